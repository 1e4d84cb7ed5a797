"""The cross-entropy that attacks maximise, for confident networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fs_jax.attacks import cross_entropy, logit_margin, pgd


@pytest.mark.parametrize("ahead", [-40.0, 0.0, 5.0, 17.0, 40.0, 80.0])
def test_the_value_and_gradient_have_a_relative_error_of_float32(ahead):
    logits = np.array([[0.5, ahead, -1.0, 0.0], [ahead, -0.5, 0.25, -3.0]], np.float32)
    labels = np.array([1, 0])
    others = np.where(np.arange(4) == labels[:, None], -np.inf, logits.astype(np.float64))
    lead = scipy.special.logsumexp(others, axis=1) - ahead
    by_lead = scipy.special.expit(lead)[:, None]
    expected = by_lead * np.where(np.isfinite(others), scipy.special.softmax(others, axis=1), -1)

    gradient = jax.grad(lambda z: jnp.sum(cross_entropy(z, labels)))(jnp.asarray(logits))

    # A difference of 80 has a rounding error of 4e-6, and so its exp a relative error of 4e-6; there are several.
    np.testing.assert_allclose(cross_entropy(logits, labels), np.log1p(np.exp(lead)), rtol=2e-5)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5)


def test_pgd_attacks_confident_networks_too():
    def logits_fn(x):  # class 0 is ahead by 30; both logits rise with each pixel, that of class 0 faster
        brightness = jnp.sum(x, (1, 2, 3))
        return jnp.stack([30 * brightness, 15 * brightness], -1)

    images = jnp.full((1, 2, 2, 1), 0.5)
    attacked = pgd(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, step_size=0.025, num_steps=20)
    np.testing.assert_allclose(attacked, 0.4, atol=1e-6)  # without the derivative by its logit, PGD brightens the image


def test_labels_of_few_bits_can_have_many_classes():
    logits = jnp.zeros((1, 300)).at[0, 257].set(5.0)  # 257 is 1 in 8 bits
    few, many = (jnp.array([1], dtype) for dtype in (jnp.uint8, jnp.int32))
    assert logit_margin(logits, few) == logit_margin(logits, many) == -5
    assert cross_entropy(logits, few) == cross_entropy(logits, many)


@pytest.mark.parametrize("place", range(3))
def test_the_margin_is_nan_if_any_logit_is(place):
    """On a CPU, the maximum of compiled programs can pass over a NaN; argmax returns its class."""
    logits = jnp.tile(jnp.array([2.0, 1.0, 0.0]), (64, 1)).at[:, place].set(jnp.nan)
    assert jnp.isnan(jax.jit(logit_margin)(logits, jnp.zeros(64, int))).all()
