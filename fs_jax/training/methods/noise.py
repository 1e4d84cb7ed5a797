"""Training with uniform noise: the random start of an attack, without its steps."""

import jax.numpy as jnp

from fs_jax.attacks import random_start
from fs_jax.training.losses import smoothed_cross_entropy
from fs_jax.training.methods.method import Entry, Method, accuracy, check_settings


def noise(*, epsilon: float = 8 / 255, smoothing: float = 0.0) -> Method:
    """Training with uniform noise. The loss is the smoothed cross-entropy of noisy images, clipped to [0, 1].

    Args:
      epsilon: Radius of the noise, in units of [0, 1].
      smoothing: Label smoothing: the true class has 1 - smoothing.

    Example:
      >>> method = noise(epsilon=0.1, smoothing=0.5)
    """
    check_settings(smoothing=smoothing, epsilon=epsilon)

    def loss(apply, variables, batch, context):
        images, labels = batch["images"], batch["labels"]
        noisy = jnp.clip(batch.get("start", random_start(context.keys, images, epsilon)), 0, 1)
        logits, variables = apply(variables, noisy, train=True)
        value = jnp.mean(smoothed_cross_entropy(logits, labels, smoothing))
        return value, (variables, {"accuracy": accuracy(logits, labels)})

    return Method(loss)


NOISE = Entry("noise", "training on images with uniform noise, without an attack", noise)
