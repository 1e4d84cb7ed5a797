"""The Sinkhorn variant of the authors' released code, for parity with the networks trained by it.

It differs from Algorithm 1 (`sinkhorn`): it updates rows first, adds 1e-6 inside each logarithm, doesn't factor the
largest term out of its sums, and stops when the rows' potentials change little. At the paper's settings this is after
2 to 7 iterations, and its plan doesn't have the required marginals yet.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _checks
from fs_jax.ot.problem import make_problem
from fs_jax.ot.result import Outcome, Status, Transport, first_order_only, transport

_INSIDE_LOG = 1e-6


@_checks.suggests_names
def released_sinkhorn(
    cost: Float[Array, "n m"],
    *,
    reg: float | Float[Array, ""] = 0.01,
    num_iters: int = 100,
    change: float | Float[Array, ""] = 0.1,
) -> Transport:
    """The released code's Sinkhorn iterations, for uniform marginals; differentiable through the iterations done.

        f ← f + reg·(log 1/n - log(Σ_j exp((f_i + g_j - C_ij) / reg) + 1e-6))
        g ← g + reg·(log 1/m - log(Σ_i exp((f_i + g_j - C_ij) / reg) + 1e-6))

    until Σ_i |change of f_i| < `change`. Both the forward and the backward pass take time only for the iterations done.

    Args:
        cost: cost of moving a unit of mass from row i to column j, [n, m].
        reg: weight of the entropic term, in units of the cost.
        num_iters: maximum number of iterations (static under jit).
        change: stop when the sum over rows of |change of f| is below this, in units of the cost. (It is not named
            `threshold`, since that is a marginal error in the other solvers.)

    Returns:
        A `Transport`. A finite result always has `Status.LIMIT`, since this stopping test doesn't measure the plan's
        error; see `marginal_error` for that. If the test was not met, `num_iters` of the result is the maximum.

    Raises:
        TypeError: if an argument is not as described.
        ValueError: if a shape or value is invalid; the message says which, and what is expected.
        NotImplementedError: if a second derivative is taken. (First derivatives are in reverse mode only.)

    Example:
        >>> result = released_sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> int(result.num_iters), f"{result.marginal_error:.0e}"
        (1, '4e-06')

    Source: the released PyTorch code of Zhang and Wang (NeurIPS 2019).
    """
    cost, a, b, dtype = _checks.problem(cost, None, None)
    reg = _checks.positive("reg", reg, cost.dtype)
    num_iters = _checks.count("num_iters", num_iters)
    change = _checks.at_least_zero("change", change, cost.dtype)
    return _solve(cost, a, b, reg, change, num_iters, dtype)


@partial(jax.jit, static_argnames=("num_iters", "dtype"))
def _solve(cost, a, b, reg, change, num_iters, dtype):
    # Not centred, since the 1e-6 inside the logarithms is relative to sums of the original cost.
    problem, (change,) = make_problem(cost, a, b, reg, change, centred=False)
    scaled = problem.scaled
    phi, gamma, done = _potentials(scaled, lax.stop_gradient(change / problem.reg), num_iters)
    plan = lax.stop_gradient(_plan(phi, gamma, scaled))
    outcome = Outcome(plan, phi, gamma, done, jnp.full_like(done, Status.LIMIT), jnp.zeros_like(done))
    return transport(problem, outcome, None, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _potentials(scaled, change, num_iters):
    """Scaled potentials and the number of iterations done; `change` is scaled too."""
    phi, gamma, done, *_ = _iterate(scaled, change, num_iters)
    return phi, gamma, done.astype(scaled.dtype)


def _iterate(scaled, change, num_iters):
    """The iterations, with the potentials at the start of each."""
    n, m = scaled.shape
    starts = tuple(jnp.zeros_like(scaled, shape=(num_iters, size)) for size in (n, m))

    def iterate(state):
        phi, gamma, done, _, starts = state
        starts = tuple(
            lax.dynamic_update_index_in_dim(kept, new, done, 0) for kept, new in zip(starts, (phi, gamma), strict=True)
        )
        rows = _plan(phi, gamma, scaled).sum(1)
        new_phi = phi - jnp.log(n * (rows + _INSIDE_LOG))
        columns = _plan(new_phi, gamma, scaled).sum(0)
        gamma = gamma - jnp.log(m * (columns + _INSIDE_LOG))
        return new_phi, gamma, done + 1, jnp.abs(new_phi - phi).sum() < change, starts

    done = jnp.zeros_like(scaled, shape=(), dtype=jnp.int32)
    start = (jnp.zeros_like(scaled[:, 0]), jnp.zeros_like(scaled[0]), done, jnp.zeros_like(done, bool), starts)
    return lax.while_loop(lambda state: (state[2] < num_iters) & ~state[3], iterate, start)


def _forward(scaled, change, num_iters):
    phi, gamma, done, _, starts = _iterate(scaled, change, num_iters)
    return (phi, gamma, done.astype(scaled.dtype)), (scaled, phi, done, starts)


def _backward(num_iters, kept, cotangents):
    """Back through each iteration done, by two exponentials of the matrix and products with them."""
    scaled, last_phi, done, (phis, gammas) = first_order_only(kept, "released_sinkhorn")

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
    return d_scaled, jnp.zeros_like(d_scaled, shape=())


def _plan(phi, gamma, scaled):
    return jnp.exp(phi[:, None] + gamma[None, :] + scaled)


_potentials.defvjp(_forward, _backward)
