"""Sinkhorn's iterations, each in the domain where it is fast and in the one where it is safe.

With s = -C / reg and T = exp(φ_i + γ_j + s_ij), iteration k is

    γ_k = log b - LSE_i(s_ij + φ_{k-1, i})        φ_k = log a - LSE_j(s_ij + γ_{k, j})

Potentials are written as a reference (f, g) and what has come to it since: φ = f + log u, γ = g + log v. With the
matrix M_ij = s_ij + f_i + g_j both domains work on small corrections alone, and a plan is as exact as these are. The
log domain evaluates the formula above for log u and log v, with two exponentials of a matrix. The kernel domain has
K = exp(M) and needs two products of it with a vector:

    v_k = b / (Kᵀ u_{k-1})        u_k = a / (K v_k)

which is several times faster, and exact while u and v stay in range. So iterations go in short runs. Before a run the
reference takes up u and v if they have grown; after it they are looked at, and a run that left the range is repeated in
the log domain.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fs_jax.ot._batching import in_chunks
from fs_jax.ot._loops import RUN, lengths, once_if, value_if
from fs_jax.ot._numerics import MASKED, largest, log_sum_exp, product, within
from fs_jax.ot._sharding import AxisName, everywhere, maximum, minimum, somewhere, total, whole
from fs_jax.ot.problem import Points
from fs_jax.ot.result import Outcome, Status, finish, has_stalled, judged_error, rounding_floor


class Options(NamedTuple):
    """What is known when a program is compiled."""

    num_iters: int
    method: str
    fused: bool
    dtype: str  # of the result, whose plan is the one that is judged
    history: bool = False  # whether the marginal error after each run is kept
    axis_name: AxisName | None = None  # over which the rows are sharded


class State(NamedTuple):
    """Potentials as a reference and scalings, φ = f + log u and γ = g + log v.

    `kernel` is exp(s + f + g), or None where the iterations are in the log domain.
    """

    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array
    kernel: jax.Array | None


class Run(NamedTuple):
    """What the derivative needs to know of a run of at most L iterations: vectors alone.

    Attributes:
        f, g: the reference, [n] and [m].
        u: scalings of the rows before the run and after each of its iterations, [L + 1, n].
        v: scalings of the columns after each, [L, m].
        is_log: of a run in the log domain: log u and log v stand in the places of u and v.
        active: whether the iteration was done, [L]; None where all are, there being no threshold.
    """

    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array
    is_log: jax.Array
    active: jax.Array | None


class Counts(NamedTuple):
    """Within a run: iterations done, whether to stand still, and the marginal error as the cheap test has it.

    `bound` is what the error of the plan cannot exceed, where that is known without a look at it; else infinity.
    """

    done: jax.Array
    still: jax.Array
    off: jax.Array
    bound: jax.Array


class Limit(NamedTuple):
    """When to stand still within a run: a marginal error, as the cheap test has it, and a number of iterations."""

    off: jax.Array
    done: int


class Progress(NamedTuple):
    """Across runs.

    Attributes:
        done: iterations done.
        converged: the plan has been judged, and its error is at most the threshold.
        stalled: its error no longer falls.
        doubted: from here on the plan is judged after each run, and the cheap test is not believed.
        best: smallest error of a plan that was judged.
        waited: runs since then.
    """

    done: jax.Array
    converged: jax.Array
    stalled: jax.Array
    doubted: jax.Array
    best: jax.Array
    waited: jax.Array


@cache
def walk(options: Options, keep: bool):
    """The iterations as a function of (scaled, a, b, start, threshold).

    It gives the `Outcome`; and with `keep` the runs as one stack, and the last reference with its K. `start` is φ_0.
    """
    num_iters, method, _, dtype, history, axis_name = options
    run = {"log": _log_run, "kernel": _kernel_run, "stabilized": _stabilized_run}[method]

    @in_chunks
    def iterations(scaled, a, b, start, threshold):
        points = Points.of(scaled, a, b, axis_name)
        state = {"log": _start_log, "kernel": _start_kernel, "stabilized": _start_stabilized}[method](points, start)
        room = min(RUN, num_iters) if keep else None

        def error_of(points, state):
            return judged_error(finish(_plan_of(points, state), points.a)[0], a, b, dtype, axis_name)

        def step(carry, length):
            state, progress = carry
            if threshold is None:
                zero_off = jnp.zeros_like(progress, scaled.dtype)
                counts = Counts(progress, jnp.zeros_like(progress, bool), zero_off, zero_off)
                (state, counts), rows = run(points, None, room, length, state, counts)
                return (state, counts.done), (rows, error_of(points, state) if history else None)
            stopped = progress.converged | progress.stalled | (progress.done >= num_iters)
            far = jnp.full_like(progress.best, jnp.inf)
            counts = Counts(progress.done, stopped, far, far)
            # A little below a threshold that is well above rounding: then the bound says that it is met.
            near = jnp.where(threshold > 8 * _slack(points), threshold - _slack(points), threshold)
            limit = Limit(jnp.where(progress.doubted, -1, near), num_iters)
            (state, counts), rows = run(points, limit, room, length, state, counts)
            error = jnp.where(stopped, jnp.nan, error_of(points, state)) if history else None
            return (state, _judge(points, a, b, threshold, dtype, state, progress, counts, stopped)), (rows, error)

        zero = jnp.zeros_like(scaled, shape=(), dtype=jnp.int32)
        progress = zero
        if threshold is not None:
            no, far = jnp.zeros_like(zero, bool), jnp.full_like(scaled, jnp.inf, shape=())
            progress = Progress(zero, no, no, no, far, zero)
        (state, progress), (runs, errors) = lax.scan(step, (state, progress), lengths(num_iters, threshold))

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


def _judge(points, a, b, threshold, dtype, state, progress, counts, stopped):
    """What is to be done after a run: the cheap test is confirmed on the plan itself, as it would be returned.

    The test within a run compares successive scalings. It cannot see what rounding has left in the rows, nor that the
    result may have a narrower dtype. Where it fires wrongly, or is near what rounding lets it see, the iterations
    continue and the plan is judged after each run, until it is good enough or its error no longer falls. Where a bound
    of the error is known and is small enough, the plan need not be looked at: that takes as long as some iterations.
    """
    axis_name = points.axis_name
    shape, mass = whole(points.scaled.shape, axis_name), total(a.sum(), axis_name)
    unmovable = total(jnp.sum(jnp.abs(a - points.a)), axis_name) + jnp.sum(jnp.abs(b - points.b))
    sure = counts.still & ~stopped & (counts.bound + unmovable <= threshold) & (dtype == a.dtype.name)
    near_rounding = ~(counts.off > rounding_floor(shape, mass, a.dtype))
    doubted = progress.doubted | (counts.still & ~stopped) | near_rounding

    def judged(*vectors):
        plan, _ = finish(_plan_of(points, State(*vectors, None)), points.a)
        return judged_error(plan, a, b, dtype, axis_name)

    needed = doubted & ~stopped & ~sure
    error = value_if(needed, judged, jnp.full_like(progress.best, jnp.inf), *state[:4])
    converged = progress.converged | sure | (needed & (error <= threshold))
    waited = jnp.where(needed, jnp.where(error < progress.best, 0, progress.waited + 1), progress.waited)
    stalled = has_stalled(error, waited, counts.done // RUN, rounding_floor(shape, mass, dtype))
    stalled = progress.stalled | (needed & ~converged & stalled)
    return Progress(counts.done, converged, stalled, doubted, jnp.minimum(error, progress.best), waited)


# Where the iterations start


def _start_log(points, phi):
    zeros = jnp.zeros_like(points.b)
    f, g = jnp.where(points.present_a, phi, MASKED), jnp.where(points.present_b, zeros, MASKED)
    return State(f, g, jnp.ones_like(f), jnp.ones_like(g), None)


def _start_kernel(points, phi):
    f, g = jnp.zeros_like(points.a), jnp.zeros_like(points.b)
    u = jnp.where(points.present_a, jnp.exp(phi), 0)
    return State(f, g, u, jnp.ones_like(g), jnp.exp(points.scaled))


def _start_stabilized(points, phi):
    """A reference for potentials that fit nothing yet: each row's and each column's largest entry in K is one."""
    s, present_a, present_b = points.scaled, points.present_a, points.present_b
    phi = jnp.where(present_a, phi, MASKED)
    g = jnp.where(present_b, -maximum(jnp.max(s + phi[:, None], 0), points.axis_name), MASKED)
    f = jnp.where(present_a, -jnp.max(s + g[None, :], 1), MASKED)
    # A row that starts far below the others (by e⁸⁷ in float32) weighs nothing, but its scaling must not be zero.
    u = jnp.maximum(jnp.exp(phi - f), jnp.finfo(f.dtype).tiny)
    return _absorb(points, f, g)._replace(u=jnp.where(present_a, u, 0))


# Runs


def _log_run(points, limit, room, length, state, counts):
    """Iterations in the log domain, on corrections to the reference."""
    _, _, _, log_a, log_b, present_a, present_b, axis_name = points
    m = matrix(points.scaled, state.f, state.g)

    def iteration(du, _):
        dv = jnp.where(present_b, log_b - log_sum_exp(m + du[:, None], 0, axis_name), 0)
        return jnp.where(present_a, log_a - log_sum_exp(m + dv[None, :], 1), 0), dv

    def error(dv, new_dv):
        return jnp.expm1(dv - new_dv)

    pair = (jnp.where(present_a, jnp.log(state.u), 0), jnp.where(present_b, jnp.log(state.v), 0))
    (du, dv), counts, rows = _iterate(iteration, error, points.b, limit, room, length, pair, counts)
    rows = None if room is None else Run(state.f, state.g, *rows[:2], jnp.ones_like(counts.still), rows[2])
    # What has grown goes into the reference, where it is rounded; what is small stays, and is exact.
    grown = somewhere(jnp.maximum(jnp.abs(du).max(), jnp.abs(dv).max()) > 1, axis_name)
    f, g = jnp.where(present_a & grown, state.f + du, state.f), jnp.where(present_b & grown, state.g + dv, state.g)
    u, v = jnp.exp(jnp.where(grown, 0, du)), jnp.exp(jnp.where(grown, 0, dv))
    return (State(f, g, u, v, None), counts), rows


def _kernel_run(points, limit, room, length, state, counts):
    """Iterations in the kernel domain, from and to the same reference."""
    absent_a, absent_b = ((~there).astype(points.a.dtype) for there in (points.present_a, points.present_b))

    def iteration(u, _):
        new_v = points.b / (total(product("ij,i->j", state.kernel, u), points.axis_name) + absent_b)
        return points.a / (product("ij,j->i", state.kernel, new_v) + absent_a), new_v

    def error(v, new_v):
        return v / (new_v + absent_b) - 1

    pair = (state.u, state.v)
    (u, v), counts, rows = _iterate(iteration, error, points.b, limit, room, length, pair, counts)
    if limit is not None:
        counts = counts._replace(bound=_bound(points, u, v, counts.off))
    carry = (state._replace(u=u, v=v), counts)
    return carry, None if room is None else Run(state.f, state.g, *rows[:2], jnp.zeros_like(counts.still), rows[2])


def _bound(points, u, v, off):
    """What the plan's error is at most where the cheap test has it at `off`, in the kernel domain.

    The plan is made of the same K. Infinite where a scaling is so small that it has lost digits.
    """
    bits = jnp.finfo(u.dtype)
    smallest = jnp.minimum(
        jnp.min(jnp.where(points.present_a, u, jnp.inf)), jnp.min(jnp.where(points.present_b, v, jnp.inf))
    )
    # Less what rounds off in limit = threshold - slack; the slack is twice what it need be.
    bound = off + (1 - 8 * bits.eps) * _slack(points)
    return jnp.where(minimum(smallest, points.axis_name) > bits.tiny / bits.eps, bound, jnp.inf)


def _slack(points):
    """How far apart the marginal error of the test and of the plan are: the rounding of n and of m positive terms."""
    shape, mass = whole(points.scaled.shape, points.axis_name), total(points.a.sum(), points.axis_name)
    return 2 * (sum(shape) + 8) * jnp.finfo(points.a.dtype).eps * mass


def _stabilized_run(points, limit, room, length, state, counts):
    """The same, with a look at the scalings before (K absorbs those that have grown) and after (all is done again).

    K flushes its entries below 1e-38 (in float32) to zero: at most u·v times that is lost of a plan, 1e-10 where
    neither is above 2e14. How far the potentials move in an iteration never grows from one to the next, so that what
    leaves the range within a run is still outside at its end.
    """
    grown = ~everywhere(within(largest(points.scaled, 0.18), state.u, state.v), points.axis_name) & ~counts.still
    state = once_if(grown, lambda state: _absorb(points, *potentials_of(points, state)), state)
    (end, end_counts), rows = _kernel_run(points, limit, room, length, state, counts)

    def again(carry):
        state, counts, *_ = carry
        # The reference that this run leaves has grown: by what was out of range in the kernel domain.
        (new, counts), rows = _log_run(points, limit, room, length, state, counts)
        new = _absorb(points, *potentials_of(points, new))
        return new, counts, (new.u, new.v), counts, rows

    out_of_range = ~everywhere(within(largest(points.scaled, 0.37), end.u, end.v), points.axis_name)
    carry = (state, counts, (end.u, end.v), end_counts, rows)
    state, _, (u, v), counts, rows = once_if(out_of_range, again, carry)
    return (state._replace(u=u, v=v), counts), rows


def _iterate(iteration, error, b, limit, room, length, pair, counts):
    """Iterations on a pair of vectors: the pair, the counts, and the rows of a `Run`.

    A problem whose marginal error seems to be at most the limit stands still. The test costs nothing: rows are exact
    after their update, and the next update of the columns tells by how much (`error`, relative) they were off.
    """

    def one(i, carry):
        pair, counts, rows = carry
        new = iteration(*pair)
        if limit is not None:
            off = jnp.sum(b * jnp.abs(error(pair[1], new[1])))
            still = counts.still | ((counts.done > 0) & (off <= limit.off))
            idle = still | (counts.done >= limit.done)
            new = jax.tree.map(lambda x, y: jnp.where(idle, x, y), pair, new)
            counts = Counts(
                counts.done + jnp.where(idle, 0, 1), still, jnp.where(counts.still, counts.off, off), counts.bound
            )
        if rows is not None:
            u, v, active = rows
            active = None if active is None else active.at[i].set(~idle)
            rows = (u.at[i + 1].set(new[0]), v.at[i].set(new[1]), active)
        return new, counts, rows

    def all_of_them(carry):
        return lax.fori_loop(0, length, one, carry)

    rows = None
    if room is not None:
        u, v = (jnp.zeros_like(x, shape=(r, *x.shape)) for r, x in zip((room + 1, room), pair, strict=True))
        rows = (u.at[0].set(pair[0]), v, None if limit is None else jnp.zeros_like(v, bool, shape=room))
    carry = (pair, counts, rows)
    return all_of_them(carry) if limit is None else once_if(~counts.still, all_of_them, carry)


# Between reference, scalings, potentials and plan


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
    """Whether K lost entries to underflow where the plan would have more mass than rounding may take."""
    entries = jnp.exp((points.scaled + jnp.log(state.u)[:, None]) + jnp.log(state.v)[None, :])
    lost = total(jnp.sum(jnp.where(state.kernel < jnp.finfo(plan.dtype).tiny, entries, 0)), points.axis_name)
    return ~(lost <= jnp.finfo(plan.dtype).eps * total(plan.sum(), points.axis_name))
