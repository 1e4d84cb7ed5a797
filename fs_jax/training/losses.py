"""Label smoothing as in the paper's code, and the cross-entropy with smoothed labels."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def smooth_labels(labels: Int[Array, "n"], num_classes: int, smoothing: float) -> Float[Array, "n classes"]:
    """Smoothed one-hot labels.

    For a label y among C classes, the probability of class c is

        p_c = 1 - smoothing          if c = y
        p_c = smoothing / (C - 1)    otherwise

    This is what the paper's code computes. The formula printed in the paper, (1 - Delta) y + Delta / (C - 1), does not
    sum to 1. Optax's `smooth_labels` differs: it spreads the smoothing over all C classes.

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
    """Cross-entropy between `smooth_labels` and the softmax of the logits.

    For logits z and smoothed labels p,

        loss = -sum_c p_c log softmax(z)_c

    Args:
      logits: Logits [N, C].
      labels: True classes [N].
      smoothing: The paper's Delta, in [0, 1].

    Returns:
      Loss of each image [N], in nats.

    Example:
      >>> smoothed_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.5).round(3).tolist()
      [1.386]
    """
    return optax.softmax_cross_entropy(logits, smooth_labels(labels, logits.shape[-1], smoothing))
