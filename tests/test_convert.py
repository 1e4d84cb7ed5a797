"""PyTorch's names and layouts, there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import convert
from fs_jax.models import WideResNet


def test_there_and_back_changes_nothing(recorded):
    state_dict = {k: v for k, v in recorded.state_dict("weights/").items() if "num_batches" not in k}
    again = convert.to_torch(convert.from_torch(state_dict))
    assert again.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_variables_are_those_of_the_network(recorded):
    model = WideResNet(recorded.depth, recorded.width)
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    ours = convert.from_torch(recorded.state_dict("weights/"))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, dict(expected))


def test_a_foreign_name_is_refused(recorded_10_1):
    weights = recorded_10_1.state_dict("weights/")
    with pytest.raises(ValueError, match=r"expected names of a Wide-ResNet.*got 'layer1\.conv\.weight'"):
        convert.from_torch({**weights, "layer1.conv.weight": np.zeros((1, 1, 3, 3))})


@pytest.mark.parametrize("name", ["fc.bias", "block2.layer.0.bn2.running_var", "block3.layer.0.convShortcut.weight"])
def test_a_missing_array_is_named(recorded_10_1, name):
    weights = recorded_10_1.state_dict("weights/")
    del weights[name]
    with pytest.raises(ValueError, match=f"1 are missing, the first is '{name}'"):
        convert.from_torch(weights)
