"""The networks of the repository are restored exactly; damaged files raise an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, weights
from fs_jax.config import preset, to_dict
from fs_jax.models import WideResNet, convert

ABOUT = {"config": to_dict(preset("digits"))}


@pytest.fixture(scope="module")
def network():
    model = WideResNet(10, 1)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_a_restored_network_has_the_same_bits(network, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", 50_000)  # so that there are several
    model, variables = network
    weights.keep(model, variables, ABOUT, "digits/ours", tmp_path)
    assert len(weights.manifest(tmp_path)["digits/ours"]["shards"]) > 1
    weights.main(["digits/ours", "--output", str(tmp_path / "a.safetensors"), "--folder", str(tmp_path)])
    restored_model, restored = convert.load_weights(tmp_path / "a.safetensors")
    assert (restored_model.depth, restored_model.width, restored_model.mean) == (10, 1, 0.5)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), variables)
    jax.tree.map(np.testing.assert_array_equal, dict(rounded), restored)


def test_a_changed_byte_raises_an_error(network, tmp_path):
    weights.keep(*network, ABOUT, "ours", tmp_path)
    shard = tmp_path / "ours-0.xz"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"ours-0.xz: expected SHA-256"):
        weights.restore("ours", tmp_path / "a.safetensors", tmp_path)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["oars", "--output", "a.safetensors"], "name: expected one of ours; got 'oars'. Did you mean 'ours'"),
    (["ours", "--output", "a.pt"], "output: expected a new .safetensors file"), (["ours"], "output: expected a new"),
    (["--output", "a.safetensors"], "name: expected the name of a network"),
])  # fmt: skip
def test_wrong_options_raise_an_error(words, message, network, tmp_path):
    weights.keep(*network, ABOUT, "ours", tmp_path)
    with pytest.raises(ValueError, match=message):
        weights.main([*words, "--folder", str(tmp_path)])


def test_only_networks_of_runs_are_added_under_new_names(network, tmp_path):
    weights.keep(*network, ABOUT, "ours", tmp_path)
    for name in ("ours", "../ours", "a b"):
        with pytest.raises(ValueError, match="name: expected"):
            weights.keep(*network, ABOUT, name, tmp_path)
    with pytest.raises(ValueError, match="keep: expected the folder of a run"):
        weights.keep(*network, {"file": "a.pt"}, "theirs", tmp_path)


def test_the_printed_command_evaluates_the_network(tmp_path, capsys):
    weights.main(["digits/standard", "--output", str(tmp_path / "net.safetensors")])
    words = capsys.readouterr().out.split("python -m experiments.evaluate ")[1].split()
    place = words.index("--suite")  # replaced by a quick attack
    del words[place : place + 2]
    evaluate.main([*words, "--attacks", "clean", "--num-images", "8", "--no-progress"])
    assert (tmp_path / "net" / "result.json").exists()


def test_all_networks_of_the_repository_can_be_restored(tmp_path):
    assert weights.manifest(weights.FOLDER)
    for number, name in enumerate(weights.manifest(weights.FOLDER)):
        weights.restore(name, tmp_path / f"{number}.safetensors")
        model, _ = convert.load_weights(tmp_path / f"{number}.safetensors")
        assert f"WRN-{model.depth}-{model.width}" == weights.manifest(weights.FOLDER)[name]["network"]
