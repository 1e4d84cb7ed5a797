"""The examples of the solvers' page run as they stand, and do what the page says."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import ot

PAGE = pathlib.Path(ot.__file__).with_name("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def results():
    """What each example leaves behind."""
    names = []
    for block in BLOCKS:
        names.append({})
        exec(compile(block, "fs_jax/ot/README.md", "exec"), names[-1])
    return names


def test_examples(results):
    first, generator, batch, metric = results
    np.testing.assert_allclose(first["result"].plan, [[0, 0.5], [0.5, 0]], atol=1e-3)  # each to its own direction
    assert generator["losses"][-1] < 0.2 * generator["losses"][0]
    assert (batch["result"].status == ot.Status.CONVERGED).all()
    assert len(set(batch["result"].num_iters.tolist())) > 1
    # The same iterations in float32, on sums with zeros among them.
    np.testing.assert_allclose(batch["result"].primal_cost[0], batch["alone"].primal_cost, rtol=1e-5)
    # 300 steps of Adam come this near; the smallest weight matters least to the plan, and is learned last.
    np.testing.assert_allclose(jnp.exp(metric["learned"]), [2, 0.5, 0.1], atol=0.02)
