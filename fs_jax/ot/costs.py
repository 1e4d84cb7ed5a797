"""Cost matrices between two point clouds."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _checks

_FEW = 8  # up to this many dimensions, taking all differences is as fast as a matrix product, which is padded


def cosine_cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Cosine distance between all pairs of rows.

        C_ij = max(0, 1 - ⟨x_i, y_j⟩ / (|x_i| |y_j|))

    A row of norm 0 has no direction: its cost to every point is 1 and its gradient is 0. If the cosine is rounded to
    above 1, the cost is 0. Derivatives of any order are those of the cosine.

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

    In up to 8 dimensions, differences are computed first and then squared, so each entry is exact to rounding and
    independent of all other points. In more dimensions it is a matrix product of points centred at c, the mean of y;
    the error is that of rounding |x_i - c|² + |y_j - c|². Place padding points near the others, for example by
    repeating one of them.

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
    # |x - y|² = |x|² + |y|² - 2⟨x, y⟩ loses digits far from the origin. Centring doesn't change the distance.
    centre = lax.stop_gradient(y.mean(0, keepdims=True)) if y.shape[0] else 0
    x, y = x - centre, y - centre
    inner = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    squared = jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1)[None, :] - 2 * inner
    return _not_below_zero(squared)


def euclidean_cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Euclidean distance between all pairs of rows, with gradient 0 at distance 0.

        C_ij = |x_i - y_j|

    The distance is not differentiable at 0; 0 is a subgradient there. Differences are computed first and then squared,
    so that distances of near points are accurate. This takes O(n m d) operations outside of a matrix product.

    Args:
        x: points, one per row.
        y: points of the same dimension, in the same unit; the cost is in that unit too.

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
    # Scaled by the largest difference, so that squares neither overflow nor underflow.
    largest = lax.stop_gradient(jnp.max(jnp.abs(differences), axis=-1, initial=0))
    distinct = largest != 0  # also of NaN, which should propagate
    scale = jnp.where(distinct, largest, 1)
    squared = jnp.sum(jnp.square(differences / scale[:, :, None]), axis=-1)
    return jnp.where(distinct, scale * jnp.sqrt(jnp.where(distinct, squared, 1)), 0)


def _not_below_zero(cost):
    # Values that rounding made negative become zero. Derivatives are those of the formula, also at its minimum. NaN
    # stays NaN.
    return cost + lax.stop_gradient(jnp.where(cost < 0, -cost, 0))


def _unit_rows(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    # The direction doesn't depend on the scale, so the row is divided by its largest entry (a constant in the
    # derivative), and squares neither overflow nor underflow. Rows of zeros are divided by one, before any square root:
    # the gradient of a discarded branch must be finite too.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0))
    x = x / jnp.where(largest > 0, largest, 1)
    squared = jnp.sum(x * x, axis=1, keepdims=True)
    return x * jnp.where(squared > 0, lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)
