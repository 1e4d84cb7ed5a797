"""Local search on linear networks, for which its result is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.attacks.local_search import local_search, local_search_steps

pytestmark = pytest.mark.usefixtures("small_programs")

KEY = jax.random.key(2)
# On 4 x 4 images, 10% is one pixel at the start, and all pixels are in its neighbourhood in later rounds.
WEIGHTS = np.random.default_rng(3).permutation(np.arange(-10.0, 6)).reshape(4, 4, 1).astype(np.float32)
IMAGE = jnp.full((1, 4, 4, 1), 0.75)
LABEL = jnp.array([0])


def logits_fn(images):
    """The margin of class 0, the true one, is <weights, x - 1/2> + 12.5: low weights times 10 lower it most."""
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
    """The image, as x - 1/2, after changing pixels of these weights in these rounds: from 1/4 to 3/8 to ..."""
    values = np.full((4, 4, 1), 0.25)
    for weights in rounds:
        values = np.where(np.isin(WEIGHTS, weights), 1.5 * values, values)
        values = np.where(values > 0.5, values - 1, values)
    return values


@pytest.fixture(scope="module")
def searched():
    return states(5, logits_fn, IMAGE)


def test_changes_the_pixels_that_lower_the_margin_most(searched):
    (only,) = WEIGHTS[np.asarray(searched[0].candidates[0])].ravel()
    assert only > 0  # then the first candidate isn't among the later ones
    lowest, next_lowest = [-10, -9, -8, -7, -6], [-5, -4, -3, -2, -1]
    expected = [
        after(),
        after([only]),
        after([only], lowest),  # 3/8
        after([only], lowest, lowest),  # 9/16, so -7/16; pushing that would help the true class
        after([only], lowest, lowest, next_lowest),
        after([only], lowest, lowest, next_lowest, next_lowest),
    ]
    for state, values in zip(searched, expected, strict=True):
        np.testing.assert_allclose(state.iterate[0] - 0.5, values, atol=1e-7)


def test_is_misclassified_when_the_margin_is_negative(searched):
    # The sum of the weights is -40, and that of the lowest five is -40 too: the margin is 2.5 at first, and 5 less when
    # those change from 1/4 to 3/8. The first pixel's weight, at most 5, adds less than 1.
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


def test_values_outside_the_range_are_wrapped_to_the_other_end():
    for value, expected in ((0.1, 0.9), (0.9, 0.1)):  # as x - 1/2: -0.4, times 1.5 -0.6, and so 0.4
        _, state = states(1, logits_fn, jnp.full((1, 4, 4, 1), value))
        np.testing.assert_allclose(np.sort(state.iterate.ravel()), np.sort([expected] + [value] * 15), rtol=1e-6)


def test_candidates_are_a_tenth_of_the_pixels_then_the_neighbourhoods():
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


def test_starts_with_128_pixels_of_large_images():
    start = jax.jit(
        lambda image: local_search_steps().start(lambda x: x[:, 0, 0] * jnp.eye(2)[:1], KEY[None], image, LABEL, LABEL)
    )
    assert start(jnp.full((1, 40, 40, 1), 0.5)).candidates.sum() == 128


def test_a_network_that_is_not_finite_outside_of_the_range_of_images_stops_the_attack():
    """A NaN is never the lowest probability, so the search would end without candidates, and find nothing."""

    def gamma(images):
        return logits_fn(jnp.power(images, 2.2))

    with pytest.raises(FloatingPointError, match="logits_fn: expected finite logits and gradients; got others"):
        local_search(gamma, KEY, jnp.full((1, 4, 4, 1), 0.25), LABEL, num_steps=2)
