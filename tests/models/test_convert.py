"""Weights are converted from and to PyTorch exactly; other files raise an error, and nothing is executed."""

import ast
import json
import pathlib
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import convert_weights
from fs_jax.config import to_dict
from fs_jax.models import WideResNet, convert
from fs_jax.training import Checkpoints

ROOT = pathlib.Path(convert.__file__).parents[2]

pytestmark = pytest.mark.usefixtures("small_programs")


@pytest.fixture(scope="module")
def weights(recorded_10_1):
    """A WRN-10-1's arrays by PyTorch name, in float32."""
    return {name: np.asarray(array, np.float32) for name, array in recorded_10_1.state_dict("weights/").items()}


@pytest.fixture(scope="module")
def wrn_16_2():
    """A network without default values: sizes, classes, a normalisation per channel."""
    model = WideResNet(16, 2, num_classes=7, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.uniform(0.1, 0.2, leaf.shape).astype(np.float32), shapes)


def assert_same(variables, expected):
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_a_round_trip_changes_nothing(recorded):
    state_dict = {k: v for k, v in recorded.state_dict("weights/").items() if "num_batches" not in k}
    again = convert.to_torch(convert.from_torch(state_dict))
    assert again.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


# Files


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_a_saved_network_is_loaded_exactly(tmp_path, wrn_16_2, suffix):
    if suffix == ".pt":
        pytest.importorskip("torch")
    model, variables = wrn_16_2
    path = tmp_path / f"network{suffix}"
    convert.save_weights(path, model, variables)
    again, loaded = convert.load_weights(path)
    assert_same(loaded, variables)
    assert (again.depth, again.width, again.num_classes) == (16, 2, 7)
    # The buffers are float32.
    np.testing.assert_allclose([again.mean, again.std], [model.mean, model.std], rtol=1e-7)


def test_a_loaded_network_has_the_recorded_logits(tmp_path, recorded_10_1, weights):
    # The names in the paper's files, whose networks take images in [-1, 1].
    np.savez(tmp_path / "paper.npz", **{f"module.basic_net.{name}": array for name, array in weights.items()})
    model, variables = convert.load_weights(tmp_path / "paper.npz")
    apply = jax.jit(model.apply)
    images = recorded_10_1.images.astype(np.float32)
    # As in tests/models: float32 after ten layers.
    np.testing.assert_allclose(apply(variables, images)[0], recorded_10_1["eval_logits"], atol=1e-4, rtol=0)
    convert.save_weights(tmp_path / "ours.safetensors", model, variables)
    again, loaded = convert.load_weights(tmp_path / "ours.safetensors")
    assert again == model
    np.testing.assert_array_equal(apply(loaded, images)[0], apply(variables, images)[0])


@pytest.mark.parametrize(("suffix", "half"), [(".npz", np.float16), (".safetensors", jnp.bfloat16)])
def test_prefixes_unused_blocks_and_half_precision_are_handled(tmp_path, weights, suffix, half):
    # As in RobustBench's descendants of TRADES: two prefixes, an unused group of blocks, buffers outside the network.
    unused = {name.replace("block1", "sub_block1"): array for name, array in weights.items() if "block1" in name}
    stored = {f"module.model.{name}": array.astype(half) for name, array in {**weights, **unused}.items()}
    buffers = {"normalize.mean": np.full((1, 3, 1, 1), 0.25), "normalize.std": np.full((1, 3, 1, 1), 0.5)}
    path = tmp_path / f"trades{suffix}"
    if suffix == ".npz":
        np.savez(path, **stored, **buffers)
    else:
        safetensors.numpy.save_file({**stored, **buffers}, path)
    model, variables = convert.load_weights(path)
    assert (model.depth, model.width, model.num_classes, model.mean, model.std) == (10, 1, 10, 0.25, 0.5)
    assert_same(variables, jax.tree.map(lambda x: x.astype(half).astype(np.float32), convert.from_torch(weights)))


def test_normalisation_is_not_guessed(tmp_path, weights):
    path = tmp_path / "bare.npz"
    np.savez(path, **weights)
    with pytest.raises(
        ValueError, match=r"mean, std: expected values, as .*bare\.npz does not contain .* Pass 0 and 1"
    ):
        convert.load_weights(path)
    assert convert.load_weights(path, mean=0, std=(1, 1, 1))[0] == WideResNet(10, 1, mean=0, std=1)
    with pytest.raises(ValueError, match="mean, std: expected both or neither"):
        convert.load_weights(path, mean=0)
    np.savez(path, **weights, mu=np.zeros(3))
    with pytest.raises(ValueError, match="expected both buffers of the normalisation, or neither; got only mean"):
        convert.load_weights(path)


def test_a_failed_write_leaves_no_file(tmp_path, wrn_16_2):
    with pytest.raises(ValueError, match=r"suffix: expected one of \.safetensors, .*got '\.safetensor'\. Did you mean"):
        convert.save_weights(tmp_path / "network.safetensor", *wrn_16_2)
    with pytest.raises(ValueError, match="variables: expected the variables of a Wide-ResNet; got 'dense/kernel'"):
        convert.save_weights(
            tmp_path / "n.npz", wrn_16_2[0], {"params": {"dense": {"kernel": np.ones((1, 1))}}, "batch_stats": {}}
        )
    assert not list(tmp_path.iterdir())


def test_the_script_converts_files(tmp_path, weights, capsys):
    np.savez(tmp_path / "bare.npz", **weights)
    convert_weights.main([str(tmp_path / "bare.npz"), str(tmp_path / "a.safetensors"), "--mean", "0", "--std", "1"])
    assert "a.safetensors: WRN-10-1, 10 classes, input (images - 0.0) / 1.0" in capsys.readouterr().out
    model, variables = convert.load_weights(tmp_path / "a.safetensors")
    assert model == WideResNet(10, 1, mean=0, std=1)
    assert_same(variables, convert.from_torch(weights))
    with pytest.raises(ValueError, match=r"target: expected a new file; got .* exists"):
        convert_weights.main([str(tmp_path / "bare.npz"), str(tmp_path / "a.safetensors")])


def test_the_script_converts_the_network_of_a_run(tmp_path, digits_state):
    config, state = digits_state
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(state)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    convert_weights.main([str(tmp_path), str(tmp_path / "digits.npz")])
    model, variables = convert.load_weights(tmp_path / "digits.npz")
    assert model == WideResNet(10, 1)
    assert_same(variables, state.variables)
    with pytest.raises(ValueError, match="expected a run with a best checkpoint"):
        convert_weights.main([str(tmp_path), str(tmp_path / "best.npz"), "--checkpoint", "best"])


# Invalid files


def test_the_error_for_another_architecture_names_an_array(weights):
    with pytest.raises(ValueError, match=r"0\.bn1\.bias'; 1 unexpected, the first 'layer1\.0\.conv1\.weight'"):
        convert.from_torch({"conv1.weight": np.zeros((64, 3, 3, 3)), "layer1.0.conv1.weight": np.zeros((64, 64, 3, 3))})
    with pytest.raises(
        ValueError, match=r"Wide-ResNet \(here of depth 10\); got 1 unexpected, the first 'ema\.fc\.bias'\."
    ):
        convert.from_torch({**weights, "ema.fc.bias": np.zeros(10)})


@pytest.mark.parametrize("name", ["fc.bias", "block2.layer.0.bn2.running_var", "block3.layer.0.convShortcut.weight"])
def test_a_missing_array_is_named(weights, name):
    with pytest.raises(ValueError, match=rf"1 missing, the first '{name}'\."):
        convert.from_torch({key: array for key, array in weights.items() if key != name})


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "block2.layer.0.conv2.weight",
            np.zeros((32, 32, 5, 5)),
            r"of shape \(32, 32, 3, 3\); got float64 \(32, 32, 5, 5",
        ),
        ("bn1.bias", np.zeros(64, int), r"expected floating point of shape \(64,\); got int64 \(64,\)"),
        ("fc.bias", np.array([np.nan, np.inf] + 8 * [0.0]), "expected finite values; got 2 that are NaN or infinite"),
    ],
    ids=["shape", "type", "NaN"],
)
def test_the_error_for_an_invalid_array_names_it(weights, name, array, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        convert.from_torch({**weights, name: array})


class Malicious:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def bare_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def torch_archive(path, content):
    # torch.save writes a zip archive with a pickle in it.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


def object_array(path, content):
    np.savez(path, **{"conv1.weight": np.array([content], object)})


@pytest.mark.parametrize(
    ("write", "name", "error"),
    [
        (bare_pickle, "weights.pt", "UnpicklingError"),
        (torch_archive, "weights.pt", "UnpicklingError"),
        (object_array, "weights.npz", "ValueError"),
        (bare_pickle, "weights.npz", "ValueError"),
        (bare_pickle, "weights.safetensors", "SafetensorError"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_nothing_in_a_file_is_executed(tmp_path, write, name, error):
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    trace, path = tmp_path / "trace", tmp_path / name
    write(path, {"conv1.weight": Malicious(trace)})
    with pytest.raises(ValueError, match=rf"weights.*contains only arrays; .*\({error}\).*not executed"):
        convert.load_weights(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # otherwise the file is created
    assert trace.exists()


def test_pytorch_loads_weights_only():
    """Without PyTorch, the test above doesn't see how its files are loaded."""
    calls = [
        node
        for path in (ROOT / "fs_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}["weights_only"] == "True"


def test_networks_are_found_in_the_checkpoints_of_pytorch(tmp_path, weights):
    torch = pytest.importorskip("torch")
    state_dict = {f"module.basic_net.{name}": torch.from_numpy(array) for name, array in weights.items()}
    checkpoint = {"net": state_dict, "acc": 0.9, "epoch": 200, "optimizer": {"state": {0: torch.zeros(3)}}}
    torch.save(checkpoint, tmp_path / "checkpoint-200")  # the paper's files have no suffix
    model, variables = convert.load_weights(tmp_path / "checkpoint-200")
    assert model == WideResNet(10, 1)
    assert_same(variables, convert.from_torch(weights))
    torch.save({"last": state_dict, "best": state_dict}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"two\.pt: expected the arrays of one network, by name; got 2"):
        convert.load_weights(tmp_path / "two.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="got 0 networks"):
        convert.load_weights(tmp_path / "none.pt")


def test_the_error_without_pytorch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it weren't installed
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ImportError, match=r"PyTorch files require PyTorch 2\.10 .*load_weights and save_weights"):
        convert.load_weights(tmp_path / "weights.pt")
