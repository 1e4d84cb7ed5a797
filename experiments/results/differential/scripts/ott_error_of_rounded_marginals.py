"""ott-jax: `converged` with marginals that are off, where potentials are large."""

import jax.numpy as jnp
import numpy as np
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

cost, a, b = jnp.full((2, 1), 200_000.0), jnp.array([0.5, 0.5]), jnp.array([1.0])
geom = geometry.Geometry(cost_matrix=cost, epsilon=1.0)
out = sinkhorn.Sinkhorn(threshold=1e-3)(linear_problem.LinearProblem(geom, a, b))
errors = np.asarray(out.errors)
print("converged:", bool(out.converged), "with an error of", errors[errors >= 0][-1])
print("marginal that the error is made of:", geom.marginal_from_potentials(out.f, out.g, axis=0))
print("marginal of the matrix:            ", out.matrix.sum(0))
lse, _ = geom._softmax(out.f, out.g, geom.epsilon, None, axis=0)
print("without subtracting and adding g:  ", jnp.exp(lse / geom.epsilon))
