"""Parameters and marks of tests: what takes long to compile, and what rests on exact sums."""

import os

import pytest

# Sums without rounding, or so rounded that they are exact in any order (see `fs_jax.ot.result`), are so on any machine,
# but not where `tests.disturb` changes their operands.
exact = pytest.mark.skipif("DISTURB" in os.environ, reason="rests on sums that every machine has exactly")


def mostly_slow(values, *quick):
    """All values for `pytest.mark.parametrize`, those that are not `quick` marked slow."""
    values = list(values)
    assert all(value in values for value in quick), f"expected some of {values}, got {quick}"
    marks = [() if value in quick else pytest.mark.slow for value in values]
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
        for value, mark in zip(values, marks, strict=True)
    ]
