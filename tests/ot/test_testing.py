"""The tool that tests solvers: it finds nothing in a correct solver, and the defects of deliberately broken ones."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import differential
from fs_jax.ot import sinkhorn
from fs_jax.ot.testing import (
    FAMILIES,
    GAVE_UP,
    Case,
    Claims,
    Finding,
    Solver,
    case,
    cases,
    findings,
    has_derivatives_checked,
    judged,
    load,
    script,
    shrunk,
    solve_exactly,
)
from fs_jax.ot.testing.reference import gradients, gradients_of_iterations
from tests.ot import broken_solvers
from tests.parameters import mostly_slow

pytest_plugins = ["pytester"]

ROOT = pathlib.Path(__file__).parents[2]
# Two problems of each kind.
NUMBERS = range(2 * len(FAMILIES))
BROKEN = {
    "stopped_early": "marginals",
    "flag_before_the_plan": "marginals",
    "dropped_mask": "masked",
    "cost_of_a_shifted_matrix": "primal_cost",
    "entropy_of_another_sign": "reg_cost",
    "potentials_of_another_gauge": "potentials",
    "too_good": "marginal_error",
    "raising": "raises",
    "raising_in_a_callback": "raises",
    "narrow": "dtype",
    "swapped_weights": "marginals",
    "dropped_square_mask": "masked",
    "shifting_in_place": "changes its arguments",
    "half_gradient": "gradient by a",
    "words": "raises",
    "flushed_kernel": "lost entries",
    "constant_potentials": "gradient by cost",
    "constant_plan": "gradient of primal_cost by cost",
    "constant_in_second_order": "second derivative",
}

SLOW = (
    "dropped_mask",
    "dropped_square_mask",
    "half_gradient",
    "constant_potentials",
    "constant_plan",
    "constant_in_second_order",
    "flushed_kernel",
)  # some seconds each


# What a script prints just before the number that shows the finding.
SHOWN = {"masked": "without weight:", "marginals": "off by", "changes its arguments": "changed by", "potentials": "by"}


def broken(name):
    return load(f"tests.ot.broken_solvers:{name}")


def found(solver, numbers, derivatives=False):
    return {
        number: [f for f in findings(solver, case(number), derivatives=derivatives) if f.check != GAVE_UP]
        for number in numbers
    }


@pytest.mark.slow
def test_nothing_is_found_in_a_correct_solver():
    assert not any(found(broken("right"), NUMBERS).values())


@pytest.mark.parametrize("name", [
    "fs_jax-stabilized-float32", "fs_jax-stabilized-float64", "fs_jax-log-float32", "fs_jax-kernel-float32",
    "fs_jax-implicit-float64",
])  # fmt: skip
@pytest.mark.slow
def test_nothing_is_found_in_our_solvers(name):
    assert not any(found(load(name), NUMBERS).values())
    one_shape = [number for number in range(120) if case(number).cost.shape == (6, 9)]  # compiled once
    assert len({case(number).family for number in one_shape}) > 5
    assert not any(found(load(name), one_shape, derivatives=True).values())


@pytest.mark.parametrize(("name", "check"), [
    pytest.param(*of, marks=pytest.mark.slow if of[0] in SLOW else ()) for of in BROKEN.items()
])  # fmt: skip
def test_a_defect_is_found_named_and_reproduced_by_a_script_on_a_simple_problem(name, check, tmp_path):
    solver, derivatives = broken(name), name.startswith("constant") or name == "half_gradient"
    small = (number for number in range(300) if not derivatives or case(number).cost.size <= 60)
    for number in small:
        of = [f for f in findings(solver, case(number), derivatives=derivatives) if f.check == check]
        if of:
            break
    assert of, f"{check} isn't found"
    simplest = shrunk(solver, case(number), of[0], seconds=120)  # most take one second, but more on a busy machine
    # A small kernel has no underflow, and for errors in derivatives, shrinking is limited since each shape is compiled.
    assert simplest.cost.size <= (30 if derivatives or name == "flushed_kernel" else 9 if "square" in name else 4)
    again = findings(solver, simplest, derivatives=derivatives)
    assert check in {f.check for f in again}
    text = script(solver, simplest, of[0])
    assert len(text.splitlines()) <= 30
    (tmp_path / "shown.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "shown.py")], capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 or check == "raises", done.stderr
    if check in SHOWN:
        assert float(re.search(rf"{SHOWN[check]} (\S+)", done.stdout)[1]) > 0
    assert check in text.splitlines()[0]


def test_findings_name_the_cause_and_what_to_do():
    (raised,) = findings(broken("raising_in_a_callback"), case(0))
    assert raised.text.startswith("OSError: no disk (broken_solvers.py")
    (narrow,) = findings(broken("narrow"), case(0))
    assert narrow.text == (
        'expected a plan of float64; got float32. For a solver of float32, set solve.claims = Claims(dtype="float32").'
    )
    (admitted,) = findings(broken("admitting"), case(0))
    assert admitted.check == GAVE_UP
    assert re.match("off by .* of the mass, and says that it has not converged", admitted.text)


def test_scripts_compute_in_the_claimed_dtype():
    finding = Finding("marginals", "", 1.0, 0.0)
    of_jax = script(load("fs_jax-log-float64"), case(0), finding)
    assert 'jax.config.update("jax_enable_x64", True)' in of_jax
    assert 'os.environ.setdefault("JAX_ENABLE_X64", "1")' in script(broken("right"), case(0), finding)
    compile(of_jax, "script", "exec")


def derivatives_of(name, number, factor):
    """The verdict on a solver whose gradient with respect to `a` is multiplied by a factor."""

    def solve(cost, a, b, reg):
        return broken_solvers.scaled_gradient(cost, a, b, reg, factor)

    claims = Claims(name, gradients=("a",), batched=True)  # it claims 1e-3 only
    return judged(Solver("scaled", solve, claims), case(number), derivatives=True)


@pytest.mark.slow
def test_a_gradient_that_is_off_by_two_per_cent_is_found_in_an_exact_solution():
    right, off = (derivatives_of("float64", 62, factor) for factor in (1.0, 1.02))
    assert (right.findings, right.differentiated, off.differentiated) == ([], True, True)
    assert [finding.check for finding in off.findings] == ["gradient by a"]


def test_gradients_of_iterations_are_those_of_automatic_differentiation(make_problem):
    cost, a, b = make_problem(4, 5)
    weights = np.random.default_rng(0).normal(size=(1, 4, 5))

    def value(cost, a, b):
        return jnp.sum(weights[0] * sinkhorn(cost, a, b, reg=0.3, num_iters=3, method="log").plan)

    got = gradients_of_iterations(Case(cost, a, b, 0.3), weights, error=0.0, limit=3)
    for name, wanted in zip(("cost", "a", "b"), jax.grad(value, (0, 1, 2))(cost, a, b), strict=True):
        constant = 0 if name == "cost" else (got[name][0] - wanted).mean()
        # The same float64 operations in another order.
        np.testing.assert_allclose(got[name][0] - constant, wanted, atol=1e-12)


def test_problems_with_derivatives_are_one_in_each_block_and_of_many_kinds():
    picked = [number for number in range(600) if has_derivatives_checked(number, 15)]
    assert [number // 15 for number in picked] == list(range(40))
    assert len({case(number).family for number in picked}) > 10
    assert all(min(case(number).cost.shape) > 1 for number in picked)
    assert all(has_derivatives_checked(number, 1) for number in range(3))


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "uniform", "far_column", "zeros"))
def test_problems_are_valid_and_solved_exactly(family):
    for problem in cases(list(FAMILIES).index(family) + len(FAMILIES) * k for k in range(8)):
        assert problem.family == family
        assert problem.cost.shape == (len(problem.a), len(problem.b))
        assert min(problem.a.min(), problem.b.min()) >= 0
        assert problem.a.sum() == pytest.approx(problem.b.sum(), rel=1e-12)
        reference = solve_exactly(problem)
        assert reference is not None
        off = np.abs(reference.plan.sum(1) - problem.a).sum() + np.abs(reference.plan.sum(0) - problem.b).sum()
        assert off <= 1e-10 * problem.a.sum()
        accurate = reference.plan > 1e-290  # smaller entries have lost digits
        exponents = (reference.f[:, None] + reference.g - problem.cost) / problem.reg
        # Rounding of exponents of up to ten thousand.
        logs = np.log(reference.plan[accurate])
        np.testing.assert_allclose(logs, exponents[accurate], atol=1e-9 * (1 + problem.ratio))


def test_a_number_determines_its_problem():
    np.testing.assert_array_equal(case(17).cost, case(17).cost)
    one, other = case(0), case(15 * len(FAMILIES))
    assert one.cost.shape != other.cost.shape or not np.array_equal(one.cost, other.cost)


@pytest.mark.parametrize("number", mostly_slow([0, 1, 4, 9], 1))
def test_derivatives_of_the_reference_equal_finite_differences(number):
    problem = next(p for p in cases(range(number, 1000, len(FAMILIES))) if p.cost.size > 4 and p.ratio < 1e3)
    rng = np.random.default_rng(0)
    weights, direction = rng.normal(size=problem.cost.shape), rng.normal(size=problem.cost.shape)
    slope = np.sum(gradients(problem, solve_exactly(problem), weights)["cost"] * direction)
    step = 1e-4 * problem.reg

    def value(t):
        return np.sum(weights * solve_exactly(problem._replace(cost=problem.cost + t * direction)).plan)

    # Fourth order in a step of 1e-4 of reg, plus rounding of 1e-11 of the plan over the step.
    differences = (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)
    assert slope == pytest.approx(differences, rel=1e-5, abs=1e-5 * np.abs(weights).max() / problem.reg)


def test_the_reference_is_the_limit_of_sinkhorn():
    problem = case(2)
    result = sinkhorn(*map(jnp.asarray, problem[:3]), reg=problem.reg, num_iters=20_000, threshold=1e-12)
    assert result.converged
    np.testing.assert_allclose(result.plan, solve_exactly(problem).plan, atol=1e-11)


@pytest.mark.parametrize("answer", [
    lambda plan: plan, lambda plan: {}, lambda plan: {"plan": plan[:1]},
    lambda plan: {"plan": plan, "f": plan, "g": plan[0]}, lambda plan: {"plan": plan, "converged": np.ones(2)},
])  # fmt: skip
def test_answers_of_another_shape_are_findings(answer):
    solver = Solver("odd", lambda cost, a, b, reg: answer(np.outer(a, b)))
    assert [f.check for f in findings(solver, case(17))] == ["shape"]


def test_outputs_of_none_are_ignored():
    def solve(cost, a, b, reg):
        return {**broken_solvers.right(cost, a, b, reg), "f": None, "converged": None}

    assert findings(Solver("none", solve), case(17)) == []


def test_an_exception_is_reported_with_its_line_in_the_solver():
    wide = next(problem for problem in cases(range(100)) if problem.cost.shape[0] < problem.cost.shape[1])
    (finding,) = findings(broken("raising"), wide)
    assert re.search(r"\(broken_solvers.py, line \d+: raise IndexError\(.index 5", finding.text)


def test_problems_outside_the_claims_are_not_checked():
    kernel = load("ott-kernel-float32")
    sharp = next(problem for problem in cases(range(100)) if problem.family == "sharp" and problem.cost.size > 100)
    assert sharp.ratio > kernel.claims.largest_ratio
    assert findings(kernel, sharp) == []


@pytest.mark.parametrize(("name", "message"), [
    ("fs_jax-stabilised-float32", "or the name of a built-in solver; .*did you mean 'fs_jax-stabilized-float32'"),
    ("mylib.wrong.raises", "expected package.module:function, .*did you mean 'mylib.wrong:raises'"),
    ("nosuch", "expected package.module:function, or the name of a built-in solver; got 'nosuch'"),
    (":", "expected package.module:function, or the name of a built-in solver; got ':'"),
    ("numpy:pi", "solver: expected a function; got 'numpy:pi', a float"),
    ("tests.ot.broken_solvers:claims_a_dictionary", r"expected claims_a_dictionary.claims to be .*Claims\(\*\*dict"),
    ("nowhere:solve", "solver: expected package.module:function that can be imported; got 'nowhere:solve'"),
    ("numpy:sinkhorn", "solver: expected package.module:function that can be imported; got 'numpy:sinkhorn'"),
])  # fmt: skip
def test_unknown_solvers_raise(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize(("claims", "message"), [
    ({"gradients": ("plan",)}, r"claims.gradients: expected a tuple of some of .*; got \('plan',\)"),
    ({"gradients": "a"}, "claims.gradients: expected a tuple"),
    ({"dtype": "float16"}, "claims.dtype: expected one of 'float32', 'float64', got 'float16'"),
    ({"marginal_error": -1}, "claims.marginal_error: expected a positive number; got -1"),
])  # fmt: skip
def test_invalid_claims_raise(claims, message):
    with pytest.raises(ValueError, match=message):
        Claims(**claims)


def test_negative_problem_numbers_raise():
    with pytest.raises(ValueError, match="number: expected an integer of at least 0; got -1"):
        case(-1)


def test_a_finding_has_the_error_and_the_allowed_error():
    solver = broken("stopped_early")
    number, (first, *_) = next((number, of) for number, of in found(solver, NUMBERS).items() if of)
    assert isinstance(first, Finding)
    assert first.error > first.allowed > 0
    assert "says that it has converged" in first.text
    assert case(number).number == number


@pytest.fixture
def run_pytest(pytester, monkeypatch):
    """Runs pytest in a folder without tests, with the plugin loaded as for an installed package."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*options):
        done = pytester.runpytest_subprocess("-p", "fs_jax.pytest_plugin", "-p", "no:xdist", *options)
        return done, "\n".join(done.outlines + done.errlines)

    return run


@pytest.mark.slow
def test_pytest_tests_a_solver_and_shows_what_fails(run_pytest, tmp_path):
    one_of_each = ("--ot-count", str(len(FAMILIES)), "--ot-seed", "15")
    done, text = run_pytest("--ot-solver=tests.ot.broken_solvers:right", *one_of_each)
    assert done.parseoutcomes() == {"passed": 14, "skipped": 1}  # for one problem it reports that it gave up
    done, text = run_pytest(
        "--ot-solver=tests.ot.broken_solvers:raising", "--pyargs", "fs_jax.ot.testing.suite", *one_of_each
    )
    wide = [case(number) for number in range(15, 30) if case(number).cost.shape[0] < case(number).cost.shape[1]]
    assert done.parseoutcomes() == {"passed": len(FAMILIES) - len(wide), "failed": len(wide)}
    node = f"fs_jax.ot.testing.suite::test_solver[tests.ot.broken_solvers:raising-{wide[0].family}-{wide[0].number}]"
    assert f"FAILED {node}" in text
    assert "tests.ot.broken_solvers:raising: problems tested: 15, gave up: 0 (0%), claims no derivatives" in text
    shown = text.split("The simplest problem found:")[1].split("____")[0]
    (tmp_path / "shown.py").write_text(shown, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "shown.py"], capture_output=True, text=True, encoding="utf-8")
    assert "IndexError: index 5 is out of bounds" in done.stderr
    done, _ = run_pytest("--ot-solver=tests.ot.broken_solvers:raising", *one_of_each, node)
    assert done.parseoutcomes() == {"failed": 1}


@pytest.mark.slow
def test_pytest_runs_the_suite_unless_tests_are_named_or_deselected(run_pytest, pytester):
    solver = "tests.ot.broken_solvers:right"
    pytester.makeini(f"[pytest]\naddopts = --ot-solver={solver} --ot-count=1 --strict-markers")
    mine = pytester.makepyfile(test_mine="def test_one(): pass")
    for options, count in (
        ((), 2), ((".",), 2), ((mine,), 1), ((f"{mine}::test_one",), 1), (("-m", "not ot_solver"), 1),
        ((f"--ot-solver={solver}",), 2), (("fs_jax.ot.testing.suite", "--junitxml=results.xml"), 1),
    ):  # fmt: skip
        assert run_pytest(*options)[0].parseoutcomes()["passed"] == count, options
    assert 'testcase classname="fs_jax.ot.testing.suite"' in (pytester.path / "results.xml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_pytest_finds_a_wrong_gradient_and_says_how_many_were_checked(run_pytest):
    solver = "--ot-solver=tests.ot.broken_solvers:half_gradient"
    _, text = run_pytest(solver, "--ot-count=12", "--ot-derivatives-every=6")
    assert "gradient by a: off by" in text
    assert re.search(r"problems tested: 12, gave up: .*, derivatives checked: [12] of 2 problems", text)


@pytest.mark.slow
def test_pytest_reports_invalid_options_and_does_nothing_without_a_solver(run_pytest):
    assert run_pytest()[0].ret == pytest.ExitCode.NO_TESTS_COLLECTED
    for options, message in (
        (("--ot-solver=nowhere:s",), "--ot-solver: solver: expected package.module:function that can be imported; got "
         "'nowhere:s': No module named 'nowhere'. If it is in the current folder, use `python -m pytest`"),
        (("--ot-solver=numpy:add", "--ot-count=0"), "--ot-count: expected at least 1; got 0"),
        (("--ot-solver=numpy:add", "--ot-seed=-1"), "--ot-seed: expected at least 0; got -1"),
        (("--ot-count=5",), "--ot-count: expected --ot-solver=package:function too"),
    ):  # fmt: skip
        done, text = run_pytest(*options)
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        assert message in text


def test_the_plugin_is_installed_and_imports_no_library():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (module,) = project["entry-points"]["pytest11"].values()
    program = f"import {module}, sys; print(*{{'jax', 'numpy', 'scipy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert module in {each.value for each in importlib.metadata.entry_points(group="pytest11")}


@pytest.mark.slow
def test_the_command_reports_findings_and_resumes(tmp_path):
    command = [
        sys.executable, "-m", "experiments.differential", "--count", "30", "--workdir", str(tmp_path / "run"),
        "--solvers", "tests.ot.broken_solvers:right", "tests.ot.broken_solvers:stopped_early",
    ]  # fmt: skip

    def run(*more):
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")

    done = run()
    assert done.returncode == 1, done.stderr
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "says that it has converged" in text
    (shown,) = (tmp_path / "run" / "scripts").iterdir()
    assert "stopped_early" in shown.read_text(encoding="utf-8")
    lines = (tmp_path / "run" / "findings.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 60
    assert run("--count", "31").returncode == 1
    again = (tmp_path / "run" / "findings.jsonl").read_text(encoding="utf-8").splitlines()
    assert (again[:60], len(again)) == (lines, 62)
    assert run("--count", "0").returncode == 2


@pytest.mark.slow
def test_the_command_notices_changed_helpers_and_removes_scripts(tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "solver.py").write_text("from mine.helper import solve\n", encoding="utf-8")
    helper = "from tests.ot.broken_solvers import right, stopped_early as early\ndef solve(*given): return {}(*given)\n"

    def run(name, *more):
        (package / "helper.py").write_text(helper.format(name), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "experiments.differential", "--count", "4", "--solvers", "mine.solver:solve",
             "--workdir", str(tmp_path / "run"), *more],
            cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip

    assert run("right").returncode == 0
    assert run("early").returncode == 1
    assert len([*(tmp_path / "run" / "scripts").iterdir()]) == 1
    again = run("right")
    assert (again.returncode, [*(tmp_path / "run" / "scripts").iterdir()]) == (0, [])
    assert "4 answers are from an earlier run of the same code" in again.stdout
    assert "from an earlier run" not in run("right", "--fresh").stdout
    assert len((tmp_path / "run" / "findings.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_the_command_raises_for_other_folders_and_without_solvers(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # `main` sets it; later tests' processes must not have it
    (tmp_path / "module.py").touch()
    for arguments, message in (
        (["--workdir", str(tmp_path)], "workdir: expected a new or empty folder, or one with findings.jsonl"),
        (["--solvers", "--workdir", str(tmp_path / "new")], "solvers: expected at least one name; got none"),
    ):
        with pytest.raises(ValueError, match=message):
            differential.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["module.py"]


def test_the_command_lists_solvers_with_their_claims():
    assert re.search(r"ott-log-float32 +dtype='float32', marginal_error=0.002, gradients=", differential.listing())
