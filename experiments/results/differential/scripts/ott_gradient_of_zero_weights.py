"""ott-jax: implicit gradients are NaN where a weight is zero."""

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

jax.config.update("jax_enable_x64", True)
cost = jnp.array([[0.0, 1.0, 0.3], [0.7, 0.2, 1.0], [0.4, 0.9, 0.1]])
a, b = jnp.array([0.4, 0.6, 0.0]), jnp.array([0.6, 0.3, 0.1])


def value(cost, a, b, implicit_diff=None):
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=0.1), a, b)
    return sinkhorn.Sinkhorn(threshold=1e-9, max_iterations=5000, implicit_diff=implicit_diff)(problem).matrix[0, 0]


implicit = implicit_differentiation.ImplicitDiff()  # the default
print("implicit, without the point\n", jax.grad(value)(cost[:2], a[:2], b, implicit))
print("implicit, with it\n", jax.grad(value)(cost, a, b, implicit))
print("implicit, with it as a column\n", jax.grad(value)(cost.T, b, a, implicit))
print("unrolled, with it\n", jax.grad(value)(cost, a, b))
