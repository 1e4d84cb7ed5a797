"""Imports go one way, and what depends on the machine is asked in one place."""

import ast
import pathlib

import pytest

import fs_jax

ROOT = pathlib.Path(fs_jax.__file__).parent

# What a room may import of this project, besides itself. (`_utils` is everybody's.)
ARROWS = {
    "_utils": set(),
    "ot": set(),
    "pytest_plugin": set(),
    "config": set(),
    "data": set(),
    "attacks": {"ot"},
    "models": {"config"},
    "evaluation": {"attacks"},
    "report": set(),
    "training": {"config", "data", "models", "ot", "attacks", "evaluation"},
}


def rooms():
    return sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} - {"__init__"})


def imported(path):
    """The rooms that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("fs_jax.")}


def test_every_room_is_listed():
    assert rooms() == sorted(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_imports_go_one_way(room):
    files = [*(ROOT / room).rglob("*.py")] or [ROOT / f"{room}.py"]
    for path in files:
        assert imported(path) - {room, "_utils", "__version__"} <= ARROWS[room], path
    if room == "ot":  # it may be used alone
        assert not any("_utils" in imported(path) for path in files)


@pytest.mark.parametrize("forbidden", ["default_backend(", "import fcntl", "import jax._src", "from jax._src"])
def test_nothing_asks_what_only_the_scripts_may(forbidden):
    assert [path for path in ROOT.rglob("*.py") if forbidden in path.read_text(encoding="utf-8")] == []


def opens_text(call):
    """Whether a call opens a text file, as far as its words tell."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    is_method = isinstance(call.func, ast.Attribute)
    modes = [
        word.value for word in call.args if isinstance(word, ast.Constant) and set(str(word.value)) <= set("rwax+bt")
    ]
    if name == "open":  # of pathlib, whose first word is the mode, but not of Pillow or tarfile, which have a path
        return (bool(modes) or not is_method) and not any("b" in mode for mode in modes)
    return is_method and name in ("read_text", "write_text")


@pytest.mark.parametrize("folder", ["fs_jax", "experiments", "tests"])
def test_text_has_an_encoding(folder):
    # By default it is the system's own, which on Windows has no τ.
    for path in (ROOT.parent / folder).rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        silent = [
            call.lineno for call in calls if opens_text(call) and "encoding" not in [word.arg for word in call.keywords]
        ]
        assert silent == [], path
