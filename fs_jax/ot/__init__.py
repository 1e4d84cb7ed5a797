"""Optimal transport between small point clouds: differentiable, batched by `jax.vmap`, with evidence in the result.

    cost = cosine_cost(x, y)                  # [n, m]
    result = sinkhorn(cost, reg=0.01)         # a Transport: plan, costs, potentials, marginal error, status
    result.primal_cost                        # ⟨plan, cost⟩, differentiable

The room needs JAX and nothing else of this project.
"""

from fs_jax.ot.costs import cosine_cost, sqeuclidean_cost
from fs_jax.ot.ipot import ipot
from fs_jax.ot.released import released_sinkhorn
from fs_jax.ot.sinkhorn import sinkhorn
from fs_jax.ot.transport import Status, Transport

__all__ = ["Status", "Transport", "cosine_cost", "ipot", "released_sinkhorn", "sinkhorn", "sqeuclidean_cost"]
