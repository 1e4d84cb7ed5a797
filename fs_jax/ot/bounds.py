"""Certificates: a plan that is feasible but for rounding, and bounds between which the exact cost lies."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fs_jax.ot import _checks
from fs_jax.ot._numerics import inverse
from fs_jax.ot.result import Transport


class Bounds(NamedTuple):
    """Between what the exact, unregularised cost lies.

    Attributes:
        lower: the dual objective of feasible potentials: no plan is cheaper.
        upper: the cost of `plan`: a plan as cheap as this there is.
        plan: a feasible plan.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    plan: Float[Array, "n m"]


def round_to_feasible(plan: Float[Array, "n m"], a: Float[Array, " n"], b: Float[Array, " m"]) -> Float[Array, "n m"]:
    """The plan, moved to marginals a and b: by at most twice its marginal error, in L1.

    Rows, then columns, that have too much are scaled down; what is missing then is added as a product of the two
    remainders. Nothing becomes negative.

    Args:
        plan: a plan without negative entries, such as a solver's that stopped early.
        a: mass of each row.
        b: mass of each column; the same total.

    Raises:
        TypeError, ValueError: an argument is not of the kind described.

    Example:
        >>> from fs_jax.ot import round_to_feasible
        >>> a = jnp.array([0.5, 0.5])
        >>> print(round_to_feasible(jnp.array([[0.6, 0.0], [0.0, 0.4]]), a, a))
        [[0.5 0. ]
         [0.  0.5]]

    Source: Altschuler, Weed and Rigollet (NeurIPS 2017), algorithm 2.
    """
    plan, a, b, _ = _checks.problem(plan, a, b)
    plan = _of_one_mass(plan, a, b)
    plan = plan * jnp.minimum(1, a * inverse(plan.sum(1)))[:, None]
    plan = plan * jnp.minimum(1, b * inverse(plan.sum(0)))[None, :]
    rows, columns = jnp.maximum(0, a - plan.sum(1)), jnp.maximum(0, b - plan.sum(0))
    return plan + rows[:, None] * columns[None, :] * inverse(rows.sum())


def bounds(
    cost: Float[Array, "n m"],
    result: Transport,
    a: Float[Array, " n"] | Bool[Array, " n"] | None = None,
    b: Float[Array, " m"] | Bool[Array, " m"] | None = None,
) -> Bounds:
    """What any result, of whatever regularisation and however early it stopped, proves of the exact cost.

        Σ_i a_i f_i + Σ_j b_j min_i (C_ij - f_i)  <=  min over plans T of ⟨T, C⟩  <=  ⟨T', C⟩

    with T' the result's plan moved to the marginals, and f its potentials: those of rows with mass, each brought to
    the largest value that is feasible.

    Args:
        cost: the cost that was solved.
        result: what `sinkhorn` or `ipot` returned.
        a: the marginals that it was solved with; of others it is the bounds of another problem.
        b: as well.

    Returns:
        `Bounds`, true up to rounding: some units in the last place of the costs, in float32 at least. NaN where the
        masses differ and could not be looked at, under jit.

    Raises:
        TypeError, ValueError: an argument is not of the kind described.

    Example:
        >>> from fs_jax.ot import bounds, ipot
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 3.0]])
        >>> lower, upper, _ = bounds(cost, ipot(cost, beta=1.0, num_iters=100))
        >>> bool(lower <= 1.0 <= upper + 1e-6), float((upper - lower).round(2))
        (True, 0.0)
    """
    cost, a, b, _ = _checks.problem(cost, a, b)
    if result.plan.shape != cost.shape:
        raise ValueError(f"result: expected that of a cost of shape {cost.shape}; got a plan {result.plan.shape}")
    plan = round_to_feasible(result.plan.astype(cost.dtype), a, b)
    rows, columns = (a > 0)[:, None], (b > 0)[None, :]
    large = jnp.finfo(cost.dtype).max / 4
    # Feasible, and as large as can be, on both sides in turn.
    g = jnp.min(jnp.where(rows, cost - result.f.astype(cost.dtype)[:, None], large), 0)
    f = jnp.min(jnp.where(columns, cost - g[None, :], large), 1)
    lower = jnp.sum(jnp.where(a > 0, a * f, 0)) + jnp.sum(jnp.where(b > 0, b * g, 0))
    lower = _of_one_mass(lower, a, b)
    return Bounds(lower, jnp.sum(plan * jnp.where(rows & columns, cost, 0)), plan)


def _of_one_mass(value, a, b):
    """The value; NaN where the masses differ, of which there is no plan."""
    differ = jnp.abs(a.sum() - b.sum()) > 1e-3 * jnp.maximum(a.sum(), b.sum())
    return jnp.where(differ, jnp.nan, value)
