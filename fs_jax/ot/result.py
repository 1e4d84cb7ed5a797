"""What a solver returns, and how it is made from a plan and scaled potentials.

Inside, potentials are divided by the regularisation: plan = exp(φ_i + γ_j + s_ij) with s = -cost / reg. A point of
marginal zero has no finite potential; `MASKED` stands for it.
"""

import enum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fs_jax.ot._logspace import MASKED, log_weights
from fs_jax.ot.problem import Problem


class Status(enum.IntEnum):
    """What `Transport.status` means; the field itself is an integer array, so that it can come out of `jit`."""

    CONVERGED = 0  # the marginal error of the returned plan is at most the threshold
    LIMIT = 1  # all iterations were done; without a threshold that is all that can be said
    NOT_FINITE = 2  # NaN or infinity in the result: it is not a solution of anything
    STALLED = 3  # the threshold is below what the dtype can reach: the error no longer falls
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
        status: a `Status` as an integer: 0 CONVERGED, which is to say marginal_error <= threshold; 1 LIMIT (also of
            all that is finite, where no threshold was given); 2 NOT_FINITE; 3 STALLED; 4 OUT_OF_RANGE.
    """

    plan: Float[Array, "n m"]
    primal_cost: Float[Array, ""]
    reg_cost: Float[Array, ""]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    marginal_error: Float[Array, ""]
    num_iters: Int[Array, ""]
    status: Int[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether `status` is CONVERGED."""
        return self.status == Status.CONVERGED


class Outcome(NamedTuple):
    """Where the iterations ended.

    Attributes:
        plan: the plan, [n, m]; only its value (`live_plan` gives it a derivative).
        phi: scaled potentials of the centred cost, [n].
        gamma: the same of the columns, [m].
        done: iterations done. A floating number, since a derivative rule has no tangent for integers that vary over
            mesh axes.
        flag: what the iterations themselves know: `Status.LIMIT`, `STALLED` or `OUT_OF_RANGE`, as a floating number.
    """

    plan: jax.Array
    phi: jax.Array
    gamma: jax.Array
    done: jax.Array
    flag: jax.Array


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


def marginal_error(plan, a, b):
    """|plan 1 - a|₁ + |planᵀ 1 - b|₁, rounded up by all that this computation, and a sum in any order, may be off."""
    wide = plan.astype(a.dtype)
    error = _distance(wide, a, 1) + _distance(wide, b, 0)
    eps = jnp.finfo(a.dtype).eps
    # |x| sums to within (n + m) eps of itself; eps of the mass is what a plan may be off that was never stored.
    return error * (1 + sum(plan.shape) * eps) + eps * lax.stop_gradient(a.sum())


def _distance(plan, weights, axis):
    """Σ |Σ plan - weights|, the inner sums free of rounding but for the last place of the weights.

    Adding and subtracting σ, twice the sum, rounds an entry to a multiple of σ's last place. Of these multiples all
    partial sums are exact, in any order; what was rounded off is a 1e-7th of the mass, and so is the error of its sum
    to that.
    """
    sigma = lax.stop_gradient(2 * plan.sum(axis, keepdims=True))
    head = (plan + sigma) - sigma
    return jnp.sum(jnp.abs((head.sum(axis) - weights) + (plan - head).sum(axis)))


def transport(problem: Problem, outcome: Outcome, threshold, dtype, *, envelope: bool = False) -> Transport:
    """The result at an outcome: the only place where costs and a status are made.

    `dtype` is that of the result, whose plan is the one that is judged; `envelope` holds plan and potentials fixed.
    """
    values = jax.tree.map(lax.stop_gradient, outcome) if envelope else outcome
    plan = lax.stop_gradient(outcome.plan)
    if envelope:
        primal_cost, reg_cost = _envelope_costs(problem, Outcome(plan, *values[1:]))
    else:
        plan = live_plan(plan, problem.scaled, values.phi, values.gamma)
        primal_cost, reg_cost = _costs(problem, plan, plan, values.phi, values.gamma)

    f = jnp.where(problem.a != 0, problem.reg * values.phi + problem.rows, MASKED)
    g = jnp.where(problem.b != 0, problem.reg * values.gamma + problem.columns, MASKED)
    plan, primal_cost, reg_cost, f, g = (_narrowed(x, dtype) for x in (plan, primal_cost, reg_cost, f, g))
    error = marginal_error(plan, problem.a, problem.b)

    done, flag = (lax.stop_gradient(x).astype(jnp.int32) for x in (outcome.done, outcome.flag))
    finite = jnp.isfinite(error) & jnp.isfinite(primal_cost) & jnp.isfinite(reg_cost)
    finite &= jnp.all(jnp.isfinite(f)) & jnp.all(jnp.isfinite(g))
    status = jnp.where(finite, flag, Status.NOT_FINITE)
    if threshold is not None:
        met = finite & (flag != Status.OUT_OF_RANGE) & (error <= threshold)
        status = jnp.where(met, Status.CONVERGED, status)
    return Transport(plan, primal_cost, reg_cost, f, g, error, done, status.astype(jnp.int32))


def _narrowed(x, dtype):
    """The same in the caller's dtype; below the lowest number of it (`MASKED` in float16) is that number."""
    return x if x.dtype == dtype else jnp.maximum(x, jnp.finfo(dtype).min).astype(dtype)


def _costs(problem, fixed_plan, plan, phi, gamma):
    """⟨T, C⟩ of the fixed plan, and the regularised cost at the potentials, of which `plan` is a function."""
    _, a, b, reg, rows, columns = problem
    # The dual objective, for it is exact to second order where the potentials are not quite converged.
    dual = _pair(a, phi) + _pair(b, gamma) + a.sum() * b.sum() - plan.sum()
    return jnp.sum(fixed_plan * problem.cost), reg * dual + a @ rows + b @ columns


def _pair(weights, potential):
    """Σ w (φ - log w) over the points that have mass."""
    return jnp.sum(jnp.where(weights != 0, weights * (potential - log_weights(weights)), 0))


@jax.custom_jvp
def _envelope_costs(problem, outcome):
    plan, phi, gamma, *_ = outcome
    return _costs(problem, plan, live_plan(plan, problem.scaled, phi, gamma), phi, gamma)


@_envelope_costs.defjvp
def _envelope_derivative(primals, tangents):
    problem, (plan, phi, gamma, *_) = primals

    def at_fixed_potentials(problem):
        return _costs(problem, plan, live_plan(plan, problem.scaled, phi, gamma), phi, gamma)

    return jax.jvp(at_fixed_potentials, (first_order_only(problem, "envelope"),), (tangents[0],))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def first_order_only(arguments, grad: str):
    """The arguments of a derivative rule; but an error where a derivative of the rule is asked for.

    The rule holds fixed what depends on them: without this a second derivative would be a wrong number.
    """
    return arguments


@first_order_only.defjvp
def _no_second_order(grad, primals, tangents):
    raise NotImplementedError(
        f'grad="{grad}" has first derivatives only, forward and reverse; for second ones differentiate grad="implicit"'
    )
