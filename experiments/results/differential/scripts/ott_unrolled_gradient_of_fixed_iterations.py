"""ott-jax: the gradient of a fixed number of iterations isn't that of its value."""

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

jax.config.update("jax_enable_x64", True)
cost = jnp.array([[0.0, 1.0, 0.3], [0.7, 0.2, 1.0], [0.4, 0.9, 0.1]])
a, b = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.6, 0.3, 0.1])


def value(cost, **options):
    geom = geometry.Geometry(cost_matrix=cost, epsilon=0.1)
    solver = sinkhorn.Sinkhorn(inner_iterations=1, max_iterations=3, implicit_diff=None, **options)
    return solver(linear_problem.LinearProblem(geom, a, b)).matrix[0, 0]


scan = dict(min_iterations=3)  # min_iterations == max_iterations: a scan
loop = dict(threshold=-1.0)  # never reached: the same 3 iterations, as a while loop
step = 1e-6 * jnp.zeros((3, 3)).at[0, 0].set(1.0)
for options in (scan, loop):
    difference = (value(cost + step, **options) - value(cost - step, **options)) / 2e-6
    print(
        options,
        "value",
        value(cost, **options),
        "gradient",
        jax.grad(value)(cost, **options)[0, 0],
        "difference",
        difference,
    )
