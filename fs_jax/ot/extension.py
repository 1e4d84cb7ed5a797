"""Potentials and maps at new points, and a regularisation relative to the scale of the cost."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fs_jax.ot import _checks
from fs_jax.ot._numerics import MASKED, log_sum_exp, result_type


def potential_at(
    cost: Float[Array, "k m"], g: Float[Array, " m"], *, reg: float | Float[Array, ""]
) -> Float[Array, " k"]:
    """The potential at new points of the first set, each with a unit of mass.

        f(x) = -reg log Σ_j exp((g_j - c(x, y_j)) / reg)

    With it, exp((f(x) + g_j - c(x, y_j)) / reg) sums to one over j. At the points of the first set it is the solver's
    `f - reg log a`. For new points of the second set, pass `cost.T` and `f`.

    Args:
        cost: cost from each new point to each point of the second set, [k, m].
        g: potentials of the second set, from a solver's result. Points without mass are ignored.
        reg: the `reg` that the solver was called with. (For `ipot`, pass beta over the result's `num_iters`.)

    Returns:
        The potential of each new point in units of the cost, [k].

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from fs_jax.ot import potential_at, sinkhorn
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> result = sinkhorn(cost, reg=0.5)
        >>> bool(jnp.allclose(potential_at(cost, result.g, reg=0.5), result.f - 0.5 * jnp.log(0.5), atol=1e-5))
        True

    Source: Pooladian and Niles-Weed, Entropic estimation of optimal transport maps (2021).
    """
    cost, g, reg = _extended(cost, g, reg)
    return -reg * log_sum_exp(_exponents(cost, g, reg), 1)


def barycentric_map(
    cost: Float[Array, "k m"], g: Float[Array, " m"], y: Float[Array, "m d"], *, reg: float | Float[Array, ""]
) -> Float[Array, "k d"]:
    """Barycentric projection of the plan: the mean target of each point. The points may be new ones.

        T(x) = Σ_j p_j(x) y_j,    p_j(x) = exp((f(x) + g_j - c(x, y_j)) / reg),    Σ_j p_j(x) = 1

    At the points of the first set, it is plan @ y divided by the row sums. It is differentiable in all arguments.

    Args:
        cost: cost from each point to each point of the second set, [k, m].
        g: potentials of the second set, from a solver's result.
        y: the points of the second set, or other values to average, such as one-hot labels, [m, d].
        reg: the `reg` that the solver was called with.

    Returns:
        The mean target of each point, [k, d].

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from fs_jax.ot import barycentric_map, sinkhorn, sqeuclidean_cost
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[10.0], [11.0]])
        >>> g = sinkhorn(sqeuclidean_cost(x, y), reg=0.1).g
        >>> new = jnp.array([[0.2]])
        >>> float(barycentric_map(sqeuclidean_cost(new, y), g, y, reg=0.1)[0, 0].round(2))
        10.0

    Source: Seguy et al. (ICLR 2018); at new points Pooladian and Niles-Weed (2021).
    """
    cost, g, reg = _extended(cost, g, reg)
    y = jnp.asarray(y)
    if y.ndim != 2 or len(y) != len(g):
        raise ValueError(f"y: expected one row per column of cost, [{len(g)}, d]; got shape {y.shape}")
    exponents = _exponents(cost, g, reg)
    weights = jnp.exp(exponents - log_sum_exp(exponents, 1)[:, None])
    return jnp.matmul(weights, y.astype(weights.dtype), precision=lax.Precision.HIGHEST)


def relative_reg(
    reg: float | Float[Array, ""],
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | Bool[Array, " n"] | None = None,
    b: Float[Array, " m"] | Bool[Array, " m"] | None = None,
    *,
    to: Literal["mean", "std"] = "mean",
) -> Float[Array, ""]:
    """A regularisation relative to the cost's mean or standard deviation, for features whose scale drifts.

        reg · E[C]    or    reg · (E[C²] - E[C]²)^½,    where E weights the pair (i, j) by a_i b_j

    No gradient flows through the scale, since it is a unit and not part of the objective.

    Args:
        reg: the regularisation, as a multiple of the scale.
        cost: the cost matrix to be solved, [n, m].
        a: mass of each row, uniform by default. Rows without mass are ignored.
        b: mass of each column, uniform by default.
        to: the scale: the mean or the standard deviation.

    Returns:
        The regularisation in units of the cost. NaN under jit if the scale is not positive.

    Raises:
        TypeError: if an argument is not as described.
        ValueError: if an argument is not as described, or the scale is not positive: a mean of negative costs, or the
            standard deviation of costs that are all equal.

    Example:
        >>> from fs_jax.ot import relative_reg, sinkhorn
        >>> cost = jnp.array([[0.0, 200.0], [300.0, 100.0]])
        >>> float(relative_reg(0.05, cost))
        7.5
        >>> result = sinkhorn(cost, reg=relative_reg(0.05, cost))
    """
    cost, a, b, _ = _checks.problem(cost, a, b)
    reg = _checks.positive("reg", reg, cost.dtype)
    to = _checks.choice("to", to, ("mean", "std"))
    weights = lax.stop_gradient(a[:, None] * b[None, :] / (a.sum() * b.sum()))
    cost = lax.stop_gradient(jnp.where(weights > 0, cost, 0))
    mean, largest = jnp.sum(weights * cost), jnp.max(jnp.abs(cost))
    unit = jnp.where(largest > 0, largest, 1)  # divided out before squaring
    scale = mean if to == "mean" else unit * jnp.sqrt(jnp.sum(weights * ((cost - mean) / unit) ** 2))
    is_scale = scale > 16 * jnp.finfo(cost.dtype).eps * largest
    if not isinstance(is_scale, jax.core.Tracer) and not is_scale:
        raise ValueError(f"cost: expected a positive {to}, got {float(scale):.3g}")
    return reg * jnp.where(is_scale, scale, jnp.nan)


def _extended(cost, g, reg):
    if jnp.ndim(cost) != 2:
        raise ValueError(f"cost: expected one matrix of shape [k, m], got shape {jnp.shape(cost)}")
    if jnp.shape(g) != (jnp.shape(cost)[1],):
        raise ValueError(
            "g: expected the potentials of the columns of cost, [k, m]; "
            f"got shape {jnp.shape(g)} for a cost of shape {jnp.shape(cost)}"
        )
    cost, g = jnp.asarray(cost), jnp.asarray(g)
    cost = cost.astype(result_type(cost, jnp.float32))
    return cost, g.astype(cost.dtype), _checks.positive("reg", reg, cost.dtype)


def _exponents(cost, g, reg):
    """(g - cost) / reg, or `MASKED` at points without mass."""
    return jnp.where(g[None, :] > MASKED / 2, (g[None, :] - cost) / reg, MASKED)
