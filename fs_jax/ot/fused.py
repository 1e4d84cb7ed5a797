"""Sinkhorn on a GPU: one kernel does all iterations of a problem on chip, and another all of the way back.

A small problem is microseconds of arithmetic, but step by step it is hundreds of launches, each of which brings its
matrix from memory. Here a block of threads has a problem to itself: it reads s = -C / reg once, and then its threads
pass nothing but vectors. `vmap` makes as many blocks as there are problems.

The iterations are those of `iterations.py`, in a form that is safe at any reg and takes one exponential per entry. With
the potentials so far and F = exp(s_ij + φ_i + γ_j), whose columns sum to b, the rows are updated and then the columns:

    u = a / (F 1)    φ ← φ + log u        v = b / (Fᵀ u)    γ ← γ + log v

No entry of F exceeds its column's weight, so nothing can overflow. Nor can the sums underflow: u and v of an iteration
lie between those of the one before, and those of the second between the smallest weight and its inverse. Only the
first, which starts from anywhere, is done in the log domain. Each half corrects what rounding left of the last, so that
errors don't add up. (Scalings with a constant K would need no exponential, but a look at their range, and another way
to go on where they leave it.)

The way back keeps φ and γ of each iteration and takes one exponential per entry too; the cotangent of s is gathered on
the way. Sums are sums: no matrix product is left for TF32 to spoil.

Kernels are written in Pallas and compiled by Triton. JAX has deprecated that backend in 0.11 in favour of Mosaic GPU,
which needs a Hopper GPU and layouts that are multiples of 64 rows; `_call` is all that knows of it.
"""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.flatten_util import ravel_pytree

from fs_jax.ot import iterations
from fs_jax.ot.logspace import MASKED, log_sum_exp

PLATFORMS = {"cuda": False}  # where the kernels are taken, and whether they are interpreted there
LARGEST = 256  # points on a side
TILE = 128 * 128  # entries that a block of threads works on at a time: 32 for each of its 512
TINY = 1e-30  # no sum is below the product of two weights; one that is even smaller is not believed


def potentials(scaled, log_a, log_b, start, threshold, num_iters, method, fused):
    """`iterations.potentials`; where it runs on a GPU, by the kernels.

    That is for float32, up to 256 points on a side, and the method that is free to choose its way, "stabilized". What
    runs where is decided here and nowhere else.
    """

    def plain(*problem):
        return iterations.potentials(*problem, num_iters, method)

    branches = {}
    if fused and method == "stabilized" and scaled.dtype == jnp.float32 and max(scaled.shape) <= LARGEST:
        shape = _padded(scaled.shape)
        for platform, interpret in PLATFORMS.items():
            if _works(shape, platform, interpret):
                branches[platform] = lambda *problem, how=interpret: on_chip(*problem, num_iters, how)
    problem = (scaled, log_a, log_b, start, threshold)
    return lax.platform_dependent(*problem, default=plain, **branches) if branches else plain(*problem)


@functools.cache
def _works(shape, platform, interpret) -> bool:
    """Whether kernels of this size compile on a device that is here, and do what the plain iterations do.

    They depend on more than JAX promises: on the GPU's generation, and on a backend that may go. So they are tried,
    once per process and size, and where they fail that costs speed and nothing else.
    """
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return False

    def trial():
        with jax.default_device(device):
            return _agrees(shape, interpret)

    reason = "its results are not those of the plain iterations"
    try:
        with ThreadPoolExecutor(1) as thread:  # this one may be tracing, and would trace the trial too
            works = thread.submit(trial).result()
    except Exception as error:  # whatever a compiler may raise
        works, reason = False, f"{type(error).__name__}: {error}"
    if not works:
        warnings.warn(f"sinkhorn goes without its kernel for {shape} points on {device}: {reason}", stacklevel=2)
    return works


def _agrees(shape, interpret):
    """Whether plan and gradient of a problem with uneven weights are those of the plain iterations."""
    n, m = (size - size // 4 for size in shape)
    rng = np.random.default_rng(0)
    scaled = jnp.asarray(rng.uniform(-20, 0, (n, m)), jnp.float32)
    log_a, log_b = (jnp.asarray(np.log(w / w.sum()), jnp.float32) for w in (rng.uniform(1, 2, n), rng.uniform(1, 2, m)))
    weights = jnp.asarray(rng.normal(size=(n, m)), jnp.float32)

    def value(solve, scaled):
        phi, gamma, *_ = solve(scaled, log_a, log_b, jnp.zeros_like(log_a), jnp.float32(1e-6))
        return jnp.sum(weights * jnp.exp(scaled + phi[:, None] + gamma))

    solvers = (lambda *p: on_chip(*p, 6, interpret)), (lambda *p: iterations.potentials(*p, 6, "log"))
    got, expected = (jax.jit(jax.value_and_grad(partial(value, solve)))(scaled) for solve in solvers)
    # Exponents of 20 are rounded at 1e-6 of a plan, and sums of 12 updates add up; a wrong one is wrong by far more.
    return all(np.allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max()) for x, y in zip(got, expected, strict=True))


# Values and derivatives, for one problem


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def on_chip(scaled, log_a, log_b, start, threshold, num_iters, interpret):
    """`iterations.potentials` by the kernels alone; `interpret` runs them without a GPU."""
    return _forward(scaled, log_a, log_b, start, threshold, num_iters, False, interpret)[0]


@on_chip.defjvp
def _derivative(num_iters, interpret, primals, tangents):
    """As in `iterations`: linear in the tangents, and written out in both directions.

    Back goes a kernel; forward mode is rare, and goes through the plain iterations in the log domain.
    """
    result, path = _forward(*primals, num_iters, True, interpret)
    *problem, threshold, path = iterations._first_order_only((*primals, path))
    vectors, unravel = ravel_pytree(tuple(tangents[1:4]))

    def forward(_, tangents):
        def plain(*problem):
            return iterations.potentials(*problem, threshold, num_iters, "log")[:2]

        d_scaled, (d_log_a, d_log_b, d_start) = tangents[0], unravel(tangents[1])
        d_potentials = jax.jvp(plain, tuple(problem), (d_scaled, d_log_a, d_log_b, d_start))[1]
        return d_scaled, ravel_pytree((*d_potentials, d_start))[0]

    def back(_, cotangents):
        c_scaled, (c_phi, c_gamma, c_start) = cotangents[0], unravel(cotangents[1])
        from_path = _back(problem[0], path, c_phi, c_gamma, interpret)
        c_scaled, c_start = c_scaled + from_path[0], c_start + from_path[3]
        return c_scaled, ravel_pytree((from_path[1], from_path[2], c_start))[0]

    right = lax.optimization_barrier((tangents[0], vectors))
    _, vectors = lax.custom_linear_solve(lambda x: x, right, forward, back)
    d_phi, d_gamma, _ = unravel(vectors)
    not_differentiable = (np.zeros(jnp.shape(x), jax.dtypes.float0) for x in result[2:])
    return result, (d_phi, d_gamma, *not_differentiable)


def _forward(scaled, log_a, log_b, start, threshold, num_iters, keep, interpret):
    """The result of `potentials`; and with `keep` the path: φ_0, φ_1, ..., then γ_1, ..., and how many were done."""
    n, m = scaled.shape
    rows, columns = shape = _padded(scaled.shape)
    stops = threshold is not None
    problem = (
        _pad(scaled, shape, 0),
        _pad(log_a, (rows,), MASKED),
        _pad(log_b, (columns,), MASKED),
        _pad(start, (rows,), MASKED),
        jnp.reshape(threshold if stops else 0, 1).astype(scaled.dtype),
    )
    kernel = partial(_forward_kernel, num_iters=num_iters, stops=stops)
    path = ((num_iters + 1, rows), (num_iters, columns)) if keep else ()
    phi, gamma, done, converged, *path = _call(kernel, interpret, problem, (rows,), (columns,), (), (), *path)
    return (phi[:n], gamma[:m], done[0], converged[0] > 0), (*path, done)


def _back(scaled, path, c_phi, c_gamma, interpret):
    """Cotangents of (scaled, log a, log b, start) from those of the potentials."""
    n, m = scaled.shape
    rows, columns = shape = _padded(scaled.shape)
    arguments = (_pad(scaled, shape, 0), *path, _pad(c_phi, (rows,), 0), _pad(c_gamma, (columns,), 0))
    outputs = _call(_back_kernel, interpret, arguments, shape, (rows,), (columns,), (rows,))
    c_scaled, c_log_a, c_log_b, c_start = outputs
    return c_scaled[:n, :m], c_log_a[:n], c_log_b[:m], c_start[:n]


def _padded(shape):
    """Powers of two, which Triton asks for. The points that are added have no mass."""
    return tuple(max(16, 1 << (size - 1).bit_length()) for size in shape)


def _pad(array, shape, value):
    widths = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
    return jnp.pad(array, widths, constant_values=value)


def _call(kernel, interpret, arguments, *shapes):
    """The kernel's outputs, of these shapes (a count has none), for one problem; `vmap` makes its axis the grid."""
    outputs = [(shape, jnp.float32) if shape else ((1,), jnp.int32) for shape in shapes]
    return pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct(*output) for output in outputs],
        interpret=interpret,
        compiler_params=None if interpret else _compiler_params(arguments[0].shape),
    )(*arguments)


def _compiler_params(shape):
    from jax.experimental.pallas import triton  # deprecated: the day that it goes, `_works` says so

    entries = min(TILE, shape[0] * shape[1])
    return triton.CompilerParams(num_warps=max(1, min(16, entries // 1024)), num_stages=1)


# The kernels. Their arguments are references to a problem's arrays.


class _Matrix:
    """s by tiles, of as many rows as are worked on at a time: held on chip where there is one, else read again."""

    def __init__(self, scaled):
        size = min(scaled.shape[0], TILE // scaled.shape[1])
        self.tiles = [slice(first, first + size) for first in range(0, scaled.shape[0], size)]
        self.is_held = len(self.tiles) == 1
        self._scaled = scaled[...] if self.is_held else scaled

    def __getitem__(self, tile):
        return self._scaled if self.is_held else self._scaled[tile, :]

    def plan(self, tile, phi, gamma):
        return jnp.exp(self[tile] + gamma[None, :] + phi[:, None])


def _forward_kernel(
    scaled, log_a, log_b, start, threshold, phi_out, gamma_out, done, converged, *path, num_iters, stops
):
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
    converged[0] = (k < num_iters).astype(jnp.int32)  # only convergence ends the loop before that


def _back_kernel(scaled, phis, gammas, done, c_phi, c_gamma, c_scaled, c_log_a, c_log_b, c_start):
    """The transpose of each iteration's derivative, from the last to the first.

    With the plans after the rows' update and before it, P = exp(s + φ_k + γ_k) and Q = exp(s + φ_{k-1} + γ_k),

        x = φ̄ / P 1    γ̄ ← γ̄ - Pᵀ x        y = γ̄ / Qᵀ 1    φ̄ ← -Q y    γ̄ ← 0

    and P ∘ x 1ᵀ + Q ∘ 1 yᵀ is taken from the cotangent of s. What is divided by are the sums of these very numbers, and
    not the weights that rounded potentials miss a little: errors of means that don't quite sum to one would grow. So
    Q is made of P, by its rows' factors 1 / u.
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
            held = take(held, tile, plan * x[:, None] + before)
        return (tuple(c_phis), jnp.zeros_like(c_gamma)), (total_a, total_b), held

    def take(held, tile, terms):
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
    return jnp.where(log_weights <= MASKED, MASKED, potential)  # not of NaN, which should come out


def _over(cotangent, total):
    return cotangent / jnp.where(total == 0, 1, total)
