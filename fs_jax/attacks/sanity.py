"""AutoAttack's warnings that an evaluation may mislead, from the network's logits and from results of attacks.

`autoattack` and `fs_jax.evaluation.evaluate` give them. The longer checklist, which follows a suite, is
`fs_jax.evaluation.gradient_masking`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from fs_jax._utils import backend
from fs_jax._utils.images import Images, as_float, check_images, check_labels
from fs_jax._utils.keys import image_keys
from fs_jax._utils.validation import check_number
from fs_jax.attacks.chain import Stage
from fs_jax.attacks.linf import LogitsFn, check_logits_fn
from fs_jax.attacks.losses import cross_entropy
from fs_jax.attacks.packing import bound, inputs_of
from fs_jax.attacks.registry import Attack

CHECKED_IMAGES = 100
"""`autoattack` and `evaluate` check the logits of this many images, the first ones; the authors' code uses a batch."""


def sanity_warnings(
    logits_fn: LogitsFn,
    images: Images,
    labels: Int[np.ndarray, "n"],
    *,
    rng: Key[Array, ""] | None = None,
    batch_size: int | None = None,
    gradients: bool = True,
) -> list[str]:
    """Check a network on clean images for properties that make evaluations under attack misleading.

    There is a warning if the logits are probabilities, if gradients are zero, and if logits change from call to call or
    depend on the other images in the batch.

    Args:
      logits_fn: Network, from images to logits [N, classes]; with `rng`, from images and a key for each.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      rng: For a randomised network, the key that it draws from. Its logits may then change from call to call.
      batch_size: The largest batch; by default 32 on a CPU, else 256.
      gradients: Check gradients too. Set it to False for a network that can't be differentiated.

    Returns:
      The warnings; an empty list if there is no problem.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, or images outside [0, 1]; or if the network's output isn't
        logits [N, classes].
      FloatingPointError: if the network gives logits that aren't finite.

    Example:
      >>> logits_fn = lambda x: jax.nn.softmax(jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1))
      >>> [warning[:54] for warning in sanity_warnings(logits_fn, np.ones((5, 1, 1, 1), np.float32), np.zeros(5, int))]
      ['logits_fn returns what looks like probabilities, which']
    """
    images, labels = np.asarray(images), np.asarray(labels)
    check_images(images, uint8_too=True)
    check_labels(labels, images)
    if not len(labels):
        raise ValueError("images: expected at least one; got none.")
    if batch_size is not None:
        check_number("batch_size", batch_size, at_least=1, integer=True)
    keys = None if rng is None else image_keys(rng, len(labels))
    check_logits_fn(logits_fn, *inputs_of(images, keys))
    images, network = as_float(images), bound(logits_fn, images, keys)
    size = min(batch_size or backend.batch_size(network.platform), len(labels))
    parts = []
    for begin in range(0, len(labels), size):
        real = np.arange(begin, min(begin + size, len(labels)))
        rows = np.resize(real, size)  # the last batch is padded with repetitions
        drawn = [] if keys is None else [keys[rows]]
        program = _logits_and_flatness if gradients else _logits_alone
        part = network.compiled(program)(images[rows], labels[rows], *drawn)
        parts.append([np.asarray(array)[: len(real)] for array in part])
    logits, flat = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).all(-1))
        raise FloatingPointError(
            f"logits_fn: expected finite logits; got others for {len(bad)} clean images, the first at {bad[0]}."
        )
    found = _warnings_about_logits(logits, flat)
    return found if keys is not None else found + _warnings_about_calls(logits_fn, images[:4])


def network_warnings(
    logits_fn: LogitsFn,
    images: Images,
    labels: Int[np.ndarray, "n"],
    attack_list: Sequence[Attack],
    *,
    rng: Key[Array, ""] | None,
    batch_size: int | None,
) -> list[str]:
    """`sanity_warnings` for the first images, as far as these attacks need them.

    Example:
      >>> images, labels = np.ones((1, 2, 2, 1)), np.zeros(1, int)
      >>> network_warnings(jnp.ravel, images, labels, [Attack("clean")], rng=None, batch_size=1)
      []
    """
    if all(attack.specification.judges_only for attack in attack_list):
        return []
    gradients = any(attack.specification.uses_gradients for attack in attack_list)
    few = slice(CHECKED_IMAGES)
    return sanity_warnings(logits_fn, images[few], labels[few], rng=rng, batch_size=batch_size, gradients=gradients)


def _logits_alone(network, images, labels, *keys):
    return network(images, *keys), jnp.zeros(len(labels), bool)


def _logits_and_flatness(network, images, labels, *keys):
    def total(x):
        logits = network(x, *keys)
        return jnp.sum(cross_entropy(logits, labels)), logits

    gradient, logits = jax.grad(total, has_aux=True)(images)
    return logits, jnp.all(gradient == 0, (1, 2, 3))


def _warnings_about_logits(logits, flat):
    """The authors' checks, with their thresholds; for lower precisions than float32, with that of their rounding."""
    found, tolerance = [], max(1e-5, 4 * float(jnp.finfo(logits.dtype).eps))  # probabilities sum to 1, so no more
    logits = logits.astype(np.float32)
    if logits.min() > -tolerance and logits.max() < 1 + tolerance and np.all(np.abs(logits.sum(-1) - 1) < tolerance):
        found.append(
            "logits_fn returns what looks like probabilities, which makes gradients vanish: return the logits, from "
            "before the softmax."
        )
    if flat.any():
        found.append(
            f"{flat.sum()} of {len(flat)} images have a cross-entropy gradient of exactly zero: attacks that follow "
            "gradients may miss adversarial examples. Compare with Square, and look for saturated or quantised layers, "
            "and for logits that differ by more than 87, where float32 underflows."
        )
    return found


def _warnings_about_calls(logits_fn, images):
    """Check whether an image's logits depend on the call, or on the other images of the batch."""

    def logits_of(images):  # traced again in each call, as the network may draw random numbers while it is traced
        logits = bound(logits_fn, images, size=len(images)).compiled(_logits)(images)
        return logits / (jnp.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10)

    def differ(one, other):  # the authors' threshold
        return bool(jnp.max(jnp.linalg.norm(one - other, axis=-1)) > 1e-4)

    first = logits_of(images)
    if differ(first, logits_of(images)):
        return [
            "logits_fn gives different logits when it is called again: for a network that draws random numbers use "
            "version 'rand', and pass the keys that it draws from."
        ]
    if differ(first[:1], logits_of(np.repeat(images[:1], len(images), 0))):
        return [
            "logits_fn gives an image different logits in different batches, as BatchNorm does in training mode: use "
            "its inference mode."
        ]
    return []


def _logits(network, images):
    return network(images)


def masking_warnings(stages: Sequence[Stage]) -> list[str]:
    """Warn if gradient-free attacks broke images that all attacks with gradients, including APGD, failed to break.

    The threshold is the authors' 0.2% of the images, and at least 3 images, as one or two may be chance. Attacks that
    are excluded from the worst case don't count.

    Example:
      >>> masking_warnings([])
      []
    """
    stages = [stage for stage in stages if not stage.attack.apart]
    others = [stage for stage in stages if stage.attack.specification.uses_gradients]
    gradient_free = [
        stage
        for stage in stages
        if not stage.attack.specification.uses_gradients and stage.attack.specification.name != "clean"
    ]
    if not gradient_free or not any(stage.attack.specification.name.startswith("apgd") for stage in others):
        return []  # if the attacks with gradients are weak, this says nothing about gradients
    survived = np.all([stage.attacked & stage.robust for stage in others], axis=0)
    broken = survived & np.any([stage.attacked & ~stage.robust for stage in gradient_free], axis=0)
    share = broken.sum() / max(1, int(np.any([stage.covered for stage in gradient_free], axis=0).sum()))
    if share <= 0.002 or broken.sum() <= 2:
        return []
    names = " and ".join(stage.attack.name for stage in gradient_free)
    return [
        f"{names}, without gradients, broke {share:.1%} of the images, on which all attacks with gradients had failed: "
        "gradients may be masked, and robustness even lower. Try more queries, or an attack made for this defence."
    ]
