"""Differential tests of entropic optimal transport: any solver against certified solutions.

    solver = load("package:function")          # solve(cost, a, b, reg) -> {"plan": ..., ...}
    for case in cases(range(1000)):
        print(findings(solver, case))           # a list of what is wrong with its answer, usually empty

The checks compute with NumPy and SciPy. Only those of derivatives, `jit` and `vmap` run JAX. Read the modules in this
order: solvers, families, reference, checks, shrinking. `python -m experiments.differential` tests solvers on thousands
of problems.
"""

from fs_jax.ot.testing.checks import (
    DERIVATIVES_EVERY,
    GAVE_UP,
    Finding,
    Verdict,
    as_seen,
    findings,
    has_derivatives_checked,
    is_claimed,
    judged,
)
from fs_jax.ot.testing.families import FAMILIES, Case, case, cases
from fs_jax.ot.testing.reference import Reference, solve_exactly
from fs_jax.ot.testing.shrinking import script, shrunk
from fs_jax.ot.testing.solvers import BUILT_IN, Claims, Solver, load

__all__ = [
    "BUILT_IN",
    "DERIVATIVES_EVERY",
    "FAMILIES",
    "GAVE_UP",
    "Case",
    "Claims",
    "Finding",
    "Reference",
    "Solver",
    "Verdict",
    "as_seen",
    "case",
    "cases",
    "findings",
    "has_derivatives_checked",
    "is_claimed",
    "judged",
    "load",
    "script",
    "shrunk",
    "solve_exactly",
]
