"""Four simulated devices compute what one device computes."""

import dataclasses
import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fs_jax import data, ot
from fs_jax.config import AttackConfig, TransportConfig, preset
from fs_jax.training import (
    create_state,
    init_state,
    make_train_step,
    pmap_train_step,
    pmapped,
    replicate,
    train_step,
    unreplicate,
)
from fs_jax.training.configured import pmap_train_steps
from fs_jax.training.methods import METHODS
from fs_jax.training.methods.feature_scatter import _over_devices
from fs_jax.training.methods.method import Context
from fs_jax.training.parallel import AXIS, share
from tests.parameters import mostly_slow

pytestmark = pytest.mark.usefixtures("small_programs")

DIGITS = data.load("digits")


def configure(method="feature_scatter", dtype="float64", **changes):
    base = preset("digits")
    model = dataclasses.replace(base.model, dtype=dtype)
    return dataclasses.replace(
        base,
        method=method,
        batch_size=16,
        model=model,
        **changes,
    )


def batch_of(count, dtype):
    return {"images": jnp.asarray(DIGITS.train_images[:count] / 255, dtype), "labels": DIGITS.train_labels[:count]}


def split(batch, devices):
    return {name: array.reshape(devices, -1, *array.shape[1:]) for name, array in batch.items()}


def as_type(state, dtype):
    # With NumPy, which does not compile a program for each shape.
    return jax.tree.map(
        lambda x: np.asarray(x).astype(dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), state
    )


@pytest.mark.parametrize("method", mostly_slow(["feature_scatter", "trades"], "feature_scatter"))
@pytest.mark.usefixtures("float64")
@pytest.mark.usefixtures("standard_promotion")
def test_four_devices_equal_one_with_a_custom_network(method):
    class Network(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, images, train=False):
            x = nn.Dense(6, dtype=images.dtype)(images.reshape(len(images), -1))
            x = nn.BatchNorm(not train, momentum=0.9, dtype=images.dtype, axis_name=self.axis_name)(x)
            return nn.Dense(10, dtype=images.dtype)(jnp.tanh(x))

    batch, rng = batch_of(16, jnp.float64), jax.random.key(1)
    others = optax.sgd(0.1), METHODS[method].build(epsilon=0.1)
    start = as_type(init_state(Network(), *others, jax.random.key(0), batch["images"]), jnp.float64)
    one = jax.jit(make_train_step(Network(), *others))
    step = pmapped(Network(AXIS), *others)
    check_four_devices(start, one, step, batch, rng)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("float64")
def test_four_devices_equal_one_on_the_whole_batch(method):
    config = configure(method)
    start = as_type(create_state(config, jax.random.key(0)), jnp.float64)
    batch, rng = batch_of(16, jnp.float64), jax.random.key(1)
    one = jax.jit(functools.partial(train_step, config=config))
    check_four_devices(start, one, pmap_train_step(config), batch, rng)


def check_four_devices(start, one, step, batch, rng):
    devices = jax.devices()
    assert len(devices) == 4
    single, many = start, replicate(start, devices)
    for _ in range(2):
        single, expected = one(single, batch, rng)
        many, metrics = step(many, split(batch, 4), rng)
    for name, value in expected.items():
        np.testing.assert_allclose(unreplicate(metrics)[name], value, atol=1e-5, err_msg=name)
    # In float64, where rounding does not flip the sign of a gradient. The sums are in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), unreplicate(many), single)
    for copy in range(1, 4):  # all devices have the same state
        jax.tree.map(lambda x, copy=copy: np.testing.assert_array_equal(x[0], x[copy]), many)


@pytest.fixture
def always_sharded(monkeypatch):
    monkeypatch.setattr(sys.modules["fs_jax.training.methods.feature_scatter"], "MOST_GATHERED", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "always_sharded")
def test_gradient_of_a_sharded_transport_equals_that_of_a_gathered_one():
    rng = np.random.default_rng(0)
    natural, attacked, weights = rng.normal(size=(16, 5)), rng.normal(size=(16, 5)), rng.normal(size=(5, 5))
    sharded = functools.partial(ot.sinkhorn, reg=0.01, num_iters=50)

    def gradient(transport, axis_name, natural, attacked):
        cost, solve = _over_devices(transport, len(natural), axis_name)
        return jax.grad(lambda x: solve(cost(natural, jnp.tanh(x @ weights))).primal_cost)(attacked)

    whole = gradient(sharded, None, natural, attacked)
    for transport in (sharded, lambda cost: sharded(cost)):  # the second has no axis_name argument
        on_each = jax.pmap(functools.partial(gradient, transport, AXIS), AXIS)
        parts = on_each(natural.reshape(4, 4, 5), attacked.reshape(4, 4, 5))
        # The sharded gradient is that of the sum of four copies, one per device. Rounding: 50 iterations with cost /
        # reg in the hundreds amplify float64's 1e-16 about a thousandfold.
        np.testing.assert_allclose(parts.reshape(16, 5), 4 * whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("transport", "images_per_device", "gathers"),
    [(ot.sinkhorn, 65, False), (ot.sinkhorn, 64, True), (lambda cost, reg: ot.sinkhorn(cost, reg=reg), 65, True)],
)
def test_no_device_holds_the_cost_matrix_of_a_large_batch(transport, images_per_device, gathers):
    images = jnp.zeros((4, images_per_device, 3, 1, 1))

    def on_each(keys, images):
        method = METHODS["feature_scatter"].build(epsilon=0.1, transport=functools.partial(transport, reg=0.01))

        def apply(variables, images, **_):
            return images.reshape(len(images), -1), variables

        batch = {"images": images, "labels": jnp.zeros(images_per_device, jnp.int32)}
        return method.loss(apply, {"params": {}, "batch_stats": {}}, batch, Context(keys, axis_name=AXIS))[0]

    keys = jax.random.split(jax.random.key(0), images.shape[:2])
    program = str(jax.make_jaxpr(jax.pmap(on_each, AXIS))(keys, images))
    total = 4 * images_per_device
    assert (f"f32[{total},{total}]" in program) == gathers


@pytest.mark.slow
def test_transport_per_device_is_a_different_problem():
    # Otherwise the test above could not detect an error in "global".
    config = configure(dtype="float32")
    per_device = dataclasses.replace(config, transport=TransportConfig(scope="device"))
    batch, costs = split(batch_of(16, jnp.float32), 4), []
    for each in (config, per_device):
        _, metrics = pmap_train_step(each)(replicate(create_state(each, jax.random.key(0))), batch, jax.random.key(1))
        costs.append(float(metrics["transport_cost"][0]))
    assert abs(costs[0] - costs[1]) > 1e-3 * costs[0]


@pytest.mark.slow
def test_dispatches_of_any_length_give_the_same_weights_bit_for_bit():
    # PGD with one step: it draws crops and noise as feature scattering does.
    config = configure("pgd", dtype="float32", attack=AttackConfig(epsilon=0.1, num_steps=1))
    device = jax.devices()[:1]
    steps = pmap_train_steps(config, DIGITS.info, tuple(device))
    images, labels, order = share((DIGITS.train_images, DIGITS.train_labels, np.arange(1437, dtype=np.int32)), device)

    def run(*lengths):
        state, first = replicate(create_state(config, jax.random.key(0)), device), 0
        for length in lengths:
            state, _ = steps(state, images, labels, order, jax.random.key(2), jnp.int32(first), jnp.int32(length))
            first += length
        return unreplicate(state)

    jax.tree.map(np.testing.assert_array_equal, run(5), run(1, 3, 1))


@pytest.mark.slow
def test_batches_follow_the_order_of_the_epoch():
    # With a negligible learning rate, the metrics of two steps are those of the initial weights on each batch.
    config = configure("standard", dtype="float32", learning_rate=1e-12)
    info = dataclasses.replace(DIGITS.info, crop_padding=0)
    device = jax.devices()[:1]
    state = create_state(config, jax.random.key(0))
    order = np.random.default_rng(0).permutation(1437).astype(np.int32)
    data_on_device = share((DIGITS.train_images, DIGITS.train_labels, order), device)
    steps = pmap_train_steps(config, info, tuple(device))
    _, sums = steps(replicate(state, device), *data_on_device, jax.random.key(2), jnp.int32(3), jnp.int32(2))
    expected = 0
    for number in (3, 4):
        chosen = order[16 * number : 16 * number + 16]
        batch = {"images": DIGITS.train_images[chosen] / np.float32(255), "labels": DIGITS.train_labels[chosen]}
        expected += train_step(state, batch, jax.random.key(0), config=config)[1]["loss"]
    np.testing.assert_allclose(unreplicate(sums)["loss"], expected, rtol=1e-5)  # float32 sums


def test_a_batch_that_the_devices_do_not_divide_raises_an_error():
    config = dataclasses.replace(preset("digits"), batch_size=30)
    with pytest.raises(ValueError, match=r"multiple of the number of devices, 4; got 30\. Try 32, or 3 devices"):
        pmap_train_step(config)


def test_arrays_without_an_axis_of_devices_raise_an_error():
    config = configure("standard", dtype="float32")
    step, state = pmap_train_step(config), create_state(config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"state: expected arrays with a leading axis of 4 .*See `replicate`"):
        step(state, split(batch_of(16, jnp.float32), 4), jax.random.key(1))
    with pytest.raises(ValueError, match=r"batch: expected arrays with a leading axis of 4 devices; got \(16, 8,"):
        step(replicate(state), batch_of(16, jnp.float32), jax.random.key(1))
