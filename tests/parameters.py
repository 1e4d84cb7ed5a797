"""Marks for tests that rely on exact sums or a CUDA device, and for parameters whose programs take long to compile."""

import os

import jax
import pytest

# Some sums are exact on any machine, because their terms are rounded so that no order of adding them rounds again (see
# `fs_jax.ot.result`). They are not exact if `tests.disturb` changes their operands.
exact = pytest.mark.skipif("DISTURB" in os.environ, reason="relies on sums that are exact on every machine")


def has_cuda() -> bool:
    """Whether this machine has a CUDA device that JAX may use."""
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return False


needs_cuda = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")


def mostly_slow(values, *quick):
    """All values for `pytest.mark.parametrize`; those that are not in `quick` are marked slow."""
    values = list(values)
    assert all(value in values for value in quick), f"expected some of {values}, got {quick}"
    marks = [() if value in quick else pytest.mark.slow for value in values]
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
        for value, mark in zip(values, marks, strict=True)
    ]
