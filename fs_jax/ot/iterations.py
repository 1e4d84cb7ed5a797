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


class Path(NamedTuple):
    """Potentials after each iteration, [T, n] and [T, m]: all that the derivative needs to know of the way."""

    phi: jax.Array
    gamma: jax.Array


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
    return _walk(scaled, log_a, log_b, start, threshold, num_iters, method, keep=False)[0]


@potentials.defjvp
def _derivative(num_iters, method, primals, tangents):
    """Linear in the tangents, and written out in both directions: forward along the path, and back.

    `custom_linear_solve` is JAX's way to say that two functions are each other's transpose. Its matrix must be square,
    so the tangents of `scaled` and of `start` come out again, for nobody. They are one vector, since JAX asks that
    all of the right side be differentiated or nothing.
    """
    threshold = primals[4]
    result, path = _walk(*primals, num_iters, method, keep=True)
    *problem, path = _first_order_only((*primals[:4], path))
    active = None if threshold is None else jnp.arange(num_iters) < result[2]
    tangents, unravel = ravel_pytree(tuple(tangents[:4]))

    def forward(_, tangents):
        return ravel_pytree(_forward(*problem, path, active, *unravel(tangents)))[0]

    def back(_, cotangents):
        return ravel_pytree(_back(*problem, path, active, method, *unravel(cotangents)))[0]

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
    f: jax.Array
    g: jax.Array
    u: jax.Array
    v: jax.Array


def _walk(scaled, log_a, log_b, start, threshold, num_iters, method, keep):
    """`potentials`, and with `keep` the path."""
    step = {"log": _log_run, "kernel": _kernel_run, "stabilized": _stabilized_run}[method]
    step = partial(step, scaled, log_a, log_b, threshold)
    if method == "log":
        state = (start, jnp.zeros_like(log_b))
    elif method == "kernel":
        state = _Kernel(
            jnp.exp(scaled), jnp.zeros_like(log_a), jnp.zeros_like(log_b), jnp.exp(start), jnp.ones_like(log_b)
        )
    else:
        state = _absorb_start(scaled, log_a, log_b, start)
    carry = (state, jnp.int32(0), jnp.bool_(False))

    def run(length, carry):
        if threshold is None:
            return step(length, keep, *carry)
        # A problem that is done stands still; a batch that is done skips the run.
        phi, gamma = _potentials_of(carry[0], log_a, log_b)
        path = Path(jnp.broadcast_to(phi, (length, *phi.shape)), jnp.broadcast_to(gamma, (length, *gamma.shape)))
        pending = ~carry[2]
        _, carry, path = lax.while_loop(
            lambda loop: loop[0],
            lambda loop: (jnp.bool_(False), *step(length, keep, *loop[1])),
            (pending, carry, path if keep else None),
        )
        return carry, path

    carry, path = _in_runs(run, carry, num_iters, num_iters if method == "kernel" and threshold is None else RUN)
    state, done, converged = carry
    phi, gamma = _potentials_of(state, log_a, log_b)
    done = jnp.int32(num_iters) if threshold is None else done
    return (phi, gamma, done, converged), path


def _in_runs(run, carry, num_iters, length):
    """`run(length, carry)` as often as fits, then the rest; what it returns beside the carry is laid end to end."""
    whole, rest = divmod(num_iters, length)
    carry, path = lax.scan(lambda carry, _: run(length, carry), carry, length=whole)
    path = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), path)
    if rest:
        carry, last = run(rest, carry)
        path = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), path, last)
    return carry, path


def _log_run(scaled, log_a, log_b, threshold, length, keep, state, done, converged):
    """Iterations in the log domain."""

    def iteration(carry, _):
        (phi, gamma), done, converged = carry
        new_gamma = jnp.where(_present(log_b), log_b - log_sum_exp(scaled + phi[:, None], 0), MASKED)
        new_phi = jnp.where(_present(log_a), log_a - log_sum_exp(scaled + new_gamma[None, :], 1), MASKED)
        change = jnp.expm1(jnp.where(_present(log_b), gamma - new_gamma, 0))
        carry = _unless_converged(threshold, log_b, change, carry, (new_phi, new_gamma), done, converged)
        return carry, Path(*carry[0]) if keep else None

    return lax.scan(iteration, (state, done, converged), length=length)


def _kernel_run(scaled, log_a, log_b, threshold, length, keep, state, done, converged):
    """Iterations in the kernel domain, from and to the same reference."""
    carry, path, _ = _scalings(log_a, log_b, threshold, length, keep, state, done, converged)
    return carry, path


def _stabilized_run(scaled, log_a, log_b, threshold, length, keep, state, done, converged):
    """The same, with a look at the scalings before (K absorbs those that have grown) and after (all is done again)."""
    grown = _largest(state) > _limit(scaled, 0.08)
    _, state = lax.while_loop(
        lambda loop: loop[0],
        lambda loop: (jnp.bool_(False), _absorb(scaled, *_potentials_of(loop[1], log_a, log_b))),
        (grown, state),
    )
    carry, path, largest = _scalings(log_a, log_b, threshold, length, keep, state, done, converged)

    # K flushes its entries below 1e-38 (in float32) to zero: at most u·v times that is lost of a plan.
    out_of_range = ~(largest <= _limit(scaled, 0.37))
    start = (*_potentials_of(state, log_a, log_b), done, converged)
    end = (*_potentials_of(carry[0], log_a, log_b), *carry[1:])
    begin = jax.tree.map(lambda x, y: jnp.where(out_of_range, x, y), start, end)

    def again(loop):
        _, (phi, gamma, done, converged), _, _ = loop
        carry, path = _log_run(scaled, log_a, log_b, threshold, length, keep, (phi, gamma), done, converged)
        return jnp.bool_(False), (*carry[0], *carry[1:]), _absorb(scaled, *carry[0]), path

    _, (_, _, done, converged), state, path = lax.while_loop(
        lambda loop: loop[0], again, (out_of_range, begin, carry[0], path)
    )
    return (state, done, converged), path


def _scalings(log_a, log_b, threshold, length, keep, state, done, converged):
    """Iterations with one K; also the largest scaling on the way."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    absent_a, absent_b = (jnp.where(_present(w), 0, 1).astype(w.dtype) for w in (log_a, log_b))
    kernel, transposed = state.k, _transposed(state.k)

    def iteration(carry, _):
        ((u, v), done, converged), (most_u, most_v) = carry
        new_v = b / (_product(transposed, u) + absent_b)
        new_u = a / (_product(kernel, new_v) + absent_a)
        change = v / (new_v + absent_b) - 1
        moved = _unless_converged(threshold, log_b, change, carry[0], (new_u, new_v), done, converged)
        (u, v), _, _ = moved
        path = (u, v) if keep else None
        return (moved, (jnp.maximum(most_u, u), jnp.maximum(most_v, v))), path

    start = (state.u, state.v)
    carry, path = lax.scan(iteration, (((start, done, converged)), (state.u, jnp.zeros_like(state.v))), length=length)
    ((u, v), done, converged), (most_u, most_v) = carry
    if keep:
        path = Path(*_potentials_of(state._replace(u=path[0], v=path[1]), log_a, log_b))
    return (state._replace(u=u, v=v), done, converged), path, jnp.maximum(most_u.max(), most_v.max())


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


def _absorb_start(scaled, log_a, log_b, phi):
    """A reference for potentials that fit nothing yet: each row's and each column's largest entry in K is one."""
    g = jnp.where(_present(log_b), -jnp.max(scaled + phi[:, None], 0), MASKED)
    f = jnp.where(_present(log_a), -jnp.max(scaled + g[None, :], 1), MASKED)
    state = _absorb(scaled, f, g)
    return state._replace(u=jnp.where(_present(log_a), jnp.exp(phi - f), 0))


def _absorb(scaled, phi, gamma):
    return _Kernel(_plan(scaled, phi, gamma), phi, gamma, jnp.ones_like(phi), jnp.ones_like(gamma))


def _potentials_of(state, log_a, log_b):
    if not isinstance(state, _Kernel):
        return state
    phi = jnp.where(_present(log_a), state.f + jnp.log(state.u), MASKED)
    return phi, jnp.where(_present(log_b), state.g + jnp.log(state.v), MASKED)


# The derivative along the path


def _forward(scaled, log_a, log_b, start, path, active, d_scaled, d_log_a, d_log_b, d_start):
    """Tangents of the potentials: each sum over a row or column becomes the mean of its terms' tangents."""

    def iteration(carry, at):
        (d_phi, d_gamma), (before, phi, gamma, active) = carry, at
        columns = _plan(scaled, before, gamma) * _inverse(log_b)[None, :]
        rows = _plan(scaled, phi, gamma) * _inverse(log_a)[:, None]
        new_d_gamma = d_log_b - jnp.sum(columns * (d_scaled + d_phi[:, None]), 0)
        new_d_phi = d_log_a - jnp.sum(rows * (d_scaled + new_d_gamma[None, :]), 1)
        if active is None:
            return (new_d_phi, new_d_gamma), None
        return (jnp.where(active, new_d_phi, d_phi), jnp.where(active, new_d_gamma, d_gamma)), None

    (d_phi, d_gamma), _ = lax.scan(iteration, (d_start, jnp.zeros_like(d_log_b)), (*_steps(start, path), active))
    return d_scaled, d_phi, d_gamma, d_start


def _back(scaled, log_a, log_b, start, path, active, method, c_scaled, c_phi, c_gamma, c_start):
    """Cotangents of (scaled, log a, log b, start) from those of the potentials: the transpose of `_forward`.

    With x = u φ̄ / a and y = v γ̄ / b, an iteration is passed backwards by

        γ̄ ← γ̄ - v ∘ Kᵀ x        φ̄ ← -u_{k-1} ∘ K y        γ̄ ← 0

    and takes K ∘ (x vᵀ + u_{k-1} yᵀ) from the cotangent of `scaled`: terms of a matrix product, done once per run.
    """
    run = partial(_back_log if method == "log" else _back_stabilized, scaled, log_a, log_b)
    total = (jnp.zeros_like(log_a), jnp.zeros_like(log_b))
    carry = ((c_phi, c_gamma), total, c_scaled)
    steps = (*_steps(start, path), active)
    num_iters = path.phi.shape[0]
    whole = num_iters - num_iters % RUN
    if whole < num_iters:
        carry = run(carry, jax.tree.map(lambda x: x[whole:], steps))
    if whole:
        runs = jax.tree.map(lambda x: x[:whole].reshape(-1, RUN, *x.shape[1:]), steps)
        carry, _ = lax.scan(lambda carry, steps: (run(carry, steps), None), carry, runs, reverse=True)
    (c_phi, _), (c_log_a, c_log_b), c_scaled = carry
    return c_scaled, c_log_a, c_log_b, c_start + c_phi


def _back_stabilized(scaled, log_a, log_b, carry, steps):
    """Back over a run, in the kernel domain if its potentials stay close enough to its last ones."""
    before, phi, gamma, _ = steps
    f, g = phi[-1], gamma[-1]
    u, v = jnp.exp(jnp.concatenate([before[:1], phi]) - f), jnp.exp(gamma - g)
    scalings = u[:-1], u[1:], v
    in_range = jnp.maximum(u[1:].max(), v.max()) <= _limit(scaled, 0.37)
    ok, result = lax.while_loop(
        lambda loop: ~loop[0] & in_range,
        lambda loop: (jnp.bool_(True), _back_kernel(scaled, log_a, log_b, (f, g), scalings, loop[1], steps)),
        (jnp.bool_(False), carry),
    )
    return lax.while_loop(
        lambda loop: ~loop[0],
        lambda loop: (jnp.bool_(True), _back_log(scaled, log_a, log_b, loop[1], steps)),
        (ok, result),
    )[1]


def _back_kernel(scaled, log_a, log_b, reference, scalings, carry, steps):
    kernel = _plan(scaled, *reference)
    transposed = _transposed(kernel)
    inverse_a, inverse_b = _inverse(log_a), _inverse(log_b)
    cotangents, totals, c_scaled = carry

    def iteration(carry, at):
        (c_phi, c_gamma), (total_a, total_b) = carry
        (u_before, u, v), active = at
        x = u * c_phi * inverse_a
        c_gamma = c_gamma - v * _product(transposed, x)
        y = v * c_gamma * inverse_b
        new_c_phi = -u_before * _product(kernel, y)
        new = ((new_c_phi, jnp.zeros_like(c_gamma)), (total_a + c_phi, total_b + c_gamma))
        if active is None:
            return new, (x, y)
        return jax.tree.map(lambda n, o: jnp.where(active, n, o), (new, (x, y)), (carry, (0 * x, 0 * y)))

    (cotangents, totals), (x, y) = lax.scan(iteration, (cotangents, totals), (scalings, steps[3]), reverse=True)
    left, right = jnp.concatenate([x, scalings[0]]), jnp.concatenate([scalings[2], y])
    outer = jnp.einsum("ti,tj->ij", left, right, precision=lax.Precision.HIGHEST)
    return cotangents, totals, c_scaled - kernel * outer


def _back_log(scaled, log_a, log_b, carry, steps):
    inverse_a, inverse_b = _inverse(log_a), _inverse(log_b)

    def iteration(carry, at):
        (c_phi, c_gamma), (total_a, total_b), c_scaled = carry
        before, phi, gamma, active = at
        rows = _plan(scaled, phi, gamma) * (c_phi * inverse_a)[:, None]
        c_gamma = c_gamma - rows.sum(0)
        columns = _plan(scaled, before, gamma) * (c_gamma * inverse_b)[None, :]
        new = (
            (-columns.sum(1), jnp.zeros_like(c_gamma)),
            (total_a + c_phi, total_b + c_gamma),
            c_scaled - rows - columns,
        )
        if active is None:
            return new, None
        return jax.tree.map(lambda n, o: jnp.where(active, n, o), new, carry), None

    return lax.scan(iteration, carry, steps, reverse=True)[0]


def _steps(start, path):
    """φ_{k-1}, φ_k and γ_k of each iteration."""
    return jnp.concatenate([start[None], path.phi[:-1]]), path.phi, path.gamma


def _present(log_weights):
    return ~(log_weights <= MASKED)  # of NaN too


def _inverse(log_weights):
    return jnp.where(_present(log_weights), jnp.exp(-log_weights), 0)


def _plan(scaled, phi, gamma):
    return jnp.exp(phi[:, None] + gamma[None, :] + scaled)


def _product(matrix, vector):
    # On a GPU the default precision is TF32's, in which the iterations stall at a marginal error of 1e-3.
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)


def _transposed(matrix):
    # Once, and not in every product: XLA's are several times slower along a matrix's columns than along its rows.
    return lax.optimization_barrier(matrix.T)


def _largest(state):
    return jnp.maximum(state.u.max(), state.v.max())


def _limit(array, power):
    """The dtype's largest number to a power: 1e3 and 2e14 in float32 for 0.08 and 0.37."""
    return float(jnp.finfo(array.dtype).max) ** power
