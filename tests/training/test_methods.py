"""Training methods: TRADES as published, weight averaging, custom networks and methods, and the registry."""

import dataclasses
import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fs_jax import ot
from fs_jax.config import TrainConfig, TransportConfig
from fs_jax.training import init_state, make_method, make_train_step
from fs_jax.training.losses import smoothed_cross_entropy
from fs_jax.training.methods import METHODS, Context, Method, averaged, feature_scatter, pgd, standard, trades
from fs_jax.training.transports import TRANSPORTS, make_transport

pytestmark = pytest.mark.usefixtures("small_programs")

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.uniform(size=(5, 2, 2, 1)), np.array([0, 3, 1, 2, 0])


class Network(nn.Module):
    """A network with BatchNorm, dropout, and features as a second output."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(3, name="first", param_dtype=images.dtype)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn", param_dtype=images.dtype)(x)
        features = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(4, name="second", param_dtype=images.dtype)(features), features


def batch(dtype=jnp.float32, **more):
    return {"images": jnp.asarray(IMAGES, dtype), "labels": jnp.asarray(LABELS), **more}


# TRADES again, in NumPy, with finite differences for derivatives.


def forward(params, stats, images, train):
    x = images.reshape(len(images), -1) @ params["first"]["kernel"] + params["first"]["bias"]
    mean, var = (x.mean(0), x.var(0)) if train else (stats["mean"], stats["var"])
    x = (x - mean) / np.sqrt(var + 1e-5) * params["bn"]["scale"] + params["bn"]["bias"]
    moved = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var} if train else stats
    return np.tanh(x) @ params["second"]["kernel"] + params["second"]["bias"], moved


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergence(natural, other):
    p, q = log_softmax(natural), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def differences(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[place] = step
        gradient[place] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def trades_by_hand(params, stats, start, epsilon, step_size, num_steps, beta, rate):
    """Parameters and statistics after one step of SGD, and the loss before it."""
    attacked, natural = start, forward(params, stats, IMAGES, train=False)[0]
    for _ in range(num_steps):
        gradient = differences(lambda x: divergence(natural, forward(params, stats, x, train=False)[0]).sum(), attacked)
        attacked = np.clip(attacked + step_size * np.sign(gradient), IMAGES - epsilon, IMAGES + epsilon).clip(0, 1)

    def loss(params):
        natural, other = (forward(params, stats, x, train=True)[0] for x in (IMAGES, attacked))
        cross_entropy = -log_softmax(natural)[np.arange(5), LABELS]
        return cross_entropy.mean() + beta * divergence(natural, other).mean()

    stepped = {}
    for layer, leaves in params.items():
        stepped[layer] = {}
        for name, leaf in leaves.items():

            def at(value, layer=layer, name=name):
                return loss({**params, layer: {**params[layer], name: value}})

            stepped[layer][name] = leaf - rate * differences(at, leaf)
    for images in (IMAGES, attacked, IMAGES):  # in the order of the authors' code
        stats = forward(params, stats, images, train=True)[1]
    return stepped, stats, loss(params)


@pytest.mark.usefixtures("float64")
@pytest.mark.usefixtures("standard_promotion")
def test_trades_equals_the_published_method_at_each_step():
    settings = {"epsilon": 0.05, "step_size": 0.02, "num_steps": 4, "beta": 6.0}
    model, optimizer, method = Network(), optax.sgd(0.1), trades(**settings)
    state = init_state(model, optimizer, method, jax.random.key(0), jnp.asarray(IMAGES))
    step = jax.jit(make_train_step(model, optimizer, method))
    params, stats = jax.tree.map(np.asarray, (state.params, state.batch_stats["bn"]))
    for number in range(3):
        start = IMAGES + 0.001 * np.random.default_rng(number).normal(size=IMAGES.shape)
        state, metrics = step(state, batch(jnp.float64, start=jnp.asarray(start)), jax.random.key(1))
        params, stats, loss = trades_by_hand(params, stats, start, **settings, rate=0.1)
        # Central differences of 1e-6 have rounding errors of 1e-10, which the rate and the steps multiply.
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-7)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-8), state.params, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-8), state.batch_stats["bn"], stats)


def test_trades_starts_from_small_noise_of_each_image():
    seen = []

    def spy(apply, variables, batch, context):
        seen.append(trades_start(context.keys, batch["images"]))
        return jnp.zeros(()), (variables, {})

    from fs_jax.training.methods.trades import _start as trades_start

    model, optimizer, method = Network(), optax.sgd(0.1), Method(spy)
    state = init_state(model, optimizer, method, jax.random.key(0), batch()["images"])
    make_train_step(model, optimizer, method)(state, batch(), jax.random.key(1))
    noise = (np.asarray(seen[0]) - IMAGES).ravel() / 0.001
    assert len(set(noise.round(3))) == noise.size
    assert 0.5 < noise.std() < 1.7  # of 20 normal numbers: within 4.5 standard errors of 1


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_moving_average_of_the_weights(decay):
    model, optimizer = Network(), optax.sgd(0.5)
    method = averaged(standard(), decay=decay)
    plain = jax.jit(make_train_step(model, optimizer, standard()))
    step = jax.jit(make_train_step(model, optimizer, method))
    first = init_state(model, optimizer, standard(), jax.random.key(0), batch()["images"])
    state = init_state(model, optimizer, method, jax.random.key(0), batch()["images"])
    average = jax.tree.map(np.asarray, first.variables)
    for number in range(4):
        first, _ = plain(first, batch(), jax.random.key(1))
        state, _ = step(state, batch(), jax.random.key(1))
        rate = min(decay, (1 + number) / (10 + number))
        average = jax.tree.map(
            lambda old, new, rate=rate: rate * old + (1 - rate) * np.asarray(new), average, first.variables
        )
    # float32's rounding, in another program.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.variables, first.variables)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.evaluated(method), average)


def trained(model, method, steps=12, **more):
    optimizer = optax.adam(0.05)
    state = init_state(model, optimizer, method, jax.random.key(0), batch()["images"])
    step, losses = jax.jit(make_train_step(model, optimizer, method)), []
    for _ in range(steps):
        state, metrics = step(state, batch(**more), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_custom_network(name):
    state, losses = trained(Network(), METHODS[name].build())
    assert losses[-1] < losses[0]
    assert int(state.step) == len(losses)
    assert not np.allclose(state.batch_stats["bn"]["mean"], 0)


@pytest.mark.parametrize("solver", TRANSPORTS)
def test_every_transport_matches_the_batch_with_itself(solver):
    transport = make_transport(TransportConfig(solver=solver))
    plan = transport(ot.cosine_cost(jnp.eye(4), jnp.eye(4))).plan
    np.testing.assert_allclose(
        plan.sum(0), 0.25, atol=1e-2
    )  # the marginals of the released code's plan are off by up to a hundredth
    if solver != "independent":
        np.testing.assert_allclose(plan, jnp.eye(4) / 4, atol=1e-2)
    _, losses = trained(Network(), feature_scatter(transport=transport))
    assert losses[-1] < losses[0]


def test_a_custom_method_can_have_a_state_and_read_other_arrays_of_the_batch():
    def loss(apply, variables, batch, context):
        logits, variables = apply(variables, batch["images"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(batch["weights"] * losses), (variables, {"calls": context.own.astype(jnp.float32)})

    counted = Method(loss, init=lambda variables: jnp.int32(0), update=lambda own, variables: own + 1)
    state, losses = trained(Network(dropout=0.2), counted, weights=jnp.array([1.0, 0, 0, 0, 0]))
    assert int(state.own) == 12
    assert losses[-1] < losses[0]


def test_each_step_has_a_new_dropout_mask():
    frozen = optax.sgd(0.0)
    model, method = Network(dropout=0.5), standard()
    state = init_state(model, frozen, method, jax.random.key(0), batch()["images"])
    step = jax.jit(make_train_step(model, frozen, method))
    state, first = step(state, batch(), jax.random.key(1))
    _, second = step(state, batch(), jax.random.key(1))
    assert float(first["loss"]) != float(second["loss"])


def test_a_network_may_lack_batch_norm_but_not_have_other_collections():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(4)(images.reshape(len(images), -1))

    state, losses = trained(Plain(), feature_scatter(epsilon=0.1))
    assert losses[-1] < losses[0]
    assert state.batch_stats == {}

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            self.variable("calls", "number", lambda: jnp.zeros(()))
            return nn.Dense(4)(images.reshape(len(images), -1))

    with pytest.raises(ValueError, match="got also calls"):
        trained(Counting(), standard())


class WithList(nn.Module):
    """A network with a list as attribute, so that it has no hash."""

    features: list[int]

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1)
        for size in self.features:
            x = nn.Dense(size)(x)
        return x


def test_a_network_with_a_list_as_attribute_can_be_trained():
    of_list, of_tuple = (trained(WithList(sizes), standard(), steps=2) for sizes in ([3, 4], (3, 4)))
    assert of_list[1] == of_tuple[1]


@pytest.mark.parametrize("method", [pgd(num_steps=1), trades(num_steps=1)], ids=["pgd", "trades"])
def test_noise_is_the_same_with_keys_of_tpus(method):
    """The starts of TRADES and PGD do not depend on JAX's default implementation of keys."""
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(Network(), optimizer, method))

    def trained(impl, seed):
        state = init_state(Network(), optimizer, method, jax.random.key(0, impl=impl), batch()["images"])
        return step(state, batch(), jax.random.key(seed, impl=impl))

    ours, theirs = (trained(impl, 1) for impl in ("threefry2x32", "rbg"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    other, _ = trained("rbg", 2)
    assert not np.array_equal(other.params["first"]["kernel"], ours[0].params["first"]["kernel"])


def test_penultimate_can_be_a_number_of_the_command_line():
    config = TrainConfig(method_settings={"penultimate": 1.0})
    assert isinstance(make_method(config), Method)
    with pytest.raises(ValueError, match=r"penultimate: expected 0 or 1; got 0\.5"):
        make_method(TrainConfig(method_settings={"penultimate": 0.5}))


def test_configurations_override_the_defaults_of_a_method():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert (default(feature_scatter, "smoothing"), default(feature_scatter, "num_steps")) == (0.5, 1)
    assert (default(pgd, "smoothing"), default(pgd, "num_steps")) == (0.0, 7)
    assert (default(trades, "num_steps"), default(trades, "beta")) == (10, 6.0)
    seen = {}
    entry = dataclasses.replace(
        METHODS["trades"], build=functools.wraps(trades)(lambda **settings: seen.update(settings) or standard())
    )
    METHODS["spied"] = dataclasses.replace(entry, name="spied")
    try:
        make_method(TrainConfig(method="spied", smoothing=0.1, method_settings={"beta": 3.0}))
    finally:
        del METHODS["spied"]
    assert seen == {"epsilon": 8 / 255, "smoothing": 0.1, "beta": 3.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pdg"}, "method: .*Did you mean 'pgd'"),
        ({"transport": TransportConfig(solver="sinkhron")}, "transport.solver: .*Did you mean 'sinkhorn'"),
        ({"method": "trades", "method_settings": {"bta": 3.0}}, "setting of trades: .*Did you mean 'beta'"),
        (
            {"method": "pgd", "method_settings": {"beta": 3.0}},
            "method_settings: expected none, as pgd has no settings of its own; got beta",
        ),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: feature_scatter(scope="globl"), "scope: expected one of device, global; got 'globl'"),
        (lambda: feature_scatter(smoothing=7.0), "smoothing: expected .* of at most 1; got 7.0"),
        (lambda: trades(epsilon=-1.0), "epsilon: expected .* of at least 0"),
        (lambda: trades(beta=-1.0), "beta: expected .* of at least 0"),
        (lambda: pgd(num_steps=0), "num_steps: expected .* of at least 1"),
        (lambda: averaged(standard(), decay=1.0), "decay: expected .* below 1; got 1.0"),
    ],
)
def test_settings_outside_their_range_raise_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (np.zeros((5, 2, 2, 1), np.uint8), LABELS, TypeError, "images: expected float"),
        (255 * IMAGES, LABELS, ValueError, "images: expected values in"),
        (IMAGES, LABELS[:, None], ValueError, "labels: expected"),
        (IMAGES, np.eye(5), (TypeError, ValueError), "labels: expected"),
    ],
)
def test_invalid_batches_raise_an_error(images, labels, error, message):
    model, optimizer, method = Network(), optax.sgd(0.1), standard()
    state = init_state(model, optimizer, method, jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    with pytest.raises(error, match=message):
        make_train_step(model, optimizer, method)(state, {"images": images, "labels": labels}, jax.random.key(1))


def test_weights_in_bfloat16_are_averaged_in_float32():
    method = averaged(standard(), decay=0.999)
    own, variables = method.init({"w": jnp.zeros(1, jnp.bfloat16)}), {"w": jnp.ones(1, jnp.bfloat16)}
    own = {**own, "steps": jnp.int32(100_000)}
    for _ in range(1000):
        own = method.update(own, variables)
    # 1 - 0.999^1000 = 0.632; bfloat16 has a resolution of 0.004 there.
    np.testing.assert_allclose(method.evaluated(own, variables)["w"].astype(np.float32), 0.632, atol=0.003)
    assert method.evaluated(own, variables)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": standard}, TypeError, "got the function standard. Call it"),
        ({"model": lambda x: x}, TypeError, "model: expected a Flax Linen module; got function"),
        ({"loss": lambda *_: jnp.zeros(())}, TypeError, r"method.loss: expected \(loss, \(variables, metrics\)\)"),
        ({"loss": lambda _, v, *__: (0.0, ({**v, "delta": 0}, {}))}, ValueError, "got .*'delta'"),
        ({"loss": lambda _, v, *__: (0.0, (v, {"loss": 0.0}))}, ValueError, "no metric named loss"),
        ({"batch": {"images": IMAGES}}, ValueError, "batch: expected images and labels; got images"),
    ],
)
def test_a_wrong_method_network_or_batch_raises_an_error(change, error, message):
    model, optimizer = Network(), optax.sgd(0.1)
    state = init_state(model, optimizer, standard(), jax.random.key(0), batch()["images"])
    method = Method(change["loss"]) if "loss" in change else change.get("method", standard())
    inputs = state, change.get("batch", batch()), jax.random.key(1)
    with pytest.raises(error, match=message):
        make_train_step(change.get("model", model), optimizer, method)(*inputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", METHODS)
def test_methods_work_with_strict_promotion(name):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        optimizer, method = optax.sgd(0.1), METHODS[name].build()
        state = init_state(Network(), optimizer, method, jax.random.key(0), batch()["images"])
        step = make_train_step(Network(), optimizer, method)
        labels = batch()["labels"].astype(jnp.int32)
        jax.eval_shape(step, state, {**batch(), "labels": labels}, jax.random.key(1))


@pytest.mark.slow
def test_penultimate_features_can_be_scattered():
    metrics, signs = {}, np.array([1, -1, 1, -1, 1], np.float32)[:, None, None, None]
    start = jnp.clip(batch()["images"] + 0.05 * signs, 0, 1)
    for penultimate in (0, 1):
        method = feature_scatter(epsilon=0.1, penultimate=penultimate)
        state = init_state(Network(), optax.sgd(0.1), method, jax.random.key(1), batch()["images"])
        step = make_train_step(Network(), optax.sgd(0.1), method)
        _, metrics[penultimate] = step(state, batch(start=start), jax.random.key(2))
        natural, moved = (Network().apply(state.variables, x)[penultimate] for x in (batch()["images"], start))
        solved = ot.sinkhorn(ot.cosine_cost(natural, moved), reg=0.01, num_iters=50)
        # The same sums in a different program.
        np.testing.assert_allclose(metrics[penultimate]["transport_cost"], solved.primal_cost, rtol=1e-4)
    # There is no accuracy without logits.
    assert metrics[0].keys() - metrics[1].keys() == {"natural_accuracy"}


def test_scattering_features_requires_a_network_that_returns_them():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(4)(images.reshape(len(images), -1))

    method = feature_scatter(epsilon=0.1, penultimate=1)
    state = init_state(Plain(), optax.sgd(0.1), method, jax.random.key(0), batch()["images"])
    with pytest.raises(ValueError, match=r"model: expected a network that returns \(logits, features\)"):
        make_train_step(Plain(), optax.sgd(0.1), method)(state, batch(), jax.random.key(1))


def test_clean_weight_is_the_weight_of_the_clean_loss():
    def apply(variables, images, *, train):
        seen.append(len(images))
        return images.reshape(len(images), -1) @ variables["params"], variables

    variables = {"params": jax.random.normal(jax.random.key(1), (4, 4)), "batch_stats": {}}
    context, losses, images, labels = Context(jax.random.split(jax.random.key(2), 5)), [], *batch().values()
    for weight in (0.0, 0.25, 0.5):
        seen: list[int] = []
        losses.append(feature_scatter(epsilon=0.1, clean_weight=weight).loss(apply, variables, batch(), context)[0])
        assert seen[-1] == (10 if weight else 5)
    clean = jnp.mean(smoothed_cross_entropy(images.reshape(5, -1) @ variables["params"], labels, 0.5))
    for weight, loss in zip(
        (0.25, 0.5), losses[1:], strict=True
    ):  # without BatchNorm, the two halves of the batch are independent
        np.testing.assert_allclose(loss, (1 - weight) * losses[0] + weight * clean, rtol=1e-5)
    with pytest.raises(ValueError, match="clean_weight: expected"):
        feature_scatter(clean_weight=1.0)
