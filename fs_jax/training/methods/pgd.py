"""PGD adversarial training."""

import jax.numpy as jnp

from fs_jax import attacks
from fs_jax.training.losses import smoothed_cross_entropy
from fs_jax.training.methods.method import Entry, Method, accuracy, check_settings, infer


def pgd(
    *, epsilon: float = 8 / 255, step_size: float | None = None, num_steps: int = 7, smoothing: float = 0.0
) -> Method:
    """PGD adversarial training. The loss is the smoothed cross-entropy of images attacked by PGD.

    The attack uses the network in inference mode. The training pass, on the attacked images, updates BatchNorm's
    running statistics.

    Args:
      epsilon: Radius, in units of [0, 1].
      step_size: Size of an attack step, in units of [0, 1]; by default epsilon / 4.
      num_steps: Number of attack steps.
      smoothing: Label smoothing: the true class has 1 - smoothing.

    Example:
      >>> method = pgd(epsilon=0.1)

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
    """
    step_size = epsilon / 4 if step_size is None else step_size
    check_settings(smoothing=smoothing, epsilon=epsilon, step_size=step_size, num_steps=num_steps)

    def loss(apply, variables, batch, context):
        images, labels = batch["images"], batch["labels"]
        attacked = attacks.pgd(
            infer(apply, variables), context.keys, images, labels,
            epsilon=epsilon, step_size=step_size, num_steps=num_steps, start=batch.get("start"),
        )  # fmt: skip
        logits, variables = apply(variables, attacked, train=True)
        value = jnp.mean(smoothed_cross_entropy(logits, labels, smoothing))
        return value, (variables, {"accuracy": accuracy(logits, labels)})

    return Method(loss)


PGD = Entry("pgd", "PGD adversarial training (Madry et al.), 7 steps by default", pgd)
