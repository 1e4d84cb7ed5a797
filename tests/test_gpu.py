"""A CUDA device computes what the CPU computes: networks, training steps, checkpoints and attacks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import data
from fs_jax.attacks import parse_attack
from fs_jax.config import ModelConfig, TrainConfig, preset
from fs_jax.evaluation import evaluate
from fs_jax.models import as_logits_fn
from fs_jax.training import create_state, make_model, pmap_train_step, replicate, train, train_step, unreplicate
from tests.parameters import needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]


def gpu():
    return jax.devices("cuda")[0]


def cpu():
    return jax.devices("cpu")[0]


def images_and_labels(count):
    keys = jax.random.split(jax.random.key(1))
    return (
        np.asarray(jax.random.uniform(keys[0], (count, 32, 32, 3))),
        np.asarray(jax.random.randint(keys[1], (count,), 0, 10)),
    )


def network(dtype="float32"):
    """A Wide-ResNet with random weights, and BatchNorm averages of random images."""
    config = TrainConfig(model=ModelConfig(10, 2, dtype=dtype))
    model, variables = make_model(config, 10), create_state(config, jax.random.key(0)).variables
    with jax.default_device(cpu()):
        images = images_and_labels(32)[0]
        _, averages = model.apply(jax.device_put(variables, cpu()), images, train=True, mutable=["batch_stats"])
    return model, {**variables, **averages}


def test_float32_networks_are_evaluated_without_tf32():
    model, variables = network()
    images, _ = images_and_labels(16)

    @jax.jit
    def logits(variables, images):
        return model.apply(variables, images)[0]

    with jax.default_matmul_precision("float32"):
        expected, got = (logits(*jax.device_put((variables, images), device)) for device in (cpu(), gpu()))
    # Rounding of sums of about 1,000 products in 10 layers; TF32 has relative errors of 1e-3.
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["feature_scatter", "trades"])
@pytest.mark.parametrize("solver", ["sinkhorn", "ipot", "released_sinkhorn"])
def test_a_training_step_equals_the_cpus_also_with_pmap(method, solver):
    if method == "trades" and solver != "sinkhorn":
        pytest.skip("TRADES has no transport")
    with jax.enable_x64(True):  # where rounding does not flip the sign of a gradient
        base = TrainConfig(method=method, model=ModelConfig(10, 1, dtype="float64"), batch_size=20)
        config = dataclasses.replace(base, transport=dataclasses.replace(base.transport, solver=solver))
        start = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            create_state(config, jax.random.key(0)),
        )
        images, labels = images_and_labels(20)
        batch, rng = {"images": images.astype(np.float64), "labels": labels}, jax.random.key(2)
        step = jax.jit(functools.partial(train_step, config=config))
        expected, metrics = step(*jax.device_put((start, batch, rng), cpu()))
        got, got_metrics = step(*jax.device_put((start, batch, rng), gpu()))
        split = {name: array[None] for name, array in batch.items()}
        many, many_metrics = pmap_train_step(config, [gpu()])(replicate(start, [gpu()]), split, rng)
        for state, of in ((got, got_metrics), (unreplicate(many), unreplicate(many_metrics))):
            # float64, but parts of the step are in float32: see the tests with four simulated devices.
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), state, expected)
            for name, value in metrics.items():
                np.testing.assert_allclose(of[name], value, atol=1e-5, err_msg=name)


def test_the_fused_transport_does_not_change_a_step_in_float32():
    base = TrainConfig(model=ModelConfig(10, 1), batch_size=60)
    images, labels = images_and_labels(60)
    batch, rng = {"images": images, "labels": labels}, jax.random.key(2)
    states, start = [], create_state(base, jax.random.key(0))
    with jax.default_matmul_precision("float32"):
        for device in (cpu(), gpu()):
            step = jax.jit(functools.partial(train_step, config=base))
            states.append(step(*jax.device_put((start, batch, rng), device)))
    (expected, metrics), (got, got_metrics) = jax.device_get(states)
    # A few signs of gradients near 0 differ, each of which moves a pixel by up to 16/255.
    np.testing.assert_allclose(got_metrics["loss"], metrics["loss"], rtol=1e-3)
    np.testing.assert_allclose(got_metrics["transport_cost"], metrics["transport_cost"], rtol=1e-3)
    assert largest_difference(got.params, expected.params) < 0.1 * largest_difference(start.params, expected.params)


def largest_difference(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), one, other)))


def test_a_stopped_training_resumes_from_its_checkpoint(tmp_path):
    config = dataclasses.replace(preset("digits"), epochs=2, decay_epochs=())
    dataset = data.load("digits")
    options = {"devices": [gpu()], "monitor_images": 64, "progress": False}
    stopped = train(config, dataset, tmp_path / "stopped", **options, max_minutes=0, steps_per_dispatch=5)
    assert not stopped.finished
    resumed = train(config, dataset, tmp_path / "stopped", **options)
    whole = train(config, dataset, tmp_path / "whole", **options)
    assert resumed.finished
    assert whole.finished
    # Bit for bit on an H200; atomic additions could change the order of sums.
    assert largest_difference(resumed.variables, whole.variables) < 1e-3
    again = train(config, dataset, tmp_path / "whole", **options)  # restores what it saved
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)


@pytest.mark.parametrize("attack", ["pgd-20", "cw-20", "apgd-ce", "fab-t"])
def test_attacks_find_the_same_as_on_the_cpu(attack):
    model, variables = network()
    images, _ = images_and_labels(40)
    labels = np.asarray(as_logits_fn(model, jax.device_put(variables, cpu()))(images).argmax(-1))
    robust = []
    for device in (cpu(), gpu()):
        with jax.default_device(device):
            logits_fn = as_logits_fn(model, jax.device_put(variables, device))
            result = evaluate(logits_fn, images, labels, [parse_attack(attack, 3 / 255)], progress=False)
            robust.append([record["robust"] for record in result.records])
    assert 0.05 < np.mean(robust[0]) < 0.99
    # Rounding changes the path of an attack; images near the boundary can differ.
    assert np.mean(np.array(robust[0]) != np.array(robust[1])) <= 0.1
