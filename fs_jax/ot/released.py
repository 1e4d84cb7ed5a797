"""The Sinkhorn variant of the authors' released code, for parity with networks that it trained.

It differs from Algorithm 1: rows come first, 1e-6 is added inside each logarithm, nothing is taken out of the sums, and
it stops when the rows' potentials change little, which is after 2 to 7 iterations at the paper's settings. Its plan is
then not yet a coupling. `sinkhorn` is Algorithm 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import checks, transport
from fs_jax.ot.transport import Transport

_INSIDE_LOG = 1e-6


def released_sinkhorn(
    cost: Float[Array, "n m"],
    *,
    reg: float | Float[Array, ""] = 0.01,
    max_iters: int = 100,
    threshold: float | Float[Array, ""] = 0.1,
) -> Transport:
    """The released code's Sinkhorn iteration between uniform marginals, differentiable through the iterations done.

        f ← f + reg·(log 1/n - log(Σ_j exp((f_i + g_j - C_ij) / reg) + 1e-6))
        g ← g + reg·(log 1/m - log(Σ_i exp((f_i + g_j - C_ij) / reg) + 1e-6))

    until Σ_i |change of f_i| < threshold. It costs only the iterations that it does, in both directions: the reverse
    rule walks back over them.

    Args:
        cost: what it costs to move a unit of mass from row i to column j.
        reg: weight of the entropic term, in units of the cost.
        max_iters: iterations, at most (static under jit).
        threshold: on the sum over rows of the change of f, in units of the cost.

    Returns:
        A `Transport`. `status` tells whether this stopping test was met; `marginal_error`, how far the plan is from a
        coupling then.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: a shape or value is refused; the message says which, and what was expected.

    Example:
        >>> result = released_sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> int(result.num_iters), f"{result.marginal_error:.0e}"
        (1, '4e-06')

    Source: the released PyTorch code of Zhang and Wang (NeurIPS 2019).
    """
    cost, a, b = checks.problem(cost, None, None)
    reg = checks.positive("reg", reg, cost.dtype)
    max_iters = checks.count("max_iters", max_iters)
    threshold = checks.threshold(threshold, cost.dtype)
    return _solve(cost, a, b, reg, threshold, max_iters)


@partial(jax.jit, static_argnames=("max_iters",))
def _solve(cost, a, b, reg, threshold, max_iters):
    scaled = -cost / reg
    phi, gamma, done, converged = _potentials(scaled, lax.stop_gradient(threshold / reg), max_iters)
    return transport.from_potentials(phi, gamma, scaled, cost, a, b, reg, done, converged)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _potentials(scaled, threshold, max_iters):
    """Scaled potentials, iterations done, and whether the change of the rows' fell below the (scaled) threshold."""
    phi, gamma, done, converged, _ = _walk(scaled, threshold, max_iters)
    return phi, gamma, done, converged


def _walk(scaled, threshold, max_iters):
    """The same, with the potentials at the start of each iteration."""
    n, m = scaled.shape
    starts = (jnp.zeros((max_iters, n), scaled.dtype), jnp.zeros((max_iters, m), scaled.dtype))

    def iterate(state):
        phi, gamma, done, _, starts = state
        starts = tuple(
            lax.dynamic_update_index_in_dim(kept, new, done, 0) for kept, new in zip(starts, (phi, gamma), strict=True)
        )
        rows = _plan(phi, gamma, scaled).sum(1)
        new_phi = phi - jnp.log(n * (rows + _INSIDE_LOG))
        columns = _plan(new_phi, gamma, scaled).sum(0)
        gamma = gamma - jnp.log(m * (columns + _INSIDE_LOG))
        return new_phi, gamma, done + 1, jnp.abs(new_phi - phi).sum() < threshold, starts

    start = (jnp.zeros(n, scaled.dtype), jnp.zeros(m, scaled.dtype), jnp.int32(0), jnp.bool_(False), starts)
    return lax.while_loop(lambda state: (state[2] < max_iters) & ~state[3], iterate, start)


def _forward(scaled, threshold, max_iters):
    phi, gamma, done, converged, starts = _walk(scaled, threshold, max_iters)
    return (phi, gamma, done, converged), (scaled, phi, done, starts)


def _backward(max_iters, kept, cotangents):
    """Back through each iteration done: two exponentials of the matrix, and products with them."""
    scaled, last_phi, done, (phis, gammas) = kept

    def iterate_back(state):
        d_phi, d_gamma, d_scaled, new_phi, t = state
        phi, gamma = (lax.dynamic_index_in_dim(starts, t, keepdims=False) for starts in (phis, gammas))
        plan = _plan(new_phi, gamma, scaled)  # as the columns were updated
        columns = plan.sum(0)
        right = -d_gamma / (columns + _INSIDE_LOG)
        d_gamma = d_gamma + columns * right
        d_phi = d_phi + jnp.sum(plan * right[None, :], 1)
        d_scaled = d_scaled + plan * right[None, :]
        plan = _plan(phi, gamma, scaled)  # as the rows were updated
        rows = plan.sum(1)
        left = -d_phi / (rows + _INSIDE_LOG)
        d_phi = d_phi + rows * left
        d_gamma = d_gamma + jnp.sum(plan * left[:, None], 0)
        d_scaled = d_scaled + plan * left[:, None]
        return d_phi, d_gamma, d_scaled, phi, t - 1

    start = (cotangents[0], cotangents[1], jnp.zeros_like(scaled), last_phi, done - 1)
    d_scaled = lax.while_loop(lambda state: state[4] >= 0, iterate_back, start)[2]
    return d_scaled, jnp.zeros((), scaled.dtype)


def _plan(phi, gamma, scaled):
    return jnp.exp(phi[:, None] + gamma[None, :] + scaled)


_potentials.defvjp(_forward, _backward)
