"""Certificates: a plan that is feasible up to rounding, and bounds of the exact cost."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Bool, Float

from fs_jax.ot import _checks
from fs_jax.ot._numerics import inverse
from fs_jax.ot.result import Transport


class Bounds(NamedTuple):
    """Lower and upper bound of the exact, unregularised cost.

    Attributes:
        lower: the dual objective at feasible potentials. No plan is cheaper.
        upper: the cost of `plan`.
        plan: a feasible plan.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    plan: Float[Array, "n m"]


export.register_namedtuple_serialization(Bounds, serialized_name="fs_jax.ot.Bounds")


def round_to_feasible(plan: Float[Array, "n m"], a: Float[Array, " n"], b: Float[Array, " m"]) -> Float[Array, "n m"]:
    """Rounds a plan to the marginals a and b. It changes by at most twice its marginal error, in L1.

    Rows with too much mass are scaled down, then columns. The missing mass is added as the outer product of what the
    rows and the columns lack, so no entry becomes negative.

    Args:
        plan: a plan without negative entries, such as the result of a solver that stopped early.
        a: mass of each row.
        b: mass of each column; the same total.

    Returns:
        The rounded plan, [n, m].

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from fs_jax.ot import round_to_feasible
        >>> a = jnp.array([0.5, 0.5])
        >>> print(round_to_feasible(jnp.array([[0.6, 0.0], [0.0, 0.4]]), a, a))
        [[0.5 0. ]
         [0.  0.5]]

    Source: Altschuler, Weed and Rigollet (NeurIPS 2017), algorithm 2.
    """
    tolerance = _tolerance(a, b)
    plan, a, b, _ = _checks.problem(plan, a, b, name="plan")
    return _rounded(_nan_if_masses_differ(plan, a, b, tolerance), a, b)


def _rounded(plan, a, b):
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
    """Bounds of the exact cost from any result, whatever its regularisation and however early it stopped.

        Σ_i a_i f_i + Σ_j b_j min_i (C_ij - f_i)  <=  min over plans T of ⟨T, C⟩  <=  ⟨T', C⟩

    Here T' is the result's plan rounded to the marginals (`round_to_feasible`). The potentials f are the result's, for
    rows with mass, each raised to the largest feasible value.

    Args:
        cost: the cost matrix of the problem, [n, m].
        result: the result of `sinkhorn` or `ipot`.
        a: mass of each row, as passed to the solver.
        b: mass of each column, as passed to the solver.

    Returns:
        `Bounds`. They hold up to rounding: a few units in the last place of the costs, in float32 or wider. They are
        NaN if the total masses differ but could not be checked, under jit.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from fs_jax.ot import bounds, ipot
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 3.0]])
        >>> lower, upper, _ = bounds(cost, ipot(cost, beta=1.0, num_iters=100))
        >>> bool(lower <= 1.0 <= upper + 1e-6), float((upper - lower).round(2))
        (True, 0.0)
    """
    tolerance = _tolerance(a, b)
    cost, a, b, _ = _checks.problem(cost, a, b)
    if not isinstance(result, Transport):
        raise TypeError(f"result: expected a Transport, of a problem whose marginals hold; got {type(result).__name__}")
    if result.plan.shape != cost.shape:
        raise ValueError(
            f"result: expected a plan of the cost's shape, {cost.shape}, got {result.plan.shape}; pass the cost that "
            "was solved"
        )
    plan = _rounded(_nan_if_masses_differ(result.plan.astype(cost.dtype), a, b, tolerance), a, b)
    rows, columns = (a > 0)[:, None], (b > 0)[None, :]
    large = jnp.finfo(cost.dtype).max / 4
    # Feasible potentials: for each side in turn, the largest that the other side's potentials allow.
    g = jnp.min(jnp.where(rows, cost - result.f.astype(cost.dtype)[:, None], large), 0)
    f = jnp.min(jnp.where(columns, cost - g[None, :], large), 1)
    lower = jnp.sum(jnp.where(a > 0, a * f, 0)) + jnp.sum(jnp.where(b > 0, b * g, 0))
    lower = _nan_if_masses_differ(lower, a, b, tolerance)
    return Bounds(lower, jnp.sum(plan * jnp.where(rows & columns, cost, 0)), plan)


def _tolerance(*weights):
    return _checks.mass_tolerance(*(getattr(each, "dtype", None) for each in weights))


def _nan_if_masses_differ(value, a, b, tolerance):
    """The value, or NaN if the total masses differ, since no plan is feasible then."""
    differ = jnp.abs(a.sum() - b.sum()) > tolerance * jnp.maximum(a.sum(), b.sum())
    return jnp.where(differ, jnp.nan, value)
