"""What a solution says of points that it was not solved for, and the scale that a cost has by itself."""

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
    """The potential of new points, for a unit of mass each: of what a solver returned, `f - reg log a` continued.

        f(x) = -reg log Σ_j exp((g_j - c(x, y_j)) / reg)

    With it exp((f(x) + g_j - c(x, y_j)) / reg) sums to one over j. For points of the second set pass `cost.T` and `f`.

    Args:
        cost: from each new point to each point of the second set.
        g: potentials of these, as a solver returned them; points without mass have no part.
        reg: as it was solved with. (After `ipot` it is beta over `num_iters`.)

    Raises:
        TypeError, ValueError: an argument is not of the kind described.

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
    """Where the transport takes points, on average; also points that it was not solved for.

        T(x) = Σ_j p_j(x) y_j,    p_j(x) = exp((f(x) + g_j - c(x, y_j)) / reg),    Σ_j p_j(x) = 1

    At the points of the first set it is plan @ y over the row sums. Differentiable in all arguments.

    Args:
        cost: from each point to each point of the second set, [k, m].
        g: potentials of these, as a solver returned them.
        y: these points themselves, or anything that belongs to them: labels as one-hot rows, say.
        reg: as it was solved with.

    Raises:
        TypeError, ValueError: an argument is not of the kind described.

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
    """A regularisation in units of the cost's own mean or standard deviation, for features whose scale drifts.

        reg · E[C]    or    reg · (E[C²] - E[C]²)^½,    the mean over pairs of mass a_i b_j

    No gradient goes through the scale: it is a unit, not part of what is minimised. Costs that are all equal have no
    scale, and negative ones no mean to speak of: there it is refused, or NaN under jit.

    Args:
        reg: in these units.
        cost: the cost that is to be solved.
        a: mass of each row; rows without have no part. Uniform by default.
        b: mass of each column.
        to: the mean or the standard deviation.

    Raises:
        TypeError, ValueError: an argument is not of the kind described.

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
    unit = jnp.where(largest > 0, largest, 1)  # taken out of what is squared
    scale = mean if to == "mean" else unit * jnp.sqrt(jnp.sum(weights * ((cost - mean) / unit) ** 2))
    is_scale = scale > 16 * jnp.finfo(cost.dtype).eps * largest
    if not isinstance(is_scale, jax.core.Tracer) and not is_scale:
        raise ValueError(f"cost: expected costs of a positive {to}, got {float(scale):.3g}")
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
    """(g - cost) / reg, far below all else at points without mass."""
    return jnp.where(g[None, :] > MASKED / 2, (g[None, :] - cost) / reg, MASKED)
