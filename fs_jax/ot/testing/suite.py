"""The tests of `pytest --ot-solver=package:function`: one for each solver and problem."""

import pytest

from fs_jax.ot.testing.checks import DERIVATIVES_EVERY, GAVE_UP, as_seen, findings, is_claimed
from fs_jax.ot.testing.families import case
from fs_jax.ot.testing.shrinking import script, shrunk
from fs_jax.ot.testing.solvers import load

SECONDS = 10.0  # for shrinking one problem; short, since a solver may fail many tests


def pytest_generate_tests(metafunc):
    """A test for each solver and problem."""
    option = metafunc.config.getoption
    if option("--ot-count") < 1 or option("--ot-seed") < 0:
        raise pytest.UsageError("expected --ot-count of at least 1 and --ot-seed of at least 0")
    numbers = range(option("--ot-seed"), option("--ot-seed") + option("--ot-count"))
    try:
        solvers = [load(name) for name in option("--ot-solver")]
    except ValueError as error:
        raise pytest.UsageError(f"--ot-solver: {error}") from None
    metafunc.parametrize(
        ("solver", "problem"),
        [(solver, case(number)) for solver in solvers for number in numbers],
        ids=[f"{solver.name}-{case(number).family}-{number}" for solver in solvers for number in numbers],
    )


@pytest.mark.filterwarnings("ignore")  # only the answer is tested
def test_solver(solver, problem):
    """There are no findings; a failure prints a script with the simplest problem that fails in the same way."""
    if not is_claimed(solver, problem):
        pytest.skip("not claimed by the solver")
    found = findings(solver, problem, derivatives=problem.number % DERIVATIVES_EVERY == 0)
    wrong = [finding for finding in found if finding.check != GAVE_UP]
    if wrong:
        simplest = shrunk(solver, as_seen(solver, problem), wrong[0], seconds=SECONDS)
        told = "\n".join(f"{finding.check}: {finding.text}" for finding in wrong)
        pytest.fail(f"{told}\n\nThe simplest problem found:\n\n{script(solver, simplest, wrong[0])}", pytrace=False)
    if found:
        pytest.skip(f"{GAVE_UP}: {found[0].text}")
