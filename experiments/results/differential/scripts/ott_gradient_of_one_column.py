"""ott-jax: implicit gradients raise an error for a cost matrix of one column, and are inexact for a far column."""

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

jax.config.update("jax_enable_x64", True)
a, b = jnp.array([0.3, 0.7]), jnp.array([0.2, 0.4, 0.4])
move = jnp.array([1e-5, -1e-5, 0.0])


def value(b, cost, **options):
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=1.0), a, b)
    implicit = implicit_differentiation.ImplicitDiff(**options)
    plan = sinkhorn.Sinkhorn(threshold=1e-12, max_iterations=20000, implicit_diff=implicit)(problem).matrix
    return jnp.sum(jnp.array([[1.0, 2.0, 0.5], [0.3, 1.0, 0.7]])[:, : len(b)] * plan)


for far in (1e3, 1e6):
    cost = jnp.array([[2.0, far, 1.0], [0.0, far, 0.2]])
    print(f"far column at {far:g}: differences", (value(b + move, cost) - value(b - move, cost)) / 2e-5)
    for options in ({}, {"solver_kwargs": {"ridge_kernel": 1.0}}):
        gradient = jax.grad(value)(b, cost, **options)
        print(options, gradient @ move / 1e-5, "of", gradient)
one = jnp.ones(1), jnp.array([[0.0], [1.0]])
print("one column, ridge", jax.grad(value)(*one, solver_kwargs={"ridge_kernel": 1.0}))
print("one column, by default", jax.grad(value)(*one))
