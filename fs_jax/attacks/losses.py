"""Losses that attacks ascend, and the margin that says whether an image stands: one value per image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    """Cross-entropy of each image: -log softmax(z)_y.

    Args:
      logits: [N, classes].
      labels: True classes [N].

    Returns:
      Losses [N], in nats.

    Example:
      >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(3).tolist()
      [1.386]
    """
    return -_pick(jax.nn.log_softmax(logits), labels)


def logit_margin(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    """How far the true class leads: z_y - max_{i != y} z_i. An image stands while it is above 0.

    Args:
      logits: [N, classes], at least 2 classes.
      labels: True classes [N].

    Returns:
      Margins [N].

    Example:
      >>> logit_margin(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
      [1.0]
    """
    is_true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return _pick(logits, labels) - jnp.max(jnp.where(is_true, -jnp.inf, logits), -1)


def cw_margin(logits: Float[Array, "n classes"], labels: Int[Array, "n"], margin: float = 50.0) -> Float[Array, "n"]:
    """The paper's "CW" loss: -max(z_y - max_{i != y} z_i + margin, 0).

    Args:
      logits: [N, classes].
      labels: True classes [N].
      margin: How far the wrong class is pushed past the true one; 50 in the paper's code.

    Returns:
      Losses [N], at most 0, rising as the image nears misclassification.

    Example:
      >>> cw_margin(jnp.array([[3.0, 1.0]]), jnp.array([0])).tolist()
      [-52.0]

    Source: Carlini & Wagner, 2017, loss f6; as an attack by signed gradients, Madry et al., 2018.
    """
    return -jnp.maximum(logit_margin(logits, labels) + margin, 0)


def _pick(values, labels):
    return jnp.take_along_axis(values, labels[:, None].astype(jnp.int32), axis=-1)[:, 0]
