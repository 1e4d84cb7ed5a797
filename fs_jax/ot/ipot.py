"""IPOT: exact optimal transport by proximal points (Algorithm 2), in a form that can neither overflow nor underflow."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import checks, transport
from fs_jax.ot.logspace import MASKED, log_sum_exp, log_weights
from fs_jax.ot.transport import Transport

GRADS = ("unroll", "envelope", "none")


def ipot(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    *,
    beta: float | Float[Array, ""],
    num_iters: int = 50,
    inner_iters: int = 1,
    threshold: float | None = None,
    grad: Literal["unroll", "envelope", "none"] = "unroll",
) -> Transport:
    """Optimal transport by inexact proximal points: each step is a Sinkhorn step from the last plan.

        T_t ≈ argmin over plans T of ⟨T, C⟩ + beta·KL(T | T_{t-1}),   from T_0 = 1

    With Q = exp(-C / beta) ∘ T_{t-1} and σ as the last step left it: δ = a / (Q σ), σ = b / (Qᵀ δ), `inner_iters`
    times, then T_t = diag(δ) Q diag(σ). Its cost tends to that of the unregularised problem, however large beta is.

    The products of the δ and of the σ so far, as logarithms F and G, hold all there is to T_t:

        T_t = exp(F_i + G_j - t C_ij / beta)

    so step t is a Sinkhorn iteration at regularisation beta / t, which starts from the potentials extrapolated by the
    last step's change: F_t = log a - LSE_j(2 G_{t-1} - G_{t-2} - t C / beta), G_t = log b - LSE_i(F_t - t C / beta).

    Args:
        cost: what it costs to move a unit of mass from row i to column j.
        a: mass of each row, 1/n by default; a zero takes the row out of the problem, exactly.
        b: mass of each column, 1/m by default; the same total as `a`.
        beta: weight of the proximal term, in units of the cost: small is few steps, each less exact.
        num_iters: proximal steps, at most (static under jit).
        inner_iters: Sinkhorn iterations in each (static under jit).
        threshold: stop when both the mass that the last step moved and the marginal error (L1) are at most this; by
            default all steps are done.
        grad: "unroll" differentiates the iterations; "envelope" holds plan and potentials fixed, so that the gradient
            of `primal_cost` is the plan; "none" gives zeros.

    Returns:
        A `Transport`. Its potentials and `reg_cost` are those at the regularisation that the last step had reached,
        beta / num_iters; they tend to the dual solution and to the exact cost.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: a shape or value is refused; the message says which, and what was expected.

    Example:
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 3.0]])
        >>> print(ipot(cost, beta=1.0).plan.round(3))
        [[0.  0.5]
         [0.5 0. ]]

    Source: Xie, Wang, Wang and Zha, A Fast Proximal Point Method for Computing Exact Wasserstein Distance (UAI 2019),
    algorithm 1; Algorithm 2 of Zhang and Wang (NeurIPS 2019).
    """
    cost, a, b = checks.problem(cost, a, b)
    beta = checks.positive("beta", beta, cost.dtype)
    num_iters = checks.count("num_iters", num_iters)
    inner_iters = checks.count("inner_iters", inner_iters)
    threshold = checks.threshold(threshold, cost.dtype)
    grad = checks.choice("grad", grad, GRADS)
    return _solve(cost, a, b, beta, threshold, num_iters, inner_iters, grad)


@partial(jax.jit, static_argnames=("num_iters", "inner_iters", "grad"))
def _solve(cost, a, b, beta, threshold, num_iters, inner_iters, grad):
    if grad == "none":
        cost, a, b, beta = lax.stop_gradient((cost, a, b, beta))
    problem = (-cost / beta, a, b)
    if grad != "unroll":
        problem = lax.stop_gradient(problem)
    phi, gamma, done, converged = _potentials(*problem, threshold, num_iters, inner_iters)

    reg = beta / done
    result = transport.from_potentials(phi, gamma, -cost / reg, cost, a, b, reg, done, converged)
    if grad == "envelope":
        plan, f, g, error = lax.stop_gradient((result.plan, result.f, result.g, result.marginal_error))
        result = result._replace(plan=plan, f=f, g=g, marginal_error=error, primal_cost=jnp.sum(plan * cost))
    return result


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _potentials(scaled, a, b, threshold, num_iters, inner_iters):
    """Potentials F and G after the proximal steps, how many were done, and whether the threshold was met."""
    step = partial(_step, scaled, a, b, threshold, inner_iters)
    if threshold is None:
        return lax.fori_loop(0, num_iters, lambda _, state: step(state), _start(a, b)).outcome
    # In a batch, too, this ends when the last problem is done.
    return lax.while_loop(lambda state: ~state.converged & (state.done < num_iters), step, _start(a, b)).outcome


@_potentials.defjvp
def _derivative(num_iters, inner_iters, primals, tangents):
    """That of the same steps as a scan, which has a reverse mode: it keeps the potentials of each step, no matrix."""

    def outcome(scaled, a, b, threshold):
        step = jax.checkpoint(partial(_step, scaled, a, b, threshold, inner_iters))
        return lax.scan(lambda state, _: (step(state), None), _start(a, b), length=num_iters)[0].outcome

    return jax.jvp(outcome, primals, tangents)


class _State(NamedTuple):
    """Potentials (F and G, and G before the last step), steps done, and whether the threshold is met."""

    phi: jax.Array
    gamma: jax.Array
    before: jax.Array
    done: jax.Array
    converged: jax.Array

    @property
    def outcome(self):
        return self.phi, self.gamma, self.done, self.converged


def _start(a, b):
    gamma = jnp.where(b != 0, jnp.zeros_like(b), MASKED)
    return _State(jnp.where(a != 0, jnp.zeros_like(a), MASKED), gamma, gamma, jnp.int32(0), jnp.bool_(False))


def _step(scaled, a, b, threshold, inner_iters, state):
    """One proximal step; none for a problem that has converged."""
    terms = (state.done + 1).astype(scaled.dtype) * scaled
    gamma = jnp.where(b != 0, 2 * state.gamma - state.before, MASKED)  # doubling MASKED again and again would overflow
    for _ in range(inner_iters):
        phi = jnp.where(a != 0, log_weights(a) - log_sum_exp(terms + gamma[None, :], 1), MASKED)
        gamma = jnp.where(b != 0, log_weights(b) - log_sum_exp(terms + phi[:, None], 0), MASKED)
    new = _State(phi, gamma, state.gamma, state.done + 1, state.converged)
    if threshold is None:
        return new
    new = new._replace(converged=_settled(scaled, a, state, new) <= threshold)
    return jax.tree.map(lambda x, y: jnp.where(state.converged, x, y), state, new)


def _settled(scaled, a, before, after):
    """The larger of the marginal error and the mass that moved in a step, both in L1."""
    plan, last = (
        jnp.exp(state.phi[:, None] + state.gamma[None, :] + state.done.astype(scaled.dtype) * scaled)
        for state in (after, before)
    )
    return jnp.maximum(jnp.abs(plan - last).sum(), jnp.abs(plan.sum(1) - a).sum())
