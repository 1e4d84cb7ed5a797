"""`pytest --ot-solver=package:function`: tests of a solver of optimal transport against certified solutions.

pytest loads this file whenever the package is installed, so it imports neither JAX nor NumPy: the tests, in
`fs_jax.ot.testing.suite`, are imported if a solver is given.
"""

import pathlib

_SUITE = pathlib.Path(__file__).parent / "ot" / "testing" / "suite.py"


def pytest_addoption(parser):
    """Add the three options."""
    options = parser.getgroup("fs_jax", "solvers of entropic optimal transport")
    options.addoption(
        "--ot-solver", action="append", default=[], metavar="PACKAGE:FUNCTION",
        help="also test this solver, solve(cost, a, b, reg) -> {'plan': ...}, against certified solutions; can be "
        "repeated. Its attribute `claims` says what to test.",
    )  # fmt: skip
    options.addoption("--ot-count", type=int, default=150, help="number of problems, of 15 kinds in turn (150)")
    options.addoption("--ot-seed", type=int, default=0, help="number of the first problem (0)")


def pytest_configure(config):
    """Collect the suite too."""
    named = any(arg.split("::")[0].endswith(("fs_jax.ot.testing.suite", str(_SUITE))) for arg in config.args)
    if config.getoption("--ot-solver") and not named:
        config.args.append(str(_SUITE))
