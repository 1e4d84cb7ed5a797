"""The attacks of the tables, and their evaluation."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.paper.experiment import Data, Measurement, Network
from experiments.paper.jobs import result_file
from experiments.paper.scales import EXPERIMENTS, Scale

Attacks = Callable[[Scale], Sequence[Any]]
"""A function from the scale to a list of `fs_jax.attacks.Attack`s, the first of which is clean."""

SIX = ("clean", "fgsm", "pgd-20", "pgd-100", "cw-20", "cw-100")


def of_six(*accuracies: float) -> dict[str, float]:
    """The paper's accuracies in a row of its tables 2 to 4, by attack."""
    return dict(zip(SIX, accuracies, strict=True))


def six_attacks(scale: Scale) -> list[Any]:
    """The attacks of the paper's tables 2 to 4, judged at the same iterates as in the paper."""
    from fs_jax.attacks import parse_attack

    return [parse_attack(word, scale.config.attack.epsilon) for word in SIX]


def and_autoattack(scale: Scale) -> list[Any]:
    """The six attacks, AutoAttack's standard version, and PGD-20 on rescaled logits."""
    from fs_jax.evaluation import suite

    autoattack = suite("autoattack", epsilon=scale.config.attack.epsilon)[1:]
    return [*six_attacks(scale), *autoattack, *(rescaled_pgd(scale, factor) for factor in RESCALED)]


def apgd_t(scale: Scale) -> list[Any]:
    """The most informative attacks for little time: PGD-20, CW-20, and AutoAttack's APGD-T alone."""
    from fs_jax.attacks import Attack, parse_attack

    epsilon = scale.config.attack.epsilon
    few = [parse_attack(word, epsilon) for word in ("clean", "pgd-20", "cw-20")]
    return [*few, Attack("apgd-t", epsilon, after=("clean",), label="apgd-t alone")]


RESCALED = (0.1, 10.0)


def rescaled_pgd(scale: Scale, factor: float) -> Any:
    """PGD-20 on the cross-entropy of logits times a factor, which does not change the classification.

    The cross-entropy gradients of a very confident network can underflow to zero, which a factor below 1 prevents. For
    a very unconfident one, all classes contribute almost equally to the gradient. With a factor above 1, the
    cross-entropy is nearly the margin to the next class, another loss.
    """
    from jax.tree_util import Partial

    from fs_jax._utils.validation import check_number
    from fs_jax.attacks import Attack, Setting, Specification, count, flag, length, pgd_steps

    def build(*, epsilon, num_classes, factor, num_steps, step_size, any_iterate):
        loss = Partial(_rescaled_cross_entropy, factor=factor)
        last_only = not any_iterate
        return pgd_steps(epsilon=epsilon, step_size=step_size, num_steps=num_steps, loss=loss, last_only=last_only)

    settings = {
        "factor": Setting(1.0, lambda name, value: check_number(name, value, above=0)),
        "num_steps": count(20),
        "step_size": length(lambda epsilon: epsilon / 4),
        "any_iterate": flag(False),
    }
    # The name of PGD, so that the random start is that of PGD-20 and only the factor differs.
    kind = Specification("pgd", "PGD on logits times a factor", build, settings, steps_in_name=True, every_run=True)
    return Attack(kind, scale.config.attack.epsilon, factor=factor, label=f"pgd-20, logits x {factor:g}")


def _rescaled_cross_entropy(logits, labels, *, factor):
    from fs_jax.attacks import cross_entropy

    return cross_entropy(factor * logits, labels)


def attacked(attacks: Attacks) -> Measurement:
    """Measure accuracy under attack, image by image. Each attack runs once per network, for all tables."""
    return Measurement(
        run=functools.partial(_evaluated, attacks),
        settings=lambda scale: [
            [attack.name, attack.epsilon, dict(attack.settings), attack.after, attack.num_images]
            for attack in attacks(scale)
        ],
        passes=lambda config, scale, images: sum(passes(attack, images) for attack in attacks(scale)),
        # Those of the attacks that drop misclassified images are larger.
        programs=lambda scale: sum(4 if attack.any_iterate else 1 for attack in attacks(scale)),
        least_classes=lambda scale: max(attack.specification.least_classes for attack in attacks(scale)),
    )


def _evaluated(attacks: Attacks, network: Network, scale: Scale, path: pathlib.Path) -> Data:
    from fs_jax.config import to_dict
    from fs_jax.evaluation import evaluate

    journal = path.with_suffix(".journal.jsonl")
    if not journal.exists():
        others = {result_file(path.parent, scale, name).with_suffix(".journal.jsonl") for name in EXPERIMENTS}
        take_over(journal, sorted(others), attacks(scale), len(network.labels))
    result = evaluate(
        network.logits_fn, network.images, network.labels, attacks(scale), seed=network.config.seed,
        journal=journal, about={"config": to_dict(network.config)}, progress=False,
    )  # fmt: skip
    return {**result.summary, "records": result.records}


def take_over(journal: pathlib.Path, others: Iterable[pathlib.Path], attacks: Sequence[Any], images: int) -> None:
    """Start a journal with the results of the same attacks in other journals of the same network."""
    from fs_jax._utils.files import read_jsonl, write_text
    from fs_jax.evaluation.journal import SCHEMA

    wanted = {attack.name: json.loads(json.dumps(attack.described())) for attack in attacks}
    lines: list[Data] = []
    for other in filter(pathlib.Path.exists, others):
        header, *rest = read_jsonl(other) or [{}]  # empty if its process was killed at once
        if (header.get("schema"), header.get("images")) != (SCHEMA, images):
            continue
        same = {
            line["attack"] for line in rest if "settings" in line and line["settings"] == wanted.get(line["attack"])
        }
        lines += [header] * (not lines)
        lines += [line for line in rest if line.get("attack") in same or ("environment" in line and line not in lines)]
        wanted = {name: settings for name, settings in wanted.items() if name not in same}
    if lines:
        write_text(journal, "".join(f"{json.dumps(line)}\n" for line in lines))


REMAINING = 0.6  # estimated share of images, for attacks that drop misclassified ones
FORWARD = 0.5  # a forward pass, as part of a forward and backward pass


def passes(attack: Any, images: int) -> float:
    """Number of forward and backward passes of an attack, per image."""
    images = min(images, attack.num_images or images)
    steps, settings = attack.settings.get("num_steps", 1), attack.settings
    runs = settings.get("restarts", 1) * settings.get("targets", 1)
    remaining = 1.0 if not attack.any_iterate else REMAINING
    if attack.specification.name == "clean":
        return FORWARD * images
    if attack.specification.name == "spsa":
        return FORWARD * images * remaining * steps * 2 * settings["num_directions"]
    if attack.specification.name == "square" or attack.specification.name.startswith("local-search"):
        return FORWARD * images * remaining * steps * runs
    if attack.specification.name.startswith("fab"):  # it also evaluates the points that it reaches
        return (1 + FORWARD) * images * remaining * steps * runs
    return images * remaining * steps * runs
