"""Optimal transport between small point clouds: differentiable, batched by `jax.vmap`, with an error in every result.

    cost = cosine_cost(x, y)                  # [n, m]
    result = sinkhorn(cost, reg=0.01)         # a Transport: plan, costs, potentials, marginal error, status
    result.primal_cost                        # ⟨plan, cost⟩, differentiable

The package depends on JAX and jaxtyping only, and on nothing else in this project. Read the modules in this order:
costs, problem, sinkhorn, ipot and released, result. The modules divergence, extension and bounds build on results. The
iterations and their derivatives are in the private modules.
"""

from fs_jax.ot.bounds import Bounds, bounds, round_to_feasible
from fs_jax.ot.costs import cosine_cost, euclidean_cost, sqeuclidean_cost
from fs_jax.ot.divergence import Divergence, sinkhorn_divergence
from fs_jax.ot.extension import barycentric_map, potential_at, relative_reg
from fs_jax.ot.fixed import fixed_plan
from fs_jax.ot.ipot import ipot
from fs_jax.ot.released import released_sinkhorn
from fs_jax.ot.result import Status, Transport
from fs_jax.ot.sinkhorn import sinkhorn
from fs_jax.ot.unbalanced import Unbalanced, unbalanced_sinkhorn

__all__ = [
    "Bounds",
    "Divergence",
    "Status",
    "Transport",
    "Unbalanced",
    "barycentric_map",
    "bounds",
    "cosine_cost",
    "euclidean_cost",
    "fixed_plan",
    "ipot",
    "potential_at",
    "relative_reg",
    "released_sinkhorn",
    "round_to_feasible",
    "sinkhorn",
    "sinkhorn_divergence",
    "sqeuclidean_cost",
    "unbalanced_sinkhorn",
]
