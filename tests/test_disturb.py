"""`DISTURB=SEED` changes sums by about a unit in the last place, as a function of seed, program and shape."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CODE = """
import json, sys
import tests.conftest
import jax, jax.numpy as jnp, numpy as np

x = np.random.default_rng(0).uniform(1, 2, (64, 30)).astype(np.float32)
images, kernel = x.reshape(1, 8, 8, 30), x[:18].reshape(3, 3, 2, 30).swapaxes(2, 3)

def product(x): return x @ x.T
def product_again(x): return x @ x.T
def total(x): return x.sum(0)
def convolved(images): return jax.lax.conv(images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME")

numbers = {f.__name__: jax.jit(f)(x) for f in (product, product_again, total, jnp.exp)}
numbers |= {"convolved": jax.jit(convolved)(images), "half": jax.jit(product)(x[:32])}
json.dump({name: np.asarray(array, float).tolist() for name, array in numbers.items()}, sys.stdout)
"""


def start(seed=None):
    environment = {key: value for key, value in os.environ.items() if key != "DISTURB"}
    environment |= {} if seed is None else {"DISTURB": str(seed)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, env=environment, **pipes)


def numbers(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return {name: np.array(array) for name, array in json.loads(out).items()}


@pytest.mark.slow  # it tests only `tests.disturb`
def test_disturbances_are_about_a_unit_in_the_last_place_and_reproducible():
    alone, disturbed, again, other = map(numbers, [start(), start(1), start(1), start(2)])
    for name, exact in alone.items():
        relative = np.abs(disturbed[name] / exact - 1)
        # All terms are positive, and each changes by at most 2^-23 per factor, plus rounding.
        assert relative.mean() > 1e-8, name
        assert relative.max() < 1e-6, name
        np.testing.assert_array_equal(disturbed[name], again[name], err_msg=name)
        assert (disturbed[name] != other[name]).any(), name
    # In another program or with another shape, the same operation has other factors.
    assert (disturbed["product"] != disturbed["product_again"]).any()
    assert (disturbed["product"][:32, :32] != disturbed["half"]).any()
