"""Square: its squares and their schedule, its search, and images at different steps in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.attacks import logit_margin, stepwise
from fs_jax.attacks.square import _random_square, square, square_steps

pytestmark = pytest.mark.usefixtures("small_programs")

KEY = jax.random.key(5)
HEIGHT, WIDTH = 32, 30


@pytest.fixture(scope="module")
def random_squares():
    """The squares of 400 images and their signs, for a number of steps and a step."""
    shape = (HEIGHT, WIDTH, 2)
    draw = jax.jit(jax.vmap(lambda key, num_steps, step: _random_square(key, step, num_steps, shape), (0, None, None)))
    return lambda num_steps, step: draw(jax.random.split(KEY, 400), num_steps, step)


@pytest.mark.parametrize(
    ("num_steps", "step", "share"),
    # AutoAttack's schedule for 5,000 queries, a tenth of it for 500; steps count from 0, and 11 is the first after 10.
    [
        (5000, 0, 1), (5000, 10, 1), (5000, 11, 2), (5000, 200, 4), (5000, 4001, 128), (500, 1, 1), (500, 2, 2),
        # Products of these numbers are above 2^31.
        (1_000_000, 2000, 1), (1_000_000, 2001, 2), (1_000_000, 999_999, 128),
    ],
)  # fmt: skip
def test_squares_have_the_scheduled_side_and_a_uniform_position(random_squares, num_steps, step, share):
    inside, signs = random_squares(num_steps, step)
    inside = np.asarray(inside)[..., 0]
    side = round(np.sqrt(0.8 / share * HEIGHT * WIDTH))
    assert (inside.sum((1, 2)) == side**2).all()
    assert (inside.any(2).sum(1) == side).all()
    # Each position of the upper left corner has probability 1 / `places`; the tolerance is five standard errors.
    for lines, places in ((inside.any(2), HEIGHT - side + 1), (inside.any(1), WIDTH - side + 1)):
        drawn = np.bincount(lines.argmax(1), minlength=places) / len(lines)
        assert len(drawn) == places
        np.testing.assert_allclose(drawn, 1 / places, atol=5 * np.sqrt(1 / places / len(lines)))
    assert set(np.unique(signs)) == {-1, 1}


@pytest.fixture(scope="module")
def search(classifier):
    """The attack's start and the states after each of 30 steps."""
    logits_fn, images, labels = classifier
    attack = square_steps(epsilon=0.05, num_steps=30)
    start, step = (jax.jit(lambda *args, part=part: part(logits_fn, *args)) for part in (attack.start, attack.step))
    keys, first_run = jax.random.split(KEY, len(images)), jnp.zeros(len(images), jnp.int32)
    states = [start(keys, images, labels, first_run)]
    for _ in range(30):
        states.append(step(states[-1], images, labels))
    return step, states


def test_starts_at_vertical_stripes_on_the_edge_of_the_ball(search, classifier):
    _, images, _ = classifier
    first = search[1][0].progress.adversarial
    up, down = np.asarray(first == jnp.clip(images + 0.05, 0, 1)), np.asarray(first == jnp.clip(images - 0.05, 0, 1))
    assert (up.all(1) | down.all(1)).all()
    assert up.any()
    assert down.any()


def test_every_pixel_stays_on_the_edge_of_the_ball(search, classifier):
    # Adding +-2 epsilon to +-epsilon and projecting stays on the edge: the paper's reason for this size.
    _, images, _ = classifier
    edges = jnp.clip(images + 0.05, 0, 1), jnp.clip(images - 0.05, 0, 1)
    last = search[1][-1].progress.adversarial
    assert ((last == edges[0]) | (last == edges[1])).all()
    assert (last != search[1][0].progress.adversarial).any()


def test_the_margin_never_rises_and_is_that_of_the_images(search, classifier):
    logits_fn, _, labels = classifier
    margins = np.stack([state.progress.margin for state in search[1]])
    assert (np.diff(margins, axis=0) <= 0).all()
    assert (margins[-1] < margins[0]).all()
    last = search[1][-1].progress
    np.testing.assert_allclose(last.margin, logit_margin(logits_fn(last.adversarial), labels), rtol=1e-5, atol=1e-5)


def test_images_at_different_steps_share_a_batch(search, classifier):
    _, images, labels = classifier
    step, states = search
    late = jnp.arange(len(images)) % 2 == 0
    mixed = step(stepwise.where(late, states[20], states[3]), images, labels)
    expected = stepwise.where(late, states[21].progress, states[4].progress)
    jax.tree.map(np.testing.assert_array_equal, mixed.progress, expected)


def test_breaks_a_network_without_gradients():
    """A piecewise constant network: class 1 if more than half of the image's columns were darkened."""

    def logits_fn(images):
        dark = jnp.sum(jnp.round(10 * images).mean((1, 3)) < 5, -1).astype(jnp.float32)
        return jnp.stack([jnp.full_like(dark, 3.5), dark], -1)

    images, labels = jnp.full((4, 6, 6, 1), 0.5), jnp.zeros(4, int)
    attacked = square(logits_fn, KEY, images, labels, epsilon=0.1, num_steps=200)
    assert (logits_fn(attacked).argmax(-1) == 1).all()
