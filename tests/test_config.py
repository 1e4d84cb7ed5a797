"""Configurations reject invalid fields, and JSON does not change them."""

import json

import numpy as np
import pytest

from fs_jax import config as configs
from fs_jax.config import AttackConfig, ModelConfig, TrainConfig, TransportConfig


@pytest.mark.parametrize("name", configs.PRESETS)
def test_json_does_not_change_a_preset(name):
    preset = configs.preset(name)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(preset)))) == preset
    of_mapping = configs.from_dict({"method": "trades", "method_settings": {"beta": 6.0}})
    assert of_mapping.method_settings == (("beta", 6.0),)
    assert configs.differences(preset, preset) == {}


def test_the_default_preset_has_the_papers_settings():
    paper = configs.preset("cifar10_wrn28_10")
    assert (paper.model.depth, paper.model.width, paper.batch_size, paper.epochs) == (28, 10, 60, 200)
    assert (paper.decay_epochs, paper.decay_factor, paper.learning_rate) == ((60, 90), 0.1, 0.1)
    assert (paper.transport.reg, paper.weight_decay, paper.momentum, paper.attack.epsilon) == (0.01, 2e-4, 0.9, 8 / 255)
    assert (paper.smoothing, paper.attack.step_size, paper.attack.num_steps) == (
        None,
        None,
        None,
    )  # the defaults of the method


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: configs.preset("cifar10_wrn28"),
            ValueError,
            "preset: expected one of .*Did you mean 'cifar10_wrn28_10'",
        ),
        (lambda: ModelConfig(depth=27), ValueError, "depth: expected 6n .* got 27. Try 22"),
        (lambda: ModelConfig(depth=28.0), TypeError, "depth: expected an integer"),
        (lambda: ModelConfig(dtype="float16"), ValueError, "dtype: expected one of float32, bfloat16.*mean 'bfloat16'"),
        (lambda: AttackConfig(epsilon=-0.1), ValueError, "attack.epsilon: expected .* of at least 0"),
        (lambda: AttackConfig(epsilon=8), ValueError, "attack.epsilon: .* of at most 1; got 8"),
        (lambda: AttackConfig(num_steps=0), ValueError, "attack.num_steps: .* at least 1; got 0"),
        (lambda: TransportConfig(reg=0), ValueError, "transport.reg: expected a finite number above 0; got 0"),
        (lambda: TrainConfig(method_settings={"beta": "6"}), TypeError, "method_settings: beta: expected a finite"),
        (lambda: TrainConfig(weight_average=1.5), ValueError, "weight_average: .* below 1; got 1.5"),
        (lambda: TrainConfig(smoothing=1.5), ValueError, "smoothing: .* at most 1; got 1.5"),
        (lambda: TrainConfig(learning_rate=float("nan")), ValueError, "learning_rate: expected a finite number"),
        (lambda: TrainConfig(decay_epochs=(90, 60)), ValueError, "decay_epochs: expected increasing"),
        (lambda: TrainConfig(seed=2**70), ValueError, "seed: expected an integer of at least 0 of at most 4294967295"),
        (lambda: TrainConfig(decay_epochs=(1.5,)), TypeError, "decay_epochs: expected an integer"),
        (lambda: TrainConfig(decay_epochs=60), TypeError, r"decay_epochs: expected a tuple of epochs, .*; got 60"),
        (lambda: TrainConfig(method_settings=("beta", 6.0)), TypeError, "method_settings: expected pairs of a name"),
        (lambda: configs.from_dict({"modle": {}}), ValueError, "field modle: .*Did you mean 'model'"),
        (lambda: configs.from_dict({"depth": 10}), ValueError, "configuration field depth: expected one of dataset"),
        (lambda: configs.from_dict({1: 2}), ValueError, "configuration field 1: expected one of dataset"),
        (lambda: configs.from_dict([]), TypeError, "configuration: expected a mapping of fields; got \\[\\]"),
        (lambda: configs.from_dict({"model": 3}), TypeError, "model: expected a mapping of fields; got 3"),
        (
            lambda: configs.from_dict({"model": {"deph": 10}}),
            ValueError,
            "field model.deph: expected one of depth, width.*'depth'",
        ),
    ],
)
def test_errors_name_the_argument_the_expected_and_the_given_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_numpy_become_numbers_of_python():
    config = TrainConfig(
        seed=np.int64(3), learning_rate=np.float32(0.5), decay_epochs=[np.int32(1), 2],
        method_settings={"beta": np.float64(6)}, attack=AttackConfig(np.float64(0.5)), model=ModelConfig(np.int64(10)),
    )  # fmt: skip
    plain = TrainConfig(
        seed=3, learning_rate=0.5, decay_epochs=(1, 2), method_settings={"beta": 6.0}, attack=AttackConfig(0.5),
        model=ModelConfig(10),
    )  # fmt: skip
    assert configs.to_dict(config) == configs.to_dict(plain)
    assert hash(config) == hash(plain)
    assert type(config.decay_epochs[0]) is int


def test_steps_follow_from_train_size_holdout_and_batch_size():
    config = TrainConfig(train_size=1000, holdout=100, batch_size=60, epochs=2)
    assert (config.steps_per_epoch, config.total_steps) == (15, 30)
