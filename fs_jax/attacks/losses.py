"""Losses that attacks maximise, and the margin, above 0 for correctly classified images; one value per image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    """Cross-entropy of each image: -log softmax(z)_y = log(1 + sum_{i != y} exp(z_i - z_y)).

    Computed by the second form. In float32, 1 + exp(-17) rounds to 1: when z_y is ahead by 17, the value of the first
    form is 0 and so is its derivative by z_y, and attacks miss adversarial examples. The second form keeps all
    derivatives until exp underflows, at a difference of 87 in float32 and bfloat16.

    Args:
      logits: [N, classes], at least 2 classes.
      labels: True classes [N].

    Returns:
      Losses [N], in nats.

    Example:
      >>> cross_entropy(jnp.array([[0.0, 0.0], [30.0, 0.0]]), jnp.array([0, 0])).tolist()
      [0.6931..., 9.357...e-14]
    """
    return jax.nn.softplus(jax.nn.logsumexp(_wrong(logits, labels), -1) - _pick(logits, labels))


def logit_margin(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    """The margin of the true class: z_y - max_{i != y} z_i, above 0 for an image that is classified correctly.

    Args:
      logits: [N, classes], at least 2 classes.
      labels: True classes [N].

    Returns:
      Margins [N]; NaN if a logit is.

    Example:
      >>> logit_margin(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
      [1.0]
    """
    wrong = _wrong(logits, labels)
    # On a CPU, XLA's maximum can pass over a NaN.
    largest = jnp.where(jnp.isnan(wrong).any(-1), jnp.nan, jnp.max(wrong, -1))
    return _pick(logits, labels) - largest


def cw_margin(logits: Float[Array, "n classes"], labels: Int[Array, "n"], margin: float = 50.0) -> Float[Array, "n"]:
    """The paper's "CW" loss: -max(z_y - max_{i != y} z_i + margin, 0).

    Args:
      logits: [N, classes].
      labels: True classes [N].
      margin: The loss is constant once the wrong class leads by this; 50 in the paper's code.

    Returns:
      Losses [N], at most 0; they grow as an image gets closer to misclassification.

    Example:
      >>> cw_margin(jnp.array([[3.0, 1.0]]), jnp.array([0])).tolist()
      [-52.0]

    Source: Carlini & Wagner, 2017, loss f6; as an attack by signed gradients, Madry et al., 2018.
    """
    return -jnp.maximum(logit_margin(logits, labels) + margin, 0)


def dlr(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    """Difference of logits ratio: -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12), z_(k) the k-th largest logit.

    Unlike the cross-entropy it doesn't change when the logits are scaled or shifted, so its gradients don't vanish for
    confident networks.

    Args:
      logits: [N, classes], at least 3 classes.
      labels: True classes [N].

    Returns:
      Losses [N], at least -1; above 0 for misclassified images.

    Raises:
      ValueError: for fewer than 3 classes.

    Example:
      >>> dlr(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([0])).tolist()
      [-0.5]

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020, equation 6.
    """
    _check_classes(logits, 3, "DLR", "APGD-CE, FAB and Square")
    top = jax.lax.top_k(logits, 3)[0]
    return -logit_margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"], targets: Int[Array, "n"]
) -> Float[Array, "n"]:
    """`dlr` towards a class t: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12).

    Args:
      logits: [N, classes], at least 4 classes.
      labels: True classes [N].
      targets: Target classes [N].

    Returns:
      Losses [N]; above 0 if the target's logit is larger than the true class's.

    Raises:
      ValueError: for fewer than 4 classes.

    Example:
      >>> targeted_dlr(jnp.array([[4.0, 3.0, 2.0, 0.0]]), jnp.array([0]), jnp.array([1])).round(3).tolist()
      [-0.333]

    Source: Croce & Hein, ICML 2020, equation 7.
    """
    _check_classes(logits, 4, "targeted DLR", "APGD-CE, FAB and Square, and with 3 classes APGD-DLR")
    top = jax.lax.top_k(logits, 4)[0]
    return (_pick(logits, targets) - _pick(logits, labels)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def wrong_class(logits: Float[Array, "n classes"], labels: Int[Array, "n"], rank: Int[Array, "n"]) -> Int[Array, "n"]:
    """The wrong class of this rank, in order of decreasing logits; rank 0 is the wrong class with the largest logit.

    Args:
      logits: [N, classes].
      labels: True classes [N].
      rank: [N], from 0 to classes - 2.

    Returns:
      Classes [N].

    Example:
      >>> wrong_class(jnp.array([[3.0, 1.0, 2.0]] * 2), jnp.array([0, 0]), jnp.array([0, 1])).tolist()
      [2, 1]
    """
    ranked = jnp.argsort(_wrong(logits, labels), axis=-1, descending=True)
    return _pick(ranked, rank).astype(jnp.int32)


def _check_classes(logits, least, loss, remaining):
    if logits.shape[-1] < least:
        raise ValueError(
            f"logits_fn: expected at least {least} classes, which the {loss} loss compares; got {logits.shape[-1]}. "
            f"Attacks that work: {remaining}."
        )


def _wrong(logits, labels):
    """The logits, with -inf for the true class."""
    # one_hot counts classes in the dtype of the labels, where uint8 would wrap around.
    is_true = jax.nn.one_hot(labels.astype(jnp.int32), logits.shape[-1], dtype=bool)
    return jnp.where(is_true, -jnp.inf, logits)


def _pick(values, labels):
    return jnp.take_along_axis(values, labels[:, None].astype(jnp.int32), axis=-1)[:, 0]
