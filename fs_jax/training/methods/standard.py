"""Standard training, on natural images."""

import jax.numpy as jnp

from fs_jax.training.losses import smoothed_cross_entropy
from fs_jax.training.methods.method import Entry, Method, accuracy, check_settings


def standard(*, smoothing: float = 0.0) -> Method:
    """Standard training. The loss is the smoothed cross-entropy of the natural images.

    Args:
      smoothing: Label smoothing: the true class has 1 - smoothing.

    Example:
      >>> method = standard(smoothing=0.1)
    """
    check_settings(smoothing=smoothing)

    def loss(apply, variables, batch, context):
        logits, variables = apply(variables, batch["images"], train=True)
        value = jnp.mean(smoothed_cross_entropy(logits, batch["labels"], smoothing))
        return value, (variables, {"accuracy": accuracy(logits, batch["labels"])})

    return Method(loss)


STANDARD = Entry("standard", "training on natural images, without an attack", standard, chosen_by="clean")
