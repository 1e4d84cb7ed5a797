"""ott-jax: `ImplicitDiff(solver=...)` raises UnboundLocalError."""

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, lineax_implicit, sinkhorn


def value(cost):
    implicit = implicit_differentiation.ImplicitDiff(solver=lineax_implicit.solve_lineax)
    geom = geometry.Geometry(cost_matrix=cost, epsilon=0.1)
    return sinkhorn.Sinkhorn(implicit_diff=implicit)(linear_problem.LinearProblem(geom)).matrix[0, 0]


print(jax.grad(value)(jnp.array([[0.0, 1.0], [0.7, 0.2]])))
