"""pip installs what the README says, and the installed package works."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def test_requirements_are_those_of_the_package_with_training():
    named = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    assert {str(requirement) for requirement in requirements("requirements.txt")} == {
        str(Requirement(n)) for n in named
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_all_requirements(python):
    pins = {canonicalize_name(pin.name): pin for pin in requirements("constraints.txt") if at(pin, python)}
    for requirement in requirements("requirements.txt"):
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def at(requirement, python):
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def test_all_versions_are_equal():
    import fs_jax

    assert PROJECT["version"] == fs_jax.__version__
    assert f"version: {fs_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


USE = """
import pathlib, sys
import jax, jax.numpy as jnp
import fs_jax
from fs_jax import attacks, evaluation, ot
assert pathlib.Path(fs_jax.__file__).is_relative_to(sys.prefix), fs_jax.__file__
assert (pathlib.Path(fs_jax.__file__).parent / "py.typed").exists()
result = ot.sinkhorn(jnp.eye(3), reg=0.1, num_iters=50)
assert abs(result.plan.sum() - 1) < 1e-5
logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
images, labels = jnp.full((4, 4, 4, 1), 0.52), jnp.zeros(4, int)
record = attacks.autoattack(logits_fn, jax.random.key(0), images, labels, epsilon=0.1, version=["pgd-5", "square"])
assert record.stages["pgd-5"] == 0
print(evaluation.evaluate(logits_fn, images, labels, ["clean", "fgsm"], epsilon=0.1, progress=False).summary["worst"])
for name in ("models", "training", "report"):
    try:
        getattr(fs_jax, name)
    except ModuleNotFoundError as error:
        assert 'pip install "PATH_OF_THE_CLONE[train]"' in str(error), error
    else:
        raise AssertionError(f"{name} should need more packages")
"""


HIDDEN = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {extras} else find_spec(name, *rest)
import fs_jax
"""


@pytest.mark.parametrize(("use", "missing"), [
    ("fs_jax.models", "flax"), ("fs_jax.training", "flax"), ("fs_jax.report", "matplotlib"),
    ("fs_jax.data.load('digits')", "sklearn"),
])  # fmt: skip
def test_the_error_for_a_missing_package_says_what_to_install(use, missing):
    extras = {"flax", "optax", "orbax", "tensorboardX", "matplotlib", "tabulate", "sklearn", "safetensors"}
    code = HIDDEN.format(extras=extras) + use
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert f'{missing} is not installed. This needs: pip install "PATH_OF_THE_CLONE[train]"' in done.stderr


@pytest.mark.slow
def test_the_wheel_works_without_extras(tmp_path):
    source = tmp_path / "source"  # a copy: setuptools would include files of an older build
    shutil.copytree(ROOT / "fs_jax", source / "fs_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", source)
    (wheel,) = (tmp_path / "wheel").iterdir()
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", wheel)
    assert "flax" not in run(python, "-m", "pip", "list").lower()
    run(python, "-c", USE)
