"""Sinkhorn's iterations and their derivative, each in the domain where it is fast and in the one where it is safe.

Everything here works on logarithms of scalings: with s = -C / reg and T = exp(φ_i + γ_j + s_ij), iteration k is

    γ_k = log b - LSE_i(s_ij + φ_{k-1, i})        φ_k = log a - LSE_j(s_ij + γ_{k, j})

The log domain evaluates that as it stands, with two exponentials of a matrix. The kernel domain writes the potentials
as φ = f + log u, γ = g + log v, with a reference (f, g) absorbed in the matrix K = exp(f_i + g_j + s_ij), and needs two
products of K with a vector:

    v_k = b / (Kᵀ u_{k-1})        u_k = a / (K v_k)

which is ten times faster, and exact while u and v stay in range. So iterations go in short runs. Before a run K takes
up u and v if they have grown; after it they are looked at, and a run that left the range is repeated in the log domain.

Loops that run "while needed" stand where a `cond` might be expected: under `vmap` a `cond` costs both of its branches,
such a loop nothing when no problem of the batch needs it. Their bodies start from what the loop carries, and only from
that: XLA moves work that doesn't depend on it out of a loop, where it would always be done.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from fs_jax.ot.logspace import MASKED, log_sum_exp

RUN = 10  # iterations between two looks at the scalings; each lets their logarithms grow by log n or so at most


class Run(NamedTuple):
    """What the derivative needs to know of a run of L iterations: vectors alone.

    Attributes:
        f, g: the reference, [n] and [m].
        first: u before the run, [n].
        u, v: scalings after each iteration, [L, n] and [L, m].
        is_log: of a run in the log domain, which has no reference: φ and γ stand in the places of u and v.
        active: whether the iteration was done, [L]; None where all are, there being no threshold.
    """

    f: jax.Array
    g: jax.Array
    first: jax.Array
    u: jax.Array
    v: jax.Array
    is_log: jax.Array
    active: jax.Array | None


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def potentials(scaled, log_a, log_b, start, threshold, num_iters, method):
    """Scaled potentials (φ, γ) after the iterations, how many were done, and whether the threshold was met.

    Args:
        scaled: -cost / reg, [n, m].
        log_a: log of the rows' weights, `MASKED` where there is no mass.
        log_b: the same of the columns.
        start: φ_0.
        threshold: marginal error (L1) at which to stop, or None.
        num_iters: iterations, at most.
        method: "kernel", "log" or "stabilized".
    """
    return _walk(_rounded(scaled), log_a, log_b, start, threshold, num_iters, method, keep=False)[0]


@potentials.defjvp
def _derivative(num_iters, method, primals, tangents):
    """Linear in the tangents, and written out in both directions: forward along the path, and back.

    `custom_linear_solve` is JAX's way to say that two functions are each other's transpose. Its matrix must be square,
    so the tangents of `scaled` and of `start` come out again, for nobody. They are one vector, since JAX asks that
    all of the right side be differentiated or nothing.
    """
    scaled, *others = primals
    primals = (_rounded(scaled), *others)
    result, runs = _walk(*primals, num_iters, method, keep=True)
    *problem, runs = _first_order_only((*primals[:3], runs))
    tangents, unravel = ravel_pytree(tuple(tangents[:4]))

    def forward(_, tangents):
        return ravel_pytree(_forward(*problem, runs, *unravel(tangents)))[0]

    def back(_, cotangents):
        return ravel_pytree(_back(*problem, runs, method, *unravel(cotangents)))[0]

    _, d_phi, d_gamma, _ = unravel(lax.custom_linear_solve(lambda x: x, tangents, forward, back))
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
    transposed: jax.Array
    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array


def _walk(scaled, log_a, log_b, start, threshold, num_iters, method, keep):
    """`potentials`, and with `keep` the runs: those of full length as one stack, and the last if it is shorter."""
    step = {"log": _log_run, "kernel": _kernel_run, "stabilized": _stabilized_run}[method]
    step = partial(step, scaled, log_a, log_b, threshold, keep)
    if method == "log":
        state = (start, jnp.zeros_like(log_b))
    elif method == "kernel":
        state = _absorb(scaled, jnp.zeros_like(log_a), jnp.zeros_like(log_b))._replace(u=jnp.exp(start))
    else:
        state = _absorb_start(scaled, log_a, log_b, start)

    def run(length, carry):
        if threshold is None:
            return step(length, *carry)
        # A problem that is done stands still; a batch that is done skips the run.
        idle = _idle_run(length, carry[0]) if keep else None
        return lax.while_loop(
            lambda loop: loop[0],
            lambda loop: (jnp.bool_(False), *step(length, *loop[1])),
            (~carry[2], carry, idle),
        )[1:]

    length = num_iters if method == "kernel" and threshold is None else min(RUN, num_iters)
    carry = (state, jnp.int32(0), jnp.bool_(False))
    carry, stack = lax.scan(lambda carry, _: run(length, carry), carry, length=num_iters // length)
    last = None
    if num_iters % length:
        carry, last = run(num_iters % length, carry)
    state, done, converged = carry
    done = jnp.int32(num_iters) if threshold is None else done
    return (*_potentials_of(state, log_a, log_b), done, converged), (stack, last)


def _log_run(scaled, log_a, log_b, threshold, keep, length, state, done, converged):
    """Iterations in the log domain."""

    def iteration(carry, _):
        (phi, gamma), done, converged = carry
        new_gamma = jnp.where(_present(log_b), log_b - log_sum_exp(scaled + phi[:, None], 0), MASKED)
        new_phi = jnp.where(_present(log_a), log_a - log_sum_exp(scaled + new_gamma[None, :], 1), MASKED)
        change = jnp.expm1(jnp.where(_present(log_b), gamma - new_gamma, 0))
        carry = _unless_converged(threshold, log_b, change, carry, (new_phi, new_gamma), done, converged)
        return carry, (*carry[0], None if threshold is None else ~carry[2]) if keep else None

    carry, kept = lax.scan(iteration, (state, done, converged), length=length)
    if not keep:
        return carry, None
    phi, gamma, active = kept
    reference = (jnp.zeros_like(log_a), jnp.zeros_like(log_b))
    return carry, Run(*reference, state[0], phi, gamma, jnp.bool_(True), active)


def _kernel_run(scaled, log_a, log_b, threshold, keep, length, state, done, converged):
    """Iterations in the kernel domain, from and to the same reference."""
    return _scalings(log_a, log_b, threshold, keep, length, state, done, converged)[:2]


def _stabilized_run(scaled, log_a, log_b, threshold, keep, length, state, done, converged):
    """The same, with a look at the scalings before (K absorbs those that have grown) and after (all is done again)."""
    grown = jnp.maximum(state.u.max(), state.v.max()) > _limit(scaled, 0.08)
    _, state = lax.while_loop(
        lambda loop: loop[0],
        lambda loop: (jnp.bool_(False), _absorb(scaled, *_potentials_of(loop[1], log_a, log_b))),
        (grown, state),
    )
    (end, *counts), run, largest = _scalings(log_a, log_b, threshold, keep, length, state, done, converged)

    # K flushes its entries below 1e-38 (in float32) to zero: at most u·v times that is lost of a plan.
    out_of_range = ~(largest <= _limit(scaled, 0.37))
    potentials = (_potentials_of(x, log_a, log_b) for x in (state, end))
    begin, finish = ((x, *c) for x, c in zip(potentials, ((done, converged), counts), strict=True))
    begin = jax.tree.map(lambda x, y: jnp.where(out_of_range, x, y), begin, finish)

    def again(loop):
        carry, run = _log_run(scaled, log_a, log_b, threshold, keep, length, *loop[1])
        return jnp.bool_(False), carry, _absorb(scaled, *carry[0]), run

    _, (_, *counts), state, run = lax.while_loop(lambda loop: loop[0], again, (out_of_range, begin, end, run))
    return (state, *counts), run


def _scalings(log_a, log_b, threshold, keep, length, state, done, converged):
    """Iterations with one K; also the largest scaling on the way."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    absent_a, absent_b = (jnp.where(_present(w), 0, 1).astype(w.dtype) for w in (log_a, log_b))

    def iteration(carry, _):
        ((u, v), done, converged), (most_u, most_v) = carry
        new_v = b / (_product(state.transposed, u) + absent_b)
        new_u = a / (_product(state.k, new_v) + absent_a)
        change = v / (new_v + absent_b) - 1
        moved = _unless_converged(threshold, log_b, change, carry[0], (new_u, new_v), done, converged)
        (u, v), _, converged = moved
        kept = (u, v, None if threshold is None else ~converged) if keep else None
        return (moved, (jnp.maximum(most_u, u), jnp.maximum(most_v, v))), kept

    start = (((state.u, state.v), done, converged), (state.u, jnp.zeros_like(state.v)))
    (((u, v), done, converged), (most_u, most_v)), kept = lax.scan(iteration, start, length=length)
    run = Run(state.f, state.g, state.u, *kept[:2], jnp.bool_(False), kept[2]) if keep else None
    return (state._replace(u=u, v=v), done, converged), run, jnp.maximum(most_u.max(), most_v.max())


def _unless_converged(threshold, log_b, change, old, new, done, converged):
    """The new potentials or scalings; the old ones for a problem whose marginal error is at most the threshold.

    The test costs nothing: rows are exact after their update, and the next update of the columns tells by how much
    (`change`, relative) they were off.
    """
    if threshold is None:
        return new, done, converged
    converged |= (done > 0) & (jnp.sum(jnp.exp(log_b) * jnp.abs(change)) <= threshold)
    new = jax.tree.map(lambda x, y: jnp.where(converged, x, y), old[0], new)
    return new, done + ~converged, converged


def _idle_run(length, state):
    """A run in which nothing was done."""
    is_log = not isinstance(state, _Kernel)
    f, g, u, v = (*map(jnp.zeros_like, state), *state) if is_log else (state.f, state.g, state.u, state.v)
    u_of_each, v_of_each = (jnp.broadcast_to(x, (length, *x.shape)) for x in (u, v))
    return Run(f, g, u, u_of_each, v_of_each, jnp.bool_(is_log), jnp.zeros(length, bool))


def _absorb_start(scaled, log_a, log_b, phi):
    """A reference for potentials that fit nothing yet: each row's and each column's largest entry in K is one."""
    g = jnp.where(_present(log_b), -jnp.max(scaled + phi[:, None], 0), MASKED)
    f = jnp.where(_present(log_a), -jnp.max(scaled + g[None, :], 1), MASKED)
    return _absorb(scaled, f, g)._replace(u=jnp.where(_present(log_a), jnp.exp(phi - f), 0))


def _absorb(scaled, f, g):
    k = _plan(scaled, f, g)
    return _Kernel(k, _transposed(k), f, g, jnp.ones_like(f), jnp.ones_like(g))


def _potentials_of(state, log_a, log_b):
    if not isinstance(state, _Kernel):
        return state
    phi = jnp.where(_present(log_a), state.f + jnp.log(state.u), MASKED)
    return phi, jnp.where(_present(log_b), state.g + jnp.log(state.v), MASKED)


# The derivative along the path


def _forward(scaled, log_a, log_b, runs, d_scaled, d_log_a, d_log_b, d_start):
    """Tangents of the potentials: each sum over a row or column becomes the mean of its terms' tangents."""

    def iteration(carry, at):
        (d_phi, d_gamma), (before, phi, gamma, active) = carry, at
        columns = _normalised(_plan(scaled, before, gamma), 0)
        rows = _normalised(_plan(scaled, phi, gamma), 1)
        new_d_gamma = d_log_b - jnp.sum(columns * (d_scaled + d_phi[:, None]), 0)
        new_d_phi = d_log_a - jnp.sum(rows * (d_scaled + new_d_gamma[None, :]), 1)
        if active is None:
            return (new_d_phi, new_d_gamma), None
        return (jnp.where(active, new_d_phi, d_phi), jnp.where(active, new_d_gamma, d_gamma)), None

    def over(carry, run):
        return lax.scan(iteration, carry, _steps(run, log_a, log_b))[0], None

    stack, last = runs
    carry, _ = lax.scan(over, (d_start, jnp.zeros_like(d_log_b)), stack)
    if last is not None:
        carry, _ = over(carry, last)
    return d_scaled, *carry, d_start


def _back(scaled, log_a, log_b, runs, method, c_scaled, c_phi, c_gamma, c_start):
    """Cotangents of (scaled, log a, log b, start) from those of the potentials: the transpose of `_forward`.

    With x = u φ̄ / a and y = v γ̄ / b, an iteration is passed backwards by

        γ̄ ← γ̄ - v ∘ Kᵀ x        φ̄ ← -u_{k-1} ∘ K y        γ̄ ← 0

    and takes K ∘ (x vᵀ + u_{k-1} yᵀ) from the cotangent of `scaled`: terms of a matrix product, done once per run.
    """
    kernel = partial(_back_kernel, scaled, log_a, log_b)
    log = partial(_back_log, scaled, log_a, log_b)

    def by_runs(carry):
        def over(carry, run):
            return _each_if(((~run.is_log, kernel), (run.is_log, log)), carry, run), None

        stack, last = runs
        if last is not None:
            carry, _ = over(carry, last)
        return lax.scan(over, carry, stack, reverse=True)[0]

    carry = ((c_phi, c_gamma), (jnp.zeros_like(log_a), jnp.zeros_like(log_b)), c_scaled)
    whole, one_reference = _as_one_run(runs)
    if method == "log":
        carry = log(carry, whole)
    elif method == "kernel":
        carry = kernel(carry, whole)
    else:
        carry = _each_if(((one_reference, kernel), (~one_reference, lambda carry, _: by_runs(carry))), carry, whole)
    (c_phi, _), (c_log_a, c_log_b), c_scaled = carry
    return c_scaled, c_log_a, c_log_b, c_start + c_phi


def _each_if(cases, carry, run):
    """`carry` passed through each function whose condition holds, as loops that run once or never."""
    for condition, function in cases:
        _, carry = lax.while_loop(
            lambda loop: loop[0],
            lambda loop, function=function: (jnp.bool_(False), function(loop[1], run)),
            (condition, carry),
        )
    return carry


def _as_one_run(runs):
    """All of them end to end, and whether that is true: there is one reference, since nothing had to be absorbed."""
    stack, last = runs
    one_reference = jnp.all(stack.f == stack.f[0]) & ~jnp.any(stack.is_log)
    together = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (stack.u, stack.v, stack.active))
    if last is not None:
        one_reference &= jnp.all(last.f == stack.f[0]) & ~last.is_log
        together = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), together, (last.u, last.v, last.active))
    u, v, active = together
    return Run(stack.f[0], stack.g[0], stack.first[0], u, v, stack.is_log[0], active), one_reference


def _back_kernel(scaled, log_a, log_b, carry, run):
    kernel = _plan(scaled, run.f, run.g)
    transposed = _transposed(kernel)
    inverse_a, inverse_b = _inverse(log_a), _inverse(log_b)
    cotangents, totals, c_scaled = carry
    before = jnp.concatenate([run.first[None], run.u[:-1]])

    def iteration(carry, at):
        (c_phi, c_gamma), (total_a, total_b) = carry
        u_before, u, v, active = at
        x = u * c_phi * inverse_a
        c_gamma = c_gamma - v * _product(transposed, x)
        y = v * c_gamma * inverse_b
        new_c_phi = -u_before * _product(kernel, y)
        new = ((new_c_phi, jnp.zeros_like(c_gamma)), (total_a + c_phi, total_b + c_gamma))
        if active is None:
            return new, (x, y)
        return jax.tree.map(lambda n, o: jnp.where(active, n, o), (new, (x, y)), (carry, (0 * x, 0 * y)))

    steps = (before, run.u, run.v, run.active)
    (cotangents, totals), (x, y) = lax.scan(iteration, (cotangents, totals), steps, reverse=True)
    left, right = jnp.concatenate([x, before]), jnp.concatenate([run.v, y])
    outer = jnp.einsum("ti,tj->ij", left, right, precision=lax.Precision.HIGHEST)
    return cotangents, totals, c_scaled - kernel * outer


def _back_log(scaled, log_a, log_b, carry, run):
    def iteration(carry, at):
        (c_phi, c_gamma), (total_a, total_b), c_scaled = carry
        before, phi, gamma, active = at
        rows = _normalised(_plan(scaled, phi, gamma), 1) * c_phi[:, None]
        c_gamma = c_gamma - rows.sum(0)
        columns = _normalised(_plan(scaled, before, gamma), 0) * c_gamma[None, :]
        new = (
            (-columns.sum(1), jnp.zeros_like(c_gamma)),
            (total_a + c_phi, total_b + c_gamma),
            c_scaled - rows - columns,
        )
        if active is None:
            return new, None
        return jax.tree.map(lambda n, o: jnp.where(active, n, o), new, carry), None

    return lax.scan(iteration, carry, _steps(run, log_a, log_b), reverse=True)[0]


def _steps(run, log_a, log_b):
    """φ_{k-1}, φ_k and γ_k of each iteration, and whether it was done."""
    u = jnp.concatenate([run.first[None], run.u])
    phi = jnp.where(run.is_log, u, jnp.where(_present(log_a), run.f + jnp.log(u), MASKED))
    gamma = jnp.where(run.is_log, run.v, jnp.where(_present(log_b), run.g + jnp.log(run.v), MASKED))
    return phi[:-1], phi[1:], gamma, run.active


def _present(log_weights):
    return ~(log_weights <= MASKED)  # of NaN too


def _inverse(log_weights):
    return jnp.where(_present(log_weights), jnp.exp(-log_weights), 0)


def _plan(scaled, phi, gamma):
    return jnp.exp(phi[:, None] + gamma[None, :] + scaled)


def _rounded(scaled):
    # By one bit, which no compiler may skip. Where -cost / reg is part of a fusion its own rounding is skipped, and K
    # on the way back is then not K on the way there: they differ by the rounding of exponents of hundreds.
    bits = jnp.finfo(scaled.dtype)
    return lax.reduce_precision(scaled, bits.nexp, bits.nmant - 1)


def _normalised(plan, axis):
    # By the sum itself and not by the weights, which rounded potentials meet only to 6e-8 of an exponent of hundreds:
    # errors of rows that don't quite sum to one would grow from iteration to iteration.
    total = plan.sum(axis, keepdims=True)
    return plan / jnp.where(total == 0, 1, total)


def _product(matrix, vector):
    # On a GPU the default precision is TF32's, in which the iterations stall at a marginal error of 1e-3.
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)


def _transposed(matrix):
    # Once, and not in every product: XLA's are several times slower along a matrix's columns than along its rows.
    return lax.optimization_barrier(matrix.T)


def _limit(array, power):
    """The dtype's largest number to a power: 1e3 and 2e14 in float32 for 0.08 and 0.37."""
    return float(jnp.finfo(array.dtype).max) ** power
