"""Local search on linear networks, where what it does can be said beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.attacks.local_search import local_search, local_search_steps

pytestmark = pytest.mark.usefixtures("small_programs")

KEY = jax.random.key(2)
# On 4 x 4 images: 10% is one pixel to start with, and everything lies in its neighbourhood from then on.
WEIGHTS = np.random.default_rng(3).permutation(np.arange(-10.0, 6)).reshape(4, 4, 1).astype(np.float32)
IMAGE = jnp.full((1, 4, 4, 1), 0.75)
LABEL = jnp.array([0])


def logits_fn(images):
    """The true class, 0, leads by <weights, x - 1/2> + 12.5. Pushed to 10, pixels of low weights harm it most."""
    margin = jnp.sum((images - 0.5) * WEIGHTS[None], (1, 2, 3)) + 12.5
    # A temperature, as a margin of 100 would be a probability of exactly 1 in float32.
    return jnp.stack([margin, jnp.zeros_like(margin)], -1) / 20


def states(num_steps, logits_fn, image, **settings):
    attack = local_search_steps(**settings)
    start, step = (jax.jit(lambda *args, part=part: part(logits_fn, *args)) for part in (attack.start, attack.step))
    states = [start(jax.random.fold_in(KEY, 0)[None], image, LABEL, jnp.array([0]))]
    for _ in range(num_steps):
        states.append(step(states[-1], image, LABEL))
    return states


def after(*rounds):
    """The image, as x - 1/2, where pixels of these weights were changed in these rounds: from 1/4 to 3/8 to ..."""
    values = np.full((4, 4, 1), 0.25)
    for weights in rounds:
        values = np.where(np.isin(WEIGHTS, weights), 1.5 * values, values)
        values = np.where(values > 0.5, values - 1, values)
    return values


@pytest.fixture(scope="module")
def searched():
    return states(5, logits_fn, IMAGE)


def test_changes_the_pixels_that_harm_most(searched):
    (only,) = WEIGHTS[np.asarray(searched[0].candidates[0])].ravel()
    assert only > 0  # then the only first candidate isn't one of those that follow
    lowest, next_lowest = [-10, -9, -8, -7, -6], [-5, -4, -3, -2, -1]
    expected = [
        after(),
        after([only]),
        after([only], lowest),  # 3/8
        after([only], lowest, lowest),  # 9/16, so -7/16, and to push that on would help the true class
        after([only], lowest, lowest, next_lowest),
        after([only], lowest, lowest, next_lowest, next_lowest),
    ]
    for state, values in zip(searched, expected, strict=True):
        np.testing.assert_allclose(state.iterate[0] - 0.5, values, atol=1e-7)


def test_falls_where_the_margin_says(searched):
    # The weights add up to -40, the lowest five to -40 too: 2.5 at first, and 5 less when those go from 1/4 to 3/8. The
    # first pixel's weight, 5 at most, gives less than 1.
    assert [int(state.progress.misclassified_at[0]) for state in searched] == [-1, -1, 2, 2, 2, 2]


@pytest.mark.slow
def test_chunks_change_nothing(searched):
    others = states(3, logits_fn, IMAGE, chunk_size=3)
    for state, other in zip(searched, others, strict=False):
        np.testing.assert_array_equal(state.iterate, other.iterate)


def test_the_published_attack_leaves_the_ball_and_the_projected_one_stays():
    attack = jax.jit(lambda epsilon: local_search(logits_fn, KEY, IMAGE, LABEL, num_steps=4, epsilon=epsilon))
    np.testing.assert_allclose(np.abs(attack(1.0) - IMAGE).max(), 3 / 8 - 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(np.abs(attack(8 / 255) - IMAGE).max(), 8 / 255, rtol=1e-5)


def test_values_that_leave_the_range_come_in_again_at_its_other_end():
    for value, expected in ((0.1, 0.9), (0.9, 0.1)):  # as x - 1/2: -0.4, times 1.5 -0.6, and so 0.4
        _, state = states(1, logits_fn, jnp.full((1, 4, 4, 1), value))
        np.testing.assert_allclose(np.sort(state.iterate.ravel()), np.sort([expected] + [value] * 15), rtol=1e-6)


def test_candidates_are_a_tenth_then_the_neighbourhoods():
    def flat(images):
        return jnp.stack([images.sum((1, 2, 3)) * 0, images.sum((1, 2, 3)) * 0 - 1], -1)

    image = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 20, 30, 1)).astype(np.float32))
    before, state = states(1, flat, image)
    assert before.candidates.sum() == 60
    changed = np.argwhere(np.asarray(state.iterate != image)[0, ..., 0])
    assert len(changed) == 5
    assert np.asarray(before.candidates)[0][tuple(changed.T)].all()
    pixels = np.stack(np.meshgrid(np.arange(20), np.arange(30), indexing="ij"), -1)
    near = (np.abs(pixels[:, :, None] - changed).max(-1) <= 5).any(-1)
    np.testing.assert_array_equal(state.candidates[0], near)
    assert not near.all()


def test_of_large_images_it_starts_with_128_pixels():
    start = jax.jit(
        lambda image: local_search_steps().start(lambda x: x[:, 0, 0] * jnp.eye(2)[:1], KEY[None], image, LABEL, LABEL)
    )
    assert start(jnp.full((1, 40, 40, 1), 0.5)).candidates.sum() == 128
