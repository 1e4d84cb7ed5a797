"""Sinkhorn iterations in the kernel domain, where they are fast, and in the log domain, where they are safe.

With s = -C / reg and T = exp(φ_i + γ_j + s_ij), iteration k is

    γ_k = log b - LSE_i(s_ij + φ_{k-1, i})        φ_k = log a - LSE_j(s_ij + γ_{k, j})

The potentials are stored as a reference (f, g) and scalings relative to it: φ = f + log u, γ = g + log v. With the
matrix M_ij = s_ij + f_i + g_j, both domains compute only small corrections to the reference, and the plan is as
accurate as these corrections. The log domain evaluates the formulas above for log u and log v, with two exponentials of
a matrix. The kernel domain has K = exp(M) and needs two matrix-vector products:

    v_k = b / (Kᵀ u_{k-1})        u_k = a / (K v_k)

This is several times faster, and accurate while u and v stay in range. The iterations are therefore done in short runs.
Before a run, u and v are absorbed into the reference if they have grown. After it, their range is checked, and a run
that left the range is repeated in the log domain.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fs_jax.ot._batching import in_chunks
from fs_jax.ot._loops import RUN, lengths, once_if, scan_until, value_if, with_row
from fs_jax.ot._numerics import MASKED, largest, log_sum_exp, product, within
from fs_jax.ot._sharding import AxisName, global_shape, maximum, minimum, on_all_devices, on_any_device, total
from fs_jax.ot.problem import Points
from fs_jax.ot.result import Outcome, Status, finish, has_stalled, judged_error, rounding_floor


class Options(NamedTuple):
    """Static options, known at compile time."""

    num_iters: int
    method: str
    fused: bool
    dtype: str  # of the result; the marginal error is that of the plan in this dtype
    history: bool = False  # whether to record the marginal error after each run
    axis_name: AxisName | None = None  # mapped axis over which the rows are sharded


class State(NamedTuple):
    """Potentials as a reference and scalings, φ = f + log u and γ = g + log v.

    `kernel` is exp(s + f + g), or None in the log domain.
    """

    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array
    kernel: jax.Array | None


class Run(NamedTuple):
    """What the derivative needs of a run of at most L iterations: only vectors.

    Attributes:
        f, g: the reference, [n] and [m].
        u: scalings of the rows before the run and after each of its iterations, [L + 1, n].
        v: scalings of the columns after each iteration, [L, m].
        is_log: whether the run was in the log domain; then u and v hold log u and log v.
        active: whether each iteration was done, [L]; None without a threshold, since then all are.
    """

    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array
    is_log: jax.Array
    active: jax.Array | None


class Counts(NamedTuple):
    """Progress within a run.

    Attributes:
        done: iterations done.
        stopped: whether the state no longer changes.
        error: the marginal error as estimated by the cheap test.
        bound: an upper bound of the plan's marginal error if one is known without computing the plan, else infinity.
    """

    done: jax.Array
    stopped: jax.Array
    error: jax.Array
    bound: jax.Array


class Limit(NamedTuple):
    """When to stop within a run: at an estimated marginal error, or after a number of iterations in total."""

    error: jax.Array
    done: int


class Progress(NamedTuple):
    """Progress across runs.

    Attributes:
        done: iterations done.
        converged: the marginal error of the plan itself is known to be at most the threshold.
        stalled: the plan's error no longer decreases.
        check_plan: from now on the plan itself is checked after each run, and the cheap test is ignored.
        best: smallest error of the plans checked so far.
        since_best: runs since that smallest error.
    """

    done: jax.Array
    converged: jax.Array
    stalled: jax.Array
    check_plan: jax.Array
    best: jax.Array
    since_best: jax.Array


@cache
def make_iterations(options: Options, keep: bool):
    """The iterations as a function of (scaled, a, b, start, threshold), where `start` is φ_0.

    The function returns the `Outcome`. With `keep` it also returns the stacked runs, and the last reference with its K.
    """
    num_iters, method, _, dtype, history, axis_name = options
    run = {"log": _log_run, "kernel": _kernel_run, "stabilized": _stabilized_run}[method]

    @in_chunks
    def iterations(scaled, a, b, start, threshold):
        points = Points.of(scaled, a, b, axis_name)
        state = {"log": _start_log, "kernel": _start_kernel, "stabilized": _start_stabilized}[method](points, start)
        path_length = min(RUN, num_iters) if keep else None

        def error_of(points, state):
            return judged_error(finish(_plan_of(points, state), points.a)[0], a, b, dtype, axis_name)

        def is_done(carry):
            progress = carry[1]
            return progress.converged | progress.stalled | (progress.done >= num_iters)

        def step(carry, length):
            state, progress = carry
            if threshold is None:
                zero_error = jnp.zeros_like(progress, scaled.dtype)
                counts = Counts(progress, jnp.zeros_like(progress, bool), zero_error, zero_error)
                (state, counts), rows = run(points, None, path_length, length, state, counts)
                return (state, counts.done), (rows, error_of(points, state) if history else None)
            stopped = is_done(carry)
            infinity = jnp.full_like(progress.best, jnp.inf)
            counts = Counts(progress.done, stopped, infinity, infinity)
            # If the threshold is well above rounding, the cheap test aims a little below it, so that `bound` meets it.
            target = jnp.where(threshold > 8 * _slack(points), threshold - _slack(points), threshold)
            limit = Limit(jnp.where(progress.check_plan, -1, target), num_iters)
            (state, counts), rows = run(points, limit, path_length, length, state, counts)
            error = jnp.where(stopped, jnp.nan, error_of(points, state)) if history else None
            progress = _next_progress(points, a, b, threshold, dtype, state, progress, counts, stopped)
            return (state, progress), (rows, error)

        zero = jnp.zeros_like(scaled, shape=(), dtype=jnp.int32)
        progress = zero
        if threshold is not None:
            false, infinity = jnp.zeros_like(zero, bool), jnp.full_like(scaled, jnp.inf, shape=())
            progress = Progress(zero, false, false, false, infinity, zero)
        carry, of_runs = (state, progress), lengths(num_iters, threshold)
        if threshold is None or keep or history:
            (state, progress), (runs, errors) = lax.scan(step, carry, of_runs)
        else:
            state, progress = scan_until(is_done, step, carry, min(RUN, num_iters), len(of_runs))
            runs = errors = None

        plan, factor = finish(_plan_of(points, state), points.a)
        phi, gamma = potentials_of(points, state)
        phi = jnp.where(points.present_a, phi + jnp.log(factor), MASKED)
        status, accepted = jnp.full_like(zero, Status.LIMIT), jnp.ones_like(zero)
        if threshold is None:
            done = zero + num_iters
        else:
            done, status = progress.done, jnp.where(progress.stalled, Status.STALLED, status)
        if method == "kernel":
            flushed = _is_flushed(points, state, plan)
            status, accepted = jnp.where(flushed, Status.OUT_OF_RANGE, status), jnp.where(flushed, 0, accepted)
        outcome = Outcome(plan, phi, gamma, *(x.astype(scaled.dtype) for x in (done, status, accepted)), errors)
        reference = (state.kernel, state.f, state.g) if keep and method != "log" else None
        return outcome, runs, reference

    return iterations


def _next_progress(points, a, b, threshold, dtype, state, progress, counts, stopped):
    """Progress after a run: a stop by the cheap test is confirmed on the plan itself, as it would be returned.

    The cheap test within a run compares successive scalings. It sees neither the rounding errors of the row sums nor a
    narrower dtype of the result. If it stops too early, or its estimate is near the rounding floor, the iterations
    continue and the plan is checked after each run, until its error meets the threshold or no longer decreases. If a
    known upper bound of the error meets the threshold, the plan is not checked, since a check takes as long as several
    iterations.
    """
    axis_name = points.axis_name
    shape, mass = global_shape(points.scaled.shape, axis_name), total(a.sum(), axis_name)
    unmovable = total(jnp.sum(jnp.abs(a - points.a)), axis_name) + jnp.sum(jnp.abs(b - points.b))
    certain = counts.stopped & ~stopped & (counts.bound + unmovable <= threshold) & (dtype == a.dtype.name)
    near_rounding = ~(counts.error > rounding_floor(shape, mass, a.dtype))
    check_plan = progress.check_plan | (counts.stopped & ~stopped) | near_rounding

    def plan_error(*vectors):
        plan, _ = finish(_plan_of(points, State(*vectors, None)), points.a)
        return judged_error(plan, a, b, dtype, axis_name)

    needed = check_plan & ~stopped & ~certain
    error = value_if(needed, plan_error, jnp.full_like(progress.best, jnp.inf), *state[:4])
    converged = progress.converged | certain | (needed & (error <= threshold))
    since_best = jnp.where(error < progress.best, 0, progress.since_best + 1)
    since_best = jnp.where(needed, since_best, progress.since_best)
    stalled = has_stalled(error, since_best, counts.done // RUN, rounding_floor(shape, mass, dtype))
    stalled = progress.stalled | (needed & ~converged & stalled)
    return Progress(counts.done, converged, stalled, check_plan, jnp.minimum(error, progress.best), since_best)


# Initial states


def _start_log(points, phi):
    zeros = jnp.zeros_like(points.b)
    f, g = jnp.where(points.present_a, phi, MASKED), jnp.where(points.present_b, zeros, MASKED)
    return State(f, g, jnp.ones_like(f), jnp.ones_like(g), None)


def _start_kernel(points, phi):
    f, g = jnp.zeros_like(points.a), jnp.zeros_like(points.b)
    u = jnp.where(points.present_a, jnp.exp(phi), 0)
    return State(f, g, u, jnp.ones_like(g), jnp.exp(points.scaled))


def _start_stabilized(points, phi):
    """The initial reference makes the largest entry of each row and of each column of K equal to one."""
    s, present_a, present_b = points.scaled, points.present_a, points.present_b
    phi = jnp.where(present_a, phi, MASKED)
    g = jnp.where(present_b, -maximum(jnp.max(s + phi[:, None], 0), points.axis_name), MASKED)
    f = jnp.where(present_a, -jnp.max(s + g[None, :], 1), MASKED)
    # A row whose start is far below the others (by a factor e⁸⁷ in float32) has no effect on the first update, but
    # its scaling must not be zero, since its logarithm is taken.
    u = jnp.maximum(jnp.exp(phi - f), jnp.finfo(f.dtype).tiny)
    return _absorb(points, f, g)._replace(u=jnp.where(present_a, u, 0))


# Runs


def _log_run(points, limit, path_length, length, state, counts):
    """A run in the log domain, on corrections to the reference."""
    _, _, _, log_a, log_b, present_a, present_b, axis_name = points
    m = matrix(points.scaled, state.f, state.g)

    def iteration(du, _):
        dv = jnp.where(present_b, log_b - log_sum_exp(m + du[:, None], 0, axis_name), 0)
        return jnp.where(present_a, log_a - log_sum_exp(m + dv[None, :], 1), 0), dv

    def column_error(dv, new_dv):
        return jnp.expm1(dv - new_dv)

    pair = (jnp.where(present_a, jnp.log(state.u), 0), jnp.where(present_b, jnp.log(state.v), 0))
    (du, dv), counts, rows = _iterate(iteration, column_error, points.b, limit, path_length, length, pair, counts)
    rows = None if path_length is None else Run(state.f, state.g, *rows[:2], jnp.ones_like(counts.stopped), rows[2])
    # Corrections that have grown are absorbed into the reference, which rounds them; small ones are kept as they are.
    grown = on_any_device(jnp.abs(jnp.concatenate([du, dv])).max() > 1, axis_name)
    f, g = jnp.where(present_a & grown, state.f + du, state.f), jnp.where(present_b & grown, state.g + dv, state.g)
    u, v = jnp.exp(jnp.where(grown, 0, du)), jnp.exp(jnp.where(grown, 0, dv))
    return (State(f, g, u, v, None), counts), rows


def _kernel_run(points, limit, path_length, length, state, counts):
    """A run in the kernel domain, which keeps the reference."""
    absent_a, absent_b = ((~there).astype(points.a.dtype) for there in (points.present_a, points.present_b))

    def iteration(u, _):
        new_v = points.b / (total(product("ij,i->j", state.kernel, u), points.axis_name) + absent_b)
        return points.a / (product("ij,j->i", state.kernel, new_v) + absent_a), new_v

    def column_error(v, new_v):
        return v / (new_v + absent_b) - 1

    pair = (state.u, state.v)
    (u, v), counts, rows = _iterate(iteration, column_error, points.b, limit, path_length, length, pair, counts)
    if limit is not None:
        counts = counts._replace(bound=_bound(points, u, v, counts.error))
    carry = (state._replace(u=u, v=v), counts)
    if path_length is None:
        return carry, None
    return carry, Run(state.f, state.g, *rows[:2], jnp.zeros_like(counts.stopped), rows[2])


def _bound(points, u, v, error):
    """An upper bound of the plan's error in the kernel domain, from the error that the cheap test estimates.

    It holds because the plan is computed from the same K. It is infinite if a scaling is so small that it has lost
    digits.
    """
    bits = jnp.finfo(u.dtype)
    smallest = jnp.minimum(
        jnp.min(jnp.where(points.present_a, u, jnp.inf)), jnp.min(jnp.where(points.present_b, v, jnp.inf))
    )
    # Slightly less than the slack, so that the rounding of limit = threshold - slack doesn't push the bound above the
    # threshold; it remains a bound, since the slack is twice what is needed.
    bound = error + (1 - 8 * bits.eps) * _slack(points)
    return jnp.where(minimum(smallest, points.axis_name) > bits.tiny / bits.eps, bound, jnp.inf)


def _slack(points):
    """Largest difference between the marginal errors of the test and of the plan: rounding of sums of n and m terms."""
    shape, mass = global_shape(points.scaled.shape, points.axis_name), total(points.a.sum(), points.axis_name)
    return 2 * (sum(shape) + 8) * jnp.finfo(points.a.dtype).eps * mass


def _stabilized_run(points, limit, path_length, length, state, counts):
    """A kernel run that first absorbs scalings that have grown, and is repeated in the log domain if they leave range.

    K flushes entries below 1e-38 (in float32) to zero. The mass that the plan loses per entry is at most u·v times
    that, which is 4e-10 if neither is above 2e14. Only the scalings at the end of the run are checked. A scaling may
    leave the range within the run and return, but the plan is computed from the last scalings, and each iteration
    corrects errors of the one before.
    """
    grown = ~on_all_devices(within(largest(points.scaled, 0.18), state.u, state.v), points.axis_name) & ~counts.stopped
    state = once_if(grown, lambda state: _absorb(points, *potentials_of(points, state)), state)
    (end, end_counts), rows = _kernel_run(points, limit, path_length, length, state, counts)

    def redo(carry):
        state, counts, *_ = carry
        (new, counts), rows = _log_run(points, limit, path_length, length, state, counts)
        # Always changes the reference, as `once_if` asks: it absorbs what was out of range in the kernel domain.
        new = _absorb(points, *potentials_of(points, new))
        return new, counts, (new.u, new.v), counts, rows

    out_of_range = ~on_all_devices(within(largest(points.scaled, 0.37), end.u, end.v), points.axis_name)
    carry = (state, counts, (end.u, end.v), end_counts, rows)
    state, _, (u, v), counts, rows = once_if(out_of_range, redo, carry)
    return (state._replace(u=u, v=v), counts), rows


def _iterate(iteration, column_error, b, limit, path_length, length, pair, counts):
    """Iterates on a pair of vectors; returns the pair, the counts, and the arrays of a `Run`.

    A problem stops changing once its estimated marginal error is at most the limit. The estimate is almost free: row
    sums are exact after the rows' update, and the next update of the columns gives the relative error of the column
    sums (`column_error`).
    """

    def one(i, carry):
        pair, counts, rows = carry
        new = iteration(*pair)
        if limit is not None:
            error = jnp.sum(b * jnp.abs(column_error(pair[1], new[1])))
            stopped = counts.stopped | ((counts.done > 0) & (error <= limit.error))
            idle = stopped | (counts.done >= limit.done)
            new = jax.tree.map(lambda x, y: jnp.where(idle, x, y), pair, new)
            error = jnp.where(counts.stopped, counts.error, error)
            counts = Counts(counts.done + jnp.where(idle, 0, 1), stopped, error, counts.bound)
        if rows is not None:
            u, v, active = rows
            active = None if active is None else with_row(active, i, ~idle)
            rows = (with_row(u, i + 1, new[0]), with_row(v, i, new[1]), active)
        return new, counts, rows

    def iterate(carry):
        return lax.fori_loop(0, length, one, carry)

    rows = None
    if path_length is not None:
        sizes = (path_length + 1, path_length)
        u, v = (jnp.zeros_like(x, shape=(size, *x.shape)) for size, x in zip(sizes, pair, strict=True))
        rows = (with_row(u, 0, pair[0]), v, None if limit is None else jnp.zeros_like(v, bool, shape=path_length))
    carry = (pair, counts, rows)
    return iterate(carry) if limit is None else once_if(~counts.stopped, iterate, carry)


# Conversions between reference, scalings, potentials and plan


def _absorb(points, f, g):
    return State(f, g, jnp.ones_like(f), jnp.ones_like(g), jnp.exp(matrix(points.scaled, f, g)))


def potentials_of(points, state):
    phi = jnp.where(points.present_a, state.f + jnp.log(state.u), MASKED)
    return phi, jnp.where(points.present_b, state.g + jnp.log(state.v), MASKED)


def _plan_of(points, state):
    kernel = jnp.exp(matrix(points.scaled, state.f, state.g)) if state.kernel is None else state.kernel
    plan = kernel * state.u[:, None] * state.v[None, :]
    return jnp.where(points.present_a[:, None] & points.present_b[None, :], plan, 0)


def matrix(scaled, f, g):
    return (scaled + f[:, None]) + g[None, :]


def _is_flushed(points, state, plan):
    """Whether entries that underflowed, in K or in the plan's product, would have more mass than its rounding error."""
    entries = jnp.exp((points.scaled + jnp.log(state.u)[:, None]) + jnp.log(state.v)[None, :])
    is_lost = (state.kernel < jnp.finfo(plan.dtype).tiny) | (plan == 0)
    lost = total(jnp.sum(jnp.where(is_lost, entries, 0)), points.axis_name)
    return ~(lost <= jnp.finfo(plan.dtype).eps * total(plan.sum(), points.axis_name))
