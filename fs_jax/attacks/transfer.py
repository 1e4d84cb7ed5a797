"""Transfer attacks: adversarial images that PGD makes for another network, classified by the evaluated one."""

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Int

from fs_jax._utils.images import Images, as_float, check_images, check_labels
from fs_jax._utils.keys import IMPLEMENTATION
from fs_jax._utils.validation import check_number
from fs_jax.attacks.clean import judge, whole
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.packing import packed
from fs_jax.attacks.pgd import pgd_steps
from fs_jax.attacks.registry import Attack
from fs_jax.attacks.specification import Setting, Specification

TRANSFER = Specification(
    "transfer",
    "adversarial images made for another network",
    lambda *, epsilon, num_classes, source: whole(Partial(judge)),
    {"source": Setting("", lambda name, value: None)},
    uses_gradients=False,
    judges_only=True,
)


def transfer(
    source_logits_fn: LogitsFn,
    images: Images,
    labels: Int[np.ndarray, "n"],
    *,
    epsilon: float = 8 / 255,
    source: str = "",
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
) -> Attack:
    """Run PGD-20 on another network, with steps of a quarter of the radius, and make its results an attack.

    Args:
      source_logits_fn: The other network, from images to logits.
      images: The images that will be evaluated, [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: Their true classes [N].
      epsilon: Radius, in units of [0, 1].
      source: Identifies the other network in records, for example a fingerprint of its weights.
      seed: Seed of the random starts, from 0 to 2^32 - 1.
      first: Index of the first image in its split.
      batch_size: The largest batch.

    Returns:
      The attack, excluded from the worst case. Its passes are those of the evaluated network alone.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], and labels, a radius or a seed out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = np.full((1, 4, 4, 1), 0.5, np.float32)
      >>> attack = transfer(logits_fn, images, np.array([0]), epsilon=0.1)
      >>> attack.name, float(attack.images.mean().round(3))  # class 0 is for bright images
      ('transfer', 0.4)
    """
    check_images(images, uint8_too=True)
    check_labels(labels, images)
    check_number("epsilon", epsilon, at_least=0, at_most=1)
    check_number("seed", seed, at_least=0, at_most=2**32 - 1, integer=True)  # others give another key in 64-bit mode
    rng = jax.random.key(seed, impl=IMPLEMENTATION)
    attack = Attack(TRANSFER, epsilon, apart=True, source=source)
    stepwise = pgd_steps(epsilon=epsilon, step_size=epsilon / 4, last_only=True)
    images = np.asarray(images)
    adversaries = np.array(as_float(images))
    keys = attack.keys(rng, first + np.arange(len(labels)), 1)
    for report in packed(stepwise, source_logits_fn, keys, images, labels, batch_size=batch_size, every_run=True):
        for job in report.finished:
            adversaries[job.image] = job.adversarial
    return attack.replace(images=adversaries)
