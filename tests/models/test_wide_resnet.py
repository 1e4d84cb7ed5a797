"""Logits, gradients and running statistics of the network equal those recorded from the released code."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fs_jax._utils.backend import compiler_options
from fs_jax.models import BatchNorm, WideResNet, convert

pytestmark = pytest.mark.usefixtures("small_programs")


def build(recorded, dtype):
    return WideResNet(recorded.depth, recorded.width, dtype=dtype), recorded.variables(dtype)


# float64: the same sums in another order; measured 1e-15. float32: 2^-24 = 6e-8 per operation, for logits of size 1
# after 10 to 16 layers.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.usefixtures("float64")
def test_logits_and_features_equal_the_recorded_ones(recorded, dtype, tolerance):
    model, variables = build(recorded, dtype)
    images = recorded.images.astype(dtype)
    logits, features = jax.jit(model.apply)(variables, images)
    assert logits.dtype == features.dtype == dtype
    np.testing.assert_allclose(logits, recorded["eval_logits"], atol=tolerance, rtol=0)
    np.testing.assert_allclose(features, recorded["eval_features"], atol=tolerance, rtol=0)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    (logits, _), moved = train(variables, images)
    np.testing.assert_allclose(logits, recorded["train_logits"], atol=tolerance, rtol=0)
    ours = convert.to_torch({"params": variables["params"], "batch_stats": moved["batch_stats"]})
    for name, array in recorded.state_dict("after_train_forward/").items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(ours[name], array, atol=tolerance, rtol=0, err_msg=name)


def assert_gradient_is_the_recorded(recorded, model, variables, tolerance):
    def loss(images):
        log_probabilities = jax.nn.log_softmax(model.apply(variables, images)[0])
        return -jnp.mean(log_probabilities[jnp.arange(len(images)), recorded.labels])

    expected = recorded.nhwc("eval_ce_grad")
    # The recorded gradient is with respect to images in [-1, 1], so half of that for images in [0, 1].
    gradient = jax.jit(jax.grad(loss))(recorded.images.astype(model.dtype)) / 2
    assert gradient.dtype == model.dtype
    np.testing.assert_allclose(gradient, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


# For the deeper network, comparing the logits is fast; the other tests are slow.
shallow_is_quick = pytest.mark.parametrize(
    "recorded", [(10, 1), pytest.param((16, 2), marks=pytest.mark.slow)], ids=["wrn_10_1", "wrn_16_2"], indirect=True
)


@shallow_is_quick
@pytest.mark.usefixtures("float64")
def test_input_gradient_equals_the_recorded_one(recorded):
    # It was recorded in float32: 1e-6 of its largest entry.
    assert_gradient_is_the_recorded(recorded, *build(recorded, np.float64), 1e-6)


@shallow_is_quick
@pytest.mark.usefixtures("float64")
def test_input_gradient_in_float32_equals_the_recorded_one_for_the_same_active_units(recorded, monkeypatch):
    # A ReLU's derivative jumps at 0. The WRN-16-2 has 245,760 units per image, and some inputs are closer to 0 than
    # float32 resolves: one is -1.8e-7, which is positive on some CPUs and changes the gradient by 7%. So the active
    # units are those of float64 here. The remaining error, of float32 sums in 16 layers forward and backward, is up to
    # 1.2e-6 on any machine. (The least important of the ambiguous units changes the gradient by 5e-4.)
    seen, relu = [], nn.relu
    (exact, exact_variables), single = build(recorded, np.float64), build(recorded, np.float32)
    monkeypatch.setattr(nn, "relu", lambda x: seen.append(x) or relu(x))
    inputs = jax.jit(lambda *args: (exact.apply(*args), seen)[1])(exact_variables, recorded.images)
    # In float64 no unit is ambiguous: values of size 1 are accurate to 1e-14.
    assert min(np.abs(x).min() for x in inputs) > 1e-10
    units = iter(inputs)
    monkeypatch.setattr(nn, "relu", lambda x: jnp.where(next(units) > 0, x, 0))
    assert_gradient_is_the_recorded(recorded, *single, 4e-6)
    assert not list(units)  # all were used


@pytest.fixture(scope="module")
def initial():
    """Initial variables of a WRN-10-1."""
    return jax.jit(WideResNet(10, 1).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.slow
def test_initial_weights_have_the_distribution_of_the_released_code(initial):
    for path, kernel in jax.tree_util.tree_leaves_with_path(initial["params"]):
        name = jax.tree_util.keystr(path)
        if "kernel" not in name or "fc" in name:
            continue
        expected = np.sqrt(2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3]))
        # The standard deviation of n normal draws has a relative standard error of 1 / sqrt(2 n); five of them.
        assert abs(np.std(kernel) / expected - 1) < 5 / np.sqrt(2 * kernel.size), name
    bound = 1 / np.sqrt(64)
    kernel = initial["params"]["fc"]["kernel"]
    assert np.abs(kernel).max() <= bound
    assert np.abs(kernel).max() > 0.98 * bound  # fails for 640 uniform draws with probability 0.98^640 = 2e-6
    assert not initial["params"]["fc"]["bias"].any()


@pytest.mark.parametrize(("depth", "parameters"), [(10, 77_850), (28, 36_479_194)])
def test_number_of_parameters_equals_the_published_one(depth, parameters):
    # 36.5 million is the published size of the WRN-28-10; the WRN-10-1's is that of the recorded weights.
    model = WideResNet(depth, 10 if depth == 28 else 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) == parameters


def test_with_bfloat16_only_convolutions_are_in_bfloat16(initial):
    model = WideResNet(10, 1, dtype=jnp.bfloat16)
    images = np.random.default_rng(1).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    logits, features = jax.jit(model.apply)(initial, images)
    exact, _ = jax.jit(WideResNet(10, 1).apply)(initial, images)
    assert logits.dtype == features.dtype == jnp.float32
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    # 8 bits of mantissa: 0.4% per operation, for logits of size 1.
    np.testing.assert_allclose(logits, exact, atol=0.05)
    assert np.abs(logits - exact).max() > 0  # bfloat16 is used


@pytest.mark.slow
def test_bfloat16_gradients_equal_those_of_float32_to_rounding(initial):
    images = np.random.default_rng(1).uniform(size=(8, 32, 32, 3)).astype(np.float32)

    def loss(params, dtype):
        variables = {**initial, "params": params}
        (logits, _), _ = WideResNet(10, 1, dtype=dtype).apply(variables, images, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    @partial(jax.jit, compiler_options=compiler_options("cpu", training=True))
    def gradients(params):
        return [ravel_pytree(jax.grad(loss)(params, dtype))[0] for dtype in (jnp.bfloat16, jnp.float32)]

    rounded, exact = gradients(initial["params"])
    # 0.4% per operation, for about twenty operations forward and backward.
    assert 0 < np.linalg.norm(rounded - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.usefixtures("float64")
def test_batch_norm_moments_are_accurate_for_a_large_mean():
    # In float32, E[x^2] - E[x]^2 has no correct digit for a variance of 1 and a mean of 1e4.
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 1, (4096, 2)), jnp.float32)
    norm = BatchNorm()
    variables = jax.tree.map(jnp.float32, norm.init(jax.random.key(0), x))
    variables["batch_stats"]["mean"] = jnp.full(2, 9_990.0, jnp.float32)
    y = norm.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    wide = np.asarray(x, np.float64)
    exact = (wide - wide.mean(0)) / wide.std(0)
    # float32 resolves 1e-3 at 1e4, and y is the difference of two products of that size.
    np.testing.assert_allclose(y, exact, atol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 17}, "depth: expected 6n \\+ 4 .*got 17. Try 16"),
        ({"depth": 4}, "depth: expected an integer of at least 10"),
        ({"width": 0}, "width: expected an integer of at least 1"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
    ],
)
def test_invalid_sizes_raise_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        WideResNet(**arguments)


def test_images_of_another_rank_raise_an_error():
    with pytest.raises(ValueError, match=r"images: expected shape .*got \(32, 32, 3\)"):
        WideResNet(10, 1).init(jax.random.key(0), jnp.zeros((32, 32, 3)))


def test_images_that_are_not_divided_by_255_raise_an_error():
    with pytest.raises(TypeError, match=r"images: expected floating point in .*got uint8. Divide uint8 images by 255"):
        WideResNet(10, 1).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8))
