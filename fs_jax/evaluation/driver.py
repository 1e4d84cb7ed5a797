"""Evaluation under attack: accuracies with intervals, the worst case over attacks, and a record of every image."""

import contextlib
import os
import pathlib
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
from fs_jax.attacks.chain import Log, Stage, check_chain, check_worst_images, randomised, run_chain
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.packing import bound
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.attacks.sanity import masking_warnings, network_warnings
from fs_jax.evaluation.journal import SCHEMA, Journal
from fs_jax.evaluation.statistics import accuracy
from fs_jax.evaluation.suites import SUITES

Precision = Literal["float32", "default"]
_COMPARED = {"schema", "images", "first", "seed", "precision", "prng", "weights", "data", "logits"}  # by the journal


class Evaluation(NamedTuple):
    """Accuracies, and a record of each image."""

    summary: dict[str, Any]
    """A dictionary of plain data:

    - `schema`, the version of this format; `images`, their number; `first`; `seed`; `precision` of products; `prng`,
      the implementation of keys; `weights` and `data`, fingerprints of the network's arrays and of images and labels;
      `environments`, the devices and versions that were used;
    - `attacks`: for each attack its settings, the number of images that it `attacked`, `correct`, `total`, `accuracy`
      with its 95% interval from `low` to `high`, `lowest_single_run` (the lowest accuracy after one random start
      alone), `forward` and `backward` (passes of single images), `by_step` (pairs of a step and the accuracy after it,
      if any iterate decides) and `seconds`;
    - `worst`: the accuracy over all attacks together, on the images that all attacks cover; `unknown`, the number of
      other images;
    - `warnings`: reasons why these numbers may mislead; empty if none was found."""
    records: list[dict[str, Any]]
    """For each image its `index` in the split, its `label`, and whether it is `robust` to all attacks (None if no
    attack broke it, but not all attacks cover it). For each image and attack, the lowest `margin` (logit of the label
    minus the highest other logit, above 0 if the image is classified correctly), `misclassified_at` (the step, 0 for
    the start; -1 if never) and `distance` (the L-infinity norm of the perturbation, to 6 digits). An attack that
    skipped the image has no entry."""


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
    """Compute the accuracy of a network, clean and under attack, on all images given.

    Args:
      logits_fn: Network, from images to logits [N, classes], in inference mode: any function, such as
        `lambda images: model.apply(variables, images)`, or an NNX module. For attacks with `num_draws`, a function of
        images and a key for each.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      attacks: Names such as "clean", "pgd-20", "cw-100x5", "square" (see `fs_jax.attacks.REGISTRY`), each run on all
        images; or `Attack`s with your own settings, which may skip misclassified images (`after`); or a `suite`.
      epsilon: Radius of the attacks that are given as names, in units of [0, 1]; 8/255 by default. `Attack`s have their
        own radius. It must be the same for all attacks that aren't excluded from the worst case (`apart=True`).
      seed: Seed of all random numbers, from 0 to 2^32 - 1. The result for an image depends on it, the attack and the
        image's index.
      first: Index of the first image in its split, if only a part of the split is given.
      batch_size: The largest batch; by default 32 on a CPU, else 256.
      precision: "float32" computes products in full float32; "default" uses JAX's setting, which rounds the factors to
        bfloat16 on a TPU and to TF32 on some GPUs.
      journal: File that records are appended to. If it exists, the evaluation resumes from it.
      parts: Journals of evaluations of parts of these images, made with the same arguments except `first`. Their
        outcomes are copied to `journal`, which must be a new file, and aren't computed again.
      about: More facts about the evaluation, as plain data, written to the journal. Resuming with other facts raises an
        error.
      worst_images: Array [N, H, W, C], or [k, H, W, C] for the first k images only. For each image, the adversarial
        example with the lowest margin is written to it. It may be a memory-mapped file. When you resume, pass the
        array with the adversarial images found so far, as outcomes in the journal aren't computed again.
      progress: Show a progress bar for each attack.

    Returns:
      Summary and records.

    Raises:
      TypeError, ValueError: if an argument has a wrong shape, type or value; if no attack is part of the worst case, if
        two have the same name, or one comes before an attack of its `after`; or if the journal is of another
        evaluation.
      FloatingPointError: if the network gives logits that aren't finite.

    Warns:
      UserWarning: the warnings of `fs_jax.attacks.sanity_warnings` for the first 100 images, unless only clean images
        are evaluated; and if gradient-free attacks break images that attacks with gradients don't.

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
    check_worst_images(worst_images, images)
    check_number("first", first, at_least=0, integer=True)
    check_number("seed", seed, at_least=0, at_most=2**32 - 1, integer=True)  # others give another key in 64-bit mode
    if taken := (about or {}).keys() & _COMPARED:
        raise ValueError(f"about: expected names that the journal doesn't use; got {', '.join(sorted(taken))}.")
    check_choice("precision", precision, ("float32", "default"))
    if parts and (journal is None or pathlib.Path(journal).expanduser().exists()):
        raise ValueError(
            f"journal: expected a new file that parts are merged into; got {journal}. To resume a merged evaluation, "
            "pass no parts."
        )
    rng = jax.random.key(seed, impl=IMPLEMENTATION)
    with contextlib.ExitStack() as stack:
        draws = any(map(randomised, attack_list))
        network = bound(logits_fn, images, rng if draws else None, size=batch_size)
        if precision == "float32":
            stack.enter_context(backend.full_float32(network.platform))
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
        draws_from = rng if draws else None
        about_logits = network_warnings(logits_fn, images, labels, attack_list, rng=draws_from, batch_size=batch_size)
        for warning in about_logits:
            warnings.warn(warning, stacklevel=2)
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
    about_gradients = masking_warnings(stages)
    for warning in about_gradients:
        warnings.warn(warning, stacklevel=2)
    worst, robust = _worst_case(stages)
    summary = {
        **evaluated,
        "environments": environments,
        "attacks": [_summary(stage, log) for stage in stages],
        "worst": worst,
        "warnings": about_logits + about_gradients,
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
        raise ValueError(
            f"attacks: expected at least one in the worst case; got {names}. Add one with a radius, such as clean."
        )
    radii = {a.epsilon for a in attack_list if not a.apart and a.specification.fixed_radius is None}
    if len(radii | ({epsilon} if radii and epsilon is not None else set())) > 1:
        got = ", ".join(f"{attack.name} {attack.epsilon:.4g}" for attack in attack_list)
        asked = "" if epsilon is None else f" (epsilon={epsilon:.4g})"
        raise ValueError(
            f"attacks: expected one radius in the worst case{asked}; got {got}. Give each Attack that radius, or "
            "apart=True to exclude it from the worst case."
        )
    return check_chain(logits_fn, images, labels, attack_list)


def _probe(network, images, draws):
    """Logits of the first images, to tell apart networks with equal arrays; None for a randomised network."""
    if draws:
        return None
    return np.asarray(network.compiled(_logits)(as_float(images[:4])), np.float64).tolist()


def _logits(network, images):
    return network(images)


def _worst_case(stages: Sequence[Stage]) -> tuple[dict[str, Any], list[bool | None]]:
    """The worst case: accuracy on the images that all its attacks cover; and for each image whether it is robust."""
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
    """The accuracy after single runs and after numbers of steps."""
    attack, stepwise = stage.attack, stage.stepwise
    every_run, total, attacked = attack.specification.every_run, int(stage.covered.sum()), int(stage.attacked.sum())
    by_run = np.zeros(stepwise.num_runs, int)
    broken: dict[int, int] = {}
    for outcome in outcomes:
        if outcome.misclassified_at >= 0:
            by_run[outcome.run] += 1
            # Steps of targets add up, as they are run one after another; random starts are counted in parallel.
            step = outcome.misclassified_at + (0 if every_run else outcome.run * stepwise.num_steps)
            broken[outcome.index] = min(step, broken.get(outcome.index, step))
    single = every_run and stepwise.num_runs > 1
    result = {"lowest_single_run": float(attacked - by_run.max()) / total if single and total else None}
    if attack.any_iterate and stepwise.num_steps and total and not stepwise.draws:  # else only the last step decides
        last = stepwise.num_steps * (1 if every_run else stepwise.num_runs)
        shown = [*(n for n in (k * 10**e for e in range(8) for k in (1, 2, 5)) if n < last), last]
        shown = shown if every_run else [0, *shown]  # attacks with `every_run` don't judge their start
        at = np.array(list(broken.values()))
        result["by_step"] = [[n, float(attacked - np.sum(at <= n)) / total] for n in shown]
    return result
