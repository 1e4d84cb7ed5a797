"""Sinkhorn's iterations and their derivative, each in the domain where it is fast and in the one where it is safe.

Everything here works on logarithms of scalings: with s = -C / reg and T = exp(φ_i + γ_j + s_ij), iteration k is

    γ_k = log b - LSE_i(s_ij + φ_{k-1, i})        φ_k = log a - LSE_j(s_ij + γ_{k, j})

The log domain evaluates that as it stands, with two exponentials of a matrix. The kernel domain writes the potentials
as φ = f + log u, γ = g + log v, with a reference (f, g) absorbed in the matrix K = exp(f_i + g_j + s_ij), and needs two
products of K with a vector:

    v_k = b / (Kᵀ u_{k-1})        u_k = a / (K v_k)

which is several times faster, and exact while u and v stay in range. So iterations go in short runs. Before a run K
takes up u and v if they have grown; after it they are looked at, and a run that left the range is repeated in the log
domain. The way back goes through the same runs, with the same K.

Work that is seldom needed stands in a loop that runs once or never (`_once_if`) where a `cond` might be expected: under
`vmap` a `cond` costs both of its branches, such a loop nothing when no problem of the batch needs it.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from fs_jax.ot.batching import in_chunks
from fs_jax.ot.logspace import MASKED, log_sum_exp

RUN = 10  # iterations between two looks at the scalings


class Run(NamedTuple):
    """What the derivative needs to know of a run of at most L iterations: vectors alone.

    Attributes:
        f, g: the reference, [n] and [m].
        u: scalings of the rows before the run and after each of its iterations, [L + 1, n].
        v: scalings of the columns after each, [L, m].
        is_log: of a run in the log domain, which has no reference: φ and γ stand in the places of u and v.
        active: whether the iteration was done, [L]; None where all are, there being no threshold.
    """

    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array
    is_log: jax.Array
    active: jax.Array | None


def rounded(scaled):
    """The matrix rounded by one bit, which no compiler may skip.

    Where -cost / reg is part of a fusion its own rounding is skipped, and K on the way back is then not K on the way
    there: they differ by the rounding of exponents of hundreds.
    """
    bits = jnp.finfo(scaled.dtype)
    return lax.reduce_precision(scaled, bits.nexp, bits.nmant - 1)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def potentials(scaled, log_a, log_b, start, threshold, num_iters, method):
    """Scaled potentials (φ, γ) after the iterations, how many were done, and whether the threshold was met.

    Args:
        scaled: -cost / reg, [n, m], as `rounded` makes it.
        log_a: log of the rows' weights, `MASKED` where there is no mass.
        log_b: the same of the columns.
        start: φ_0.
        threshold: marginal error (L1) at which to stop, or None.
        num_iters: iterations, at most.
        method: "kernel", "log" or "stabilized".
    """
    return _walk(num_iters, method, False)(scaled, log_a, log_b, start, threshold)[0]


@potentials.defjvp
def _derivative(num_iters, method, primals, tangents):
    """Linear in the tangents, and written out in both directions: forward along the path, and back.

    `custom_linear_solve` is JAX's way to say that two functions are each other's transpose. Its matrix must be square,
    so the tangents of `scaled` and of `start` come out again, for nobody.
    """
    result, runs, kernel = _walk(num_iters, method, True)(*primals)
    *problem, runs, kernel = _first_order_only((*primals[:3], runs, kernel))
    vectors, unravel = ravel_pytree(tuple(tangents[1:4]))

    def forward(_, tangents):
        d_scaled, vectors = tangents
        d_potentials = _forward(*problem, runs, num_iters, d_scaled, *unravel(vectors))
        return d_scaled, ravel_pytree(d_potentials)[0]

    def back(_, cotangents):
        c_scaled, vectors = cotangents
        c_scaled, *c_vectors = _back(num_iters, method)(*problem, runs, kernel, c_scaled, *unravel(vectors))
        return c_scaled, ravel_pytree(tuple(c_vectors))[0]

    # JAX asks that all of the right side be differentiated or nothing: behind the barrier, all of it is.
    right = lax.optimization_barrier((tangents[0], vectors))
    _, vectors = lax.custom_linear_solve(lambda x: x, right, forward, back)
    d_phi, d_gamma, _ = unravel(vectors)
    not_differentiable = (np.zeros(jnp.shape(x), jax.dtypes.float0) for x in result[2:])
    return result, (d_phi, d_gamma, *not_differentiable)


@jax.custom_jvp
def _first_order_only(residuals):
    return residuals


@_first_order_only.defjvp
def _no_second_order(primals, tangents):
    raise NotImplementedError(
        'grad="unroll" has first derivatives only, forward and reverse; for second ones differentiate grad="implicit"'
    )


# The way there


class _Kernel(NamedTuple):
    """Potentials as a reference, absorbed in K, and scalings: φ = f + log u, γ = g + log v."""

    k: jax.Array
    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array


@cache
def _walk(num_iters, method, keep):
    """The iterations: the result of `potentials`; and with `keep` the runs as one stack, and the last K."""
    run = {"log": _log_run, "kernel": _kernel_run, "stabilized": _stabilized_run}[method]

    @in_chunks
    def walk(scaled, log_a, log_b, start, threshold):
        if method == "log":
            state = (start, jnp.zeros_like(log_b))
        elif method == "kernel":
            state = _absorb(scaled, jnp.zeros_like(log_a), jnp.zeros_like(log_b))._replace(u=jnp.exp(start))
        else:
            state = _absorb_start(scaled, log_a, log_b, start)
        room = min(RUN, num_iters) if keep else None

        def step(carry, length):
            return run(scaled, log_a, log_b, threshold, room, length, *carry)

        counts = (jnp.int32(0), jnp.bool_(False))
        (state, (done, converged)), runs = lax.scan(step, (state, counts), _lengths(num_iters))
        done = jnp.int32(num_iters) if threshold is None else done
        kernel = (state.k, state.f, state.g) if keep and method != "log" else None
        return (*_potentials_of(state, log_a, log_b), done, converged), runs, kernel

    return walk


def _lengths(num_iters):
    """Of the runs: the last may be shorter."""
    return jnp.minimum(RUN, num_iters - jnp.arange(0, num_iters, RUN))


def _log_run(scaled, log_a, log_b, threshold, room, length, state, counts):
    """Iterations in the log domain."""

    def iteration(phi, _):
        new_gamma = jnp.where(_present(log_b), log_b - log_sum_exp(scaled + phi[:, None], 0), MASKED)
        return jnp.where(_present(log_a), log_a - log_sum_exp(scaled + new_gamma[None, :], 1), MASKED), new_gamma

    def error(gamma, new_gamma):
        return jnp.expm1(jnp.where(_present(log_b), gamma - new_gamma, 0))

    state, counts, run = _iterate(iteration, error, log_b, threshold, room, length, state, counts)
    if room is None:
        return (state, counts), None
    return (state, counts), Run(jnp.zeros_like(log_a), jnp.zeros_like(log_b), *run[:2], jnp.bool_(True), run[2])


def _kernel_run(scaled, log_a, log_b, threshold, room, length, state, counts):
    """Iterations in the kernel domain, from and to the same reference."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    absent_a, absent_b = (jnp.where(_present(w), 0, 1).astype(w.dtype) for w in (log_a, log_b))

    def iteration(u, _):
        new_v = b / (_product("ij,i->j", state.k, u) + absent_b)
        return a / (_product("ij,j->i", state.k, new_v) + absent_a), new_v

    def error(v, new_v):
        return v / (new_v + absent_b) - 1

    (u, v), counts, run = _iterate(iteration, error, log_b, threshold, room, length, (state.u, state.v), counts)
    carry = (state._replace(u=u, v=v), counts)
    return carry, None if room is None else Run(state.f, state.g, *run[:2], jnp.bool_(False), run[2])


def _stabilized_run(scaled, log_a, log_b, threshold, room, length, state, counts):
    """The same, with a look at the scalings before (K absorbs those that have grown) and after (all is done again).

    K flushes its entries below 1e-38 (in float32) to zero: at most u·v times that is lost of a plan, 1e-10 where
    neither is above 2e14. How far the potentials move in an iteration never grows from one to the next, so that what
    leaves the range within a run is still outside at its end.
    """

    def absorb(state):
        return _absorb(scaled, *_potentials_of(state, log_a, log_b))

    grown = jnp.maximum(state.u.max(), state.v.max()) > _limit(scaled, 0.18)
    state = _once_if(grown, absorb, state)
    (end, end_counts), run = _kernel_run(scaled, log_a, log_b, threshold, room, length, state, counts)

    def again(carry):
        state, counts, *_ = carry
        start = _potentials_of(state, log_a, log_b)
        (potentials, counts), run = _log_run(scaled, log_a, log_b, threshold, room, length, start, counts)
        state = _absorb(scaled, *potentials)
        return state, counts, (state.u, state.v), counts, run

    out_of_range = ~(jnp.maximum(end.u.max(), end.v.max()) <= _limit(scaled, 0.37))
    carry = (state, counts, (end.u, end.v), end_counts, run)
    state, _, (u, v), counts, run = _once_if(out_of_range, again, carry)
    return (state._replace(u=u, v=v), counts), run


def _iterate(iteration, error, log_b, threshold, room, length, pair, counts):
    """Iterations on a pair of vectors: the pair, the counts (done, converged), and the rows of a `Run`.

    A problem whose marginal error is at most the threshold stands still. The test costs nothing: rows are exact after
    their update, and the next update of the columns tells by how much (`error`, relative) they were off.
    """

    def one(i, carry):
        pair, (done, converged), rows = carry
        new = iteration(*pair)
        if threshold is not None:
            off = jnp.sum(jnp.exp(log_b) * jnp.abs(error(pair[1], new[1])))
            converged |= (done > 0) & (off <= threshold)
            new = jax.tree.map(lambda x, y: jnp.where(converged, x, y), pair, new)
            done += ~converged
        if rows is not None:
            u, v, active = rows
            active = None if active is None else active.at[i].set(~converged)
            rows = (u.at[i + 1].set(new[0]), v.at[i].set(new[1]), active)
        return new, (done, converged), rows

    def all_of_them(carry):
        return lax.fori_loop(0, length, one, carry)

    rows = None
    if room is not None:
        u, v = (jnp.zeros((r, *x.shape), x.dtype) for r, x in zip((room + 1, room), pair, strict=True))
        rows = (u.at[0].set(pair[0]), v, None if threshold is None else jnp.zeros(room, bool))
    carry = (pair, counts, rows)
    return all_of_them(carry) if threshold is None else _once_if(~counts[1], all_of_them, carry)


def _once_if(condition, function, carry):
    """`function(carry)` if the condition holds, else `carry`: a loop that runs once or never.

    The function should start from what it is given, and from that alone: XLA moves work that doesn't depend on what a
    loop carries out of the loop, where it would always be done.
    """
    loop = (condition, carry)
    return lax.while_loop(lambda loop: loop[0], lambda loop: (jnp.bool_(False), function(loop[1])), loop)[1]


def _absorb_start(scaled, log_a, log_b, phi):
    """A reference for potentials that fit nothing yet: each row's and each column's largest entry in K is one."""
    g = jnp.where(_present(log_b), -jnp.max(scaled + phi[:, None], 0), MASKED)
    f = jnp.where(_present(log_a), -jnp.max(scaled + g[None, :], 1), MASKED)
    # A row that starts far below the others (by e⁸⁷ in float32) weighs nothing, but its scaling must not be zero.
    u = jnp.maximum(jnp.exp(phi - f), jnp.finfo(f.dtype).tiny)
    return _absorb(scaled, f, g)._replace(u=jnp.where(_present(log_a), u, 0))


def _absorb(scaled, f, g):
    return _Kernel(_plan(scaled, f, g), f, g, jnp.ones_like(f), jnp.ones_like(g))


def _potentials_of(state, log_a, log_b):
    if not isinstance(state, _Kernel):
        return state
    phi = jnp.where(_present(log_a), state.f + jnp.log(state.u), MASKED)
    return phi, jnp.where(_present(log_b), state.g + jnp.log(state.v), MASKED)


# The derivative along the path


def _forward(scaled, log_a, log_b, runs, num_iters, d_scaled, d_log_a, d_log_b, d_start):
    """Tangents of the potentials: each sum over a row or column becomes the mean of its terms' tangents."""

    def over(carry, at):
        run, length = at
        phi_of_each, gamma_of_each = _potentials_along(run, log_a, log_b)

        def iteration(i, carry):
            d_phi, _ = carry
            columns = _normalised(_plan(scaled, phi_of_each[i], gamma_of_each[i]), 0)
            rows = _normalised(_plan(scaled, phi_of_each[i + 1], gamma_of_each[i]), 1)
            new_d_gamma = d_log_b - jnp.sum(columns * (d_scaled + d_phi[:, None]), 0)
            new_d_phi = d_log_a - jnp.sum(rows * (d_scaled + new_d_gamma[None, :]), 1)
            return _where_active(run, i, (new_d_phi, new_d_gamma), carry)

        return lax.fori_loop(0, length, iteration, carry), None

    carry, _ = lax.scan(over, (d_start, jnp.zeros_like(d_log_b)), (runs, _lengths(num_iters)))
    return *carry, d_start


@cache
def _back(num_iters, method):
    """Cotangents of (scaled, log a, log b, start) from those of the potentials: the transpose of `_forward`.

    With x = u φ̄ / a and y = v γ̄ / b, an iteration is passed backwards by

        γ̄ ← γ̄ - v ∘ Kᵀ x        φ̄ ← -u_{k-1} ∘ K y        γ̄ ← 0

    and takes K ∘ (x vᵀ + u_{k-1} yᵀ) from the cotangent of `scaled`: terms of a matrix product, done once per run.
    """
    step = {"log": _back_log, "kernel": _back_kernel, "stabilized": _back_stabilized}[method]

    @in_chunks
    def back(scaled, log_a, log_b, runs, kernel, c_scaled, c_phi, c_gamma, c_start):
        def over(carry, at):
            one = partial(step, scaled, log_a, log_b, *at)
            is_active = at[0].active
            return one(carry) if is_active is None else _once_if(is_active[0], one, carry), None

        totals = (jnp.zeros_like(log_a), jnp.zeros_like(log_b))
        carry = (((c_phi, c_gamma), totals), c_scaled, kernel)
        carry, _ = lax.scan(over, carry, (runs, _lengths(num_iters)), reverse=True)
        ((c_phi, _), (c_log_a, c_log_b)), c_scaled, _ = carry
        return c_scaled, c_log_a, c_log_b, c_start + c_phi

    return back


def _back_stabilized(scaled, log_a, log_b, run, length, carry):
    cotangents, c_scaled, (k, f, g) = carry
    # The last reference stays, where it is that of this run too, or where the run has none.
    new_f, new_g = jnp.where(run.is_log, f, run.f), jnp.where(run.is_log, g, run.g)
    moved = jnp.any(new_f != f) | jnp.any(new_g != g)
    kernel = _once_if(moved, lambda kernel: (_plan(scaled, *kernel[1:]), run.f, run.g), (k, new_f, new_g))
    carry = _back_kernel(scaled, log_a, log_b, run, length, (cotangents, c_scaled, kernel))
    return _once_if(run.is_log, partial(_back_log, scaled, log_a, log_b, run, length), carry)


def _back_kernel(scaled, log_a, log_b, run, length, carry):
    """Through a run in the kernel domain; one in the log domain is left as it is."""
    cotangents, c_scaled, kernel = carry
    inverse_a, inverse_b = (jnp.where(run.is_log, 0, _inverse(w)) for w in (log_a, log_b))

    def iteration(i, carry):
        i = length - 1 - i
        ((c_phi, c_gamma), (total_a, total_b)), (xs, ys) = carry
        x = run.u[i + 1] * c_phi * inverse_a
        c_gamma = c_gamma - run.v[i] * _product("ij,i->j", kernel[0], x)
        y = run.v[i] * c_gamma * inverse_b
        new_c_phi = -run.u[i] * _product("ij,j->i", kernel[0], y)
        new = ((new_c_phi, jnp.zeros_like(c_gamma)), (total_a + c_phi, total_b + c_gamma))
        new, x, y = _where_active(run, i, (new, x, y), (carry[0], jnp.zeros_like(x), jnp.zeros_like(y)))
        return new, (xs.at[i].set(x), ys.at[i].set(y))

    xs, ys = jnp.zeros_like(run.u[1:]), jnp.zeros_like(run.v)
    new, (xs, ys) = lax.fori_loop(0, length, iteration, (cotangents, (xs, ys)))
    new = jax.tree.map(lambda x, y: jnp.where(run.is_log, x, y), cotangents, new)
    left, right = jnp.concatenate([xs, run.u[:-1]]), jnp.concatenate([run.v, ys])
    left = lax.optimization_barrier(left.T)  # XLA's product of thin matrices is half as fast along columns
    return new, c_scaled - kernel[0] * _product("it,tj->ij", left, right), kernel


def _back_log(scaled, log_a, log_b, run, length, carry):
    """Through a run in the log domain."""
    phi_of_each, gamma_of_each = _potentials_along(run, log_a, log_b)

    def iteration(i, carry):
        i = length - 1 - i
        ((c_phi, c_gamma), (total_a, total_b)), c_scaled = carry
        rows = _normalised(_plan(scaled, phi_of_each[i + 1], gamma_of_each[i]), 1) * c_phi[:, None]
        c_gamma = c_gamma - rows.sum(0)
        columns = _normalised(_plan(scaled, phi_of_each[i], gamma_of_each[i]), 0) * c_gamma[None, :]
        new = ((-columns.sum(1), jnp.zeros_like(c_gamma)), (total_a + c_phi, total_b + c_gamma))
        return _where_active(run, i, (new, c_scaled - rows - columns), carry)

    *carry, kernel = carry
    return *lax.fori_loop(0, length, iteration, tuple(carry)), kernel


def _potentials_along(run, log_a, log_b):
    """φ before the run and after each iteration, and γ after each."""
    phi = jnp.where(run.is_log, run.u, jnp.where(_present(log_a), run.f + jnp.log(run.u), MASKED))
    return phi, jnp.where(run.is_log, run.v, jnp.where(_present(log_b), run.g + jnp.log(run.v), MASKED))


def _where_active(run, i, new, old):
    """The new values where iteration i was done."""
    if run.active is None:
        return new
    return jax.tree.map(lambda x, y: jnp.where(run.active[i], x, y), new, old)


def _present(log_weights):
    return ~(log_weights <= MASKED)  # of NaN too


def _inverse(log_weights):
    return jnp.where(_present(log_weights), jnp.exp(-log_weights), 0)


def _plan(scaled, phi, gamma):
    return jnp.exp(phi[:, None] + gamma[None, :] + scaled)


def _normalised(plan, axis):
    # By the sum itself and not by the weights, which rounded potentials meet only to 6e-8 of an exponent of hundreds:
    # errors of rows that don't quite sum to one would grow from iteration to iteration.
    total = plan.sum(axis, keepdims=True)
    return plan / jnp.where(total == 0, 1, total)


def _product(axes, left, right):
    # On a GPU the default precision is TF32's, in which the iterations stall at a marginal error of 1e-3.
    return jnp.einsum(axes, left, right, precision=lax.Precision.HIGHEST)


def _limit(array, power):
    """The dtype's largest number to a power: 9e6 and 2e14 in float32 for 0.18 and 0.37."""
    return float(jnp.finfo(array.dtype).max) ** power
