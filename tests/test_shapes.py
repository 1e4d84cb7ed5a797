"""Shapes and types are as in the signatures, checked at run time in a subprocess."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow  # half a minute, and few changes affect it
def test_shapes_and_types_are_as_signatures_say():
    run = subprocess.run(
        [sys.executable, "-c", "from tests import shapes; shapes.main()"],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},  # does not change what is traced
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "All shapes" in run.stdout
