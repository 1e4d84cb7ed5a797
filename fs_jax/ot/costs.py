"""Costs between two clouds of points, as matrices that the solvers take."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _checks

_FEW = 8  # dimensions in which all differences cost no more than a matrix product that is padded to them


def cosine_cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Cosine distance between all pairs of rows.

        C_ij = max(0, 1 - ⟨x_i, y_j⟩ / (|x_i| |y_j|))

    A row of norm 0 has no direction: its cost to everything is 1 and its gradient 0. Where rounding takes the cosine
    above 1 the cost is 0; derivatives of any order are those of the cosine.

    Args:
        x: points, one per row, in any unit: the cost is dimensionless, between 0 and 2.
        y: points of the same dimension.

    Returns:
        The cost, float32 or the wider dtype of x and y.

    Raises:
        TypeError: x or y is not numeric.
        ValueError: x or y is not a matrix, or their numbers of columns differ.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(cosine_cost(x, -x))
        [[2. 1.]
         [1. 2.]]

    Source: Zhang and Wang, Defense Against Adversarial Attacks Using Feature Scattering-based Adversarial Training
    (NeurIPS 2019), section 3.2.
    """
    x, y = _checks.points(x, y)
    cosine = jnp.matmul(_unit_rows(x), _unit_rows(y).T, precision=lax.Precision.HIGHEST)
    return _not_below_zero(1 - cosine)


def sqeuclidean_cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Squared Euclidean distance between all pairs of rows.

        C_ij = |x_i - y_j|²

    In up to 8 dimensions differences are taken before they are squared, and each entry is exact to rounding, whatever
    other points there are. In more it is a matrix product, about the mean of y: the error is that of rounding
    |x_i - c|² + |y_j - c|². So padded points should lie near the others; repeat one of them, say.

    Args:
        x: points, one per row.
        y: points of the same dimension, in the same unit; the cost is in its square.

    Returns:
        The cost, float32 or the wider dtype of x and y.

    Raises:
        TypeError: x or y is not numeric.
        ValueError: x or y is not a matrix, or their numbers of columns differ.

    Example:
        >>> print(sqeuclidean_cost(jnp.array([[0.0], [1.0]]), jnp.array([[3.0]])))
        [[9.]
         [4.]]
    """
    x, y = _checks.points(x, y)
    if x.shape[1] <= _FEW:
        return jnp.sum(jnp.square(x[:, None, :] - y[None, :, :]), -1)
    # |x - y|² = |x|² + |y|² - 2⟨x, y⟩ cancels badly far from the origin, and the distance doesn't know where that is.
    centre = lax.stop_gradient(y.mean(0, keepdims=True)) if y.shape[0] else 0
    x, y = x - centre, y - centre
    inner = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    squared = jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1)[None, :] - 2 * inner
    return _not_below_zero(squared)


def euclidean_cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Euclidean distance between all pairs of rows, with gradient 0 at distance 0.

        C_ij = |x_i - y_j|

    The distance has a kink where two points meet: no gradient there, but 0 is in the subdifferential, and finite.
    Differences are taken before they are squared (O(n m d) work outside of a matrix product), so that near points
    keep their digits.

    Args:
        x: points, one per row.
        y: points of the same dimension, in the same unit, which is the cost's too.

    Returns:
        The cost, float32 or the wider dtype of x and y.

    Raises:
        TypeError: x or y is not numeric.
        ValueError: x or y is not a matrix, or their numbers of columns differ.

    Example:
        >>> print(euclidean_cost(jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.array([[3.0, 4.0]])))
        [[5.]
         [4.]]
    """
    x, y = _checks.points(x, y)
    differences = x[:, None, :] - y[None, :, :]
    # Scaled by the largest difference, so that squares neither overflow nor vanish.
    largest = lax.stop_gradient(jnp.max(jnp.abs(differences), axis=-1, initial=0))
    apart = largest != 0  # of NaN too, which should come out
    scale = jnp.where(apart, largest, 1)
    squared = jnp.sum(jnp.square(differences / scale[:, :, None]), axis=-1)
    return jnp.where(apart, scale * jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def _not_below_zero(cost):
    # What rounding took below zero comes back; derivatives are those of the formula, at its minimum too. NaN stays NaN.
    return cost + lax.stop_gradient(jnp.where(cost < 0, -cost, 0))


def _unit_rows(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    # The direction doesn't depend on the scale, so dividing by the largest entry (a constant to the derivative) changes
    # nothing, and squares then neither overflow nor vanish. Rows of zeros are divided by one instead, before any square
    # root: the gradient of a discarded branch must be finite too.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0))
    x = x / jnp.where(largest > 0, largest, 1)
    squared = jnp.sum(x * x, axis=1, keepdims=True)
    return x * jnp.where(squared > 0, lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)
