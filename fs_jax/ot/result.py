"""The result of a solver, and how it is computed from a plan and scaled potentials.

The iterations scale potentials by the regularisation: plan = exp(φ_i + γ_j + s_ij) with s = -cost / reg. The potential
of a point without mass is -infinity; it is represented by `MASKED`.
"""

import enum
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Bool, Float, Int

from fs_jax.ot import _sharding
from fs_jax.ot._numerics import MASKED, log_weights
from fs_jax.ot.problem import Problem

_SECOND = 'grad="implicit" of sinkhorn and unbalanced_sinkhorn has second derivatives; grad="{}"'
UNROLL, ENVELOPE = _SECOND.format("unroll"), _SECOND.format("envelope")


class Status(enum.IntEnum):
    """The meaning of `Transport.status`, which is an integer array so that `jit` can return it.

    In an `Unbalanced`, the duality gap takes the place of the marginal error.
    """

    CONVERGED = 0  # the marginal error of the returned plan is at most the threshold
    LIMIT = 1  # no threshold was given, or num_iters was reached before the threshold was met
    NOT_FINITE = 2  # NaN or infinity in the result
    STALLED = 3  # the error is rounding error only, and still above the threshold
    OUT_OF_RANGE = 4  # only method="kernel": exp(-cost / reg) underflowed where the plan has mass


class Transport(NamedTuple):
    """The result of a solver: a plan, its costs, its error and a status.

    Attributes:
        plan: mass moved from row i to column j, [n, m]: exp((f_i + g_j - cost_ij) / reg).
        primal_cost: ⟨plan, cost⟩, the paper's OT-distance.
        reg_cost: the cost with the entropic term, ⟨plan, cost⟩ + reg·KL(plan | a bᵀ), computed as the dual objective at
            the potentials (ott-jax's `reg_ot_cost`). Its rounding error is a few units in the last place of the cost,
            or of reg times the mass if this is larger.
        f: potential of each row in units of the cost, [n]; a large negative number where a is zero.
        g: potential of each column, [m]; likewise.
        marginal_error: |plan 1 - a|₁ + |planᵀ 1 - b|₁ of the returned plan, in units of mass. It is rounded up by the
            rounding error of its sums, so the plan is never worse than it says. (float32 for plans in half precision.)
        num_iters: number of iterations done.
        status: a `Status` as an integer: 0 CONVERGED, marginal_error <= threshold; 1 LIMIT, no threshold was given, or
            the maximum number of iterations was reached first; 2 NOT_FINITE; 3 STALLED; 4 OUT_OF_RANGE.
        errors: with `history`, the marginal error after each run of at most ten iterations, NaN after the solver has
            stopped: ⌈num_iters / 10⌉ numbers, and one more with a threshold. Otherwise None.
    """

    plan: Float[Array, "n m"]
    primal_cost: Float[Array, ""]
    reg_cost: Float[Array, ""]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    marginal_error: Float[Array, ""]
    num_iters: Int[Array, ""]
    status: Int[Array, ""]
    errors: Float[Array, " k"] | None = None

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether `status` is CONVERGED."""
        return self.status == Status.CONVERGED


export.register_namedtuple_serialization(Transport, serialized_name="fs_jax.ot.Transport")


class Outcome(NamedTuple):
    """The result of the iterations.

    Attributes:
        plan: the plan, [n, m], without a derivative (`live_plan` adds it).
        phi: scaled potentials of the rows for the centred cost, [n].
        gamma: scaled potentials of the columns, [m].
        done: iterations done, as a floating number: a derivative rule has no tangent for integers that vary over mesh
            axes.
        status: the status if the threshold is not met, as a floating number.
        accepted: 1 if a plan that meets the threshold counts as converged; 0 if the solver has another condition that
            is not met.
        errors: marginal errors after each run, or None.
    """

    plan: jax.Array
    phi: jax.Array
    gamma: jax.Array
    done: jax.Array
    status: jax.Array
    accepted: jax.Array
    errors: jax.Array | None = None


@jax.custom_jvp
def live_plan(plan, scaled, phi, gamma):
    """The given plan, with the derivative of exp(φ_i + γ_j + s_ij).

    The iterations compute the plan as a product of small corrections. Computing it from φ, γ and s instead would add
    the rounding errors of large exponents.
    """
    return plan


@live_plan.defjvp
def _derivative(primals, tangents):
    plan = live_plan(*primals)  # calls itself, so that derivatives of any order are right
    _, d_scaled, d_phi, d_gamma = tangents
    return plan, plan * (d_scaled + d_phi[:, None] + d_gamma[None, :])


def finish(plan, a):
    """Scales the plan's rows to their weights: half an iteration on the plan itself, which removes rounding errors.

    Returns the plan and the factor of each row.
    """
    rows = plan.sum(1)
    factor = jnp.where(rows > 0, a / jnp.where(rows > 0, rows, 1), 1)
    return plan * factor[:, None], factor


def marginal_error(plan, a, b, axis_name=None):
    """|plan 1 - a|₁ + |planᵀ 1 - b|₁, rounded up by the error of this computation."""
    wide = plan.astype(a.dtype)
    error = _sharding.total(_distance(wide, a, 1), axis_name) + _distance(wide, b, 0, axis_name)
    eps = jnp.finfo(a.dtype).eps
    # The sum of n + m absolute values has a relative error of at most (n + m) eps. A compiler may also recompute the
    # plan for this, with other rounding than in the plan that it stores: an eps of each entry, once in the row sums and
    # once in the column sums.
    points = sum(_sharding.global_shape(plan.shape, axis_name))
    return error * (1 + points * eps) + 2 * eps * lax.stop_gradient(_sharding.total(a.sum(), axis_name))


def judged_error(plan, a, b, dtype, axis_name=None):
    """The marginal error of a plan as it will be returned, for the decision whether to stop.

    The result's error is computed by another program. Two units in the last place are added here, so that different
    rounding there can't put it above the threshold.
    """
    error, mass = marginal_error(plan.astype(dtype), a, b, axis_name), _sharding.total(a.sum(), axis_name)
    return error + 2 * jnp.finfo(a.dtype).eps * mass


def rounding_floor(shape, mass, dtype):
    """A marginal error that can be due to rounding alone: 8 + √(n + m) units in the last place of the mass."""
    return (8 + math.sqrt(sum(shape))) * float(jnp.finfo(dtype).eps) * mass


def has_stalled(error, since_best, num_checks, floor):
    """Whether the error no longer decreases, after `num_checks` checks of which the last `since_best` set no new best.

    Rounding errors vary randomly from check to check. A new best is then rare, and becomes rarer with the number of
    checks. An error above the floor never counts as stalled, since convergence may just be slow. NaN always counts as
    stalled.
    """
    return ((error <= floor) & (since_best > 20 + num_checks // 2)) | jnp.isnan(error)


def _distance(plan, weights, axis, axis_name=None):
    """Σ |Σ plan - weights|, where the inner sums are exact up to the last place of the weights.

    With σ twice the sum, adding and subtracting σ rounds an entry to a multiple of the last place of σ. All partial
    sums of these multiples are exact, in any order. The remainders are about 1e-7 of the mass, and their sum has a
    relative error of about 1e-7 again.
    """
    sigma = lax.stop_gradient(2 * _sharding.total(plan.sum(axis, keepdims=True), axis_name))
    head = (plan + sigma) - sigma
    heads = _sharding.total(head.sum(axis), axis_name)
    return jnp.sum(jnp.abs((heads - weights) + _sharding.total((plan - head).sum(axis), axis_name)))


def transport(
    problem: Problem, outcome: Outcome, threshold, dtype, *, gauge=0, envelope: bool = False, axis_name=None
) -> Transport:
    """The `Transport` of an outcome: the only place that computes costs and a status.

    The marginal error is that of the plan in `dtype`, the result's. `gauge` is a constant, in units of the cost, that
    moves from g to f. `envelope` holds plan and potentials fixed. Rows are sharded over `axis_name`, if given.
    """
    values = jax.tree.map(lax.stop_gradient, outcome) if envelope else outcome
    plan = lax.stop_gradient(outcome.plan)
    if envelope:
        primal_cost, reg_cost = _envelope_costs(problem, Outcome(plan, *values[1:]), axis_name)
    else:
        plan = live_plan(plan, problem.scaled, values.phi, values.gamma)
        primal_cost, reg_cost = _costs(problem, plan, plan, values.phi, values.gamma, axis_name)

    f = jnp.where(problem.a != 0, problem.reg * values.phi + (problem.rows + gauge), MASKED)
    g = jnp.where(problem.b != 0, problem.reg * values.gamma + (problem.columns - gauge), MASKED)
    if envelope:
        f, g = lax.stop_gradient((f, g))
    plan, primal_cost, reg_cost, f, g = (narrowed(x, dtype) for x in (plan, primal_cost, reg_cost, f, g))
    error = marginal_error(plan, problem.a, problem.b, axis_name)

    done, status = (lax.stop_gradient(x).astype(jnp.int32) for x in (outcome.done, outcome.status))
    finite = jnp.isfinite(error) & jnp.isfinite(primal_cost) & jnp.isfinite(reg_cost)
    finite &= _sharding.on_all_devices(jnp.all(jnp.isfinite(f)), axis_name) & jnp.all(jnp.isfinite(g))
    status = jnp.where(finite, status, Status.NOT_FINITE)
    if threshold is not None:
        status = jnp.where(threshold >= 0, status, Status.NOT_FINITE)
        met = finite & (outcome.accepted > 0) & (error <= threshold)
        status = jnp.where(met, Status.CONVERGED, status)
    errors = lax.stop_gradient(outcome.errors)
    copies = (primal_cost, reg_cost, g, error, done, status.astype(jnp.int32), errors)
    primal_cost, reg_cost, g, error, done, status, errors = _sharding.replicated(copies, axis_name)
    return Transport(plan, primal_cost, reg_cost, f, g, error, done, status, errors)


def narrowed(x, dtype):
    """Converts x to the caller's dtype. Numbers below its range (`MASKED` in float16) become its lowest number."""
    return x if x.dtype == dtype else jnp.maximum(x, float(jnp.finfo(dtype).min)).astype(dtype)


def _costs(problem, fixed_plan, plan, phi, gamma, axis_name):
    """⟨T, C⟩ of the fixed plan, and the regularised cost at the potentials; `plan` is a function of the potentials."""
    _, a, b, reg, rows, columns = problem
    total = partial(_sharding.total, axis_name=axis_name)
    # The dual objective, since its error is of second order in that of the potentials.
    dual = total(_pair(a, phi)) + _pair(b, gamma) + total(a.sum()) * b.sum() - total(plan.sum())
    return total(jnp.sum(fixed_plan * problem.cost)), reg * dual + total(jnp.sum(a * rows)) + jnp.sum(b * columns)


def _pair(weights, potential):
    """Σ w (φ - log w) over points with mass."""
    return jnp.sum(jnp.where(weights != 0, weights * (potential - log_weights(weights)), 0))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _envelope_costs(problem, outcome, axis_name):
    plan, phi, gamma, *_ = outcome
    return _costs(problem, plan, live_plan(plan, problem.scaled, phi, gamma), phi, gamma, axis_name)


@_envelope_costs.defjvp
def _envelope_derivative(axis_name, primals, tangents):
    problem, (plan, phi, gamma, *_) = primals

    def at_fixed_potentials(problem):
        return _costs(problem, plan, live_plan(plan, problem.scaled, phi, gamma), phi, gamma, axis_name)

    return jax.jvp(at_fixed_potentials, (first_order_only(problem, ENVELOPE),), (tangents[0],))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def first_order_only(arguments, what: str):
    """The arguments of a derivative rule, with an error if the rule itself is differentiated.

    The rule treats values that depend on its arguments as constants, so a second derivative would silently be wrong.
    """
    return arguments


@first_order_only.defjvp
def _no_second_order(what, primals, tangents):
    raise NotImplementedError(f"{what} has first derivatives only")
