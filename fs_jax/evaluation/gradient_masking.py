"""Gradient masking: the field's checklist, computed from the results of attacks on a network.

A defence whose gradients mislead white-box attacks seems robust and isn't. Signs of it are attacks that do worse than
they should: with more steps, with a larger radius, or in comparison with a gradient-free attack. (The warnings that
every evaluation gives are in `fs_jax.attacks.sanity`.)

Source: Athalye et al., "Obfuscated gradients give a false sense of security", ICML 2018; Carlini et al., "On evaluating
adversarial robustness", 2019.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.keys import image_keys, random_signs
from fs_jax._utils.text import radius
from fs_jax.attacks import cross_entropy, logit_margin
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.network import on_network
from fs_jax.attacks.registry import Attack
from fs_jax.evaluation.statistics import accuracy

RADII = tuple(level / 255 for level in (1, 2, 4, 6, 8, 12, 16))
SWEEP, UNBOUNDED = "pgd-20 at ", "pgd-100 at radius 1"

# In points: for networks of PGD training, AutoAttack's accuracy is a little less than this below PGD-20's (Croce &
# Hein, 2020).
_USUAL_GAP = 5
_RISING = 0.95  # the share of images for which the loss has to rise along the gradient


class Check(NamedTuple):
    """One line of the checklist."""

    what: str
    """What is expected of a network without gradient masking."""
    verdict: Literal["yes", "no", "not tested"]
    """Whether this network meets it."""
    why: str
    """The numbers behind the verdict."""


def radius_attacks(num_images: int, epsilon: float) -> list[Attack]:
    """PGD-20 at the radii of the sweep, which include this one, and PGD-100 with a ball that contains every image.

    Any iterate decides. They attack the first images, except those that are misclassified without an attack.

    Example:
      >>> [attack.name for attack in radius_attacks(100, 0.1)][-3:]
      ['pgd-20 at 16/255', 'pgd-20 at 0.1', 'pgd-100 at radius 1']
    """
    shared: dict[str, Any] = {"any_iterate": True, "apart": True, "after": ("clean",), "num_images": num_images}
    radii = sorted({*RADII, *(() if any(abs(epsilon - eps) < 1e-6 for eps in RADII) else (epsilon,))} - {0})
    sweep = [Attack("pgd", eps, num_steps=20, label=f"{SWEEP}{radius(eps)}", **shared) for eps in radii]
    return [*sweep, Attack("pgd", 1.0, step_size=0.1, num_steps=100, label=UNBOUNDED, **shared)]


def radius_points(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracies at the radii of the sweep, which include 0: the clean accuracy on the same images."""
    swept = [attack for attack in summary["attacks"] if attack["name"].startswith(SWEEP) and attack["total"]]
    if not swept:
        return []
    clean = accuracy(np.array([record["margin"]["clean"] > 0 for record in records[: swept[0]["total"]]]))
    return [{"epsilon": 0.0, **clean}, *swept]


def loss_surface(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: float,
    size: int = 21,
) -> tuple[Float[np.ndarray, "n k k"], Float[np.ndarray, "n k k"]]:
    """Cross-entropy and margin on a plane through each image: x + s epsilon sign(gradient) + t epsilon r, in [0, 1].

    r has random signs; s and t are in [-1, 1]. Without gradient masking, the loss rises smoothly along s, and more than
    along t.

    Args:
      logits_fn: Network, from images to logits [N, classes].
      rng: Key of the random signs, or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Half the side of the plane, in units of [0, 1].
      size: Number of points along each side, k; if it is odd, the image itself is in the middle.

    Returns:
      Losses and margins [N, k, k]; t changes over rows, s over columns.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.5)
      >>> _, margins = loss_surface(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, size=3)
      >>> margins[0, 1].round(2).tolist()  # along s, which lowers the margin of class 0
      [0.2, 0.0, -0.2]
    """
    images, keys = jnp.asarray(images), image_keys(rng, len(images))
    side = jnp.linspace(-1, 1, size, dtype=images.dtype)
    losses, margins = on_network(_planes, logits_fn, images, keys, labels, epsilon, side)
    return np.asarray(losses), np.asarray(margins)


def _planes(logits_fn, images, keys, labels, epsilon, side):
    def loss(x, label):
        return jnp.sum(cross_entropy(logits_fn(x), label))

    steps = side[:, None, None, None]

    def plane(inputs):
        key, image, label = inputs
        same = jnp.full(len(side), label)
        along = epsilon * jnp.sign(jax.grad(loss)(image[None], label[None]))
        across = epsilon * random_signs(key, image.shape, image.dtype)

        def row(t):
            logits = logits_fn(jnp.clip(image[None] + steps * along + t * across[None], 0, 1))
            return cross_entropy(logits, same), logit_margin(logits, same)

        return jax.lax.map(row, side)

    return jax.lax.map(plane, (keys, images, labels))  # row by row: memory doesn't depend on the number of images


def checklist(
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    losses: Float[np.ndarray, "n k k"] | None = None,
) -> list[Check]:
    """The checklist; a check whose attacks weren't run is "not tested".

    Args:
      summary: The summary of `fs_jax.evaluation.evaluate`, with `radius_attacks` among its attacks.
      records: Its records.
      losses: The losses of `loss_surface`.

    Returns:
      The checks, in a fixed order.
    """
    attacks = {attack["name"]: attack for attack in summary["attacks"] if attack["total"]}
    return [
        _unbounded(attacks),
        _radii(attacks, records),
        _iterations(attacks, records),
        _black_box(attacks, records),
        _transfer(attacks),
        _surface(losses),
        _gap(attacks, records),
    ]


def _unbounded(attacks):
    what = "accuracy is 0 at radius 1, whose ball contains every image"
    if UNBOUNDED not in attacks:
        return Check(what, "not tested", "")
    attack = attacks[UNBOUNDED]
    why = f"{attack['correct']} of {attack['total']} images are robust to PGD-100 at radius 1"
    return Check(what, _yes(attack["correct"] == 0), why)


def _radii(attacks, records):
    what = "a larger radius is never weaker, except by chance of random starts"
    swept = [name for name in attacks if name.startswith(SWEEP)]
    if len(swept) < 2:
        return Check(what, "not tested", "")
    levels = ", ".join(f"{255 * attacks[name]['epsilon']:.3g}" for name in swept)
    why = f"PGD-20 at {levels} / 255: {', '.join(_percent(attacks[name]) for name in swept)}"
    wrong = _weaker(itertools.pairwise(swept), records)
    return Check(what, _yes(not wrong), "; ".join([*wrong, why]))


def _iterations(attacks, records):
    what = "more steps are never weaker, except by chance of random starts"
    pairs = [
        (weaker, stronger)
        for weaker, stronger in (
            ("fgsm", "pgd-20"), ("pgd-20", "pgd-100"), ("pgd-100", "pgd-500x5"), ("pgd-500x5", "pgd-1000x5"),
            ("cw-20", "cw-100"), ("cw-100", "cw-500x5"), ("cw-500x5", "cw-1000x5"),
        )
        if weaker in attacks and stronger in attacks
    ]  # fmt: skip
    if not pairs:
        return Check(what, "not tested", "")
    wrong = _weaker(pairs, records)
    shown = dict.fromkeys(name for pair in pairs for name in pair)
    return Check(what, _yes(not wrong), "; ".join(wrong) or ", ".join(f"{n} {_percent(attacks[n])}" for n in shown))


def _weaker(pairs, records):
    """Sentences about the pairs of attacks in which the second finds fewer images than the first."""
    wrong = []
    for first, second in pairs:
        every = [record["misclassified_at"] for record in records]
        at = [of_image for of_image in every if {first, second} <= of_image.keys()]  # images that both attacked
        broken = [(of_image[first] >= 0, of_image[second] >= 0) for of_image in at]
        won, lost = broken.count((False, True)), broken.count((True, False))
        # Random starts differ: by chance, either attack is as likely to find more. (5% one-sided sign test.)
        if lost > won and scipy.stats.binomtest(lost, won + lost, alternative="greater").pvalue < 0.05:
            wrong.append(f"{second} misses {lost} images that {first} finds, and finds {won} others")
    return wrong


def _black_box(attacks, records):
    what = "gradient-free attacks find nothing that the others miss"
    white, black = (
        [
            name
            for name, attack in attacks.items()
            if attack["uses_gradients"] == by_gradients and not attack["apart"] and attack["kind"] != "clean"
        ]
        for by_gradients in (True, False)
    )
    if not white or not black:
        return Check(what, "not tested", "")

    def broken(record, names):
        return any(record["misclassified_at"].get(name, -1) >= 0 for name in names)

    robust = [record for record in records if not broken(record, ["clean", *white])]
    tried = [record for record in robust if any(name in record["misclassified_at"] for name in black)]
    beaten = [record for record in tried if broken(record, black)]
    why = (
        f"{len(robust)} images are robust to {len(white)} attacks with gradients; {', '.join(black)} tried "
        f"{len(tried)} of these and broke {len(beaten)}"
    )
    return Check(what, _yes(not beaten) if tried or not robust else "not tested", why)


def _transfer(attacks):
    what = "adversaries made for another network are weaker"
    if "transfer" not in attacks or "pgd-20" not in attacks:
        missing = "PGD-20 on this network wasn't run" if "transfer" in attacks else "no other network was given"
        return Check(what, "not tested", missing)
    own, other = attacks["pgd-20"], attacks["transfer"]
    why = f"accuracy is {_percent(other)} under adversaries of the other network, {_percent(own)} under PGD-20 on this"
    return Check(what, _yes(own["accuracy"] <= other["accuracy"]), why)


def _surface(losses):
    what = "the loss rises along the gradient, and more than along random signs"
    if losses is None or not len(losses):
        return Check(what, "not tested", "")
    middle = losses.shape[1] // 2
    along, across = losses[:, middle, -1], losses[:, -1, middle]
    risen = int(np.sum((along > across) & (along > losses[:, middle, middle])))
    return Check(what, _yes(risen >= _RISING * len(losses)), f"in {risen} of {len(losses)} images")


def _gap(attacks, records):
    what = f"accuracy under all attacks is at most {_USUAL_GAP} points below that under PGD-20"
    among = [attack for attack in attacks.values() if not attack["apart"]]
    own = [attack for attack in attacks.values() if attack["name"] == "pgd-20" or _swept_at_radius(attack, among)]
    if not own or all(attack["name"] in ("clean", "pgd-20") for attack in among):
        return Check(what, "not tested", "PGD-20 or stronger attacks weren't run at this radius")
    pgd = own[0]
    # Attacks on fewer images than the others don't count here: they can show that an image isn't robust, but not that
    # the other images are. (Images that an attack skipped are misclassified.)
    total = min(pgd["total"], max(attack["total"] for attack in among if attack["name"] not in ("clean", "pgd-20")))
    strong = [pgd["name"], *(attack["name"] for attack in among if attack["total"] >= total)]
    few = [record["misclassified_at"] for record in records[:total]]
    to_pgd = sum(of_image.get(pgd["name"], 0) < 0 for of_image in few)
    to_all = sum(all(of_image.get(name, 0) < 0 for name in strong) for of_image in few)
    chained = attacks.get("square", {}).get("after")
    autoattack = f"AutoAttack {_percent(attacks['square'])}, " if chained else ""
    points = 100 * (to_pgd - to_all) / len(few)
    passed = points <= _USUAL_GAP
    why = f"PGD-20 {to_pgd / len(few):.1%}, {autoattack}all attacks together {to_all / len(few):.1%}: "
    why += f"{points:.1f} points" if passed else f"PGD-20 alone overstates this network by {points:.1f} points"
    if to_pgd:
        why += f"; {1 - to_all / to_pgd:.0%} of the images that are robust to PGD-20 aren't robust to all"
    return Check(what, _yes(passed), why)


def _swept_at_radius(attack, among):
    """Whether an attack is the sweep's PGD-20 at the others' radius, which replaces PGD-20 if that wasn't run."""
    return attack["name"].startswith(SWEEP) and any(abs(attack["epsilon"] - a["epsilon"]) < 1e-6 for a in among)


def _yes(passed):
    return "yes" if passed else "no"


def _percent(attack):
    return f"{100 * attack['accuracy']:.1f}%"
