"""SPSA: its estimate against the true gradient, its descent against Adam, and the attack against PGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fs_jax.attacks import cw_margin, logit_margin, pgd
from fs_jax.attacks.spsa import estimated_gradient, spsa, spsa_steps

pytestmark = pytest.mark.usefixtures("small_programs")

KEYS = jax.random.split(jax.random.key(1), 6)


@pytest.mark.usefixtures("standard_promotion")
def test_works_in_half_precision():
    # Adam's 0.999 is 1 in bfloat16: its correction needs higher precision.
    def logits_fn(x):
        mean = x.astype(jnp.float32).mean((1, 2, 3))
        return jnp.stack([mean, 1 - mean], -1)

    images = jnp.full((2, 4, 4, 1), 0.52, jnp.bfloat16)
    attacked = spsa(logits_fn, KEYS[0], images, jnp.zeros(2, int), epsilon=0.1, num_steps=20, num_directions=16)
    assert attacked.dtype == jnp.bfloat16
    assert (logit_margin(logits_fn(attacked), jnp.zeros(2, int)) < 0).all()


@pytest.fixture(scope="module")
def quadratic():
    """A network whose margin is a quadratic function, 6 images for it, and the margin's gradients there."""
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(16, 16)).astype(np.float32)
    matrix += matrix.T

    def logits_fn(images):
        flat = images.reshape(len(images), -1)
        margin = jnp.sum(flat @ matrix * flat, -1) / 2
        return jnp.stack([jnp.zeros_like(margin), margin], -1)

    images = rng.uniform(size=(6, 4, 4, 1)).astype(np.float32)
    return logits_fn, jnp.asarray(images), jnp.ones(6, int), (images.reshape(6, 16) @ matrix).reshape(images.shape)


@pytest.fixture(scope="module")
def estimates(quadratic):
    """Estimates from 2,000 directions: all at once, and in chunks, of which the last isn't full."""
    logits_fn, images, labels, _ = quadratic

    @jax.jit
    def estimate(chunk):
        return estimated_gradient(logits_fn, KEYS, images, labels, num_directions=2000, delta=0.1, chunk=chunk)

    return estimate(jnp.arange(2000)), estimate(jnp.arange(300))


def test_estimates_the_gradient(quadratic, estimates):
    gradient = quadratic[-1]
    # Central differences of a quadratic are exact, so each direction gives <g, v> v, whose entry j has the mean g_j
    # and the variance ||g||^2 - g_j^2.
    total = np.sum(gradient**2, (1, 2, 3), keepdims=True)
    errors = (estimates[0] - gradient) / np.sqrt((total - gradient**2) / 2000)
    assert np.abs(errors).max() < 5
    assert np.abs(errors.mean()) < 5 / np.sqrt(errors.size)
    assert np.abs(np.mean(errors**2) - 1) < 5 * np.sqrt(2 / errors.size)


def test_the_estimate_does_not_depend_on_the_chunk(estimates):
    # Margins of about 1, in float32, divided by 2 delta.
    np.testing.assert_allclose(*estimates, atol=1e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.usefixtures("standard_promotion")
def test_descends_as_adam_does():
    # For one pixel the estimate isn't random: it is the slope times the square of the sign. The radius, 0.2, has no
    # effect, as 12 steps of at most 0.01 stay inside.
    def margins(x):
        return 3 + jnp.sin(5 * x) + x**2

    def logits_fn(images):
        margin = margins(images[:, 0, 0, 0])
        return jnp.stack([margin, jnp.zeros_like(margin)], -1)

    images, labels = jnp.linspace(0.3, 0.7, 4).reshape(4, 1, 1, 1), jnp.zeros(4, int)
    attack = spsa_steps(epsilon=0.5, num_directions=3, delta=0.02)
    start, step = (jax.jit(lambda *args, part=part: part(logits_fn, *args)) for part in (attack.start, attack.step))
    state = start(KEYS[:4], images, labels, jnp.zeros(4, int))
    x = jnp.clip(state.iterate[:, 0, 0, 0], 0.2, 0.8)  # away from the range's ends
    state = state._replace(iterate=x[:, None, None, None])
    adam = optax.adam(0.01)
    memory = adam.init(x)
    for _ in range(12):
        slope = (margins(x + 0.02) - margins(x - 0.02)) / 0.04
        update, memory = adam.update(slope, memory)
        x = x + update
        state = step(state, images, labels)
        # Adam divides a slope by its size, however small. So this is in float64, with errors of 1e-16 / 0.04.
        np.testing.assert_allclose(state.iterate[:, 0, 0, 0], x, atol=1e-9)


@pytest.mark.slow
def test_is_as_strong_as_pgd(classifier):
    smooth, images, _ = classifier
    labels = smooth(images).argmax(-1)

    def logits_fn(images):
        return jax.lax.stop_gradient(smooth(images))

    @jax.jit
    def margins(rng):
        settings = {"epsilon": 0.05, "num_steps": 60}
        searched = spsa(logits_fn, rng, images, labels, num_directions=64, chunk_size=64, **settings)
        descended = pgd(smooth, rng, images, labels, step_size=0.01, loss=cw_margin, **settings)
        return logit_margin(smooth(searched), labels), logit_margin(smooth(descended), labels)

    searched, descended = margins(jax.random.key(0))
    assert 0 < (descended <= 0).sum() < len(images)
    np.testing.assert_array_equal(searched <= 0, descended <= 0)


@pytest.mark.parametrize("name", ["num_directions", "delta", "learning_rate", "chunk_size"])
def test_settings_of_zero_raise_an_error(classifier, name):
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0; got 0"):
        spsa(classifier[0], jax.random.key(0), *classifier[1:], **{name: 0})
