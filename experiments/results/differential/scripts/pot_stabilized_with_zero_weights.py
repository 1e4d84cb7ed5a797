"""POT: `sinkhorn_stabilized` fails where a weight is zero, if it absorbs."""

import numpy as np
import ot

a, b = np.array([0.5, 0.5, 0.0]), np.array([0.9, 0.1])
M = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
for rows in (2, 3):  # without the point that has no mass, and with it
    for method in ("sinkhorn_log", "sinkhorn_stabilized"):
        plan, log = ot.sinkhorn(a[:rows], b, M[:rows], 0.02, method=method, log=True)
        off = abs(plan.sum(1) - a[:rows]).sum() + abs(plan.sum(0) - b).sum()
        print(rows, method, plan.tolist(), "marginals off by", off, "error", log["err"][-1])
