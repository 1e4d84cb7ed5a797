"""ott-jax: implicit gradients in float32 raise an error for some ordinary problems, fewer with a larger tolerance."""

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn


def value(cost, tolerance):
    implicit = implicit_differentiation.ImplicitDiff(solver_kwargs={"rtol": tolerance, "atol": tolerance})
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=0.1))
    return sinkhorn.Sinkhorn(threshold=1e-3, max_iterations=5000, implicit_diff=implicit)(problem).matrix[0, 0]


for n in (3, 10):
    for tolerance in (1e-6, 1e-5, 1e-4):  # the first is the default
        failed = 0
        for seed in range(8):
            cost = np.random.default_rng(seed).uniform(size=(n, n)).astype(np.float32)
            try:
                jax.block_until_ready(jax.jit(jax.grad(value), static_argnums=1)(jnp.asarray(cost), tolerance))
            except Exception as error:
                failed, message = failed + 1, str(error)
        print(f"{n} x {n}, tolerance {tolerance:g}: {failed} of 8 raise an error")
print(next(line for line in message.splitlines() if "linear solver" in line))
