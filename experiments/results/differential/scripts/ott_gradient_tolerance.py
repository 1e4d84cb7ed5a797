"""ott-jax: implicit gradients are as exact as an absolute tolerance of 1e-6, however small the numbers are."""

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

jax.config.update("jax_enable_x64", True)
cost = jnp.array([[0.0, 1.0, 0.3], [0.7, 0.2, 1.0], [0.4, 0.9, 0.1]])
a, b = jnp.array([0.4, 0.35, 0.25]), jnp.array([0.6, 0.3, 0.1])
move = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def value(cost, scale, **options):
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=0.1), a, b)
    implicit = implicit_differentiation.ImplicitDiff(**options)
    plan = sinkhorn.Sinkhorn(threshold=1e-12, max_iterations=20000, implicit_diff=implicit)(problem).matrix
    return scale * plan[0, 1]


for scale in (1.0, 1e-3, 1e-6):
    difference = (value(cost + 1e-5 * move, scale) - value(cost - 1e-5 * move, scale)) / 2e-5
    print(f"a loss of {scale:g} plan[0, 1]: its derivative by cost[0, 0] is {difference:.6g} by differences")
    for options in ({}, {"solver_kwargs": {"rtol": 1e-14, "atol": 1e-14}}):
        print("   ", options, f"{jax.grad(value)(cost, scale, **options)[0, 0]:.6g}")
