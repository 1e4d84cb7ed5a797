"""The checks find known defects in the solvers of an old commit. They were found by other means, and are now fixed."""

import subprocess
import sys

import pytest

from fs_jax.ot.testing import Claims, Solver, case, findings
from tests.ot.test_testing import ROOT

COMMIT = "1b1b862"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A function of `method` and more that returns a solver: `fs_jax.ot` of that commit, under another name."""

    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")

    listed = git("ls-tree", "-r", "--name-only", COMMIT, "fs_jax/ot")
    if listed.returncode:
        pytest.skip(f"the history has no commit {COMMIT}")
    package = tmp_path_factory.mktemp("history") / "old_transport"
    package.mkdir()
    for path in listed.stdout.split():
        if path.endswith(".py"):
            text = git("show", f"{COMMIT}:{path}").stdout.replace("fs_jax.ot", package.name)
            (package / path.rsplit("/", 1)[1]).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        import old_transport  # type: ignore[import-not-found]

        def solver(method, grad="unroll", dtype="float32", threshold=1e-3, **claims):
            def solve(cost, a, b, reg):
                options = {"num_iters": 5000, "threshold": threshold, "method": method, "grad": grad}
                result = old_transport.sinkhorn(cost, a, b, reg=reg, **options)
                return dict(result._asdict(), converged=result.status == 0)

            return Solver("old", solve, Claims(dtype, threshold, batched=True, **claims))

        yield solver
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def first(solver, families, check, numbers=range(1500), **options):
    """The first finding of this check in problems of these families."""
    for number in numbers:
        if case(number).family in families:
            for finding in findings(solver, case(number), **options):
                if finding.check == check:
                    return finding
    raise AssertionError(f"{check} isn't found")


@pytest.mark.parametrize("families", [("uniform", "training", "points", "shifted", "sharp"), ("far_row",)])
def test_converged_that_is_wrong_is_found(old, families):
    of = first(old("stabilized"), families, "marginals")
    assert "says that it has converged" in of.text


def test_a_partial_underflow_of_the_kernel_is_found(old):
    # The error exceeds the total mass, since the plan is recomputed from costs whose kernel entries were flushed.
    of = first(old("kernel"), ("blocks",), "marginals")
    assert of.error > 1
    assert "says that it has converged" in of.text


def test_second_derivatives_that_are_wrong_are_found(old):
    of = first(
        old("stabilized", "implicit", "float64", 1e-6, gradients=("cost",), second_order=True), ("blocks", "far_row"),
        "second derivative", (117, 130), derivatives=True,
    )  # fmt: skip
    assert of.error > 2 * of.allowed


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_error_in_the_derivative_by_one_weight_vector_is_found(old, name):
    solver = old("stabilized", "implicit", "float64", 1e-6, gradients=(name,))
    assert "TypeError" in first(solver, ("blocks",), f"gradient by {name}", (117,), derivatives=True).text
