"""The committed problems with certified solutions are what the command writes, and are certified by NumPy alone."""

import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import transport_cases
from fs_jax.ot import sinkhorn
from fs_jax.ot.testing import FAMILIES
from tests.ot.test_testing import ROOT

FOLDER = ROOT / transport_cases.Arguments.results
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def committed():
    with np.load(FOLDER / "cases.npz") as arrays:  # without pickles, so that others can read it
        return dict(arrays)


def fields(arrays, name):
    return {key.split("/")[1]: array for key, array in arrays.items() if key.startswith(f"{name}/")}


def test_the_committed_file_is_small_and_has_problems_of_every_kind(committed):
    assert (FOLDER / "cases.npz").stat().st_size < 2e6
    kinds = [name.split("-")[0] for name in committed["names"]]
    assert kinds == [kind for kind in FAMILIES for _ in range(transport_cases.PER_KIND)]


def test_the_committed_file_is_certified_by_numpy_alone():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    alone = "import sys; sys.modules.update(dict.fromkeys(['jax', 'scipy', 'fs_jax', 'ot', 'ott']))\n" + program
    done = subprocess.run([sys.executable, "-c", alone], cwd=FOLDER, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == f"version 1: {15 * transport_cases.PER_KIND} problems are certified".split()


@pytest.mark.parametrize("spoilt", [
    lambda of: of | {"plan": of["plan"] * (1 + 1e-5)},
    lambda of: of | {"f": of["f"] + 1e-5 * of["reg"] * np.arange(len(of["f"]))},
    lambda of: of | {"a": np.roll(of["a"], 1)},
])  # fmt: skip
def test_changed_solutions_and_problems_are_not_certified(committed, spoilt):
    of = fields(committed, "uniform-15")
    arguments = ("cost", "a", "b", "reg", "plan", "f", "g")
    errors = transport_cases.CHECK["errors"]
    assert errors(*(of[name] for name in arguments))[0] <= 1.5 * of["log_plan_error"]
    assert errors(*(spoilt(of)[name] for name in arguments))[0] > 9e-6


def test_another_solver_is_within_the_bounds(committed):
    compared = 0
    for name in committed["names"]:
        of = fields(committed, name)
        if of["cost"].shape == (6, 9):  # a single shape, so that the solver is compiled once
            result = sinkhorn(of["cost"], of["a"], of["b"], reg=of["reg"], num_iters=20_000, threshold=1e-13)
            arguments = (
                *(of[x] for x in ("cost", "a", "b", "reg")),
                *map(np.asarray, (result.plan, result.f, result.g)),
            )
            bound = transport_cases.CHECK["errors"](*arguments)[0]
            if bound < 1e-6:  # otherwise the solver has not converged
                seen = of["plan"] > 1e-280
                off = np.abs(np.log(of["plan"][seen]) - np.log(arguments[4][seen])).max()
                assert off <= bound + of["log_plan_error"], name
                compared += 1
    assert compared >= 5


@pytest.mark.slow
def test_the_command_writes_the_committed_file(committed):
    written = transport_cases.cases()
    assert transport_cases.page(committed) == PAGE
    assert list(written) == list(committed)
    for name in committed["names"]:
        old, new = fields(committed, name), fields(written, name)
        # Powers and products of another library differ in their last digits.
        for of in ("cost", "a", "b", "reg", "weights"):
            np.testing.assert_allclose(new[of], old[of], rtol=1e-13, atol=1e-13 * np.abs(old[of]).max())
        # These differences are relative to exponents as large as cost / reg. Weakly connected parts of the plan amplify
        # them as they amplify the rounding errors in the bound.
        bound = 100 * (old["log_plan_error"] + new["log_plan_error"])
        np.testing.assert_allclose(new["plan"], old["plan"], rtol=bound, atol=1e-290)
        # Gradients are sums of terms that may cancel and are as large as W, which is at most 2; for the gradient with
        # respect to the cost, times mass / reg.
        for of, size in (("cost", 2 * old["a"].sum() / old["reg"]), ("a", 2), ("b", 2)):
            new_of, old_of = new[f"gradient_{of}"], old[f"gradient_{of}"]
            np.testing.assert_allclose(new_of, old_of, rtol=0, atol=10 * bound * (size + np.abs(old_of).max()))
