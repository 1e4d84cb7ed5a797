"""A training step equals the recorded steps of the released code, and its loss equals the formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fs_jax import data
from fs_jax._utils.images import as_float
from fs_jax.config import ModelConfig, TrainConfig, TransportConfig, preset
from fs_jax.data.augmentation import augment
from fs_jax.models import convert
from fs_jax.training import TrainState, create_state, make_optimizer, smooth_labels, smoothed_cross_entropy, train_step
from fs_jax.training.configured import learning_rate_schedule
from fs_jax.training.methods import METHODS
from tests.conftest import GOLDEN


# The deeper network is slow here; tests/models compares its logits and gradients.
@pytest.mark.parametrize(
    "recorded", [(10, 1), pytest.param((16, 2), marks=pytest.mark.slow)], ids=["wrn_10_1", "wrn_16_2"], indirect=True
)
@pytest.mark.usefixtures("float64")
def test_two_steps_of_feature_scattering_equal_the_released_code(recorded):
    config = TrainConfig(
        model=ModelConfig(recorded.depth, recorded.width, "float64"),
        transport=TransportConfig(solver="released_sinkhorn"),
        batch_size=len(recorded.labels),
    )
    variables = recorded.variables(jnp.float64)
    params = variables["params"]
    state = TrainState(params, variables["batch_stats"], make_optimizer(config).init(params), jnp.int32(0))
    step = jax.jit(lambda state, batch: train_step(state, batch, jax.random.key(0), config=config))
    for number in (0, 1):
        start = recorded.images + recorded.nhwc(f"fs{number}_noise_nchw") / 2
        state, metrics = step(state, {"images": recorded.images, "labels": recorded.labels, "start": start})
        # Attacked images and weights were recorded in float32, which resolves 6e-8 near 1.
        np.testing.assert_allclose(metrics["loss"], recorded[f"fs{number}_loss"], atol=1e-6, rtol=0)
        ours = convert.to_torch(state.variables)
        for name, array in recorded.state_dict(f"fs{number}_after/").items():
            if not name.endswith("num_batches_tracked"):
                np.testing.assert_allclose(ours[name], array, atol=1e-6, rtol=0, err_msg=name)
    assert int(state.step) == 2


def test_smoothed_labels_and_loss_equal_the_recorded_ones():
    with np.load(GOLDEN / "losses.npz") as losses:
        logits, labels = jnp.asarray(losses["logits"]), jnp.asarray(losses["labels"])
        for smoothing in (0.0, 0.3, 0.5, 0.8):
            ours = smooth_labels(labels, 10, smoothing)
            np.testing.assert_allclose(ours, losses[f"smooth_{smoothing}"], atol=1e-7)  # float32
            loss = jnp.mean(smoothed_cross_entropy(logits, labels, smoothing))
            np.testing.assert_allclose(loss, losses[f"soft_ce_{smoothing}"], rtol=1e-6)


def test_smoothed_labels_sum_to_one():
    np.testing.assert_allclose(smooth_labels(jnp.arange(7), 7, 0.37).sum(-1), 1, atol=1e-6)


def test_weight_decay_covers_every_parameter_and_the_rate_decays_at_its_epochs():
    config = TrainConfig(train_size=600, decay_epochs=(2, 3), momentum=0.0, weight_decay=0.01)  # 10 steps an epoch
    optimizer, params = make_optimizer(config), {"kernel": jnp.ones(2), "bn": {"scale": jnp.full(2, 3.0)}}
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for step in range(31):
        updates, state = optimizer.update(zeros, state, params)
        rate = 0.1 if step < 20 else 0.01 if step < 30 else 0.001
        np.testing.assert_allclose(updates["kernel"], -rate * 0.01, rtol=1e-6)
        np.testing.assert_allclose(updates["bn"]["scale"], -rate * 0.03, rtol=1e-6)
        np.testing.assert_allclose(learning_rate_schedule(config)(step), rate, rtol=1e-6)


@functools.cache
def digits_step(method):
    """A state before its first step, a batch of 32 digits, and the compiled step."""
    config, digits = dataclasses.replace(preset("digits"), method=method), data.load("digits")
    batch = {"images": digits.train_images[:32] / np.float32(255), "labels": digits.train_labels[:32]}
    return create_state(config, jax.random.key(0)), batch, jax.jit(functools.partial(train_step, config=config))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["standard", "pgd", "trades", "feature_scatter"])
def test_a_few_steps_lower_the_loss(method):
    state, batch, step = digits_step(method)
    state, first = step(state, batch, jax.random.key(1))
    for _ in range(9):
        state, last = step(state, batch, jax.random.key(1))
    assert last["loss"] < first["loss"] - 0.05
    assert int(state.step) == 10
    if method == "feature_scatter":
        assert last["transport_cost"] > 0
        assert last["natural_accuracy"] > 0.2  # 0.1 by chance


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_float32_in_64_bit_mode_too(dtype):
    config = dataclasses.replace(preset("digits"), model=ModelConfig(10, 1, dtype))
    state = jax.eval_shape(lambda: create_state(config, jax.random.key(0)))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_in_64_bit_mode(method):
    """A run may be resumed in a process with JAX_ENABLE_X64."""
    dataset = data.load("digits")
    short = dict(train_size=64, batch_size=32, epochs=2, decay_epochs=(1,))
    config = dataclasses.replace(preset("digits"), model=ModelConfig(10, 1), method=method, **short)
    images, labels = dataset.train_images[:64].reshape(2, 32, 8, 8, 1), dataset.train_labels[:64].reshape(2, 32)

    @jax.jit
    def steps():
        state = create_state(config, jax.random.key(0), dataset.info)
        for its_images, its_labels in zip(images, labels, strict=True):
            cropped = augment(jax.random.key(1), jnp.asarray(its_images), padding=1, flip=True)
            batch = {"images": as_float(cropped), "labels": jnp.asarray(its_labels)}
            state, metrics = train_step(state, batch, jax.random.key(2), config=config)
        return state, metrics

    usual = steps()
    with jax.enable_x64(True):
        again = steps()
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(usual), strict=True):
        assert ours.dtype == theirs.dtype
        # The rounding of two programs. Other weights, noise or crops give differences of 1e-3 and more.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_noise_changes_with_the_step_and_the_key():
    state, batch, step = digits_step("feature_scatter")

    def cost(number, seed):
        return float(step(state.replace(step=jnp.int32(number)), batch, jax.random.key(seed))[1]["transport_cost"])

    assert len({cost(0, 0), cost(1, 0), cost(0, 1)}) == 3
    assert cost(0, 0) == cost(0, 0)


def test_images_outside_0_to_1_raise_an_error():
    config = preset("digits")
    state = create_state(config, jax.random.key(0))
    batch = {"images": jnp.full((4, 8, 8, 1), 255.0), "labels": jnp.arange(4)}
    with pytest.raises(ValueError, match="images: expected values in"):
        train_step(state, batch, jax.random.key(0), config=config)


def test_the_optimizer_is_pytorchs_sgd():
    # p <- p - lr m, m <- momentum m + (g + decay p), by hand for two steps.
    config = TrainConfig(decay_epochs=(), weight_decay=0.1)
    p, m = 2.0, 0.0
    optimizer, params = make_optimizer(config), jnp.array(2.0)
    state = optimizer.init(params)
    for g in (1.0, -0.5):
        m = 0.9 * m + (g + 0.1 * p)
        p -= 0.1 * m
        updates, state = optimizer.update(jnp.array(g), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, p, rtol=1e-6)
