"""What a solver returns, and how it is made from scaled potentials.

Inside, potentials are divided by the regularisation: plan = exp(phi_i + gamma_j + s_ij) with s = -cost / reg. A point
of marginal zero has no finite potential; `MASKED` stands for it.
"""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fs_jax.ot.logspace import MASKED, log_weights


class Status(enum.IntEnum):
    """What `Transport.status` means; the field itself is an integer array, so that it can come out of `jit`."""

    CONVERGED = 0  # the stopping test was met
    LIMIT = 1  # all iterations were done; without a threshold that is all that can be said
    NOT_FINITE = 2  # NaN or infinity in the result: it is not a solution of anything


class Transport(NamedTuple):
    """The result of a solver: a plan, its costs, and the evidence to judge them by.

    Attributes:
        plan: mass moved from each point to each, [n, m]: exp((f_i + g_j - cost_ij) / reg).
        primal_cost: ⟨plan, cost⟩, the paper's OT-distance.
        reg_cost: with the entropic term, reg·KL(plan | a bᵀ), at these potentials (ott-jax's `reg_ot_cost`).
        f: potential of each row in units of the cost, [n]; a large negative number where a is zero.
        g: potential of each column, [m].
        marginal_error: |plan 1 - a|₁ + |planᵀ 1 - b|₁, in units of mass.
        num_iters: iterations done.
        status: a `Status` as an integer: 0 CONVERGED, 1 LIMIT (also of all that is finite, where no threshold was
            given), 2 NOT_FINITE.
    """

    plan: Float[Array, "n m"]
    primal_cost: Float[Array, ""]
    reg_cost: Float[Array, ""]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    marginal_error: Float[Array, ""]
    num_iters: Int[Array, ""]
    status: Int[Array, ""]


def from_potentials(phi, gamma, scaled, cost, a, b, reg, num_iters, converged) -> Transport:
    """The result at scaled potentials, where `scaled` is -cost / reg.

    `converged` is the outcome of the solver's own stopping test, or False.
    """
    plan = jnp.exp(phi[:, None] + gamma[None, :] + scaled)
    rows, columns = plan.sum(1), plan.sum(0)
    marginal_error = jnp.abs(rows - a).sum() + jnp.abs(columns - b).sum()
    primal_cost = jnp.sum(plan * cost)
    # The dual objective, for it is exact to second order where the potentials are not quite converged.
    reg_cost = reg * (_pair(a, phi) + _pair(b, gamma) + a.sum() * b.sum() - plan.sum())
    f, g = _unscaled(a, phi, reg), _unscaled(b, gamma, reg)
    finite = jnp.isfinite(marginal_error) & jnp.isfinite(primal_cost) & jnp.isfinite(reg_cost)
    finite &= jnp.all(jnp.isfinite(f)) & jnp.all(jnp.isfinite(g))
    status = jnp.where(finite, jnp.where(converged, Status.CONVERGED, Status.LIMIT), Status.NOT_FINITE)
    return Transport(plan, primal_cost, reg_cost, f, g, marginal_error, jnp.int32(num_iters), jnp.int32(status))


def _pair(weights, potential):
    """Σ w (φ - log w) over the points that have mass."""
    return jnp.sum(jnp.where(weights != 0, weights * (potential - log_weights(weights)), 0))


def _unscaled(weights, potential, reg):
    return jnp.where(weights != 0, reg * potential, MASKED)
