"""Tables of accuracies under attack: ours, the paper's, and which rows differ; as Markdown, CSV and LaTeX."""

import csv
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tabulate

from experiments.paper.attacked import Attacks, attacked
from experiments.paper.experiment import Data, Experiment, Finished, Row
from experiments.paper.scales import Scale
from fs_jax.evaluation.statistics import accuracy, paired_difference

Collect = Callable[[Experiment, Scale, Sequence[Finished]], Data]

EQUAL = 2.0  # points: rows whose difference lies within are equal


def table(
    *, name: str, title: str, source: str, rows: Sequence[Row], attacks: Attacks, reading: str = "",
    draw: Callable[[Data, pathlib.Path], Any] | None = None, collect: Collect | None = None,
    show: Callable[[Data], str] | None = None,
) -> Experiment:  # fmt: skip
    """An experiment that is a table: a row for each way to train, a column for each attack."""
    return Experiment(
        name=name, title=title, source=source, rows=rows, reading=reading, draw=draw,
        measurement=attacked(attacks), collect=collect or collected, show=show or shown,
        other_files=lambda data: {".csv": as_csv(data), ".tex": f"{formatted(data, 'latex_booktabs')}\n"},
    )  # fmt: skip


def collected(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """Accuracies by row and attack over all images, and how each row differs from the table's first one."""
    reference = experiment.rows[0].label
    correct = {of.row.label: pooled(of.results, len(scale.datasets)) for of in finished}
    rows: dict[str, Data] = {}
    for row, results, _folders in finished:
        rows[row.label] = {}
        for name, images in correct[row.label].items():
            compared = row.label != reference and reference in correct
            rows[row.label][name] = {
                **mean_accuracy(images), "paper": row.paper.get(name), "by_network": by_network(results, name),
                "difference": difference(images, correct[reference][name]) if compared else None,
            }  # fmt: skip
    return {"rows": rows, "reference": reference}


def pooled(evaluations: Sequence[Data], datasets: int) -> dict[str, np.ndarray]:
    """By attack, for each image of all folds the share of its networks, of several seeds, that were right.

    An image is counted once however many networks it was shown to: they agree more than other images would.

    Args:
      evaluations: Of the networks, all seeds of a data set together.
      datasets: How many data sets, or folds, there are.
    """
    seeds = len(evaluations) // datasets
    folds = [evaluations[begin : begin + seeds] for begin in range(0, len(evaluations), seeds)]
    return {
        attack["name"]: np.concatenate([np.mean([survived(e, attack["name"]) for e in fold], axis=0) for fold in folds])
        for attack in evaluations[0]["attacks"]
    }


def mean_accuracy(images: np.ndarray) -> Data:
    """The mean and its 95% interval over images: Wilson's of one network for each image, the normal one of several."""
    if np.isin(images, (0, 1)).all():
        return accuracy(images.astype(bool))
    mean, half = float(np.mean(images)), float(1.96 * np.std(images, ddof=1) / np.sqrt(len(images)))
    return {
        "correct": float(np.sum(images)), "total": len(images), "accuracy": mean,
        "low": max(0.0, mean - half), "high": min(1.0, mean + half),
    }  # fmt: skip


def survived(evaluation: Data, name: str) -> np.ndarray:
    """Which images an attack left, of those that it was meant for.

    An attack after others counts what those left: as AutoAttack's do, in its order.
    """
    (attack,) = (attack for attack in evaluation["attacks"] if attack["name"] == name)
    chain, records = (*attack["after"], name), evaluation["records"][: attack["num_images"]]
    return np.array([all(record["misclassified_at"].get(each, 0) < 0 for each in chain) for record in records], bool)


def by_network(evaluations: Sequence[Data], name: str) -> list[float]:
    """The accuracy of each network alone, for the spread over folds and seeds."""
    return [float(np.mean(survived(evaluation, name))) for evaluation in evaluations]


def difference(ours: np.ndarray, theirs: np.ndarray) -> Data:
    """Of two rows on the same images, in points, with half its 95% interval, and what that says.

    Example:
      >>> difference(np.arange(1000) < 900, np.arange(1000) < 850)["verdict"]
      'higher'
    """
    mean, half = (100 * value for value in paired_difference(ours, theirs))
    if mean - half >= -EQUAL and mean + half <= EQUAL:
        verdict = "equal"
    elif mean - half > 0:
        verdict = "higher"
    else:
        verdict = "lower" if mean + half < 0 else "undetermined"
    return {"points": mean, "half": half, "verdict": verdict}


def shown(data: Data) -> str:
    """The accuracies, and below them the differences."""
    rows, reference = data["rows"], data["reference"]
    first = next(iter(rows.values()))
    counts = [numbers["total"] for numbers in first.values()]
    images = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    about = (
        f"Accuracy in % of {images} test images, with 95% intervals over images; in (): the paper's, on CIFAR-10 at "
        "8/255."
    )
    parts = [formatted(data, "pipe"), about]
    if spread := seed_spread(first):
        parts += [spread]
    text = [
        [label, *(f"{d['points']:+.1f} ±{d['half']:.1f} {d['verdict']}" for d in found)]
        for label, row in rows.items()
        if (found := differences(row))
    ]
    if text:
        parts += [
            f"Points by which each row differs from *{reference}*, on the same images, with 95% intervals over images, "
            f"for these networks. *Equal*: within ±{EQUAL:g} in the whole interval; *undetermined*: neither equal nor "
            "different.",
            tabulate.tabulate(text, headers=["", *first], tablefmt="pipe"),
        ]
    return "\n\n".join(parts)


def formatted(data: Data, style: str) -> str:
    """The accuracies in a style of tabulate's."""
    text = [[label, *map(cell, numbers.values())] for label, numbers in data["rows"].items()]
    return tabulate.tabulate(text, headers=["", *next(iter(data["rows"].values()))], tablefmt=style)


def cell(numbers: Data) -> str:
    text = f"{100 * numbers['accuracy']:.1f} [{100 * numbers['low']:.1f}, {100 * numbers['high']:.1f}]"
    return text if numbers["paper"] is None else f"{text} ({numbers['paper']:.1f})"


def differences(row: Data) -> list[Data]:
    """From the table's first row; none of itself, or where that hasn't been run."""
    return [numbers["difference"] for numbers in row.values() if numbers["difference"] is not None]


def seed_spread(row: Data) -> str | None:
    """How much networks differ that differ in their fold or seed alone."""
    several = {name: numbers["by_network"] for name, numbers in row.items() if len(numbers["by_network"]) > 1}
    if not several:
        return None
    spread = ", ".join(f"{name} {100 * np.std(values, ddof=1):.1f}" for name, values in several.items())
    count = len(next(iter(several.values())))
    return f"Standard deviation over the first row's {count} networks, of other folds or seeds, in points: {spread}."


def as_csv(data: Data) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = ("correct", "total", "accuracy", "low", "high")
    writer.writerow(["row", "attack", *fields, "paper"])
    for label, numbers in data["rows"].items():
        for name, of in numbers.items():
            paper = "" if of["paper"] is None else round(of["paper"] / 100, 6)  # a share, as ours
            writer.writerow([label, name, *(of[field] for field in fields), paper])
    return file.getvalue()
