"""POT: `sinkhorn_stabilized` gives NaN for costs that a constant was added to."""

import numpy as np
import ot

a = b = np.array([0.5, 0.5])
M = np.array([[0.0, 1.0], [1.0, 0.0]])
for constant in (0.0, 1000.0):  # a constant changes no plan
    for method in ("sinkhorn_log", "sinkhorn_stabilized"):
        print(constant, method, ot.sinkhorn(a, b, M + constant, 1.0, method=method).tolist())
