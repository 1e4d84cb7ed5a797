"""Tables of accuracies under attack: ours, the paper's, and the differences between rows; Markdown, CSV and LaTeX."""

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

HEADINGS = {
    "square": "AutoAttack",  # the last of its attacks, run on the images that are robust to the others
    "spsa": "spsa, 100 steps",
    "local-search-projected": "local search, 150 rounds",
}
"""Headings of columns that differ from the attack's name in the JSON file."""

EQUAL = 2.0  # points: two rows are equal if the interval of their difference is within ±EQUAL


def table(
    *, name: str, title: str, source: str, rows: Sequence[Row], attacks: Attacks, reading: str = "",
    draw: Callable[[Data, pathlib.Path], Any] | None = None, collect: Collect | None = None,
    show: Callable[[Data], str] | None = None,
) -> Experiment:  # fmt: skip
    """An experiment that is a table, with one row per way to train and one column per attack."""
    return Experiment(
        name=name, title=title, source=source, rows=rows, reading=reading, draw=draw,
        measurement=attacked(attacks), collect=collect or collected, show=show or shown,
        other_files=lambda data: {".csv": as_csv(data), ".tex": f"{formatted(data, 'latex_booktabs')}\n"},
    )  # fmt: skip


def collected(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """Accuracies by row and attack, over all images, and the difference of each row from the first."""
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
    """For each attack, the fraction of networks that classify an image correctly, for the images of all folds.

    Each image counts once, even with networks of several seeds, because their results on the same image are correlated.

    Args:
      evaluations: Evaluations of the networks, ordered by data set and then by seed.
      datasets: Number of data sets, or folds.

    Returns:
      Arrays [N] with values in [0, 1], by attack.
    """
    seeds = len(evaluations) // datasets
    folds = [evaluations[begin : begin + seeds] for begin in range(0, len(evaluations), seeds)]
    return {
        attack["name"]: np.concatenate([np.mean([survived(e, attack["name"]) for e in fold], axis=0) for fold in folds])
        for attack in evaluations[0]["attacks"]
    }


def mean_accuracy(images: np.ndarray) -> Data:
    """Mean and 95% interval over images: Wilson's interval for one network per image, the normal one for several."""
    if np.isin(images, (0, 1)).all():
        return accuracy(images.astype(bool))
    mean, half = float(np.mean(images)), float(1.96 * np.std(images, ddof=1) / np.sqrt(len(images)))
    return {
        "correct": float(np.sum(images)), "total": len(images), "accuracy": mean,
        "low": max(0.0, mean - half), "high": min(1.0, mean + half),
    }  # fmt: skip


def survived(evaluation: Data, name: str) -> np.ndarray:
    """Which images are robust to an attack, of those that it was run on.

    For an attack that runs after others, as in AutoAttack, images must be robust to all of them.
    """
    (attack,) = (attack for attack in evaluation["attacks"] if attack["name"] == name)
    chain, records = (*attack["after"], name), evaluation["records"][: attack["num_images"]]
    return np.array([all(record["misclassified_at"].get(each, 0) < 0 for each in chain) for record in records], bool)


def by_network(evaluations: Sequence[Data], name: str) -> list[float]:
    """The accuracy of each network, for the standard deviation over folds and seeds."""
    return [float(np.mean(survived(evaluation, name))) for evaluation in evaluations]


def difference(ours: np.ndarray, theirs: np.ndarray) -> Data:
    """Difference of two rows on the same images, in points, with half its 95% interval and a verdict.

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
    """The table of accuracies, followed by the table of differences."""
    rows, reference = data["rows"], data["reference"]
    first = next(iter(rows.values()))
    counts = [numbers["total"] for numbers in first.values()]
    images = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    about = (
        f"Accuracy in % on {images} test images, with 95% intervals over images; in parentheses, the paper's accuracy "
        "on CIFAR-10 at 8/255."
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
            f"Difference of each row from *{reference}*, in percentage points, on the same images, with 95% intervals "
            f"over images, for these networks. *Equal*: the interval is within ±{EQUAL:g}. *Higher*, *lower*: it is "
            "not, and excludes 0. *Undetermined*: neither.",
            tabulate.tabulate(text, headers=["", *map(heading, first)], tablefmt="pipe"),
        ]
    return "\n\n".join(parts)


def formatted(data: Data, style: str) -> str:
    """The accuracies, in a table format of tabulate."""
    text = [[label, *map(cell, numbers.values())] for label, numbers in data["rows"].items()]
    return tabulate.tabulate(text, headers=["", *map(heading, next(iter(data["rows"].values())))], tablefmt=style)


def heading(attack: str) -> str:
    """The heading of an attack's column."""
    return HEADINGS.get(attack, attack)


def cell(numbers: Data) -> str:
    text = f"{100 * numbers['accuracy']:.1f} [{100 * numbers['low']:.1f}, {100 * numbers['high']:.1f}]"
    return text if numbers["paper"] is None else f"{text} ({numbers['paper']:.1f})"


def differences(row: Data) -> list[Data]:
    """Differences from the first row; empty for the first row itself, or if the first row is not finished."""
    return [numbers["difference"] for numbers in row.values() if numbers["difference"] is not None]


def seed_spread(row: Data) -> str | None:
    """Standard deviation over networks that differ only in their fold or seed."""
    several = {name: numbers["by_network"] for name, numbers in row.items() if len(numbers["by_network"]) > 1}
    if not several:
        return None
    spread = "; ".join(f"{heading(name)} {100 * np.std(values, ddof=1):.1f}" for name, values in several.items())
    count = len(next(iter(several.values())))
    return f"Standard deviation over the first row's {count} networks (folds or seeds), in points: {spread}."


def as_csv(data: Data) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = ("correct", "total", "accuracy", "low", "high")
    writer.writerow(["row", "attack", *fields, "paper"])
    for label, numbers in data["rows"].items():
        for name, of in numbers.items():
            paper = "" if of["paper"] is None else round(of["paper"] / 100, 6)  # a fraction, like ours
            writer.writerow([label, name, *(of[field] for field in fields), paper])
    return file.getvalue()
