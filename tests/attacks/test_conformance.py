"""Properties of every attack, with one test for each."""

import dataclasses
import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from fs_jax import attacks
from fs_jax._utils.keys import random_signs
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import adversaries, first_judged, judged
from fs_jax.evaluation import evaluate
from fs_jax.ot import ipot, released_sinkhorn, sqeuclidean_cost

pytestmark = pytest.mark.usefixtures("small_programs", "one_batch_size")


def unlabelled(attack):
    """An attack without labels, with the signature of the others."""

    @functools.wraps(attack)
    def run(logits_fn, rng, images, labels, **settings):
        return attack(logits_fn, rng, images, **settings)

    return run


scatter = functools.partial(unlabelled(attacks.feature_scatter), step_size=0.05)
ATTACKS = {
    "fgsm": attacks.fgsm,
    "pgd": functools.partial(attacks.pgd, step_size=0.03, num_steps=5),
    "cw": functools.partial(attacks.cw, step_size=0.03, num_steps=5),
    "feature_scatter": scatter,
    "feature_scatter 3 steps": functools.partial(scatter, num_steps=3),
    "feature_scatter ipot": functools.partial(scatter, transport=functools.partial(ipot, beta=0.5)),
    "feature_scatter released": functools.partial(scatter, transport=released_sinkhorn, cost=sqeuclidean_cost),
}
SLOW_WITHOUT_JIT = ("feature_scatter", "feature_scatter 3 steps", "feature_scatter ipot", "feature_scatter released")
KEY = jax.random.key(3)
EPSILON = 0.08


@functools.cache
def compiled(attack, logits_fn):
    """An attack as one program, from keys, images, labels and radius to attacked images and their gradients."""

    def total(images, scale, rng, labels, epsilon):
        attacked = attack(lambda x: scale * logits_fn(x), rng, images, labels, epsilon=epsilon)
        return jnp.sum(attacked), attacked

    program = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))

    def run(rng, images, labels, epsilon=EPSILON):
        gradients, attacked = program(images, 1.0, rng, labels, epsilon)
        return attacked, gradients

    return run


@pytest.fixture(scope="module", params=ATTACKS.values(), ids=ATTACKS)
def program(request, classifier):
    return compiled(request.param, classifier[0])


def test_stays_in_the_ball_and_in_the_range_and_moves(program, classifier):
    _, images, labels = classifier
    attacked, _ = program(KEY, images, labels)
    assert attacked.shape == images.shape
    assert attacked.dtype == images.dtype
    # clip(x, c - epsilon, c + epsilon) is exact but for the rounding of c +- epsilon, 6e-8 at most.
    assert np.abs(attacked - images).max() <= EPSILON + 6e-8
    assert np.abs(attacked - images).max() > EPSILON / 2
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_same_key_gives_same_images_and_another_key_others(program, classifier):
    _, images, labels = classifier
    one, again, other = (program(key, images, labels)[0] for key in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_radius_zero_is_the_identity(program, classifier):
    _, images, labels = classifier
    np.testing.assert_array_equal(program(KEY, images, labels, 0.0)[0], images)


def test_no_gradient_flows_through(program, classifier):
    _, images, labels = classifier
    for gradient in program(KEY, images, labels)[1]:
        assert not jnp.any(gradient)


# Without `jit`, each part of an attack is compiled separately, in each call. So most variants of scattering are slow
# tests.
@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(attack, marks=[pytest.mark.slow] if name in SLOW_WITHOUT_JIT else [])
        for name, attack in ATTACKS.items()
    ],
    ids=ATTACKS,
)
def test_eager_equals_jit_and_start_is_the_first_iterate(attack, classifier):
    logits_fn, images, labels = classifier
    run = functools.partial(attack, logits_fn, epsilon=EPSILON)
    eager = run(KEY, images, labels)
    # Compiled sums may be rounded differently, which could flip a sign of a gradient near 0; here there is none.
    np.testing.assert_allclose(compiled(attack, logits_fn)(KEY, images, labels)[0], eager, atol=1e-6)
    start = attacks.random_start(KEY, images, EPSILON)
    np.testing.assert_array_equal(run(jax.random.key(9), images, labels, start=start), eager)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
def test_one_key_per_image_makes_images_independent_of_the_batch(name, classifier):
    # (Feature scattering isn't tested: its images depend on each other.)
    logits_fn, images, labels = classifier
    keys = jax.random.split(KEY, len(images))
    whole = ATTACKS[name](logits_fn, keys, images, labels, epsilon=EPSILON)
    halves = [ATTACKS[name](logits_fn, keys[s], images[s], labels[s], epsilon=EPSILON) for s in (np.s_[:2], np.s_[2:])]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-6)  # rounding of differently shaped products


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
def test_labelled_attacks_raise_their_loss(name, classifier):
    logits_fn, images, labels = classifier
    loss = attacks.cw_margin if name == "cw" else attacks.cross_entropy
    attacked = ATTACKS[name](logits_fn, KEY, images, labels, epsilon=EPSILON)
    assert (loss(logits_fn(attacked), labels) > loss(logits_fn(images), labels)).all()


# Every attack of the registry, and one that is defined here; all through their specifications alone.
def _towards_grey(logits_fn, state, images, labels, *, epsilon):
    iterate = attacks.project(state.iterate + epsilon / 4 * jnp.sign(0.5 - state.iterate), images, epsilon)
    return _Fading(iterate, judged(state.progress, iterate, logits_fn(iterate), labels))


class _Fading(NamedTuple):
    iterate: jax.Array
    progress: attacks.Progress


def _grey_start(logits_fn, keys, images, labels, run):
    return _Fading(images, first_judged(images, logits_fn(images), labels))


FADE = Specification(
    "fade",
    "less contrast, step by step",
    lambda *, epsilon, num_classes, num_steps: attacks.Stepwise(
        Partial(_grey_start), Partial(_towards_grey, epsilon=epsilon), num_steps, passes=((1, 0), (1, 0))
    ),
    {"num_steps": count(4)},
    uses_gradients=False,
)
QUICK = {"num_steps": 5, "num_directions": 16, "targets": 2, "restarts": 2, "any_iterate": True, "step_size": 0.03}


def stepwise_attack(specification):
    settings = {name: value for name, value in QUICK.items() if name in specification.settings}
    settings = attacks.Attack(specification, EPSILON, **settings).settings

    def run(logits_fn, rng, images, labels, *, epsilon):
        attack = specification.build(epsilon=epsilon, num_classes=5, **settings)
        return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=specification.uses_gradients)

    return run


BOUNDED = {
    specification.name: stepwise_attack(specification)
    for specification in (*attacks.REGISTRY.values(), FADE)
    if specification.fixed_radius is None
}
STEPWISE = {**BOUNDED, "local-search": stepwise_attack(attacks.REGISTRY["local-search"])}
STARTS_AT_THE_IMAGE = ("mi-fgsm", "fab", "fab-t", "fade")  # at least in the first run


# These are quick, one of each kind: with momentum, with checkpoints, with targets, without gradients.
QUICKLY = ("mi-fgsm", "apgd-ce", "fab-t", "fade")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICKLY else [pytest.mark.slow]) for name in STEPWISE],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stepwise(name, classifier):
    return compiled(STEPWISE[name], classifier[0])


def in_float64(classifier):
    logits_fn, images, labels = classifier
    return logits_fn, images.astype(jnp.float64), labels


@pytest.mark.usefixtures("float64")
def test_stepwise_attacks_stay_in_the_ball_and_in_the_range_and_lower_the_margin(name, stepwise, classifier):
    logits_fn, images, labels = in_float64(classifier)
    attacked, _ = stepwise(jax.random.split(KEY, len(images)), images, labels)
    assert attacked.dtype == images.dtype
    if name in BOUNDED:
        assert np.abs(attacked - images).max() <= EPSILON + 6e-8  # as above
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    margins, before = (attacks.logit_margin(logits_fn(x), labels) for x in (attacked, images))
    # Images that are misclassified without an attack may stop at the start, whose margin may be higher.
    assert (margins <= before)[before > 0].all()
    assert (margins < before)[before > 0].any()


@pytest.mark.usefixtures("float64")
def test_stepwise_attacks_give_the_same_images_for_the_same_key_and_depend_on_it(name, stepwise, classifier):
    _, images, labels = in_float64(classifier)
    one, again, other = (
        stepwise(jax.random.split(key, len(images)), images, labels)[0] for key in (KEY, KEY, jax.random.key(4))
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() or name in STARTS_AT_THE_IMAGE


def test_stepwise_attacks_give_the_same_images_in_64_bit_mode(stepwise, classifier):
    _, images, labels = classifier
    keys = jax.random.split(KEY, len(images))
    attacked, _ = stepwise(keys, images, labels)
    with jax.enable_x64(True):
        again, _ = stepwise(keys, images, labels)
    assert again.dtype == attacked.dtype
    # The rounding of float32 sums. Other random numbers would give differences of epsilon.
    np.testing.assert_allclose(again, attacked, atol=1e-6)


def test_random_signs_are_the_same_in_64_bit_mode():
    signs = random_signs(KEY, (100,), jnp.float32)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(random_signs(KEY, (100,), jnp.float32), signs)


@pytest.mark.usefixtures("float64")
def test_stepwise_attacks_without_jit_equal_those_with_it(name, stepwise, classifier):
    logits_fn, images, labels = in_float64(classifier)
    keys = jax.random.split(KEY, len(images))
    eager = STEPWISE[name](logits_fn, keys, images, labels, epsilon=EPSILON)
    np.testing.assert_allclose(eager, stepwise(keys, images, labels)[0], atol=1e-9)  # as below


@pytest.mark.usefixtures("float64")
def test_stepwise_attacks_with_radius_zero_are_the_identity(name, stepwise, classifier):
    if name not in BOUNDED:
        pytest.skip("It has no radius.")
    _, images, labels = in_float64(classifier)
    attacked, _ = stepwise(jax.random.split(KEY, len(images)), images, labels, 0.0)
    np.testing.assert_array_equal(attacked, images)


@pytest.mark.usefixtures("float64")
def test_no_gradient_flows_through_stepwise_attacks(stepwise, classifier):
    _, images, labels = in_float64(classifier)
    for gradient in stepwise(jax.random.split(KEY, len(images)), images, labels)[1]:
        assert not jnp.any(gradient)


@pytest.mark.usefixtures("float64")
def test_results_of_stepwise_attacks_do_not_depend_on_the_position_in_the_batch(stepwise, classifier):
    # The last rows of a product may be rounded differently from the others. In float64 the difference is 1e-16, which
    # attacks amplify to far less than 1e-9 (SPSA divides by 0.02); in float32 it could flip a sign.
    _, images, labels = in_float64(classifier)
    keys = jax.random.split(KEY, len(images))
    attacked, _ = stepwise(keys, images, labels)
    reversed_, _ = stepwise(keys[::-1], images[::-1], labels[::-1])
    np.testing.assert_allclose(attacked, reversed_[::-1], atol=1e-9)


def test_scattering_raises_the_transport_cost(classifier):
    logits_fn, images, _ = classifier
    run = jax.jit(
        functools.partial(attacks.scatter, logits_fn, transport=released_sinkhorn, epsilon=EPSILON, step_size=0.03),
        static_argnames="num_steps",
    )
    result = {n: run(KEY, images, num_steps=n) for n in (1, 4)}
    # The transport at the iterate before the last step: with one step, at the random start.
    assert result[4].transport.primal_cost > 1.2 * result[1].transport.primal_cost
    # Logits of size 8, whose last digit is 1e-6, computed by another program.
    np.testing.assert_allclose(result[1].natural_logits, logits_fn(images), atol=1e-5)


FUNCTIONS = ("mi_fgsm", "apgd", "fab", "square", "spsa", "local_search")


@pytest.mark.parametrize(
    "attack",
    [*ATTACKS.values(), *(getattr(attacks, function) for function in FUNCTIONS)],
    ids=[*ATTACKS, *FUNCTIONS],
)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon: expected a number in [0, 1], the range of the images; got -0.1"),
        ({"epsilon": float("nan")}, ValueError, "epsilon: expected a number in [0, 1]"),
        ({"epsilon": 8}, ValueError, "epsilon: expected a number in [0, 1], the range of the images; got 8. Try 8/255"),
        ({"num_steps": 0}, ValueError, "num_steps: expected at least 1; got 0"),
        ({"num_steps": 1.5}, TypeError, "num_steps: expected an integer; got 1.5"),
        ({"images": jnp.full((6, 4, 4, 1), 2.0)}, ValueError, "images: expected values in [0, 1]; got [2, 2]"),
        ({"images": jnp.full((6, 4, 4, 1), jnp.nan)}, ValueError, "images: expected values in [0, 1]"),
        ({"images": jnp.ones((6, 4, 4))}, ValueError, "images: expected shape [N, height, width, channels]"),
        ({"images": jnp.ones((6, 4, 4, 1), jnp.uint8)}, TypeError, "images: expected floating point in [0, 1]; got u"),
        ({"start": jnp.ones((1, 4, 4, 1))}, ValueError, "start: expected the images' shape (6, 4, 4, 1)"),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_bad_input_raises_an_error(attack, classifier, change, error, message):
    logits_fn, images, labels = classifier
    if change.keys() - inspect.signature(attack).parameters.keys() - {"images", "labels", "settings"}:
        pytest.skip("It has no such argument.")
    arguments = {"images": images, "labels": labels, "epsilon": EPSILON, **change}
    with pytest.raises(error, match=re.escape(message)):
        attack(logits_fn, KEY, arguments.pop("images"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (jnp.arange(6), ValueError, "labels: expected classes 0 to 4, as logits_fn has 5; got 0 to 5"),
        (-jnp.arange(6), ValueError, "labels: expected classes 0 to 4"),
        (jnp.zeros(5, int), ValueError, "labels: expected shape (6,), one for each image; got (5,)"),
        (jnp.zeros(6), TypeError, "labels: expected integers; got float32"),
    ],
)
def test_bad_labels_raise_an_error(name, classifier, labels, error, message):
    logits_fn, images, _ = classifier
    with pytest.raises(error, match=re.escape(message)):
        ATTACKS[name](logits_fn, KEY, images, labels)


@pytest.mark.parametrize(
    "attack",
    [
        *ATTACKS.values(),
        *(getattr(attacks, function) for function in FUNCTIONS),
        lambda logits_fn, _, *data, epsilon: attacks.sanity_warnings(logits_fn, *data),
        lambda logits_fn, rng, *data, epsilon: next(attacks.packed(attacks.pgd_steps(), logits_fn, rng, *data)),
        attacks.autoattack,
        lambda logits_fn, _, *data, epsilon: evaluate(logits_fn, *data, ["pgd-20"], epsilon=epsilon),
    ],
    ids=[*ATTACKS, *FUNCTIONS, "sanity_warnings", "packed", "autoattack", "evaluate"],
)
def test_a_network_that_returns_more_than_logits_raises_an_error(attack, classifier):
    logits_fn, images, labels = classifier
    message = (
        r"expected logits of shape \[N, classes\]; got a tuple of 2\. Take the logits, .* lambda x: model\(x\)\[0\]"
    )
    with pytest.raises(ValueError, match=message):
        attack(lambda x: (logits_fn(x), x), KEY, np.asarray(images), np.asarray(labels), epsilon=EPSILON)


def test_random_start_is_uniform_in_the_ball_and_not_clipped():
    images = jnp.zeros((50, 10, 10, 2))
    noise = np.asarray(attacks.random_start(KEY, images, 0.1)) / 0.1
    assert (noise < 0).any()
    assert np.abs(noise).max() <= 1
    # Of 10,000 uniform draws: mean and second moment, five standard errors.
    assert abs(noise.mean()) < 5 / np.sqrt(3 * noise.size)
    assert abs(np.mean(noise**2) - 1 / 3) < 5 * np.sqrt(4 / 45 / noise.size)


def test_a_wrong_number_of_keys_raises_an_error(classifier):
    logits_fn, images, labels = classifier
    with pytest.raises(ValueError, match="rng: expected a key, or one for each of the 6 images"):
        attacks.pgd(logits_fn, jax.random.split(KEY, 3), images, labels)


def test_evaluate_runs_your_own_attack(classifier):
    logits_fn, images, _ = classifier
    labels = np.asarray(logits_fn(images).argmax(-1))
    fade = attacks.Attack(FADE, 0.5, num_steps=8)
    result = evaluate(logits_fn, np.asarray(images), labels, ["clean", fade], progress=False)
    (_, found) = result.summary["attacks"]
    assert (found["name"], found["settings"], found["uses_gradients"]) == ("fade", {"num_steps": 8}, False)
    assert found["accuracy"] < 1


def test_an_attack_that_leaves_the_ball_raises_an_error(classifier):
    logits_fn, images, labels = classifier
    wide = dataclasses.replace(FADE, build=lambda **settings: FADE.build(**{**settings, "epsilon": 0.5}))
    with pytest.raises(ValueError, match=r"fade: expected images in \[0, 1\] within 0\.1; it gave one at 0\.\d+"):
        evaluate(logits_fn, np.asarray(images), np.asarray(labels), [attacks.Attack(wide, 0.1)], progress=False)
