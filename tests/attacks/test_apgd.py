"""APGD: against the published algorithm in plain NumPy, closed forms, and its losses by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import attacks
from fs_jax.attacks import losses
from fs_jax.attacks.apgd import _intervals
from fs_jax.attacks.stepwise import run

pytestmark = pytest.mark.usefixtures("small_programs")

KEY = jax.random.key(2)
EPSILON = 0.08


def reference(loss_and_gradient, image, start, epsilon, num_steps):
    """Croce & Hein, algorithm 1, for one image, in NumPy: the iterate after each step.

    It stops early if a gradient vanishes (that of the DLR loss does if the true class is third: the loss is 1 there).
    After that, signs of the gradient are signs of rounding errors.
    """
    checkpoints, length = [0], int(0.22 * num_steps)
    while checkpoints[-1] + length <= num_steps:
        checkpoints.append(checkpoints[-1] + length)
        length = max(length - int(0.03 * num_steps), int(0.06 * num_steps))

    def project(x):
        return np.clip(np.clip(x, image - epsilon, image + epsilon), 0, 1)

    eta, x, before, halved, last = 2 * epsilon, start, start, True, 0
    loss, gradient = loss_and_gradient(x)
    best, history, path = (loss, x, gradient), [loss], [x]
    best_at_checkpoint = loss
    for k in range(1, num_steps + 1):
        z = project(x + eta * np.sign(gradient))
        after = z if k == 1 else project(x + 0.75 * (z - x) + 0.25 * (x - before))
        before, x = x, after
        loss, gradient = loss_and_gradient(x)
        history.append(loss)
        if loss > best[0]:
            best = loss, x, gradient
        if k in checkpoints:
            rises = np.sum(np.diff(history[last:]) > 0)
            halved = rises <= 0.75 * (k - last) or (not halved and best[0] <= best_at_checkpoint)
            if halved:
                eta, x, gradient = eta / 2, best[1], best[2]
            best_at_checkpoint, last = best[0], k
        path.append(x)
        if np.abs(gradient).min() < 1e-10:
            break
    return path, eta


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("loss", ["ce", pytest.param("dlr", marks=pytest.mark.slow)])
def test_iterates_equal_the_published_algorithm(classifier, loss):
    logits_fn, images, labels = classifier
    images = jnp.asarray(images, jnp.float64)
    attack = attacks.apgd_steps(epsilon=EPSILON, loss=loss)
    step = jax.jit(lambda state: attack.step(logits_fn, state, images, labels))
    states = [started(attack, logits_fn, images, labels)]
    for _ in range(attack.num_steps):
        states.append(step(states[-1]))  # misclassified images continue too
    loss_fn = {"ce": attacks.cross_entropy, "dlr": attacks.dlr}[loss]
    one = jax.jit(jax.value_and_grad(lambda x, label: loss_fn(logits_fn(x[None]), label[None])[0]))
    halved = whole = 0
    for i in range(len(images)):
        path, eta = reference(
            lambda x, i=i: one(x, labels[i]), np.asarray(images[i]), np.asarray(states[0].iterate[i]), EPSILON, 100
        )
        np.testing.assert_allclose([state.iterate[i] for state in states[: len(path)]], path, atol=1e-12)
        assert states[len(path) - 1].step_size[i] == pytest.approx(eta)
        halved += eta < 2 * EPSILON
        whole += len(path) == len(states)
    assert whole >= 4  # of 6
    assert halved > 0  # else no checkpoint was tested


def test_checkpoints_are_the_published_ones():
    assert (np.flatnonzero(_intervals(100)) + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert (np.flatnonzero(_intervals(5)) + 1).tolist() == [1, 2, 3, 4, 5]  # no interval is shorter than a step


def linear(classes=2):
    """A linear network on 3 x 3 images, with margins in closed form, and images that it classifies correctly."""
    rng = np.random.default_rng(4)
    weights = rng.normal(size=(9, classes))
    weights -= weights.mean(0)  # so that images near 0.5 are near the boundary
    images = rng.uniform(0.3, 0.7, size=(12, 3, 3, 1))

    def logits_fn(x):
        return x.reshape(len(x), -1) @ weights

    return logits_fn, jnp.asarray(images), jnp.argmax(logits_fn(images), -1), weights


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", [{"loss": "ce"}, {"loss": "targeted", "num_runs": 4}], ids=["ce", "targeted"])
def test_on_a_linear_network_an_image_is_misclassified_if_it_can_be(settings):
    # If no pixel is within epsilon of 0 or 1, class i can exceed y if z_y - z_i < epsilon ||w_y - w_i||_1.
    classes = 2 if settings["loss"] == "ce" else 5
    logits_fn, images, labels, weights = linear(classes)
    logits = np.asarray(logits_fn(images))
    wrong = np.array([[i for i in range(classes) if i != y] for y in labels])
    gaps = logits[np.arange(12), labels][:, None] - np.take_along_axis(logits, wrong, -1)
    reach = np.abs(weights[:, labels, None] - weights[:, wrong]).sum(0)
    epsilon = float(np.median(np.min(gaps / reach, -1)))
    assert epsilon < 0.3
    attack = attacks.apgd_steps(epsilon=epsilon, **settings)
    progress = run(attack, logits_fn, jax.random.split(KEY, 12), images, labels)
    can_be_misclassified = (gaps < epsilon * reach).any(-1)
    assert can_be_misclassified.sum() == 6
    np.testing.assert_array_equal(progress.misclassified_at >= 0, can_be_misclassified)
    if classes == 2:  # robust images have the lowest possible margin, in float32
        lowest = np.min(gaps - epsilon * reach, -1)
        np.testing.assert_allclose(progress.margin[~can_be_misclassified], lowest[~can_be_misclassified], rtol=1e-5)


def started(attack, logits_fn, images, labels):
    start = jax.jit(lambda keys: attack.start(logits_fn, keys, images, labels, jnp.zeros_like(labels)))
    return start(jax.random.split(KEY, len(images)))


def test_the_start_is_judged_and_is_on_the_surface_of_the_ball(classifier):
    logits_fn, images, labels = classifier
    attack = attacks.apgd_steps(epsilon=EPSILON)
    state = started(attack, logits_fn, images, labels.at[:3].add(1) % 5)
    correct = attacks.logit_margin(logits_fn(state.iterate), labels.at[:3].add(1) % 5) > 0
    assert correct.any()
    assert not correct.all()
    assert (state.progress.misclassified_at == jnp.where(correct, -1, 0)).all()
    inside = started(attack, logits_fn, jnp.full_like(images, 0.5), labels).iterate
    np.testing.assert_allclose(jnp.abs(inside - 0.5).max((1, 2, 3)), EPSILON, atol=1e-7)


def test_losses_by_hand():
    logits = jnp.array([[5.0, 3.0, 2.0, 1.0], [3.0, 5.0, 2.0, 1.0]])
    labels, targets = jnp.array([0, 0]), jnp.array([3, 1])
    # Margins 2 and -2 over 5 - 2; distances to the targets 4 and -2 over 5 - (2 + 1) / 2.
    np.testing.assert_allclose(attacks.dlr(logits, labels), [-2 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(attacks.targeted_dlr(logits, labels, targets), [-4 / 3.5, 2 / 3.5], rtol=1e-6)
    np.testing.assert_allclose(attacks.dlr(7 * logits - 3, labels), attacks.dlr(logits, labels), rtol=1e-6)
    assert losses.wrong_class(logits, labels, jnp.array([0, 2])).tolist() == [1, 3]
    assert losses.wrong_class(logits, jnp.array([1, 1]), jnp.array([0, 1])).tolist() == [0, 2]


def test_gradients_of_a_randomised_network_are_averaged():
    logits_fn, images, labels, _ = linear(3)
    images = images.astype(jnp.float32)

    def noisy(x, keys):
        # Exact logits; gradients with noise of three times their size.
        noise = jnp.einsum(
            "nd,ndc->nc", x.reshape(len(x), -1), jax.vmap(lambda key: jax.random.normal(key, (9, 3)))(keys)
        )
        return logits_fn(x).astype(x.dtype) + 3 * (noise - jax.lax.stop_gradient(noise))

    exact = started(attacks.apgd_steps(), logits_fn, images, labels).direction
    agreement = {}
    for draws in (1, 100):
        attack = attacks.apgd_steps(num_draws=draws)
        agreement[draws] = (started(attack, noisy, images, labels).direction == exact).mean()
    # The fraction of correct signs is about 0.6 for noise of size 3, and 0.9 for 3 / 10, the mean of 100 draws.
    assert agreement[1] < 0.75 < 0.85 < agreement[100]
    assert attack.passes == ((101, 100), (100, 100))  # one more pass judges the run


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (
            2,
            {"loss": "dlr"},
            "at least 3 classes, which the DLR loss compares; got 2. Attacks that work: APGD-CE, FAB",
        ),
        (
            3,
            {"loss": "targeted"},
            "at least 4 classes, which the targeted DLR loss compares; got 3. Attacks that work",
        ),
        (5, {"loss": "targeted", "num_runs": 5}, "num_runs: expected at least 1, and with targets at most 4"),
        (5, {"loss": "cd"}, "loss: expected one of ce, dlr, targeted; got 'cd'"),
    ],
)
def test_bad_settings_raise_an_error(classes, settings, message):
    logits_fn, images, labels, _ = linear(classes)
    with pytest.raises(ValueError, match=re.escape(message)):
        attacks.apgd(logits_fn, KEY, images.astype(jnp.float32), labels, **settings)


def test_with_few_classes_all_wrong_ones_are_targets():
    logits_fn, images, labels, _ = linear(4)
    # More than 3 targets would raise an error.
    jax.eval_shape(lambda x: attacks.apgd(logits_fn, KEY, x, labels, loss="targeted"), images.astype(jnp.float32))
