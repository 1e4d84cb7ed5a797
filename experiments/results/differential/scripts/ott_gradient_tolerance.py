"""ott-jax: implicit gradients of small numbers are inexact, since the linear solver stops at a residual of 1e-6."""

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

jax.config.update("jax_enable_x64", True)
x, y = np.random.default_rng(0).normal(size=(2, 300, 2))
cost = jnp.array(((x[:, None] - y) ** 2).sum(-1))
move = 1e-5 * jnp.array(np.random.default_rng(1).normal(size=cost.shape))


def value(cost, **options):
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=1.0))
    implicit = implicit_differentiation.ImplicitDiff(**options)
    plan = sinkhorn.Sinkhorn(threshold=1e-12, max_iterations=20000, implicit_diff=implicit)(problem).matrix
    return jnp.sum(plan**2)


exact = jax.grad(value)(cost, solver_kwargs={"rtol": 1e-14, "atol": 1e-14})
print("by differences:", (value(cost + move) - value(cost - move)) / 2, "by this gradient:", jnp.vdot(exact, move))
for tolerance in (1e-6, 1e-8, 1e-10):  # the first is the default
    gradient = jax.grad(value)(cost, solver_kwargs={"rtol": 1e-6, "atol": tolerance})
    error = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
    print(f"atol={tolerance:g}: off by {100 * error:.2g}%")
