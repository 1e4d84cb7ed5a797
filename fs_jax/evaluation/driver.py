"""Evaluation under attack: every image of a split, one record per image and attack, the worst case over attacks."""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from fs_jax._utils import backend
from fs_jax._utils.fingerprints import fingerprint
from fs_jax._utils.images import Images, as_float
from fs_jax._utils.keys import IMPLEMENTATION
from fs_jax._utils.validation import check_choice, check_number
from fs_jax.attacks.chain import Log, Stage, check_chain, randomised, run_chain
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.packing import bound
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.attacks.sanity import answers_warnings, masking_warnings
from fs_jax.evaluation.journal import SCHEMA, Journal
from fs_jax.evaluation.statistics import accuracy
from fs_jax.evaluation.suites import SUITES

Precision = Literal["float32", "default"]


class Evaluation(NamedTuple):
    """Accuracies over a split, and what happened to each image."""

    summary: dict[str, Any]
    """`schema`, its version; `images`, `first`, `seed`; `precision` of products and `prng`, the implementation of keys;
    `weights` and `data`, fingerprints of the network's arrays and of images and labels; `environments` that it ran in.

    `attacks`: for each, its settings, `correct`, `total`, `accuracy` with its 95% interval `low` to `high`,
    `lowest_single_run`, `attacked` (images), `forward` and `backward` (the passes of one image that they took in all),
    `by_step` (pairs of a step and the accuracy after it, where any iterate decides) and `seconds`.

    `worst`: the accuracy over all attacks at once, of the images that all of them were meant for; `unknown`, how many
    others there are.

    `warnings`: why these numbers may mislead, where there is a sign of it."""
    records: list[dict[str, Any]]
    """For each image its `index` in the split, `label`, whether it is `robust` to all (None if some attack wasn't meant
    for it, and no other broke it), and by attack the lowest `margin` (logit of the label less the highest other one:
    above 0 where the image is classified correctly), `misclassified_at` (the step, 0 for the start; -1 for never) and
    `distance`, the size of the perturbation in L-infinity, to 6 digits. An attack that the image was spared is
    missing."""


def evaluate(
    logits_fn: LogitsFn,
    images: Images,
    labels: Int[np.ndarray, "n"],
    attacks: Sequence[str | Attack],
    *,
    epsilon: float | None = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    precision: Precision = "float32",
    journal: str | os.PathLike | None = None,
    parts: Sequence[str | os.PathLike] = (),
    about: Mapping[str, Any] | None = None,
    worst_images: Float[np.ndarray, "k h w c"] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Accuracy of a network, clean and under attack, over all the images given.

    Args:
      logits_fn: Network, from images to logits [N, classes], in inference mode: any function, such as
        `lambda images: model.apply(variables, images)`, or an NNX module. For attacks with `num_draws`, a function of
        images and a key for each.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      attacks: Words such as "clean", "pgd-20", "cw-100x5", "square" (`fs_jax.attacks.REGISTRY` has them all), each from
        the clean images; or `Attack`s, with settings and orders of one's own; or a `suite`.
      epsilon: Radius of the attacks that are given as words, in units of [0, 1]; 8/255 by default. `Attack`s have their
        own, which must be the same one, but for those apart.
      seed: Of all that is drawn. What happens to an image depends on it, the attack and the image's index.
      first: Index of the first image in its split, if only a part of it is given.
      batch_size: Images at a time, at most; by default 32 on a CPU, else 256.
      precision: "float32" computes products of float32 as such; "default" leaves them to JAX's setting, which rounds
        the factors to bfloat16 on a TPU and to TF32 on some GPUs.
      journal: File that the records are written to as they come. If it is there, the evaluation resumes from it.
      parts: Journals of evaluations of parts of these images, with the same arguments but for `first`: their outcomes
        are taken over into this one's journal, which must be a new one.
      about: What is to be known of the evaluation, as plain data. It is written to the journal, and a resume with
        something else is refused.
      worst_images: Where each image's adversary of the lowest margin goes, [N, H, W, C] or, of the first k images
        only, [k, H, W, C]; it may be a file in memory. What the journal or the parts hold isn't attacked again, and
        its adversaries aren't written: pass the array that has them.
      progress: Show a progress bar for each attack.

    Returns:
      Summary and records.

    Raises:
      TypeError, ValueError: if images or labels aren't as said, or there are none, or no attack that isn't apart, or
        one twice, or one after an attack that isn't before it, or if the journal is of another evaluation.
      FloatingPointError: if the network gives logits that aren't finite.

    Warns:
      UserWarning: what `fs_jax.attacks.sanity_warnings` says of the first 100 images, unless the clean ones alone are
        asked for; and if attacks that see no gradient break images that the others don't.

    Example:
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda x: 10 * jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images, labels = np.linspace(0.5, 1, 50, dtype=np.float32).reshape(50, 1, 1, 1), np.zeros(50, int)
      >>> result = evaluate(logits_fn, images, labels, ["pgd-20"], epsilon=0.2, progress=False)
      >>> result.summary["attacks"][0]["accuracy"], result.records[0]["margin"]["pgd-20"]
      (0.6, -4.0)
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if isinstance(attacks, str) or isinstance(parts, (str, os.PathLike)):
        name, given = ("attacks", attacks) if isinstance(attacks, str) else ("parts", parts)
        advice = f"suite({given!r})" if name == "attacks" and given in SUITES else f"[{given!r}]"
        raise TypeError(f"{name}: expected a list; got {given!r}. Write {advice}.")
    radius = 8 / 255 if epsilon is None else epsilon
    attack_list = [parse_attack(attack, radius) if isinstance(attack, str) else attack for attack in attacks]
    check_evaluation(logits_fn, images, labels, attack_list, epsilon=epsilon)
    check_number("first", first, at_least=0, integer=True)
    if taken := (about or {}).keys() & {"schema", "images", "first", "seed", "precision", "prng", "weights", "data"}:
        raise ValueError(f"about: expected names that a record doesn't have itself; got {', '.join(sorted(taken))}.")
    check_choice("precision", precision, ("float32", "default"))
    if parts and (journal is None or os.path.exists(journal)):
        raise ValueError(f"journal: expected a new file that parts are merged into; got {journal}.")
    rng = jax.random.key(seed, impl=IMPLEMENTATION)
    with contextlib.ExitStack() as stack:
        draws = any(map(randomised, attack_list))
        network = bound(logits_fn, images, rng if draws else None, size=batch_size)
        if precision == "float32" and network.platform != "cpu":  # where they are so in any case
            stack.enter_context(jax.default_matmul_precision("float32"))
        evaluated = {
            "schema": SCHEMA,
            "images": len(labels),
            "first": first,
            "seed": seed,
            "precision": precision,
            "prng": IMPLEMENTATION,
            "weights": fingerprint(network.arrays),
            "data": fingerprint([images, labels]),
        }
        if journal is not None:
            header = {**evaluated, "logits": _probe(network, images, draws), **(about or {})}
        drawn_from = rng if draws else None
        doubts = answers_warnings(logits_fn, images, labels, attack_list, rng=drawn_from, batch_size=batch_size)
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)
        environments = [backend.describe(network.platform)]
        log = Log()
        taken_over = []
        for part in parts:
            where = Journal.header(part)
            of_part = slice(where["first"] - first, where["first"] - first + where["images"])
            expected = {"images": where["images"], "first": where["first"]}
            expected["logits"] = _probe(network, images[of_part], draws)
            expected["data"] = fingerprint([images[of_part], labels[of_part]])
            settings = {}
            for attack in attack_list:
                images_of_part = None if attack.images is None else attack.images[of_part]
                settings[attack.name] = attack.replace(images=images_of_part).described()
            taken_over += Journal.part(part, {**header, **expected}, settings)
        if journal is not None:
            log = stack.enter_context(Journal(journal, header, environments[0]))
            log.take_over(taken_over)
            environments = log.environments
        stages = run_chain(
            network, rng, images, labels, attack_list,
            log=log, first=first, batch_size=batch_size, worst_images=worst_images, progress=progress,
        )  # fmt: skip
    masking = masking_warnings(stages)
    for doubt in masking:
        warnings.warn(doubt, stacklevel=2)
    worst, robust = _worst_case(stages)
    summary = {
        **evaluated,
        "environments": environments,
        "attacks": [_summary(stage, log) for stage in stages],
        "worst": worst,
        "warnings": doubts + masking,
    }
    records = [
        {
            "index": first + place,
            "label": int(labels[place]),
            "robust": robust[place],
            **{
                field: {
                    stage.attack.name: getattr(stage.lowest[place], field) for stage in stages if place in stage.lowest
                }
                for field in ("margin", "misclassified_at", "distance")
            },
        }
        for place in range(len(labels))
    ]
    return Evaluation(summary, records)


def check_evaluation(
    logits_fn: LogitsFn,
    images: Images,
    labels: Int[np.ndarray, "n"],
    attack_list: Sequence[Attack],
    *,
    epsilon: float | None = None,
) -> int:
    """Check `evaluate`'s arguments without running it.

    Returns:
      The number of classes of the network.

    Example:
      >>> import jax.numpy as jnp
      >>> from fs_jax.evaluation import suite
      >>> logits_fn = lambda x: jnp.zeros((len(x), 10))
      >>> check_evaluation(logits_fn, np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 9]), suite("autoattack"))
      10
    """
    if all(attack.apart for attack in attack_list):
        names = ", ".join(attack.name for attack in attack_list) or "none"
        raise ValueError(f"attacks: expected at least one that isn't apart from the worst case; got {names}.")
    radii = {a.epsilon for a in attack_list if not a.apart and a.specification.fixed_radius is None}
    if len(radii | ({epsilon} if radii and epsilon is not None else set())) > 1:
        got = ", ".join(f"{attack.name} {attack.epsilon:.4g}" for attack in attack_list)
        asked = "" if epsilon is None else f" (epsilon={epsilon:.4g})"
        raise ValueError(
            f"attacks: expected one radius in the worst case{asked}; got {got}. Give each Attack that radius, or "
            "apart=True."
        )
    return check_chain(logits_fn, images, labels, attack_list)


def _probe(network, images, draws):
    """Logits of the first images: networks of the same arrays may compute something else. None where they are drawn."""
    if draws:
        return None
    return np.asarray(network.compiled(_logits)(as_float(images[:4])), np.float64).tolist()


def _logits(network, images):
    return network(images)


def _worst_case(stages: Sequence[Stage]) -> tuple[dict[str, Any], list[bool | None]]:
    """Over the attacks that aren't apart: accuracy of the images that all of them cover; and for each image."""
    together = [stage for stage in stages if not stage.attack.apart]
    covered = np.all([stage.covered for stage in together], axis=0)
    broken = np.any([stage.covered & ~stage.robust for stage in together], axis=0)
    robust = [False if lost else True if known else None for lost, known in zip(broken, covered, strict=True)]
    return {**accuracy(~broken[covered]), "unknown": int(np.sum(~covered))}, robust


def _summary(stage: Stage, log: Log) -> dict[str, Any]:
    attack, stepwise = stage.attack, stage.stepwise
    return {
        "name": attack.name,
        **attack.described(),
        "num_steps": stepwise.num_steps,
        "restarts": attack.settings.get("restarts", 1),
        "judged_by": attack.judged_by,
        "uses_gradients": attack.specification.uses_gradients,
        "attacked": int(stage.attacked.sum()),
        **accuracy(stage.robust[stage.covered]),
        "forward": stage.passes[0],
        "backward": stage.passes[1],
        **_strength(stage, log.outcomes[attack.name].values()),
        "seconds": log.seconds[attack.name],
    }


def _strength(stage, outcomes):
    """What the attack found with how much of its work."""
    attack, stepwise = stage.attack, stage.stepwise
    every_run, total, attacked = attack.specification.every_run, int(stage.covered.sum()), int(stage.attacked.sum())
    by_run = np.zeros(stepwise.num_runs, int)
    broken: dict[int, int] = {}
    for outcome in outcomes:
        if outcome.misclassified_at >= 0:
            by_run[outcome.run] += 1
            # Targets come one after another, starts side by side.
            step = outcome.misclassified_at + (0 if every_run else outcome.run * stepwise.num_steps)
            broken[outcome.index] = min(step, broken.get(outcome.index, step))
    single = every_run and stepwise.num_runs > 1
    result = {"lowest_single_run": float(attacked - by_run.max()) / total if single and total else None}
    if attack.any_iterate and stepwise.num_steps and total and not stepwise.draws:  # else the last draw alone decides
        last = stepwise.num_steps * (1 if every_run else stepwise.num_runs)
        looked_at = [*(n for n in (k * 10**e for e in range(8) for k in (1, 2, 5)) if n < last), last]
        looked_at = looked_at if every_run else [0, *looked_at]  # of these, the start isn't judged
        at = np.array(list(broken.values()))
        result["by_step"] = [[n, float(attacked - np.sum(at <= n)) / total] for n in looked_at]
    return result
