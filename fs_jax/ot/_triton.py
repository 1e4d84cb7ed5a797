"""Sinkhorn on a GPU: one kernel does all iterations of a problem on chip, another the whole backward pass.

A small problem takes microseconds of arithmetic, but as separate operations it takes hundreds of kernel launches, each
of which reads the matrix from memory. Here one block of threads solves one problem: it reads s = -C / reg once, and
then its threads exchange only vectors. `vmap` launches one block per problem.

The iterations are those of `_iterations.py`, in a form that is safe at any reg and takes one exponential per entry.
With the current potentials and F = exp(s_ij + φ_i + γ_j), whose columns sum to b, an iteration updates rows and then
columns:

    u = a / (F 1)    φ ← φ + log u        v = b / (Fᵀ u)    γ ← γ + log v

No entry of F exceeds its column's weight, so nothing can overflow. The sums can't underflow either: u and v of an
iteration lie between the extremes of the iteration before, and those of the second iteration between the smallest
weight and its inverse. Only the first iteration, whose start is arbitrary, is done in the log domain. Each half step
corrects the rounding errors of the one before, so errors don't accumulate. (Scalings of a constant K would need no
exponential, but they would need a check of their range and a fallback.)

The backward pass reads φ and γ of each iteration, which the forward pass has stored. It takes one exponential per
entry as well, and accumulates the cotangent of s as it goes. All sums are plain sums: there is no matrix product that
could run in TF32.

The kernels are written in Pallas and compiled by Triton. JAX 0.11 deprecated that backend in favour of Mosaic GPU,
which needs a Hopper GPU and layouts that are multiples of 64 rows. Only `_call` depends on the backend.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from fs_jax.ot import _iterations, _unroll
from fs_jax.ot._iterations import Options
from fs_jax.ot._loops import value_if
from fs_jax.ot._numerics import MASKED, log_sum_exp
from fs_jax.ot._unroll import with_transpose
from fs_jax.ot.problem import Points
from fs_jax.ot.result import (
    UNROLL,
    Outcome,
    Status,
    finish,
    first_order_only,
    judged_error,
    rounding_floor,
)

try:
    from jax.experimental.pallas import triton
except ImportError:  # a JAX version without this backend
    triton = None  # type: ignore[assignment]

IS_AVAILABLE = triton is not None
LARGEST = 256  # points on a side
TILE = 128 * 128  # entries that a block of threads processes at a time: 32 for each of its 512 threads
TINY = 1e-30  # lower limit of sums: an exact sum is at least the product of two weights


# Values and derivatives, for one problem


def solve(scaled, a, b, start, threshold, options: Options, interpret: bool) -> Outcome:
    """`Outcome` of the iterations; `interpret` runs the kernel without a GPU.

    With a threshold, the kernel aims a little below it, and the error of the plan is checked as it is returned. If it
    is too large although the kernel's own sums met the threshold, or came close to the rounding floor, the problem is
    solved again by the plain iterations, which check the plan after their runs.
    """
    if threshold is None:
        return _forward(scaled, a, b, start, None, options, False, interpret)[0]
    floor = rounding_floor(scaled.shape, a.sum(), scaled.dtype)
    # Not near the floor, where the kernel might never reach a smaller error.
    reachable = jnp.where(threshold > 4 * floor, threshold - floor, jnp.maximum(threshold, floor))
    outcome, _ = _forward(scaled, a, b, start, reachable, options, False, interpret)
    failed = (outcome.done < options.num_iters) & ~(judged_error(outcome.plan, a, b, options.dtype) <= threshold)

    def plain(scaled, start):
        return _iterations.make_iterations(options, False)(scaled, a, b, start, threshold)[0]

    return value_if(failed, plain, outcome, scaled, start)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def unroll(scaled, a, b, start, threshold, options: Options, interpret: bool) -> Outcome:
    """`Outcome` of the iterations without a threshold, with the iterations' derivative."""
    return _forward(scaled, a, b, start, threshold, options, False, interpret)[0]


@unroll.defjvp
def _derivative(options, interpret, primals, tangents):
    """Reverse mode is a kernel. Forward mode is rare, and differentiates the plain iterations in the log domain."""
    primals = first_order_only(primals, UNROLL)
    outcome, path = _forward(*primals, options, True, interpret)
    problem = tuple(primals[:4])

    def forward(*tangents):
        def plain(*problem):
            result = _unroll.solve(*problem, None, options._replace(method="log"))
            return result.phi, result.gamma

        return jax.jvp(plain, problem, tangents)[1]

    d_phi, d_gamma = with_transpose(forward, partial(_back, *problem[:3], path, interpret), tangents[:4])
    return outcome, jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)


def _forward(scaled, a, b, start, threshold, options, keep, interpret):
    """The outcome; with `keep` also the path: φ_0, φ_1, ..., then γ_1, ..., and the number of iterations."""
    n, m = scaled.shape
    rows, columns = shape = _padded(scaled.shape)
    points = Points.of(scaled, a, b)
    stops = threshold is not None
    problem = (
        _pad(scaled, shape, 0),
        _pad(points.log_a, (rows,), MASKED),
        _pad(points.log_b, (columns,), MASKED),
        _pad(jnp.where(points.present_a, start, MASKED), (rows,), MASKED),
        jnp.reshape(threshold if stops else jnp.zeros_like(scaled, shape=()), 1),
    )
    kernel = partial(_forward_kernel, num_iters=options.num_iters, stops=stops)
    path = ((options.num_iters + 1, rows), (options.num_iters, columns)) if keep else ()
    phi, gamma, done, *path = _call(kernel, interpret, problem, (rows,), (columns,), (), *path)
    phi, gamma = phi[:n], gamma[:m]
    present = points.present_a[:, None] & points.present_b[None, :]
    plan, factor = finish(jnp.where(present, jnp.exp((scaled + phi[:, None]) + gamma[None, :]), 0), points.a)
    phi = jnp.where(points.present_a, phi + jnp.log(factor), MASKED)
    status = jnp.full_like(phi, Status.LIMIT, shape=())
    return Outcome(plan, phi, gamma, done[0].astype(phi.dtype), status, jnp.ones_like(status)), (*path, done)


def _back(scaled, a, b, path, interpret, c_phi, c_gamma):
    """Cotangents of (scaled, a, b, start) from those of the potentials."""
    n, m = scaled.shape
    rows, columns = shape = _padded(scaled.shape)
    arguments = (_pad(scaled, shape, 0), *path, _pad(c_phi, (rows,), 0), _pad(c_gamma, (columns,), 0))
    outputs = _call(_back_kernel, interpret, arguments, shape, (rows,), (columns,), (rows,))
    c_scaled, c_log_a, c_log_b, c_start = outputs
    points = Points.of(scaled, a, b)
    c_a, c_b = c_log_a[:n] * _unroll.inverse(points.a), c_log_b[:m] * _unroll.inverse(points.b)
    return c_scaled[:n, :m], c_a, c_b, c_start[:n]


def _padded(shape):
    """The shape padded to powers of two, which Triton requires. The added points have no mass."""
    return tuple(max(16, 1 << (size - 1).bit_length()) for size in shape)


def _pad(array, shape, value):
    widths = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
    return jnp.pad(array, widths, constant_values=value)


def _call(kernel, interpret, arguments, *shapes):
    """The kernel's outputs of the given shapes for one problem; () is a count. `vmap` turns its axis into the grid."""
    outputs = [(shape, jnp.float32) if shape else ((1,), jnp.int32) for shape in shapes]
    axes = jax.typeof(arguments[0]).manual_axis_type  # of a mesh, inside `shard_map`
    return pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct(*output, manual_axis_type=axes) for output in outputs],
        interpret=interpret,
        compiler_params=None if interpret else _compiler_params(arguments[0].shape),
    )(*arguments)


def _compiler_params(shape):
    entries = min(TILE, shape[0] * shape[1])
    return triton.CompilerParams(num_warps=max(1, min(16, entries // 1024)), num_stages=1)


# The kernels. Their arguments are references to a problem's arrays.


class _Matrix:
    """The matrix s in tiles of rows. A single tile is held on chip; several are read again at each use."""

    def __init__(self, scaled):
        size = min(scaled.shape[0], TILE // scaled.shape[1])
        self.tiles = [slice(first, first + size) for first in range(0, scaled.shape[0], size)]
        self.is_held = len(self.tiles) == 1
        self._scaled = scaled[...] if self.is_held else scaled

    def __getitem__(self, tile):
        return self._scaled if self.is_held else self._scaled[tile, :]

    def plan(self, tile, phi, gamma):
        return jnp.exp(self[tile] + gamma[None, :] + phi[:, None])


def _forward_kernel(scaled, log_a, log_b, start, threshold, phi_out, gamma_out, done, *path, num_iters, stops):
    s = _Matrix(scaled)
    tiles = s.tiles
    log_a, log_b = [log_a[tile] for tile in tiles], log_b[...]
    b = jnp.exp(log_b)

    def column_sums(phi, gamma):
        return sum(s.plan(tile, p, gamma).sum(0) for tile, p in zip(tiles, phi, strict=True))

    def has_converged(sums):
        return jnp.abs(sums - b).sum() <= threshold[0]

    def keep(k, phi, gamma=None):
        if not path:
            return
        for tile, p in zip(tiles, phi, strict=True):
            path[0][k, tile] = p
        if gamma is not None:
            path[1][k - 1, :] = gamma

    def first_iteration():
        phi = [start[tile] for tile in tiles]
        keep(0, phi)
        largest = reduce(jnp.maximum, [(s[tile] + p[:, None]).max(0) for tile, p in zip(tiles, phi, strict=True)])
        gamma = _masked(log_b, log_b - largest - jnp.log(column_sums(phi, -largest)))
        sums = [log_sum_exp(s[tile] + gamma[None, :], 1) for tile in tiles]
        phi = tuple(_masked(w, w - total) for w, total in zip(log_a, sums, strict=True))
        keep(1, phi, gamma)
        return np.int32(1), phi, gamma, column_sums(phi, gamma)

    def iteration(state):
        k, old, gamma, sums = state
        gamma = _masked(log_b, gamma + log_b - jnp.log(jnp.maximum(sums, TINY)))
        phi, sums = [], jnp.zeros_like(b)
        for tile, p, w in zip(tiles, old, log_a, strict=True):
            plan = s.plan(tile, p, gamma)
            total = jnp.maximum(plan.sum(1), TINY)
            phi.append(_masked(w, p + w - jnp.log(total)))
            sums += (plan * (jnp.exp(w) / total)[:, None]).sum(0)
        keep(k + 1, phi, gamma)
        return k + 1, tuple(phi), gamma, sums

    def is_needed(state):
        k, _, _, sums = state
        return (k < num_iters) & ~has_converged(sums) if stops else k < num_iters

    k, phi, gamma, _ = lax.while_loop(is_needed, iteration, first_iteration())
    for tile, p in zip(tiles, phi, strict=True):
        phi_out[tile] = p
    gamma_out[...] = gamma
    done[0] = k


def _back_kernel(scaled, phis, gammas, done, c_phi, c_gamma, c_scaled, c_log_a, c_log_b, c_start):
    """The transpose of each iteration's derivative, from the last to the first.

    With the plans after and before the rows' update, P = exp(s + φ_k + γ_k) and Q = exp(s + φ_{k-1} + γ_k),

        x = φ̄ / P 1    γ̄ ← γ̄ - Pᵀ x        y = γ̄ / Qᵀ 1    φ̄ ← -Q y    γ̄ ← 0

    and P ∘ x 1ᵀ + Q ∘ 1 yᵀ is subtracted from the cotangent of s. The divisors are the sums of these very numbers and
    not the weights, from which the sums differ slightly because potentials are rounded: errors of means whose weights
    don't quite sum to one would grow. For the same reason, Q is computed from P, by the factors 1 / u of its rows.
    """
    s = _Matrix(scaled)
    tiles = s.tiles

    def iteration(i, state):
        (c_phis, c_gamma), (total_a, total_b), held = state
        k = done[0] - i
        gamma, phi = gammas[k - 1, :], [phis[k, tile] for tile in tiles]
        factor = [jnp.exp(phis[k - 1, tile] - p) for tile, p in zip(tiles, phi, strict=True)]

        xs, sums = [], jnp.zeros_like(c_gamma)
        total_a = tuple(total + c for total, c in zip(total_a, c_phis, strict=True))
        for tile, p, f, c in zip(tiles, phi, factor, c_phis, strict=True):
            plan = s.plan(tile, p, gamma)
            xs.append(_over(c, plan.sum(1)))
            c_gamma -= (plan * xs[-1][:, None]).sum(0)
            sums += (plan * f[:, None]).sum(0)

        y, total_b = _over(c_gamma, sums), total_b + c_gamma
        c_phis = []
        for tile, p, f, x in zip(tiles, phi, factor, xs, strict=True):
            plan = s.plan(tile, p, gamma)
            before = plan * f[:, None] * y[None, :]
            c_phis.append(-before.sum(1))
            held = subtract(held, tile, plan * x[:, None] + before)
        return (tuple(c_phis), jnp.zeros_like(c_gamma)), (total_a, total_b), held

    def subtract(held, tile, terms):
        if s.is_held:
            return held - terms
        c_scaled[tile, :] -= terms
        return held

    held = jnp.zeros_like(s[tiles[0]]) if s.is_held else ()
    if not s.is_held:
        for tile in tiles:
            c_scaled[tile, :] = jnp.zeros_like(s[tile])
    cotangents = (tuple(c_phi[tile] for tile in tiles), c_gamma[...])
    state = (cotangents, jax.tree.map(jnp.zeros_like, cotangents), held)
    (c_phis, _), (total_a, total_b), held = lax.fori_loop(np.int32(0), done[0], iteration, state)
    for tile, c, total in zip(tiles, c_phis, total_a, strict=True):
        c_start[tile], c_log_a[tile] = c, total
    c_log_b[...] = total_b
    if s.is_held:
        c_scaled[...] = held


def _masked(log_weights, potential):
    return jnp.where(log_weights <= MASKED, MASKED, potential)  # False for NaN, which should propagate


def _over(cotangent, total):
    return cotangent / jnp.where(total == 0, 1, total)
