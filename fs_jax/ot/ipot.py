"""IPOT: exact optimal transport by proximal points (Algorithm 2), in a form that can neither overflow nor underflow."""

import math
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fs_jax.ot import _checks
from fs_jax.ot._batching import in_chunks
from fs_jax.ot._iterations import Points
from fs_jax.ot._logspace import MASKED, log_sum_exp
from fs_jax.ot.problem import make_problem
from fs_jax.ot.result import (
    Outcome,
    Status,
    Transport,
    finish,
    first_order_only,
    has_stalled,
    judged_error,
    rounding_floor,
    transport,
)

GRADS = ("unroll", "envelope", "none")
SEGMENT = 128  # steps whose matrices are all kept for the way back


@_checks.answers_other_names
def ipot(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | Bool[Array, " n"] | None = None,
    b: Float[Array, " m"] | Bool[Array, " m"] | None = None,
    *,
    beta: float | Float[Array, ""],
    num_iters: int = 50,
    inner_iters: int = 1,
    threshold: float | Float[Array, ""] | None = None,
    grad: Literal["unroll", "envelope", "none"] = "unroll",
) -> Transport:
    """Optimal transport by inexact proximal points: each step is a Sinkhorn step from the last plan.

        T_t ≈ argmin over plans T of ⟨T, C⟩ + beta·KL(T | T_{t-1}),   from T_0 = 1

    With Q = exp(-C / beta) ∘ T_{t-1} and σ as the last step left it: δ = a / (Q σ), σ = b / (Qᵀ δ), `inner_iters`
    times, then T_t = diag(δ) Q diag(σ). Its cost tends to that of the unregularised problem, however large beta is.

    All of it is done on logarithms, so that nothing underflows at any beta; and log T itself is carried from step to
    step, as Algorithm 2 carries T, so that rounding doesn't grow with their number. With F and G the sums of log δ
    and of log σ so far, T_t = exp(F_i + G_j - t C_ij / beta): step t is a Sinkhorn iteration at reg beta / t.

    Args:
        cost: what it costs to move a unit of mass from row i to column j. Half precision is computed in float32 and
            returned in half precision.
        a: mass of each row, 1/n by default; a zero takes the row out of the problem, exactly. Or a boolean mask: the
            rows that are True share a mass of one evenly.
        b: mass of each column, 1/m by default; the same total as `a`.
        beta: weight of the proximal term, in units of the cost: small is few steps, each less exact.
        num_iters: proximal steps, at most (static under jit).
        inner_iters: Sinkhorn iterations in each (static under jit).
        threshold: stop when the marginal error (L1, in units of mass) of the plan that is returned is at most this, and
            the last step moved no more mass than this either, since a coupling alone is not yet a cheap one; by default
            all steps are done. (A beta far above the costs moves little in each step.) One below what the dtype can
            reach ends early, with `Status.STALLED`.
        grad: "unroll" differentiates the iterations, and keeps a matrix of each (of more than 128, of each segment of
            √T and each of its steps); "envelope" holds plan and potentials fixed, so that the gradient of
            `primal_cost` is the plan (first derivatives); "none" gives zeros. The exact plan is a vertex, and jumps:
            where beta is small or steps are many, "unroll" is the derivative of such a jump, of any size. For the exact
            cost's own gradient take "envelope".

    Returns:
        A `Transport`. Its potentials and `reg_cost` are those at the regularisation that the last step had reached,
        beta / num_iters; they tend to the dual solution and to the exact cost.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: a shape or value is refused; the message says which, and what was expected.
        NotImplementedError: a second derivative is taken where there is a threshold.

    Example:
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 3.0]])
        >>> print(ipot(cost, beta=1.0).plan.round(3))
        [[0.  0.5]
         [0.5 0. ]]

    Source: Xie, Wang, Wang and Zha, A Fast Proximal Point Method for Computing Exact Wasserstein Distance (UAI 2019),
    algorithm 1; Algorithm 2 of Zhang and Wang (NeurIPS 2019).
    """
    cost, a, b, dtype = _checks.problem(cost, a, b)
    beta = _checks.positive("beta", beta, cost.dtype)
    num_iters = _checks.count("num_iters", num_iters)
    inner_iters = _checks.count("inner_iters", inner_iters)
    threshold = _checks.threshold(threshold, cost.dtype)
    grad = _checks.choice("grad", grad, GRADS)
    return _solve(cost, a, b, beta, threshold, Options(num_iters, inner_iters, dtype), grad)


@partial(jax.jit, static_argnames=("options", "grad"))
def _solve(cost, a, b, beta, threshold, options, grad):
    if grad == "none":
        cost, a, b, beta = lax.stop_gradient((cost, a, b, beta))
    problem, (threshold,) = make_problem(cost, a, b, beta, threshold)
    # The centred cost starts from σ = 1 as well, in its own terms.
    arguments = (problem.scaled, problem.a, problem.b, -problem.columns / problem.reg)
    if grad != "unroll":
        arguments = lax.stop_gradient(arguments)
    outcome = _iterations(*arguments, lax.stop_gradient(threshold), options)
    problem = problem._replace(reg=problem.reg / lax.stop_gradient(outcome.done))
    return transport(problem, outcome, threshold, options.dtype, envelope=grad == "envelope")


class Options(NamedTuple):
    """What is known when a program is compiled."""

    num_iters: int
    inner_iters: int
    dtype: str  # of the result, whose plan is the one that is judged


class State(NamedTuple):
    """After a step: log T, log σ of this step, and the sums of log δ and of log σ over all steps so far.

    log T is held and not made of the sums, as Algorithm 2 holds T: terms as large as t C / beta, and their rounding,
    would grow with t.
    """

    log_plan: jax.Array
    sigma: jax.Array
    phi: jax.Array
    gamma: jax.Array


class Progress(NamedTuple):
    """Steps done, the mass that the last moved, how it ended, the smallest error so far, and steps since then."""

    done: jax.Array
    moved: jax.Array
    converged: jax.Array
    stalled: jax.Array
    best: jax.Array
    waited: jax.Array


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _iterations(scaled, a, b, start, threshold, options):
    """`Outcome` of the proximal steps; its potentials have their derivative."""
    return _walk(options)(scaled, a, b, start, threshold)


@_iterations.defjvp
def _derivative(options, primals, tangents):
    """That of the same steps as a scan, which has a reverse mode."""
    if primals[4] is not None:  # a while loop, which has no reverse mode, finds where they stop
        primals = first_order_only(primals, "ipot without a threshold has second derivatives; with one it")
    *problem, threshold = primals
    outcome = None if threshold is None else _walk(options)(*primals)
    done = None if threshold is None else outcome.done

    def potentials(scaled, a, b, start):
        state = _scan(Points.of(scaled, a, b), start, done, options)
        return (state.phi, state.gamma), state

    (_, (d_phi, d_gamma), state) = jax.jvp(potentials, tuple(problem), tuple(tangents[:4]), has_aux=True)
    if outcome is None:
        outcome = _outcome(Points.of(*problem[:3]), state, jnp.full_like(d_phi, options.num_iters, shape=()))
    return outcome, jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)


@cache
def _walk(options):
    @in_chunks
    def iterations(scaled, a, b, start, threshold):
        points = Points.of(scaled, a, b)
        first = _start(points, start)
        zero = jnp.zeros_like(scaled, shape=(), dtype=jnp.int32)
        if threshold is None:
            state = lax.fori_loop(0, options.num_iters, lambda _, s: _step(points, options.inner_iters, s), first)
            return _outcome(points, state, (zero + options.num_iters).astype(scaled.dtype))

        def unfinished(carry):
            progress = carry[2]
            return ~progress.converged & ~progress.stalled & (progress.done < options.num_iters)

        def step(carry):
            state, last, progress = carry
            state = _step(points, options.inner_iters, state)
            plan, _ = _finished(points, state)
            return state, plan, _judge(a, b, threshold, options.dtype, plan, last, progress)

        no, far = jnp.zeros_like(zero, bool), jnp.full_like(scaled, jnp.inf, shape=())
        carry = (first, _finished(points, first)[0], Progress(zero, far, no, no, far, zero))
        state, _, progress = lax.while_loop(unfinished, step, carry)
        outcome = _outcome(points, state, progress.done.astype(scaled.dtype))
        return outcome._replace(
            status=jnp.where(progress.stalled, Status.STALLED, outcome.status).astype(scaled.dtype),
            accepted=(progress.moved <= threshold).astype(scaled.dtype),
        )

    return iterations


def _judge(a, b, threshold, dtype, plan, last, progress):
    """Both the marginal error of the plan, as it would be returned, and the mass that moved are to be small."""
    moved = jnp.sum(jnp.abs(plan - last))
    error = jnp.maximum(judged_error(plan, a, b, dtype), moved)
    waited = jnp.where(error < progress.best, 0, progress.waited + 1)
    converged = error <= threshold
    stalled = ~converged & has_stalled(error, waited, progress.done, rounding_floor(plan.shape, a.sum(), dtype))
    return Progress(progress.done + 1, moved, converged, stalled, jnp.minimum(error, progress.best), waited)


def _start(points, sigma):
    there = points.there_a[:, None] & points.there_b[None, :]
    log_plan = jnp.where(there, jnp.zeros_like(points.scaled), MASKED)
    zeros_a, zeros_b = jnp.zeros_like(points.a), jnp.zeros_like(points.b)
    return State(log_plan, jnp.where(points.there_b, sigma, 0), zeros_a, zeros_b)


def _step(points, inner_iters, state):
    """One proximal step."""
    _, _, _, log_a, log_b, there_a, there_b = points
    matrix, sigma = state.log_plan + points.scaled, state.sigma
    for _ in range(inner_iters):
        delta = jnp.where(there_a, log_a - log_sum_exp(matrix + sigma[None, :], 1), 0)
        sigma = jnp.where(there_b, log_b - log_sum_exp(matrix + delta[:, None], 0), 0)
    log_plan = matrix + (delta[:, None] + sigma[None, :])
    return State(log_plan, sigma, state.phi + delta, state.gamma + sigma)


def _scan(points, start, done, options):
    """The same steps with a reverse mode: it keeps a matrix of each step, of many steps those of every √T-th."""
    step = jax.checkpoint(partial(_step, points, options.inner_iters))

    def one(state, t):
        new = step(state)
        if done is not None:
            new = jax.tree.map(lambda x, y: jnp.where(t < done, x, y), new, state)
        return new, None

    def several(state, ts):
        return lax.scan(one, state, ts)

    steps = jnp.arange(options.num_iters)
    state = _start(points, start)
    if options.num_iters <= SEGMENT:
        return several(state, steps)[0]
    length = math.isqrt(options.num_iters)
    whole = options.num_iters // length * length
    state, _ = lax.scan(jax.checkpoint(several), state, steps[:whole].reshape(-1, length))
    return several(state, steps[whole:])[0]


def _finished(points, state):
    """The plan, with half a step more on its columns, and what that changed them by."""
    there = points.there_a[:, None] & points.there_b[None, :]
    plan, factor = finish(jnp.where(there, jnp.exp(state.log_plan), 0).T, points.b)
    return plan.T, factor


def _outcome(points, state, done):
    plan, factor = _finished(points, state)
    phi = jnp.where(points.there_a, state.phi, MASKED)
    gamma = jnp.where(points.there_b, state.gamma + jnp.log(factor), MASKED)
    return Outcome(plan, phi, gamma, done, jnp.full_like(done, Status.LIMIT), jnp.ones_like(done))
