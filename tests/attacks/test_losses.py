"""The cross-entropy that attacks maximise, for confident networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fs_jax.attacks import cross_entropy


@pytest.mark.parametrize("ahead", [-40.0, 0.0, 5.0, 17.0, 40.0, 80.0])
def test_the_value_and_gradient_have_a_relative_error_of_float32(ahead):
    logits = np.array([[0.5, ahead, -1.0, 0.0], [ahead, -0.5, 0.25, -3.0]], np.float32)
    labels = np.array([1, 0])
    others = np.where(np.arange(4) == labels[:, None], -np.inf, logits.astype(np.float64))
    lead = scipy.special.logsumexp(others, axis=1) - ahead
    by_lead = scipy.special.expit(lead)[:, None]
    expected = by_lead * np.where(np.isfinite(others), scipy.special.softmax(others, axis=1), -1)

    gradient = jax.grad(lambda z: jnp.sum(cross_entropy(z, labels)))(jnp.asarray(logits))

    # The rounding error of a difference of 80 is 4e-6, which exp multiplies by 1.
    np.testing.assert_allclose(cross_entropy(logits, labels), np.log1p(np.exp(lead)), rtol=2e-5)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5)
