"""What a solver returns, and how it is made from a plan and scaled potentials.

Inside, potentials are divided by the regularisation: plan = exp(φ_i + γ_j + s_ij) with s = -cost / reg. A point of
marginal zero has no finite potential; `MASKED` stands for it.
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

_SECOND = 'sinkhorn with grad="implicit" has second derivatives; with grad="{}" it'
UNROLL, ENVELOPE = _SECOND.format("unroll"), _SECOND.format("envelope")


class Status(enum.IntEnum):
    """What `Transport.status` means; the field itself is an integer array, so that it can come out of `jit`."""

    CONVERGED = 0  # the marginal error of the returned plan is at most the threshold
    LIMIT = 1  # no verdict: no threshold was given, or all iterations were done before it was met
    NOT_FINITE = 2  # NaN or infinity in the result: it is not a solution of anything
    STALLED = 3  # rounding is all that is left of the error, and it is above the threshold
    OUT_OF_RANGE = 4  # method="kernel" alone: exp(-cost / reg) underflowed where the plan has mass


class Transport(NamedTuple):
    """The result of a solver: a plan, its costs, and the evidence to judge them by.

    Attributes:
        plan: mass moved from each point to each, [n, m]: exp((f_i + g_j - cost_ij) / reg).
        primal_cost: ⟨plan, cost⟩, the paper's OT-distance.
        reg_cost: with the entropic term, reg·KL(plan | a bᵀ), at these potentials (ott-jax's `reg_ot_cost`).
        f: potential of each row in units of the cost, [n]; a large negative number where a is zero.
        g: potential of each column, [m].
        marginal_error: |plan 1 - a|₁ + |planᵀ 1 - b|₁ of this very plan, in units of mass. It is rounded up: the
            dtype's rounding of the sums is part of it, so that the plan is at least this good. (Of a plan in half
            precision it is float32.)
        num_iters: iterations done.
        status: a `Status` as an integer: 0 CONVERGED, with marginal_error <= threshold; 1 LIMIT, which is no verdict:
            no threshold was given, or all iterations were done before it was met; 2 NOT_FINITE; 3 STALLED;
            4 OUT_OF_RANGE.
        errors: with `history`, the marginal error every ten iterations, NaN once stopped; else None.
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
    """Where the iterations ended.

    Attributes:
        plan: the plan, [n, m]; only its value (`live_plan` gives it a derivative).
        phi: scaled potentials of the centred cost, [n].
        gamma: the same of the columns, [m].
        done: iterations done. A floating number, since a derivative rule has no tangent for integers that vary over
            mesh axes.
        status: what it is where the threshold is not met, as a floating number.
        accepted: 1 where a plan that meets the threshold is a solution; 0 where the solver asks for more, and has not
            got it.
        errors: of the plans after each run, if asked for.
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
    """The plan, with the derivative of exp(φ_i + γ_j + s_ij).

    The iterations have the plan as a product of small factors; exponents as large as φ, γ and s would round it again.
    """
    return plan


@live_plan.defjvp
def _derivative(primals, tangents):
    plan = live_plan(*primals)  # by itself, for derivatives of any order
    _, d_scaled, d_phi, d_gamma = tangents
    return plan, plan * (d_scaled + d_phi[:, None] + d_gamma[None, :])


def finish(plan, a):
    """Half an iteration more, on the plan itself: its rows are brought to their sums, which rounding had left.

    Returns the plan, and the factor of each row.
    """
    rows = plan.sum(1)
    factor = jnp.where(rows > 0, a / jnp.where(rows > 0, rows, 1), 1)
    return plan * factor[:, None], factor


def marginal_error(plan, a, b, axis_name=None):
    """|plan 1 - a|₁ + |planᵀ 1 - b|₁, rounded up by what this computation may be off."""
    wide = plan.astype(a.dtype)
    error = _sharding.total(_distance(wide, a, 1), axis_name) + _distance(wide, b, 0, axis_name)
    eps = jnp.finfo(a.dtype).eps
    # |x| sums to within (n + m) eps of itself. A compiler may compute the plan again for this, rounded otherwise than
    # the one that it stores: an eps of each entry, once for the rows and once for the columns.
    points = sum(_sharding.whole(plan.shape, axis_name))
    return error * (1 + points * eps) + 2 * eps * lax.stop_gradient(_sharding.total(a.sum(), axis_name))


def judged_error(plan, a, b, dtype, axis_name=None):
    """The marginal error of a plan as it will be returned, for iterations that decide whether to stop.

    The result is computed by another program; two units in the last place keep its rounding from changing the verdict.
    """
    error, mass = marginal_error(plan.astype(dtype), a, b, axis_name), _sharding.total(a.sum(), axis_name)
    return error + 2 * jnp.finfo(a.dtype).eps * mass


def rounding_floor(shape, mass, dtype):
    """An error that rounding alone may leave in the plan: some units in the last place, more of more points."""
    return (8 + math.sqrt(sum(shape))) * float(jnp.finfo(dtype).eps) * mass


def has_stalled(error, waited, looks, floor):
    """Whether an error no longer falls, after `looks` of which the last `waited` had no record.

    Errors that rounding makes are new at each look: a record is rare then, and rarer the longer it goes. Above the
    floor convergence may be slow, but it is convergence. What is not a number stays so.
    """
    return ((error <= floor) & (waited > 20 + looks // 2)) | jnp.isnan(error)


def _distance(plan, weights, axis, axis_name=None):
    """Σ |Σ plan - weights|, the inner sums free of rounding but for the last place of the weights.

    Adding and subtracting σ, twice the sum, rounds an entry to a multiple of σ's last place. Of these multiples all
    partial sums are exact, in any order; what was rounded off is a 1e-7th of the mass, and so is the error of its sum
    to that.
    """
    sigma = lax.stop_gradient(2 * _sharding.total(plan.sum(axis, keepdims=True), axis_name))
    head = (plan + sigma) - sigma
    heads = _sharding.total(head.sum(axis), axis_name)
    return jnp.sum(jnp.abs((heads - weights) + _sharding.total((plan - head).sum(axis), axis_name)))


def transport(
    problem: Problem, outcome: Outcome, threshold, dtype, *, gauge=0, envelope: bool = False, axis_name=None
) -> Transport:
    """The result at an outcome: the only place where costs and a status are made.

    `dtype` is that of the result, whose plan is the one that is judged; `gauge` is a constant, in units of the cost,
    that moves from g to f; `envelope` holds plan and potentials fixed; over the axis `axis_name` rows are sharded.
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
    plan, primal_cost, reg_cost, f, g = (narrowed(x, dtype) for x in (plan, primal_cost, reg_cost, f, g))
    error = marginal_error(plan, problem.a, problem.b, axis_name)

    done, status = (lax.stop_gradient(x).astype(jnp.int32) for x in (outcome.done, outcome.status))
    finite = jnp.isfinite(error) & jnp.isfinite(primal_cost) & jnp.isfinite(reg_cost)
    finite &= _sharding.everywhere(jnp.all(jnp.isfinite(f)), axis_name) & jnp.all(jnp.isfinite(g))
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
    """The same in the caller's dtype; below the lowest number of it (`MASKED` in float16) is that number."""
    return x if x.dtype == dtype else jnp.maximum(x, float(jnp.finfo(dtype).min)).astype(dtype)


def _costs(problem, fixed_plan, plan, phi, gamma, axis_name):
    """⟨T, C⟩ of the fixed plan, and the regularised cost at the potentials, of which `plan` is a function."""
    _, a, b, reg, rows, columns = problem
    total = partial(_sharding.total, axis_name=axis_name)
    # The dual objective, for it is exact to second order where the potentials are not quite converged.
    dual = total(_pair(a, phi)) + _pair(b, gamma) + total(a.sum()) * b.sum() - total(plan.sum())
    return total(jnp.sum(fixed_plan * problem.cost)), reg * dual + total(jnp.sum(a * rows)) + jnp.sum(b * columns)


def _pair(weights, potential):
    """Σ w (φ - log w) over the points that have mass."""
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
    """The arguments of a derivative rule; but an error where a derivative of the rule is asked for.

    The rule holds fixed what depends on them: without this a second derivative would be a wrong number.
    """
    return arguments


@first_order_only.defjvp
def _no_second_order(what, primals, tangents):
    raise NotImplementedError(f"{what} has first derivatives only")
