"""Label smoothing as the paper's code has it, and the cross-entropy to smoothed labels."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def smooth_labels(labels: Int[Array, "n"], num_classes: int, smoothing: float) -> Float[Array, "n classes"]:
    """Smoothed one-hot labels: 1 - smoothing for the true class, smoothing / (C - 1) for each other.

    The paper prints (1 - Delta) y + Delta / (C - 1), which doesn't sum to 1; this is what its code computes. (Optax's
    `smooth_labels` spreads the smoothing over all C classes instead.)

    Args:
      labels: True classes [N].
      num_classes: Number of classes C.
      smoothing: The paper's Delta, in [0, 1].

    Returns:
      Probabilities [N, C].

    Example:
      >>> smooth_labels(jnp.array([0]), 5, 0.5).tolist()
      [[0.5, 0.125, 0.125, 0.125, 0.125]]

    Source: Zhang & Wang, NeurIPS 2019, section 5.
    """
    is_true = jax.nn.one_hot(labels, num_classes, dtype=bool)
    return jnp.where(is_true, 1 - smoothing, smoothing / max(num_classes - 1, 1))


def smoothed_cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"], smoothing: float
) -> Float[Array, "n"]:
    """Cross-entropy to `smooth_labels`: -sum_c p_c log softmax(z)_c, for each image, in nats.

    Example:
      >>> smoothed_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.5).round(3).tolist()
      [1.386]
    """
    return optax.softmax_cross_entropy(logits, smooth_labels(labels, logits.shape[-1], smoothing))
