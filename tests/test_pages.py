"""The examples of the solvers' page run as they stand, and do what the page says."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import ot

pytestmark = pytest.mark.usefixtures("small_programs")

PAGE = pathlib.Path(ot.__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(block):
    """What an example leaves behind."""
    names = {}
    exec(compile(BLOCKS[block], "fs_jax/ot/README.md", "exec"), names)
    return names


def test_all_examples_are_tested():
    assert len(BLOCKS) == 11


@pytest.mark.usefixtures("standard_promotion")
def test_first_example():
    result = run(0)["result"]
    np.testing.assert_allclose(result.plan, [[0, 0.5], [0.5, 0]], atol=1e-3)  # each to its own direction


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_generator():
    losses = run(1)["losses"]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.usefixtures("standard_promotion")
def test_batch():
    names = run(2)
    result, alone = names["result"], names["alone"]
    assert (result.status == ot.Status.CONVERGED).all()
    assert len(set(result.num_iters.tolist())) > 1
    # The same iterations in float32, on sums with zeros among them.
    np.testing.assert_allclose(result.primal_cost[0], alone.primal_cost, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_learned_metric():
    # 300 steps of Adam come this near; the smallest weight matters least to the plan, and is learned last.
    np.testing.assert_allclose(jnp.exp(run(3)["learned"]), [2, 0.5, 0.1], atol=0.02)


@pytest.mark.usefixtures("standard_promotion")
def test_divergence():
    names = run(4)
    x, distance = names["x"], names["distance"]
    assert distance(x, x) == 0
    np.testing.assert_allclose(distance(x, x + 0.5), 0.5, rtol=0.02)  # entropic: a little less than the exact 0.5
    assert distance(names["moved"], x) < 0.05 * distance(x, x + 0.5)


@pytest.mark.usefixtures("standard_promotion")
def test_new_points():
    np.testing.assert_allclose(run(5)["mapped"], [[1.2, 0.85]], atol=0.15)  # from 200 points, blurred


@pytest.mark.usefixtures("standard_promotion")
def test_bounds():
    names = run(6)
    assert names["lower"] <= names["upper"] <= names["lower"] * 1.02


@pytest.mark.usefixtures("standard_promotion")
def test_dustbin():
    np.testing.assert_allclose(run(7)["matched"], [[0, 1], [1, 0], [0, 0]], atol=1e-3)


@pytest.mark.usefixtures("standard_promotion")
def test_unbalanced():
    result = run(8)["result"]
    assert result.converged.all()
    to_outliers = result.plan[:, :, :3].sum((1, 2))
    assert to_outliers[0] < 1e-3
    assert 0.01 < to_outliers[1] < 0.09
    np.testing.assert_allclose(to_outliers[2], 0.1, rtol=0.01)  # a gap of 1e-3 of a cost of some 5


@pytest.mark.usefixtures("standard_promotion")
def test_sharded_rows():
    names = run(9)
    # The same iterations in float32, on sums in another order.
    np.testing.assert_allclose(names["value"], names["alone"], rtol=1e-5)
    whole = jax.grad(
        lambda x: ot.sinkhorn(ot.sqeuclidean_cost(x, names["y"]), reg=0.1, num_iters=2000, threshold=1e-3).primal_cost
    )
    np.testing.assert_allclose(names["gradient"], whole(names["x"]), atol=1e-6)


def test_a_solver_of_ones_own_is_checked():
    found = run(10)["found"]
    checks = {finding.check for of in found.values() for finding in of}
    assert checks == {"marginals"}  # fifty iterations aren't enough for all, and it says that they are
