"""IPOT: exact optimal transport by the inexact proximal point method (Algorithm 2), safe from over- and underflow."""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fs_jax.ot import _checks
from fs_jax.ot._batching import in_chunks
from fs_jax.ot._loops import RUN, lengths, once_if, with_row
from fs_jax.ot._numerics import MASKED, inverse, largest, log_sum_exp, normalised, product, within
from fs_jax.ot._unroll import with_transpose
from fs_jax.ot.problem import Points, make_problem
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


@_checks.suggests_names
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
    """Exact optimal transport by the inexact proximal point method.

        T_t ≈ argmin over plans T of ⟨T, C⟩ + beta·KL(T | T_{t-1}),   from T_0 = 1

    Step t does `inner_iters` Sinkhorn iterations on Q = exp(-C / beta) ∘ T_{t-1}, starting from the previous step's σ:
    δ = a / (Q σ), σ = b / (Qᵀ δ). Then T_t = diag(δ) Q diag(σ). The cost tends to that of the unregularised problem,
    however large beta is.

    The computation uses logarithms, so nothing underflows at any beta. It stores log T from step to step, as
    Algorithm 2 stores T, so rounding errors don't grow with the number of steps. With F and G the sums of log δ and of
    log σ over all steps so far, T_t = exp(F_i + G_j - t C_ij / beta): step t is a Sinkhorn iteration at regularisation
    beta / t.

    Args:
        cost: cost of moving a unit of mass from row i to column j, [n, m]. Half precision is computed in float32 and
            returned in half precision.
        a: mass of each row, 1/n by default. A weight of zero excludes the row from the problem exactly. Or a boolean
            mask: the rows that are True share a mass of one evenly.
        b: mass of each column, 1/m by default; the same total as `a`.
        beta: weight of the proximal term, in units of the cost. A small beta needs fewer steps, but each is solved less
            exactly. Start with a tenth of a typical cost. With a beta far above the costs, 50 steps change little.
        num_iters: maximum number of proximal steps (static under jit).
        inner_iters: Sinkhorn iterations in each step (static under jit).
        threshold: stop when the marginal error (L1, in units of mass) of the returned plan is at most this, and the
            last step moved at most this much mass too, since a plan with the right marginals need not be optimal.
            Checked after every ten steps and the last one. By default, all steps are done. (With a beta far above the
            costs, each step moves little mass, so the solver stops near the independent coupling.) With a threshold
            below what the dtype can reach, it stops early with `Status.STALLED`.
        grad: how to differentiate; all have first derivatives only.
            "unroll" differentiates through the iterations. It stores vectors for each step and two matrices for every
            ten (for all `num_iters` steps, even if a threshold stops the solver earlier).
            "envelope" holds plan and potentials fixed: the gradient of `primal_cost` is the plan.
            "none" gives zero gradients.
            The exact plan is a vertex, which jumps as the cost changes. With a small beta or many steps, "unroll" is
            the derivative of such a jump and can be arbitrarily large. For the gradient of the exact cost, use
            "envelope": with respect to the costs, that of `primal_cost` or `reg_cost`; with respect to the weights,
            that of `reg_cost` (for a fixed plan, `primal_cost` does not depend on the weights).

    Returns:
        A `Transport`. Its potentials and `reg_cost` are those at the regularisation of the last step, which is beta
        over the result's `num_iters`. They tend to the dual solution and to the exact cost.

    Raises:
        TypeError: if an argument is not as described.
        ValueError: if a shape or value is invalid; the message says which, and what is expected.
        NotImplementedError: if a second derivative is taken.

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
    # σ = 1 at the start, in terms of the centred cost.
    arguments = (problem.scaled, problem.a, problem.b, -problem.columns / problem.reg)
    if grad != "unroll":
        arguments = lax.stop_gradient(arguments)
    outcome = _iterations(*arguments, lax.stop_gradient(threshold), options)
    problem = problem._replace(reg=problem.reg / lax.stop_gradient(outcome.done))
    return transport(problem, outcome, threshold, options.dtype, envelope=grad == "envelope")


class Options(NamedTuple):
    """Static options, known at compile time."""

    num_iters: int
    inner_iters: int
    dtype: str  # of the result; the marginal error is that of the plan in this dtype


class State(NamedTuple):
    """State after a step: log T, log δ and log σ of this step, and the sums of both over all steps so far.

    log T is stored, as Algorithm 2 stores T, and not computed from the sums: the terms t C / beta, and so their
    rounding errors, would grow with t.
    """

    log_plan: jax.Array
    delta: jax.Array
    sigma: jax.Array
    phi: jax.Array
    gamma: jax.Array


class Run(NamedTuple):
    """What the derivative needs of a run of at most L steps.

    In step k of the run, exp(log_plan + k drift + x_i + y_j) is a matrix with the right row sums or column sums, for x
    in `rows` and y in `columns`.

    Attributes:
        before: steps done before the run.
        length: steps in the run.
        log_plan: log T before the run, [n, m].
        drift: change of log T in a step if δ and σ stayed as they are before the run, [n, m].
        rows: x of each step, for each of its inner iterations, [L, inner_iters, n].
        columns: y of each step, before and after each of its inner iterations, [L, 1 + inner_iters, m].
    """

    before: jax.Array
    length: jax.Array
    log_plan: jax.Array
    drift: jax.Array
    rows: jax.Array
    columns: jax.Array


class Progress(NamedTuple):
    """Progress across runs.

    Attributes:
        done: steps done.
        converged: the threshold is met.
        stalled: the error no longer decreases.
        moved: mass moved by the last step.
        best: smallest error so far.
        since_best: runs since that smallest error.
    """

    done: jax.Array
    converged: jax.Array
    stalled: jax.Array
    moved: jax.Array
    best: jax.Array
    since_best: jax.Array


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _iterations(scaled, a, b, start, threshold, options):
    """`Outcome` of the proximal steps. Its potentials have the steps' derivative; its plan has none."""
    return _make_iterations(options, False)(scaled, a, b, start, threshold)[0]


@_iterations.defjvp
def _derivative(options, primals, tangents):
    primals = first_order_only(primals, "ipot")
    outcome, runs = _make_iterations(options, True)(*primals)
    forward, back = (partial(f, *primals[:3], runs) for f in (_forward, _back))
    d_phi, d_gamma = with_transpose(forward, back, tangents[:4])
    return outcome, jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)


@cache
def _make_iterations(options, keep):
    """The steps: a function of (scaled, a, b, start, threshold) to the `Outcome`, and with `keep` also to the runs."""
    num_iters, inner_iters, dtype = options

    @in_chunks
    def iterations(scaled, a, b, start, threshold):
        points = Points.of(scaled, a, b)
        state = _start(points, start)
        zero = jnp.zeros_like(scaled, shape=(), dtype=jnp.int32)
        false, infinity = jnp.zeros_like(zero, bool), jnp.full_like(scaled, jnp.inf, shape=())
        progress = Progress(zero, false, false, infinity, infinity, zero)
        path_length = min(RUN, num_iters)

        def one_run(carry, length):
            def run(carry):
                state, progress, _ = carry
                new, kept = _run(points, inner_iters, path_length, length, progress.done, state)
                kept = kept._replace(length=zero + length)
                if threshold is None:
                    progress = progress._replace(done=progress.done + length)
                else:
                    progress = _next_progress(points, a, b, threshold, dtype, kept, new, progress)
                return new, progress, kept if keep else None

            carry = (*carry, _no_run(points, inner_iters, path_length) if keep else None)
            stopped = carry[1].converged | carry[1].stalled
            *carry, kept = run(carry) if threshold is None else once_if(~stopped, run, carry)
            return tuple(carry), kept

        (state, progress), runs = lax.scan(one_run, (state, progress), lengths(num_iters, None).astype(zero.dtype))
        plan, factor = _plan_of(points, state.log_plan)
        phi = jnp.where(points.present_a, state.phi, MASKED)
        gamma = jnp.where(points.present_b, state.gamma + jnp.log(factor), MASKED)
        status, accepted = jnp.full_like(infinity, Status.LIMIT), jnp.ones_like(infinity)
        if threshold is not None:
            status = jnp.where(progress.stalled, Status.STALLED, status)
            accepted = (progress.moved <= threshold).astype(infinity.dtype)
        return Outcome(plan, phi, gamma, progress.done.astype(infinity.dtype), status, accepted), runs

    return iterations


def _next_progress(points, a, b, threshold, dtype, run, state, progress):
    """Progress after a run. Both the marginal error of the plan, as it would be returned, and the mass moved count."""
    plan, _ = _plan_of(points, state.log_plan)
    k = run.length - 1
    # The step before the last. In a run of one step, it is the state before the run.
    x, y = (jnp.where(k > 0, v[k - 1, -1], 0) for v in (run.rows, run.columns))
    last, _ = _plan_of(points, _at(run, k, x, y))
    moved = jnp.sum(jnp.abs(plan - last))
    error = jnp.maximum(judged_error(plan, a, b, dtype), moved)
    since_best = jnp.where(error < progress.best, 0, progress.since_best + 1)
    converged = error <= threshold
    floor = rounding_floor(plan.shape, a.sum(), dtype)
    stalled = ~converged & has_stalled(error, since_best, progress.done // RUN, floor)
    best = jnp.minimum(error, progress.best)
    return Progress(progress.done + run.length, converged, stalled, moved, best, since_best)


def _start(points, sigma):
    """The state at T = 1, with log δ such that the largest term of each row's sum is one."""
    log_plan = jnp.where(points.present_a[:, None] & points.present_b[None, :], jnp.zeros_like(points.scaled), MASKED)
    sigma = jnp.where(points.present_b, sigma, 0)
    largest_terms = jnp.max((log_plan + points.scaled) + sigma[None, :], 1)
    zeros_a, zeros_b = jnp.zeros_like(points.a), jnp.zeros_like(points.b)
    return State(log_plan, jnp.where(points.present_a, -largest_terms, 0), sigma, zeros_a, zeros_b)


def _no_run(points, inner_iters, path_length):
    zero, matrix = jnp.zeros_like(points.scaled, shape=(), dtype=jnp.int32), jnp.zeros_like(points.scaled)
    rows = jnp.zeros_like(points.a, shape=(path_length, inner_iters, *points.a.shape))
    columns = jnp.zeros_like(points.b, shape=(path_length, 1 + inner_iters, *points.b.shape))
    return Run(zero, zero, matrix, matrix, rows, columns)


def _run(points, inner_iters, path_length, length, before, state):
    """A run of steps, which computes only the deviation of log T from log_plan + k drift.

    The drift is zero where a converged plan has mass, so little is added to log T, with little rounding error. In the
    first run the drift doesn't include the initial δ and σ: with a constant of 1e6 in a column, it would lose digits.
    """
    delta, sigma = (jnp.where(before > 0, v, 0) for v in (state.delta, state.sigma))
    drift = points.scaled + (delta[:, None] + sigma[None, :])
    run = _no_run(points, inner_iters, path_length)._replace(before=before, log_plan=state.log_plan, drift=drift)
    zeros_a, zeros_b = jnp.zeros_like(points.a), jnp.zeros_like(points.b)
    true = jnp.ones_like(zeros_a, shape=(), dtype=bool)
    start = ((zeros_a, zeros_b, state.delta - delta, state.sigma - sigma), (run.rows, run.columns), true)

    def steps(inner_iterations, start):
        def step(i, carry):
            (x, y, d_delta, d_sigma), (rows, columns), in_range = carry
            xs, ys, is_exact = inner_iterations(points, run, i + 1, inner_iters, x + d_delta, y + d_sigma)
            vectors = (xs[-1], ys[-1], xs[-1] - x, ys[-1] - y)
            return vectors, (with_row(rows, i, xs), with_row(columns, i, ys)), in_range & is_exact

        return lax.fori_loop(0, length, step, start)

    def redo(carry):
        new = steps(_by_logarithms, carry[0])
        return new, new  # changes every part of the carry, as `once_if` asks

    end = steps(_by_products, start)
    _, ((x, y, d_delta, d_sigma), (rows, columns), _) = once_if(~end[2], redo, (start, end))
    # The plan is computed from log T twice, for the stopping test and for the result. The barrier makes log T the same
    # number in both.
    log_plan = lax.optimization_barrier(_at(run, length, x, y))
    steps_done = jnp.asarray(length, delta.dtype)
    phi, gamma = (p + (steps_done * d + v) for p, d, v in ((state.phi, delta, x), (state.gamma, sigma, y)))
    new = State(log_plan, delta + d_delta, sigma + d_sigma, phi, gamma)
    return new, run._replace(rows=rows, columns=columns)


def _by_products(points, run, k, inner_iters, x, y):
    """The inner iterations of step k by matrix-vector products.

    The matrix includes the previous δ and σ, so it is nearly a plan, and the new factors are near one. The last value
    returned says whether they are in range. Then entries of the matrix below 1e-38 (in float32), which are flushed to
    zero, are negligible, as in the module `_iterations`.
    """
    _, a, b, _, _, present_a, present_b, _ = points
    absent_a, absent_b = (~present_a).astype(a.dtype), (~present_b).astype(b.dtype)
    kernel = jnp.exp(_at(run, k, x, y))

    def inner_iteration(v, _):
        u = a / (product("ij,j->i", kernel, v) + absent_a)
        v = b / (product("ij,i->j", kernel, u) + absent_b)
        return v, (u, v)

    _, (us, vs) = lax.scan(inner_iteration, jnp.ones_like(b), length=inner_iters)
    xs = jnp.where(present_a[None], x[None] + jnp.log(us), 0)
    ys = jnp.where(present_b[None], y[None] + jnp.log(vs), 0)
    is_positive = jnp.all((us > 0) | ~present_a[None]) & jnp.all((vs > 0) | ~present_b[None])
    return xs, jnp.concatenate([y[None], ys]), within(largest(kernel, 0.37), us, vs) & is_positive


def _by_logarithms(points, run, k, inner_iters, x, y):
    """The inner iterations of step k in the log domain, where the factors may be of any size."""
    _, _, _, log_a, log_b, present_a, present_b, _ = points
    zeros_a, zeros_b = jnp.zeros_like(x), jnp.zeros_like(y)

    def inner_iteration(y, _):
        x = jnp.where(present_a, log_a - log_sum_exp(_at(run, k, zeros_a, y), 1), 0)
        y = jnp.where(present_b, log_b - log_sum_exp(_at(run, k, x, zeros_b), 0), 0)
        return y, (x, y)

    _, (xs, ys) = lax.scan(inner_iteration, y, length=inner_iters)
    return xs, jnp.concatenate([y[None], ys]), jnp.ones_like(x, shape=(), dtype=bool)


def _at(run, k, x, y):
    return (run.log_plan + jnp.asarray(k, x.dtype) * run.drift) + (x[:, None] + y[None, :])


def _plan_of(points, log_plan):
    """The plan with its columns scaled to their weights, and the factor of each column."""
    present = points.present_a[:, None] & points.present_b[None, :]
    plan, factor = finish(jnp.where(present, jnp.exp(log_plan), 0).T, points.b)
    return plan.T, factor


# The derivative. With F and G the sums of log δ and log σ, step t is
#
#     F_t = log a - LSE_j(t s_ij + 2 G_{t-1} - G_{t-2})        G_t = log b - LSE_i(t s_ij + F_t)
#
# From the second inner iteration on, the step's current G replaces 2 G_{t-1} - G_{t-2}. The derivative of the logarithm
# of a sum is a weighted mean of its terms' tangents, with the weights computed from the stored runs.


@in_chunks
def _forward(scaled, a, b, runs, d_scaled, d_a, d_b, d_start):
    """Tangents of F and G."""
    points = Points.of(scaled, a, b)
    d_log_a, d_log_b = d_a * inverse(points.a), d_b * inverse(points.b)

    def forward_run(carry, run):
        def step(i, carry):
            d_phi, d_gamma, d_sigma = carry
            t = (run.before + i + 1).astype(scaled.dtype)

            def inner_iteration(j, carry):
                _, d_gamma = carry
                row_weights, column_weights = _weights(run, i, j)
                d_phi = d_log_a - jnp.sum(row_weights * (t * d_scaled + d_gamma[None, :]), 1)
                return d_phi, d_log_b - jnp.sum(column_weights * (t * d_scaled + d_phi[:, None]), 0)

            d_phi, new_d_gamma = lax.fori_loop(0, run.rows.shape[1], inner_iteration, (d_phi, d_gamma + d_sigma))
            return d_phi, new_d_gamma, new_d_gamma - d_gamma

        return lax.fori_loop(0, run.length, step, carry), None

    carry = (jnp.zeros_like(d_log_a), jnp.zeros_like(d_log_b), d_start)
    (d_phi, d_gamma, _), _ = lax.scan(forward_run, carry, runs)
    return d_phi, d_gamma


@in_chunks
def _back(scaled, a, b, runs, c_phi, c_gamma):
    """Cotangents of (scaled, a, b, start) from those of F and G: the transpose of `_forward`."""
    points = Points.of(scaled, a, b)

    def back_run(carry, run):
        def step(i, carry):
            (c_phi, c_gamma, c_sigma), totals = carry
            i = run.length - 1 - i
            t = (run.before + i + 1).astype(scaled.dtype)

            def inner_iteration(j, carry):
                (c_phi, c_gamma), (total_scaled, total_a, total_b) = carry
                row_weights, column_weights = _weights(run, i, run.rows.shape[1] - 1 - j)
                columns = column_weights * c_gamma[None, :]
                c_phi, total_b = c_phi - columns.sum(1), total_b + c_gamma
                rows = row_weights * c_phi[:, None]
                totals = (total_scaled - t * (rows + columns), total_a + c_phi, total_b)
                return (jnp.zeros_like(c_phi), -rows.sum(0)), totals

            carry = ((c_phi, c_gamma + c_sigma), totals)
            (c_phi, c_gamma), totals = lax.fori_loop(0, run.rows.shape[1], inner_iteration, carry)
            return (c_phi, c_gamma - c_sigma, c_gamma), totals

        return lax.fori_loop(0, run.length, step, carry), None

    zeros_a, zeros_b = jnp.zeros_like(points.a), jnp.zeros_like(points.b)
    carry = ((c_phi, c_gamma, zeros_b), (jnp.zeros_like(scaled), zeros_a, zeros_b))
    ((_, _, c_start), (c_scaled, c_log_a, c_log_b)), _ = lax.scan(back_run, carry, runs, reverse=True)
    return c_scaled, c_log_a * inverse(points.a), c_log_b * inverse(points.b), c_start


def _weights(run, i, j):
    """Weights of the terms of each row, and of each column, in inner iteration j of step i."""

    def plan(y):
        return jnp.exp(_at(run, i + 1, run.rows[i, j], y))

    return normalised(plan(run.columns[i, j]), 1), normalised(plan(run.columns[i, j + 1]), 0)
