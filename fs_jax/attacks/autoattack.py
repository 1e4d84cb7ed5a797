"""AutoAttack: attacks in order, each on the images that are still classified correctly; what is left is robust."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fs_jax._utils.images import Images, as_float
from fs_jax._utils.keys import threefry
from fs_jax._utils.validation import check_choice
from fs_jax.attacks.chain import Log, check_chain, randomised, run_chain
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.packing import bound
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.attacks.sanity import answers_warnings, masking_warnings

VERSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {"apgd-ce": {}, "apgd-t": {}, "fab-t": {}, "square": {}},
    "plus": {
        "apgd-ce": {"restarts": 5},
        "apgd-dlr": {"restarts": 5},
        "fab": {"restarts": 5},
        "square": {},
        "apgd-t": {},
        "fab-t": {},
    },
    # For networks that draw random numbers: each gradient is the mean of 20. One draw judges each run's best iterate:
    # more runs break more images by chance as well.
    "rand": {"apgd-ce": {"num_draws": 20}, "apgd-dlr": {"restarts": 1, "num_draws": 20}},
}
"""The authors' versions: their attacks in order, with the settings that differ from an attack's own."""


def autoattack_attacks(
    version: str | Sequence[str | Attack] = "standard", *, epsilon: float = 8 / 255, num_classes: int = 10
) -> list[Attack]:
    """The attacks of a version in their order: first the clean images, then each on what those before it left.

    Args:
      version: A key of `VERSIONS`; or a list of words such as "apgd-ce" or "pgd-20", or of `Attack`s of this radius.
      epsilon: Radius, in units of [0, 1].
      num_classes: Classes of the network.

    Raises:
      TypeError, ValueError: for an unknown version or attack, none, one twice, one of another radius, or too few
        classes for one.

    Example:
      >>> [attack.name for attack in autoattack_attacks()]
      ['clean', 'apgd-ce', 'apgd-t', 'fab-t', 'square']
    """
    chain = _chain(version, epsilon)
    for attack in chain:
        attack.steps(num_classes)
    return chain


def _chain(version, epsilon) -> list[Attack]:
    if isinstance(version, str):
        check_choice("version", version, VERSIONS)
        chosen = [Attack(name, epsilon, **settings) for name, settings in VERSIONS[version].items()]
    else:
        chosen = [parse_attack(attack, epsilon) if isinstance(attack, str) else attack for attack in version]
    if wrong := [attack for attack in chosen if not isinstance(attack, Attack)]:
        raise TypeError(f"version: expected words and Attacks; got {wrong[0]!r}. Of a Specification, write Attack(it).")
    chosen = chosen[1:] if chosen and chosen[0].specification.name == "clean" else chosen  # it comes first in any case
    names = [attack.name for attack in chosen]
    if not chosen or len({"clean", *names}) <= len(names):
        raise ValueError(f"version: expected one attack at least, and none twice; got {['clean', *names]}.")
    for attack in chosen:
        if attack.epsilon != epsilon or attack.num_images is not None or attack.apart:
            raise ValueError(
                f"version: expected attacks of radius {epsilon:.6g} on all images; got {attack}. Use `evaluate`."
            )
    clean = Attack("clean", num_draws=1 if any(map(randomised, chosen)) else None)
    return [clean, *(attack.replace(after=["clean", *names[:place]]) for place, attack in enumerate(chosen))]


class AttackRecord(NamedTuple):
    """What `autoattack` found."""

    images: Float[np.ndarray, "n h w c"]
    """For each image the misclassified one; where it is robust, the one of the lowest margin found."""
    robust: Bool[np.ndarray, "n"]
    """Whether it survived everything."""
    stages: dict[str, float]
    """Share of images robust after each attack; first, as `clean`, before any."""
    broken_by: list[str]
    """The attack that broke each image: `clean` if it was misclassified as it is, empty where it is robust."""
    steps: Int[np.ndarray, "n"]
    """The step of that attack at which it was; -1 where it is robust."""
    margin: Float[np.ndarray, "n"]
    """Of `images`: logit of the label less the highest other one."""
    queries: dict[str, tuple[int, int]]
    """For each attack, the (forward, backward) passes of single images that it took."""
    settings: dict[str, Any]
    """Version, radius, and the settings of each attack."""
    warnings: list[str]
    """Why these numbers may mislead, where there is a sign of it."""


def autoattack(
    logits_fn: LogitsFn,
    rng: Key[Array, ""],
    images: Images,
    labels: Int[np.ndarray, "n"],
    *,
    epsilon: float = 8 / 255,
    version: str | Sequence[str | Attack] = "standard",
    batch_size: int | None = None,
    progress: bool = False,
) -> AttackRecord:
    """AutoAttack in L-infinity, on any number of images.

    APGD-CE, APGD-T, FAB-T and Square in this order, each from the clean images, each on those that are still classified
    correctly. Misclassified images are dropped at once, also within an attack; the others are packed (see `packing`).

    `fs_jax.evaluation.evaluate` runs the same attacks with the same numbers, on a log that it resumes from.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode. For "rand", a function of images and a
        key for each, `logits_fn(images, keys)`.
      rng: A key. What happens to an image depends on it and on the image's position, not on the batch.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      version: "standard"; "plus", with five starts, APGD-DLR and untargeted FAB besides; "rand", for networks that draw
        random numbers (`VERSIONS` has what they are); or a list of words and `Attack`s, as `evaluate` takes it.
      batch_size: Most images at a time; by default 32 on a CPU, else 256.
      progress: Show a progress bar for each attack.

    Returns:
      What was broken, where, by which attack, and what it cost.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        an unknown version or attack, too few classes for one.
      FloatingPointError: if the network gives logits that aren't finite.

    Warns:
      UserWarning: what `sanity_warnings` says of the first 100 images; and if Square, which sees no gradient, breaks
        images that APGD and the other attacks before it didn't.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1.001 - x.mean((1, 2, 3))], -1)
      >>> images = np.linspace(0.45, 0.65, 5, dtype=np.float32).reshape(5, 1, 1, 1)  # class 0 likes bright images
      >>> record = autoattack(logits_fn, jax.random.key(0), images, np.zeros(5, int), epsilon=0.08, version=["apgd-ce"])
      >>> record.stages, record.broken_by
      ({'clean': 0.6, 'apgd-ce': 0.4}, ['clean', 'clean', 'apgd-ce', '', ''])

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020.
    """
    images, labels, rng = np.asarray(images), np.asarray(labels), threefry(rng)
    attacks = _chain(version, epsilon)
    check_chain(logits_fn, images, labels, attacks)
    drawn_from = rng if randomised(attacks[0]) else None
    network = bound(logits_fn, images, drawn_from)
    doubts = answers_warnings(logits_fn, images, labels, attacks, rng=drawn_from, batch_size=batch_size)
    found, log = np.array(as_float(images)), Log()
    stages = run_chain(
        network, rng, images, labels, attacks, log=log, batch_size=batch_size, worst_images=found, progress=progress
    )
    broken_by, steps, margin = [""] * len(labels), np.full(len(labels), -1), np.full(len(labels), np.inf)
    for stage in stages:
        for place, outcome in stage.lowest.items():
            margin[place] = min(margin[place], outcome.margin)
            if outcome.misclassified_at >= 0:
                broken_by[place], steps[place] = stage.attack.name, outcome.misclassified_at
    doubts += masking_warnings(stages)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    settings = {
        "version": version if isinstance(version, str) else [attack.name for attack in attacks[1:]],
        "epsilon": epsilon,
        **{stage.attack.name: stage.attack.published(stage.stepwise) for stage in stages[1:]},
    }
    return AttackRecord(
        images=found,
        robust=stages[-1].robust,
        stages={stage.attack.name: float(stage.robust.mean()) for stage in stages},
        broken_by=broken_by,
        steps=steps,
        margin=margin,
        queries={stage.attack.name: stage.passes for stage in stages[1:]},
        settings=settings,
        warnings=doubts,
    )
