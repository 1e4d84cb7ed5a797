"""Subpackages import each other in one direction only, and only one file asks for the machine's backend."""

import ast
import pathlib

import pytest

import fs_jax
from tests.conftest import NEWEST_ONLY, NEWEST_ONLY_FILES

ROOT = pathlib.Path(fs_jax.__file__).parent

# What a subpackage may import from this project, besides itself and `_utils`.
ARROWS = {
    "_utils": set(),
    "ot": set(),
    "pytest_plugin": {"ot"},
    "config": set(),
    "data": set(),
    "attacks": {"ot"},
    "models": {"config"},
    "evaluation": {"attacks"},
    "report": set(),
    "training": {"config", "data", "models", "ot", "attacks", "evaluation"},
}


def subpackages():
    return sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} - {"__init__"})


def imported(path):
    """The subpackages that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("fs_jax.")}


def test_all_subpackages_are_listed():
    assert subpackages() == sorted(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_imports_have_one_direction(name):
    files = [*(ROOT / name).rglob("*.py")] or [ROOT / f"{name}.py"]
    for path in files:
        assert imported(path) - {name, "_utils", "__version__"} <= ARROWS[name], path
    if name == "ot":  # it can be used without the others
        assert not any("_utils" in imported(path) for path in files)


@pytest.mark.parametrize("forbidden", ["default_backend(", "import fcntl", "import jax._src", "from jax._src"])
def test_forbidden_calls_and_imports_do_not_occur(forbidden):
    assert [path for path in ROOT.rglob("*.py") if forbidden in path.read_text(encoding="utf-8")] == []


def opens_text(call):
    """Whether a call opens a text file, judging by its arguments."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    is_method = isinstance(call.func, ast.Attribute)
    modes = [
        word.value for word in call.args if isinstance(word, ast.Constant) and set(str(word.value)) <= set("rwax+bt")
    ]
    if name == "open":  # pathlib's `open` starts with the mode; those of Pillow and tarfile with a path
        return (bool(modes) or not is_method) and not any("b" in mode for mode in modes)
    return is_method and name in ("read_text", "write_text")


@pytest.mark.parametrize("folder", ["fs_jax", "experiments", "tests"])
def test_text_has_an_encoding(folder):
    # The default encoding depends on the system; on Windows it has no τ.
    for path in (ROOT.parent / folder).rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        silent = [
            call.lineno for call in calls if opens_text(call) and "encoding" not in [word.arg for word in call.keywords]
        ]
        assert silent == [], path


def test_tests_that_the_oldest_python_skips_exist():
    files = list(pathlib.Path(__file__).parent.rglob("test_*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert not [name for name in NEWEST_ONLY if f"def {name}" not in text]
    assert set(NEWEST_ONLY_FILES) <= {path.name for path in files}
