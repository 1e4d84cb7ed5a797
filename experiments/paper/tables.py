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

EQUAL = 2.0  # points: rows whose difference lies within are equal


def table(
    *, name: str, title: str, source: str, rows: Sequence[Row], attacks: Attacks, reading: str = "",
    draw: Callable[[Data, pathlib.Path], Any] | None = None,
) -> Experiment:  # fmt: skip
    """An experiment that is a table: a row for each way to train, a column for each attack."""
    return Experiment(
        name=name, title=title, source=source, rows=rows, reading=reading, draw=draw,
        measurement=attacked(attacks), collect=collect, show=show,
        other_files=lambda data: {".csv": as_csv(data), ".tex": f"{formatted(data, 'latex_booktabs')}\n"},
    )  # fmt: skip


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """Accuracies by row and attack over all folds and seeds, and how each row differs from the first."""
    rows: dict[str, Data] = {}
    correct = {of.row.label: pooled(of.results) for of in finished}
    reference = correct[finished[0].row.label]
    for row, results, _folders in finished:
        rows[row.label] = {}
        for name, images in correct[row.label].items():
            rows[row.label][name] = {
                **accuracy(images), "paper": row.paper.get(name), "by_network": by_network(results, name),
                "difference": None if row is finished[0].row else difference(images, reference[name]),
            }  # fmt: skip
    return {"rows": rows}


def pooled(evaluations: Sequence[Data]) -> dict[str, np.ndarray]:
    """By attack, whether each image of all folds and seeds was classified correctly."""
    return {
        attack["name"]: np.concatenate([survived(evaluation, attack["name"]) for evaluation in evaluations])
        for attack in evaluations[0]["attacks"]
    }


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


def show(data: Data) -> str:
    """The accuracies, and below them the differences."""
    rows = data["rows"]
    first, *others = rows
    counts = [numbers["total"] for numbers in rows[first].values()]
    images = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    about = f"Accuracy in % of {images} test images, with 95% intervals; in brackets the paper's, on CIFAR-10 at 8/255."
    parts = [formatted(data, "pipe"), about]
    if spread := seed_spread(rows[first]):
        parts += [spread]
    if others:
        text = [
            [label, *(f"{d['points']:+.1f} ±{d['half']:.1f} {d['verdict']}" for d in differences(rows[label]))]
            for label in others
        ]
        parts += [
            f"Points by which each row differs from *{first}*, on the same images, with 95% intervals. *Equal*: surely "
            f"within ±{EQUAL:g}; *undetermined*: neither equal nor surely different.",
            tabulate.tabulate(text, headers=["", *rows[first]], tablefmt="pipe"),
        ]
    return "\n\n".join(parts)


def formatted(data: Data, style: str) -> str:
    """The accuracies in a style of tabulate's."""
    text = [[label, *map(cell, numbers.values())] for label, numbers in data["rows"].items()]
    return tabulate.tabulate(text, headers=["", *next(iter(data["rows"].values()))], tablefmt=style)


def cell(numbers: Data) -> str:
    text = f"{100 * numbers['accuracy']:.1f} ±{50 * (numbers['high'] - numbers['low']):.1f}"
    return text if numbers["paper"] is None else f"{text} ({numbers['paper']:.1f})"


def differences(row: Data) -> list[Data]:
    return [numbers["difference"] for numbers in row.values()]


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
    fields = ("correct", "total", "accuracy", "low", "high", "paper")
    writer.writerow(["row", "attack", *fields])
    for label, numbers in data["rows"].items():
        for name, of in numbers.items():
            writer.writerow([label, name, *("" if of[field] is None else of[field] for field in fields)])
    return file.getvalue()
