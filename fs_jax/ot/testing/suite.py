"""The tests of `pytest --ot-solver=package:function`: one for each solver and problem."""

import pytest

from fs_jax.ot.testing.checks import GAVE_UP, as_seen, has_derivatives_checked, is_claimed, judged
from fs_jax.ot.testing.families import case
from fs_jax.ot.testing.shrinking import script, shrunk
from fs_jax.ot.testing.solvers import load

SECONDS = 10.0  # for shrinking one problem; short, since a solver may fail many tests


def pytest_generate_tests(metafunc):
    """A test for each solver and problem."""
    option = metafunc.config.getoption
    numbers = range(option("--ot-seed"), option("--ot-seed") + option("--ot-count"))
    solvers = [load(name) for name in dict.fromkeys(option("--ot-solver"))]
    metafunc.parametrize(
        ("solver", "problem"),
        [
            pytest.param(
                solver, case(number), marks=pytest.mark.ot_solver, id=f"{solver.name}-{case(number).family}-{number}"
            )
            for solver in solvers
            for number in numbers
        ],
    )


@pytest.mark.filterwarnings("ignore")  # the answer is checked; warnings of the solver are not findings
def test_solver(solver, problem, request, record_property):
    """No finding on this problem. A failure prints a script with the simplest problem that fails in the same way."""
    record_property("ot_solver", solver.name)  # for the summary at the end
    if not is_claimed(solver, problem):
        record_property("ot_problem", "outside")
        pytest.skip("the solver does not claim to solve this problem")
    derivatives = has_derivatives_checked(problem.number, request.config.getoption("--ot-derivatives-every"))
    found, differentiated = judged(solver, problem, derivatives=derivatives)
    wrong = [finding for finding in found if finding.check != GAVE_UP]
    record_property("ot_problem", "wrong" if wrong else GAVE_UP if found else "right")
    if not solver.claims.gradients:
        record_property("ot_derivatives", "not claimed")
    elif derivatives:
        record_property("ot_derivatives", "checked" if differentiated else "not checked")
    if wrong:
        simplest = shrunk(solver, as_seen(solver, problem), wrong[0], seconds=SECONDS)
        told = "\n".join(f"{finding.check}: {finding.text}" for finding in wrong)
        pytest.fail(f"{told}\n\nThe simplest problem found:\n\n{script(solver, simplest, wrong[0])}", pytrace=False)
    if found:
        pytest.skip(f"{GAVE_UP}: {found[0].text}")
