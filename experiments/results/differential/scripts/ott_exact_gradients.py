"""ott-jax with other options for implicit gradients, as a solver to test: a ridge, and tolerances near rounding."""

import jax
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

from fs_jax.ot.testing import BUILT_IN

IMPLICIT_DIFF = implicit_differentiation.ImplicitDiff(solver_kwargs={"ridge_kernel": 1.0, "rtol": 1e-14, "atol": 1e-14})


@jax.jit
def solve(cost, a, b, reg):
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=reg), a, b)
    out = sinkhorn.Sinkhorn(threshold=1e-6, max_iterations=5_000, implicit_diff=IMPLICIT_DIFF)(problem)
    costs = dict(primal_cost=out.primal_cost, reg_cost=out.reg_ot_cost)
    return dict(plan=out.matrix, f=out.f, g=out.g, converged=out.converged, **costs)


solve.claims = BUILT_IN["ott-log-float64"].claims
