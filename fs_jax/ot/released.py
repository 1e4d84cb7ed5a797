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

from fs_jax.ot import _checks
from fs_jax.ot.problem import make_problem
from fs_jax.ot.result import Outcome, Status, Transport, first_order_only, transport

_INSIDE_LOG = 1e-6


@_checks.answers_other_names
def released_sinkhorn(
    cost: Float[Array, "n m"],
    *,
    reg: float | Float[Array, ""] = 0.01,
    num_iters: int = 100,
    change: float | Float[Array, ""] = 0.1,
) -> Transport:
    """The released code's Sinkhorn iteration between uniform marginals, differentiable through the iterations done.

        f ← f + reg·(log 1/n - log(Σ_j exp((f_i + g_j - C_ij) / reg) + 1e-6))
        g ← g + reg·(log 1/m - log(Σ_i exp((f_i + g_j - C_ij) / reg) + 1e-6))

    until Σ_i |change of f_i| < `change`. It costs only the iterations that it does, in both directions: the reverse
    rule walks back over them.

    Args:
        cost: what it costs to move a unit of mass from row i to column j.
        reg: weight of the entropic term, in units of the cost.
        num_iters: iterations, at most (static under jit).
        change: stop when the sum over rows of the change of f is below this, in units of the cost. (It is no
            `threshold`, which in the other solvers is a marginal error.)

    Returns:
        A `Transport`. Its status is `Status.LIMIT` where it is finite: this stopping test says nothing of the plan.
        `marginal_error` tells how far that is from a coupling; `num_iters` is the limit where the test was not met.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: a shape or value is refused; the message says which, and what was expected.
        NotImplementedError: a second derivative is taken. (Of the first ones it has reverse mode alone.)

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
    # Not centred: 1e-6 inside the logarithms is added to sums of the cost as it is.
    problem, (change,) = make_problem(cost, a, b, reg, change, centred=False)
    scaled = problem.scaled
    phi, gamma, done = _potentials(scaled, lax.stop_gradient(change / problem.reg), num_iters)
    plan = lax.stop_gradient(_plan(phi, gamma, scaled))
    outcome = Outcome(plan, phi, gamma, done, jnp.full_like(done, Status.LIMIT), jnp.zeros_like(done))
    return transport(problem, outcome, None, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _potentials(scaled, change, num_iters):
    """Scaled potentials, and the iterations done until the rows' changed by less than `change` (scaled)."""
    phi, gamma, done, *_ = _walk(scaled, change, num_iters)
    return phi, gamma, done.astype(scaled.dtype)


def _walk(scaled, change, num_iters):
    """The same, with the potentials at the start of each iteration."""
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
    phi, gamma, done, _, starts = _walk(scaled, change, num_iters)
    return (phi, gamma, done.astype(scaled.dtype)), (scaled, phi, done, starts)


def _backward(num_iters, kept, cotangents):
    """Back through each iteration done: two exponentials of the matrix, and products with them."""
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
