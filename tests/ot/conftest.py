"""Float64 for all tests of the solvers, and the problems that they solve."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.parameters import mostly_slow

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _float64(small_programs):
    """Float64, since formulas are compared up to rounding. Tests of float32 convert their inputs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", params=mostly_slow((7, 32, 60), 7, 60))
def golden(request):
    """Arrays recorded from the released code's IPOT and Sinkhorn at N points, by name."""
    with np.load(GOLDEN / f"ot_n{request.param}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def make_problem():
    """A function of n, m and a seed: a cost [n, m] in [0, 2], and uneven weights a [n], b [m]."""

    def make(n, m, seed=0):
        rng = np.random.default_rng(seed)
        a, b = rng.uniform(0.5, 1.5, n), rng.uniform(0.5, 1.5, m)
        return rng.uniform(0, 2, (n, m)), a / a.sum(), b / b.sum()

    return make


@pytest.fixture(scope="session")
def problem(make_problem):
    """A problem with n ≠ m."""
    return make_problem(6, 9)
