"""The examples on the pages of data, models and training run, in order."""

import pathlib
import re
import sys

import numpy as np
import pytest

import fs_jax

pytestmark = [
    pytest.mark.usefixtures("small_programs", "standard_promotion", "one_batch_size"),
    *([pytest.mark.slow] if sys.version_info < (3, 12) else []),
]


def run(package):
    """The names that a page's examples define, run one after the other in one namespace."""
    page = pathlib.Path(fs_jax.__file__).with_name(package) / "README.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_data():
    names = run("data")
    assert names["digits"].train_images.shape == (1437, 8, 8, 1)
    assert names["mine"].info.class_names == names["same"].info.class_names == ("ant", "bee", "cat")
    assert names["augmented"].shape == (8, 16, 16, 3)
    assert not np.array_equal(names["augmented"], names["images"])


def test_models():
    names = run("models")
    assert (names["logits"].shape, names["features"].shape) == ((2, 10), (2, 64))
    assert (names["model"].depth, names["model"].width) == (10, 1)  # read from the file
    attacks = {attack["name"]: attack["accuracy"] for attack in names["result"].summary["attacks"]}
    assert attacks["clean"] == 1  # the labels are the network's own


@pytest.mark.slow  # other tests train a configuration and a custom network
def test_training():
    names = run("training")
    assert names["run"].finished
    assert {"loss", "accuracy"} <= names["metrics"].keys()
    assert int(names["unreplicate"](names["state"]).step) == 1
