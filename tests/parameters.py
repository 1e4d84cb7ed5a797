"""Parameters of tests that differ in little but the time that compiling them takes."""

import pytest


def mostly_slow(values, *quick):
    """All values for `pytest.mark.parametrize`, those that are not `quick` marked slow."""
    values = list(values)
    assert all(value in values for value in quick), f"expected some of {values}, got {quick}"
    marks = [() if value in quick else pytest.mark.slow for value in values]
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
        for value, mark in zip(values, marks, strict=True)
    ]
