"""AutoAttack: a list of attacks, each on the images that the earlier ones didn't misclassify."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fs_jax._utils import backend
from fs_jax._utils.images import Images, as_float
from fs_jax._utils.keys import threefry
from fs_jax._utils.validation import check_choice
from fs_jax.attacks.chain import Log, check_chain, randomised, run_chain
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.packing import bound
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.attacks.sanity import masking_warnings, network_warnings

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
    # For randomised networks: each gradient is the mean of 20 draws. One draw judges the best iterate of each run:
    # with more runs, more images are misclassified by chance.
    "rand": {"apgd-ce": {"num_draws": 20}, "apgd-dlr": {"restarts": 1, "num_draws": 20}},
}
"""The authors' versions: their attacks in order, with the settings that differ from the attack's defaults."""


def autoattack_attacks(
    version: str | Sequence[str | Attack] = "standard", *, epsilon: float = 8 / 255, num_classes: int = 10
) -> list[Attack]:
    """The attacks of a version, in order: first the clean images, then each attack after all earlier ones.

    Args:
      version: A key of `VERSIONS`; or a list of names such as "apgd-ce" or "pgd-20", or of `Attack`s with this radius.
      epsilon: Radius, in units of [0, 1].
      num_classes: Number of classes of the network.

    Raises:
      TypeError, ValueError: for an unknown version or attack, an empty list, an attack that is listed twice or has
        another radius, or too few classes.

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
        raise TypeError(
            f"version: expected names and Attacks; got {wrong[0]!r}. If it is a Specification, write Attack(it)."
        )
    chosen = chosen[1:] if chosen and chosen[0].specification.name == "clean" else chosen  # it is added below
    names = [attack.name for attack in chosen]
    if not chosen or len({"clean", *names}) <= len(names):
        raise ValueError(f"version: expected at least one attack, and none twice; got {['clean', *names]}.")
    for attack in chosen:
        if attack.epsilon != epsilon or attack.num_images is not None or attack.apart:
            raise ValueError(
                f"version: expected attacks of radius {epsilon:.6g} on all images; got {attack}. Use `evaluate`."
            )
    clean = Attack("clean", num_draws=1 if any(map(randomised, chosen)) else None)
    return [clean, *(attack.replace(after=["clean", *names[:place]]) for place, attack in enumerate(chosen))]


class AttackRecord(NamedTuple):
    """The result of `autoattack`."""

    images: Float[np.ndarray, "n h w c"]
    """For each image, the misclassified adversarial image; for robust images, that of the lowest margin."""
    robust: Bool[np.ndarray, "n"]
    """Whether an image is robust to all attacks."""
    stages: dict[str, float]
    """Share of images that are robust after each attack; the first entry, `clean`, is the clean accuracy."""
    broken_by: list[str]
    """The attack that first misclassified each image: `clean` for the clean image, empty for robust images."""
    steps: Int[np.ndarray, "n"]
    """The step of that attack; -1 for robust images."""
    margin: Float[np.ndarray, "n"]
    """Margins of `images`: logit of the label minus the highest other logit."""
    queries: dict[str, tuple[int, int]]
    """For each attack, the number of forward and of backward passes, of single images."""
    settings: dict[str, Any]
    """Version, radius, and the settings of each attack."""
    warnings: list[str]
    """Reasons why these numbers may mislead; empty if none was found."""


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

    The standard version runs APGD-CE, APGD-T, FAB-T and Square, in this order. Each starts from the clean images, and
    attacks those that the earlier ones didn't misclassify. Misclassified images are dropped at once, also within an
    attack, and the rest compacted (see `packed`).

    `fs_jax.evaluation.evaluate` runs the same attacks, with the same results, and can resume. Both compute products in
    full float32.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode. For "rand", a function of images and a
        key for each, `logits_fn(images, keys)`.
      rng: A key. The result for an image depends on it and on the image's position, not on the batch.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      version: "standard"; "plus", which adds restarts, APGD-DLR and untargeted FAB; "rand", for randomised networks
        (`VERSIONS` has their attacks); or a list of names and `Attack`s, as in `evaluate`.
      batch_size: The largest batch; by default 32 on a CPU, else 256.
      progress: Show a progress bar for each attack.

    Returns:
      Which images are robust, the adversarial images, the attack that found each, and the number of passes.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        an unknown version or attack, too few classes for an attack.
      FloatingPointError: if the network gives logits that aren't finite.

    Warns:
      UserWarning: the warnings of `sanity_warnings` for the first 100 images; and if Square, which uses no gradients,
        misclassifies images that APGD and the other attacks before it didn't.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1.001 - x.mean((1, 2, 3))], -1)
      >>> images = np.linspace(0.45, 0.65, 5, dtype=np.float32).reshape(5, 1, 1, 1)  # class 0 is for bright images
      >>> record = autoattack(logits_fn, jax.random.key(0), images, np.zeros(5, int), epsilon=0.08, version=["apgd-ce"])
      >>> record.stages, record.broken_by
      ({'clean': 0.6, 'apgd-ce': 0.4}, ['clean', 'clean', 'apgd-ce', '', ''])

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020.
    """
    images, labels, rng = np.asarray(images), np.asarray(labels), threefry(rng)
    attacks = _chain(version, epsilon)
    check_chain(logits_fn, images, labels, attacks)
    draws_from = rng if randomised(attacks[0]) else None
    network = bound(logits_fn, images, draws_from)
    found, log = np.array(as_float(images)), Log()
    with backend.full_float32(network.platform):
        found_warnings = network_warnings(logits_fn, images, labels, attacks, rng=draws_from, batch_size=batch_size)
        stages = run_chain(
            network, rng, images, labels, attacks, log=log, batch_size=batch_size, worst_images=found, progress=progress
        )
    broken_by, steps, margin = [""] * len(labels), np.full(len(labels), -1), np.full(len(labels), np.inf)
    for stage in stages:
        for place, outcome in stage.lowest.items():
            margin[place] = min(margin[place], outcome.margin)
            if outcome.misclassified_at >= 0:
                broken_by[place], steps[place] = stage.attack.name, outcome.misclassified_at
    found_warnings += masking_warnings(stages)
    for warning in found_warnings:
        warnings.warn(warning, stacklevel=2)
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
        warnings=found_warnings,
    )
