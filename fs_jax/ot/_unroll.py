"""grad="unroll": the derivative of the iterations done, in forward and in reverse mode.

It goes through the same runs with the same K. Of each run, only vectors are stored.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from fs_jax.ot import _iterations
from fs_jax.ot._batching import in_chunks
from fs_jax.ot._iterations import Options
from fs_jax.ot._loops import lengths, once_if, row, with_row
from fs_jax.ot._numerics import inverse, normalised, product
from fs_jax.ot._sharding import total
from fs_jax.ot.problem import Points
from fs_jax.ot.result import UNROLL, first_order_only


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def solve(scaled, a, b, start, threshold, options: Options):
    """`Outcome` of the iterations. Its potentials have the iterations' derivative; its plan has none."""
    return _iterations.make_iterations(options, False)(scaled, a, b, start, threshold)[0]


@solve.defjvp
def _derivative(options, primals, tangents):
    primals = first_order_only(primals, UNROLL)
    scaled, a, b, _, threshold = primals
    outcome, *path = _iterations.make_iterations(options, True)(*primals)
    run_lengths = lengths(options.num_iters, threshold)
    forward = partial(_forward(options.axis_name), scaled, a, b, path[0], run_lengths)
    back = partial(_back(options.method, options.axis_name), scaled, a, b, *path, run_lengths)
    d_phi, d_gamma = with_transpose(forward, back, tangents[:4])
    d_outcome = jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)
    return outcome, d_outcome


def with_transpose(forward, back, tangents):
    """(d_phi, d_gamma) = forward(*tangents) for tangents (d_scaled, d_a, d_b, d_start), with `back` as its transpose.

    In JAX, `custom_linear_solve` defines a linear function together with its transpose. Its matrix must be square, so
    the tangents of `scaled` and of `start` are returned too, and discarded. JAX differentiates with respect to all of
    its right side or to none of it, so the right side is one vector.
    """
    right, unravel = ravel_pytree(tuple(tangents))

    def solve(_, vector):
        d_scaled, d_a, d_b, d_start = unravel(vector)
        d_phi, d_gamma = forward(d_scaled, d_a, d_b, d_start)
        return ravel_pytree((d_scaled, d_phi, d_gamma, d_start))[0]

    def transpose_solve(_, vector):
        c_scaled, c_phi, c_gamma, c_start = unravel(vector)
        from_scaled, c_a, c_b, from_start = back(c_phi, c_gamma)
        return ravel_pytree((c_scaled + from_scaled, c_a, c_b, c_start + from_start))[0]

    solution = lax.custom_linear_solve(lambda x: x, right, solve, transpose_solve)
    _, d_phi, d_gamma, _ = unravel(solution)
    return d_phi, d_gamma


@cache
def _forward(axis_name):
    """Tangents of the potentials: the derivative of the logarithm of a sum is the mean of its terms' tangents."""

    @in_chunks
    def forward(scaled, a, b, runs, run_lengths, d_scaled, d_a, d_b, d_start):
        points = Points.of(scaled, a, b, axis_name)
        d_log_a, d_log_b = (d * inverse(w) for d, w in ((d_a, points.a), (d_b, points.b)))

        def forward_run(carry, run_and_length):
            run, length = run_and_length
            logs = _logs(points, run)

            def iteration(i, carry):
                d_phi, _ = carry
                columns = normalised(logs.plan(i, i), 0, axis_name)
                rows = normalised(logs.plan(i + 1, i), 1)
                new_d_gamma = d_log_b - total(jnp.sum(columns * (d_scaled + d_phi[:, None]), 0), axis_name)
                new_d_phi = d_log_a - jnp.sum(rows * (d_scaled + new_d_gamma[None, :]), 1)
                return _where_active(run, i, (new_d_phi, new_d_gamma), carry)

            return lax.fori_loop(0, length, iteration, carry), None

        return lax.scan(forward_run, (d_start, jnp.zeros_like(d_log_b)), (runs, run_lengths))[0]

    return forward


@cache
def _back(method, axis_name):
    """Cotangents of (scaled, a, b, start) from those of the potentials: the transpose of `_forward`.

    With x = u φ̄ / a and y = v γ̄ / b, the backward step of an iteration is

        γ̄ ← γ̄ - v ∘ Kᵀ x        φ̄ ← -u_{k-1} ∘ K y        γ̄ ← 0

    It also subtracts K ∘ (x vᵀ + u_{k-1} yᵀ) from the cotangent of `scaled`; one matrix product per run sums these
    terms. If rows are sharded, γ̄ is the cotangent of a device's own copy; the sum over devices is taken for `y`.
    """
    step = {"log": _back_log, "kernel": _back_kernel, "stabilized": _back_stabilized}[method]

    @in_chunks
    def back(scaled, a, b, runs, reference, run_lengths, c_phi, c_gamma):
        points = Points.of(scaled, a, b, axis_name)

        def back_run(carry, run_and_length):
            one = partial(step, points, *run_and_length)
            is_active = run_and_length[0].active
            return one(carry) if is_active is None else once_if(jnp.any(is_active), one, carry), None

        totals = (jnp.zeros_like(a), jnp.zeros_like(b))
        carry = (((c_phi, c_gamma), totals), jnp.zeros_like(scaled), reference)
        carry, _ = lax.scan(back_run, carry, (runs, run_lengths), reverse=True)
        ((c_phi, _), (c_log_a, c_log_b)), c_scaled, _ = carry
        return c_scaled, c_log_a * inverse(points.a), c_log_b * inverse(points.b), c_phi

    return back


def _back_stabilized(points, run, length, carry):
    cotangents, c_scaled, (k, f, g) = carry
    # K is computed again only if this run has another reference. A run in the log domain uses none.
    new_f, new_g = jnp.where(run.is_log, f, run.f), jnp.where(run.is_log, g, run.g)
    moved = jnp.any(jnp.concatenate([new_f, new_g]) != jnp.concatenate([f, g]))
    reference = once_if(moved, lambda kernel: (_kernel(points, *kernel[1:]), run.f, run.g), (k, new_f, new_g))
    carry = _back_kernel(points, run, length, (cotangents, c_scaled, reference))
    return once_if(run.is_log, partial(_back_log, points, run, length), carry)


def _back_kernel(points, run, length, carry):
    """Back through a run in the kernel domain. For a run in the log domain it changes nothing."""
    cotangents, c_scaled, reference = carry
    inverse_a, inverse_b = (jnp.where(run.is_log, 0, inverse(w)) for w in (points.a, points.b))

    def iteration(i, carry):
        i = length - 1 - i
        ((c_phi, c_gamma), (total_a, total_b)), (xs, ys) = carry
        x = row(run.u, i + 1) * c_phi * inverse_a
        c_gamma = c_gamma - row(run.v, i) * product("ij,i->j", reference[0], x)
        y = row(run.v, i) * total(c_gamma, points.axis_name) * inverse_b
        new_c_phi = -row(run.u, i) * product("ij,j->i", reference[0], y)
        new = ((new_c_phi, jnp.zeros_like(c_gamma)), (total_a + c_phi, total_b + c_gamma))
        new, x, y = _where_active(run, i, (new, x, y), (carry[0], jnp.zeros_like(x), jnp.zeros_like(y)))
        return new, (with_row(xs, i, x), with_row(ys, i, y))

    xs, ys = jnp.zeros_like(run.u[1:]), jnp.zeros_like(run.v)
    new, (xs, ys) = lax.fori_loop(0, length, iteration, (cotangents, (xs, ys)))
    new = jax.tree.map(lambda x, y: jnp.where(run.is_log, x, y), cotangents, new)
    left, right = jnp.concatenate([xs, run.u[:-1]]), jnp.concatenate([run.v, ys])
    left = lax.optimization_barrier(left.T)  # the stored transpose makes XLA's product of thin matrices twice as fast
    return new, c_scaled - reference[0] * product("it,tj->ij", left, right), reference


def _back_log(points, run, length, carry):
    """Back through a run in the log domain."""
    logs = _logs(points, run)

    def iteration(i, carry):
        i = length - 1 - i
        ((c_phi, c_gamma), (total_a, total_b)), c_scaled = carry
        rows = normalised(logs.plan(i + 1, i), 1) * c_phi[:, None]
        c_gamma = c_gamma - rows.sum(0)
        columns = normalised(logs.plan(i, i), 0, points.axis_name) * total(c_gamma, points.axis_name)[None, :]
        new = ((-columns.sum(1), jnp.zeros_like(c_gamma)), (total_a + c_phi, total_b + c_gamma))
        return _where_active(run, i, (new, c_scaled - rows - columns), carry)

    *carry, reference = carry
    return *lax.fori_loop(0, length, iteration, tuple(carry)), reference


class _Logs(NamedTuple):
    """A run's reference matrix M; log u before the run and after each iteration; log v after each iteration."""

    matrix: jax.Array
    du: jax.Array
    dv: jax.Array

    def plan(self, i, j):
        return jnp.exp(self.matrix + row(self.du, i)[:, None] + row(self.dv, j)[None, :])


def _logs(points, run):
    def log(scalings, present):
        return jnp.where(run.is_log, scalings, jnp.log(jnp.where(present & ~run.is_log, scalings, 1)))

    matrix = _iterations.matrix(points.scaled, run.f, run.g)
    return _Logs(matrix, log(run.u, points.present_a), log(run.v, points.present_b))


def _where_active(run, i, new, old):
    """The new values if iteration i was done, else the old ones."""
    if run.active is None:
        return new
    return jax.tree.map(lambda x, y: jnp.where(row(run.active, i), x, y), new, old)


def _kernel(points, f, g):
    return jnp.exp(_iterations.matrix(points.scaled, f, g))
