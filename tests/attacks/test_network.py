"""Any function is a network: it is compiled once, its current arrays are used, and no program keeps it in memory."""

import functools
import gc
import weakref
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from fs_jax import attacks
from fs_jax.evaluation import evaluate
from fs_jax.ot import ipot

pytestmark = pytest.mark.usefixtures("small_programs", "one_batch_size")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(size=(5, 4, 4, 1)).astype(np.float32))
LABELS = jnp.array([0, 1, 2, 0, 1])
LABELS_HOST = np.asarray(LABELS)


def weights(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(16, 4)).astype(np.float32))


def linear(w, images):
    return images.reshape(len(images), -1) @ w


def labels_of(w):
    return np.asarray(linear(w, IMAGES).argmax(-1))


class Model:
    """With a method, which is a new object in each access."""

    def __init__(self, w):
        self.w = w

    def logits(self, images):
        return linear(self.w, images)


EAGER = {
    "pgd": functools.partial(attacks.pgd, num_steps=3),
    "fgsm": attacks.fgsm,
    "cw": functools.partial(attacks.cw, num_steps=3),
    "mi_fgsm": functools.partial(attacks.mi_fgsm, num_steps=3),
    "apgd": functools.partial(attacks.apgd, num_steps=3),
    "fab": functools.partial(attacks.fab, num_steps=3, targeted=True),
    "square": functools.partial(attacks.square, num_steps=3),
    "spsa": functools.partial(attacks.spsa, num_steps=2, num_directions=4),
    "local_search": functools.partial(attacks.local_search, num_steps=2),
}


def slow_but(quick, names):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", slow_but(("pgd", "apgd", "square"), EAGER))
def test_a_second_call_without_jit_compiles_nothing(name, compilations):
    w = weights()
    logits_fn = lambda images: linear(w, images)  # noqa: E731
    EAGER[name](logits_fn, KEY, IMAGES, LABELS)
    with compilations() as compiled:
        EAGER[name](logits_fn, jax.random.key(1), IMAGES, LABELS, epsilon=0.07)
    assert not compiled


def test_a_second_scattering_compiles_nothing(compilations):
    w = weights()
    logits_fn = lambda images: linear(w, images)  # noqa: E731
    for beta in (0.5, 0.5):
        with compilations() as compiled:  # as in the documentation: a new partial each time
            attacks.feature_scatter(logits_fn, KEY, IMAGES, transport=functools.partial(ipot, beta=beta, num_iters=2))
    assert not compiled


JITTED = jax.jit(linear)
NETWORKS = {
    "lambda": lambda w: lambda images: linear(w, images),
    "jit of a lambda": lambda w: jax.jit(lambda images: linear(w, images)),
    "partial": lambda w: functools.partial(linear, w),
    "Partial": lambda w: Partial(linear, w),
    "partial of jit": lambda w: functools.partial(JITTED, w),
}


@pytest.mark.parametrize("name", slow_but(("lambda", "jit of a lambda"), NETWORKS))
def test_other_weights_in_a_function_of_the_same_structure_compile_nothing(name, compilations):
    for seed in (0, 1):
        w = weights(seed)
        with compilations() as compiled:
            found = attacks.pgd(NETWORKS[name](w), KEY, IMAGES, LABELS, num_steps=3)
        plain = attacks.pgd(lambda images, w=w: linear(w, images), KEY, IMAGES, LABELS, num_steps=3)
        np.testing.assert_allclose(found, plain, atol=1e-6)  # and they are used
    assert not compiled


def test_a_model_that_was_changed_in_place_is_attacked_with_its_current_weights(compilations):
    model = Model(weights(0))
    for seed in (0, 1):
        model.w = weights(seed)
        with compilations() as compiled:
            result = evaluate(model.logits, np.asarray(IMAGES), labels_of(weights(1)), ["clean"], progress=False)
        assert (result.summary["worst"]["accuracy"] == 1) == (seed == 1)
    assert not compiled


class Retrained:
    """A model whose prediction is a new function after training, with captured weights."""

    def train(self, w, sign=1.0):
        self.predict = jax.jit(lambda images: sign * linear(w, images))

    def __call__(self, images):
        return self.predict(images)


def straight_through(model):
    """Quantised in the forward pass; the gradient depends on the model's state."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(4 * x) / 4

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (model.scale * g,))
    return lambda images: linear(WEIGHTS, rounded(images))


WEIGHTS = weights()


def test_a_jitted_function_that_was_replaced_is_used():
    model, labels = Retrained(), labels_of(weights(1))
    for seed in (0, 1):
        model.train(weights(seed))
        result = evaluate(model, np.asarray(IMAGES), labels, ["clean"], progress=False)
        assert (result.summary["worst"]["accuracy"] == 1) == (seed == 1)


def test_a_gradient_rule_with_changed_state_is_used():
    model = Model(None)
    logits_fn, found = straight_through(model), []
    for model.scale in (1.0, -1.0):
        found.append(attacks.pgd(logits_fn, KEY, IMAGES, LABELS, num_steps=1, start=IMAGES))
    assert not np.allclose(*found)
    np.testing.assert_allclose(found[0] - IMAGES, IMAGES - found[1], atol=0.01)  # except at 0 and 1


def test_a_host_callback_that_was_changed_is_used():
    def network(scale):
        def logits_fn(images):
            shape = jax.ShapeDtypeStruct((len(images), 4), jnp.float32)
            return jax.pure_callback(lambda x: np.asarray(scale * linear(WEIGHTS, x)), shape, images)

        return logits_fn

    margins = []
    for scale in (1.0, 2.0):
        result = evaluate(network(scale), np.asarray(IMAGES), np.asarray(LABELS), ["clean"], progress=False)
        margins.append(np.array([record["margin"]["clean"] for record in result.records]))
    np.testing.assert_allclose(margins[1], 2 * margins[0], rtol=1e-5)


GAIN = 1.0


def gained(w, images):
    return GAIN * linear(w, images)


def test_a_global_variable_that_was_changed_is_used(monkeypatch, tmp_path):
    logits_fn, labels = functools.partial(gained, WEIGHTS), labels_of(WEIGHTS)
    for gain, accuracy in ((1.0, 1), (-1.0, 0)):
        monkeypatch.setitem(globals(), "GAIN", gain)
        result = evaluate(logits_fn, np.asarray(IMAGES), labels, ["clean"], progress=False)
        assert result.summary["worst"]["accuracy"] == accuracy


def logits_of_model(model, images):
    return model.scale * linear(WEIGHTS, images)


def test_a_bound_object_that_was_changed_is_used():
    model = Model(None)
    logits_fn, labels = functools.partial(logits_of_model, model), labels_of(WEIGHTS)
    for model.scale, accuracy in ((1.0, 1), (-1.0, 0)):
        result = evaluate(logits_fn, np.asarray(IMAGES), labels, ["clean"], progress=False)
        assert result.summary["worst"]["accuracy"] == accuracy


def test_attacks_with_equal_programs_have_states_of_their_own_type():
    """As when the cell of a notebook that defines an attack is run again."""

    def attack(step_size):
        class State(NamedTuple):
            progress: attacks.Progress

        def start(logits_fn, keys, images, labels, run):
            return State(attacks.first_judged(images, logits_fn(images), labels))

        def step(logits_fn, state, images, labels):
            iterates = jnp.clip(state.progress.adversarial - step_size, 0, 1)
            return State(attacks.judged(state.progress, iterates, logits_fn(iterates), labels))

        return attacks.Stepwise(Partial(start), Partial(step), num_steps=2)

    for step_size in (0.01, 0.02):
        reports = attacks.packed(attack(step_size), Partial(linear, WEIGHTS), KEY, np.asarray(IMAGES), LABELS)
        assert sum(len(report.finished) for report in reports) == len(LABELS)


@pytest.mark.parametrize("kind", ["lambda", "partial"])
def test_arrays_on_another_device_are_used_there(kind):
    found = []
    for device in jax.devices()[:2]:
        w, images = jax.device_put((WEIGHTS, IMAGES), device)
        function = {"lambda": lambda images, w=w: linear(w, images), "partial": Partial(linear, w)}[kind]
        for given in (images, np.asarray(images)):
            found.append(attacks.pgd(function, jax.device_put(KEY, device), given, LABELS_HOST, num_steps=1))
            assert found[-1].devices() == {device}
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])


def test_numpy_arrays_that_were_changed_in_place_are_used():
    w = np.array(weights(0))
    logits_fn = lambda images: linear(w, images)  # noqa: E731
    for seed in (0, 1):
        w[:] = weights(seed)
        result = evaluate(logits_fn, np.asarray(IMAGES), labels_of(weights(1)), ["clean"], progress=False)
        assert (result.summary["worst"]["accuracy"] == 1) == (seed == 1)


def test_constants_that_depend_on_the_batch_size_are_right_for_every_size():
    w = weights()

    def logits_fn(images):  # it has another constant for each size
        return linear(w, images) + np.zeros((len(images), 1), np.float32) + np.float32(1 / len(images))

    images, labels = np.asarray(IMAGES), labels_of(w)
    for batch_size in (4, 2, 1, 4):
        result = evaluate(logits_fn, images, labels, ["clean"], batch_size=batch_size, progress=False)
        expected = attacks.logit_margin(linear(w, IMAGES), jnp.asarray(labels))
        np.testing.assert_allclose([record["margin"]["clean"] for record in result.records], expected, atol=1e-5)


CALLS = {
    "packed": lambda f: list(attacks.packed(attacks.pgd_steps(num_steps=2), f, KEY, np.asarray(IMAGES), LABELS)),
    "pgd": lambda f: attacks.pgd(f, KEY, IMAGES, LABELS, num_steps=2),
    "apgd": lambda f: attacks.apgd(f, KEY, IMAGES, LABELS, num_steps=2),
    "feature_scatter": lambda f: attacks.feature_scatter(f, KEY, IMAGES),
    "evaluate": lambda f: evaluate(f, np.asarray(IMAGES), np.asarray(LABELS), ["pgd-2"], progress=False),
    "autoattack": lambda f: attacks.autoattack(f, KEY, np.asarray(IMAGES), np.asarray(LABELS), version=["apgd-ce"]),
}


@pytest.mark.parametrize("call", slow_but(("packed", "pgd", "autoattack"), CALLS))
@pytest.mark.parametrize("kind", slow_but(("lambda",), ["lambda", "method", "partial"]))
def test_no_program_keeps_the_function_alive(call, kind):
    w = weights()
    model = Model(w)
    alive = weakref.ref(w), weakref.ref(model)
    function = {"lambda": lambda images: linear(w, images), "method": model.logits, "partial": Partial(linear, w)}[kind]
    CALLS[call](function)
    del w, model, function
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_an_abandoned_generator_keeps_nothing_alive():
    w = weights()
    alive = weakref.ref(w)
    reports = attacks.packed(attacks.pgd_steps(num_steps=50), lambda x: linear(w, x), KEY, np.asarray(IMAGES), LABELS)
    next(reports)
    del reports, w
    gc.collect()
    assert alive() is None


class Perceptron(nnx.Module):
    """As in Flax's documentation."""

    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, images):
        hidden = self.norm(nnx.relu(self.hidden(images.reshape(len(images), -1))))
        return self.out(self.dropout(hidden))


def test_evaluate_takes_an_nnx_module(compilations):
    model = Perceptron(nnx.Rngs(0))
    model.eval()
    labels = np.asarray(model(IMAGES).argmax(-1))
    first = evaluate(model, np.asarray(IMAGES), labels, ["clean", "pgd-5"], epsilon=0.3, progress=False)
    assert first.summary["attacks"][0]["accuracy"] == 1 > first.summary["worst"]["accuracy"]
    model.out.bias[...] += 100 * jax.nn.one_hot((labels[0] + 1) % 4, 4)  # more training
    with compilations() as compiled:
        second = evaluate(model, np.asarray(IMAGES), labels, ["clean", "pgd-5"], epsilon=0.3, progress=False)
    assert second.summary["attacks"][0]["accuracy"] < 1
    assert not compiled


def test_evaluate_takes_an_equinox_module():
    model = eqx.nn.MLP(16, 4, 8, 1, key=KEY)
    logits_fn = jax.vmap(lambda image: model(image.ravel()))
    labels = np.asarray(logits_fn(IMAGES).argmax(-1))
    result = evaluate(logits_fn, np.asarray(IMAGES), labels, ["clean", "pgd-5"], epsilon=0.3, progress=False)
    assert result.summary["attacks"][0]["accuracy"] == 1 > result.summary["worst"]["accuracy"]


def test_packed_refuses_a_network_that_captures_traced_arrays():
    @jax.jit
    def inside(w):
        list(attacks.packed(attacks.pgd_steps(), lambda x: linear(w, x), KEY, np.asarray(IMAGES), LABELS))

    with pytest.raises(TypeError, match=r"it captures traced ones\. Call this outside of jax\.jit"):
        inside(weights())
