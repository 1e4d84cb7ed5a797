"""ot.solve_batch without reg: after an even number of steps the plan is the independent coupling."""

import numpy as np
import ot

costs = np.random.default_rng(0).random((1, 10, 10))
weights = np.full(10, 0.1)
print("exact cost ", ot.emd2(weights, weights, costs[0]))
for steps in (1000, 1001):
    result = ot.solve_batch(costs, max_iter=steps)
    print(steps, "steps", result.value_linear[0], "marginals off by", abs(result.plan[0].sum(1) - weights).max())
print("independent", costs.mean())
