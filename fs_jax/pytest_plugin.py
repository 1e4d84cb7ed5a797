"""`pytest --ot-solver=package:function`: tests of a solver of optimal transport against certified solutions.

pytest loads this file whenever the package is installed, so it imports neither JAX nor NumPy: the tests, in
`fs_jax.ot.testing.suite`, are imported if they are to be run.
"""

import collections
import os
import pathlib

import pytest

_NAME = "fs_jax.ot.testing.suite"
_SUITE = pathlib.Path(__file__).parent / "ot" / "testing" / "suite.py"


def pytest_addoption(parser):
    """Add the options."""
    options = parser.getgroup("fs_jax", "solvers of entropic optimal transport")
    options.addoption(
        "--ot-solver", action="append", default=[], metavar="PACKAGE:FUNCTION",
        help="also test this solver, solve(cost, a, b, reg) -> {'plan': ...}, against certified solutions, unless the "
        "command names files or tests; can be repeated. Its attribute `claims` says what it claims.",
    )  # fmt: skip
    options.addoption("--ot-count", type=int, help="how many problems, of 15 kinds in turn (150)")
    options.addoption("--ot-seed", type=int, help="number of the first problem (0)")
    options.addoption(
        "--ot-derivatives-every", type=int, metavar="N",
        help="check derivatives, jit and vmap of one problem in N, if the solver claims them (10)",
    )  # fmt: skip


_DEFAULTS = {"count": 150, "seed": 0, "derivatives-every": 10}


def pytest_configure(config):
    """Collect the suite too, unless files or tests are named on the command line."""
    config.addinivalue_line("markers", "ot_solver: a problem for the solvers of --ot-solver")
    given = config.getoption("--ot-solver")
    for name, default in _DEFAULTS.items():
        destination = f"ot_{name.replace('-', '_')}"
        value, least = getattr(config.option, destination), 0 if name == "seed" else 1
        if value is not None and not given:
            raise pytest.UsageError(f"--ot-{name}: expected --ot-solver=package:function too")
        if value is not None and value < least:
            raise pytest.UsageError(f"--ot-{name}: expected at least {least}; got {value}")
        setattr(config.option, destination, default if value is None else value)
    # Failures are reported under the suite's module name; that name is accepted as an argument too.
    config.args[:] = [str(_SUITE) + arg.removeprefix(_NAME) if arg.startswith(_NAME) else arg for arg in config.args]
    if given and all(os.path.isdir(arg) for arg in config.args):
        config.args.append(str(_SUITE))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Refuse solvers that can't be imported, before anything is collected."""
    if any(arg.startswith(str(_SUITE)) for arg in session.config.args):
        from fs_jax.ot.testing.solvers import load

        for name in session.config.getoption("--ot-solver"):
            try:
                load(name)
            except ValueError as error:
                raise pytest.UsageError(f"--ot-solver: {error}") from None


def pytest_pycollect_makemodule(module_path, parent):
    """The suite, under a name that can be pasted into a command: its path is outside of the project that runs it."""
    if module_path == _SUITE:
        return pytest.Module.from_parent(parent, path=module_path, nodeid=_NAME)
    return None


def pytest_terminal_summary(terminalreporter):
    """Report how many problems and derivatives of each solver were tested."""
    if not terminalreporter.config.getoption("--ot-solver"):
        return
    seen = collections.defaultdict(collections.Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            # Other tests may have properties that aren't pairs.
            told = dict(each for each in getattr(report, "user_properties", ()) if isinstance(each, tuple))
            if getattr(report, "when", None) == "call" and "ot_solver" in told:
                seen[told["ot_solver"]].update(["problems", told["ot_problem"], told.get("ot_derivatives")])
    if seen:
        terminalreporter.section("solvers of optimal transport")
    for solver, of in seen.items():
        tested = of["problems"] - of["outside"]
        parts = [f"problems tested: {tested}", f"gave up: {of['gave up']} ({of['gave up'] / max(tested, 1):.0%})"]
        if of["outside"]:
            parts.append(f"outside of its claims: {of['outside']}")
        told = f"derivatives checked: {of['checked']} of {of['checked'] + of['not checked']} problems"
        parts.append("claims no derivatives" if of["not claimed"] else told)
        terminalreporter.line(f"{solver}: {', '.join(parts)}")
