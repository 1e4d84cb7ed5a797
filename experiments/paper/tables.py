"""Tables of accuracies under attack: ours, the paper's, and the differences between rows; Markdown, CSV and LaTeX."""

import csv
import io
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tabulate
from scipy.stats import norm, t

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
    columns: Sequence[str] = (), draw: Callable[[Data, pathlib.Path], Any] | None = None,
    collect: Collect | None = None, show: Callable[[Data, Sequence[str]], str] | None = None,
) -> Experiment:  # fmt: skip
    """An experiment that is a table, with one row per way to train and one column per attack.

    The Markdown has the attacks in `columns` only, by default all; CSV and LaTeX have all.
    """
    return Experiment(
        name=name, title=title, source=source, rows=rows, reading=reading, draw=draw,
        measurement=attacked(attacks), collect=collect or collected,
        show=lambda data: (show or shown)(data, columns or all_attacks(data)),
        other_files=lambda data: {
            ".csv": as_csv(data), ".tex": f"{formatted(data, all_attacks(data), 'latex_booktabs')}\n",
        },
    )  # fmt: skip


def all_attacks(data: Data) -> list[str]:
    """The names of the attacks."""
    return list(next(iter(data["rows"].values())))


def collected(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """Accuracies by row and attack, over all images, and the difference of each row from the first."""
    reference = experiment.rows[0].label
    correct = {of.row.label: pooled(of.results, len(scale.datasets)) for of in finished}
    compared_with = next((of.results for of in finished if of.row.label == reference), [])
    rows: dict[str, Data] = {}
    for row, results, _folders in finished:
        rows[row.label] = {}
        for name, images in correct[row.label].items():
            compared = row.label != reference and reference in correct
            rows[row.label][name] = {
                **mean_accuracy(images), "paper": row.paper.get(name), "by_network": by_network(results, name),
                "difference": difference(
                    images, correct[reference][name], by_network(results, name), by_network(compared_with, name),
                    folds=len(scale.datasets),
                ) if compared else None,
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
    return {
        attack["name"]: mean_over_seeds([survived(each, attack["name"]) for each in evaluations], datasets)
        for attack in evaluations[0]["attacks"]
    }


def mean_over_seeds(networks: Sequence[np.ndarray], datasets: int) -> np.ndarray:
    """The mean over the seeds of each fold, for the images of all folds. Networks are ordered by fold, then by seed.

    Example:
      >>> mean_over_seeds([np.array([0, 1]), np.array([1, 1]), np.array([0]), np.array([0])], datasets=2).tolist()
      [0.5, 1.0, 0.0]
    """
    seeds = len(networks) // datasets
    folds = [networks[begin : begin + seeds] for begin in range(0, len(networks), seeds)]
    return np.concatenate([np.mean(fold, axis=0) for fold in folds])


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


def difference(
    ours: np.ndarray, theirs: np.ndarray, our_networks: Sequence[float], their_networks: Sequence[float], *,
    folds: int = 1,
) -> Data:  # fmt: skip
    """Difference of two rows on the same images, in points, with half its 95% interval and a verdict.

    For rows of several networks, the interval includes the variation of training. Networks of several seeds have the
    same test images: the interval over images and that over networks (Student's t) are of independent causes, and their
    squares add. Each fold has other test images, so the interval over folds (Student's t, of means over seeds) has both
    causes, and the wider of the two intervals is taken. (The training sets of folds overlap, which is ignored.)

    Args:
      ours: Whether each image is classified correctly, or the fraction of networks that do so.
      theirs: The same for the other row.
      our_networks: Accuracy of each network, ordered by fold, then by seed.
      their_networks: The same for the other row, in the same order.
      folds: Number of data sets with test images of their own.

    Example:
      >>> difference(np.arange(1000) < 900, np.arange(1000) < 850, [0.9], [0.85])["verdict"]
      'higher'
    """
    mean, over_images = (100 * value for value in paired_difference(ours, theirs))
    each, over_networks = 100 * (np.array(our_networks) - np.array(their_networks)), 0.0
    if folds > 1:
        each = each.reshape(folds, -1).mean(1)
    if len(each) > 1:
        over_networks = float(t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))
    halves = {"over_images": over_images, "over_networks": over_networks, "networks": len(each), "folds": folds}
    half = half_width(halves)
    if mean - half >= -EQUAL and mean + half <= EQUAL:
        verdict = "equal"
    elif mean - half > 0:
        verdict = "higher"
    else:
        verdict = "lower" if mean + half < 0 else "undetermined"
    return {"points": mean, "half": half, "verdict": verdict, **halves}


def half_width(difference: Data, level: float = 0.95) -> float:
    """Half of the interval of a difference, in points.

    Example:
      >>> half_width({"over_images": 3.0, "over_networks": 4.0, "networks": 3, "folds": 1})
      5.0
      >>> half_width({"over_images": 3.0, "over_networks": 4.0, "networks": 5, "folds": 5})
      4.0
    """
    upper = 0.5 + level / 2
    over_images = float(difference["over_images"] * (norm.ppf(upper) / norm.ppf(0.975)))
    if difference["networks"] == 1:
        return over_images
    freedom = difference["networks"] - 1
    over_networks = float(difference["over_networks"] * (t.ppf(upper, freedom) / t.ppf(0.975, freedom)))
    return max(over_images, over_networks) if difference["folds"] > 1 else math.hypot(over_images, over_networks)


def shown(data: Data, columns: Sequence[str]) -> str:
    """The table of accuracies, followed by the table of differences."""
    rows, reference = data["rows"], data["reference"]
    parts = [about(data, columns), formatted(data, columns, "pipe")]
    if spread := spread_over_networks(data, columns):
        parts += [spread]
    text = [[label, *map(points, found)] for label, row in rows.items() if (found := differences(row, columns))]
    if text:
        parts += [
            f"Difference from *{reference}* in percentage points, on the same images, from unrounded accuracies, with "
            f"95% intervals over {units(data)}. *Equal*: the interval is within ±{EQUAL:g}. *Higher*, "
            "*lower*: it is not, and excludes 0.",
            tabulate.tabulate(text, headers=["", *map(heading, columns)], tablefmt="pipe"),
        ]
    return "\n\n".join(parts)


def units(data: Data) -> str:
    """What the intervals of differences are over, as text."""
    folds, seeds = len(data["images"]["datasets"]), len(data["seeds"])
    if folds > 1:
        return f"images or over the {folds} folds (Student's t), whichever are wider"
    return f"images and over the {seeds} seeds (Student's t), whose squares add" if seeds > 1 else "images"


def about(data: Data, columns: Sequence[str]) -> str:
    """The sentences above the table: units, number of images, what is in parentheses, and the columns left out."""
    rows = data["rows"]
    totals = [next(iter(rows.values()))[name]["total"] for name in columns]
    most = max(totals, key=totals.count)
    others = "; ".join(f"{heading(name)}: {n:,}" for name, n in zip(columns, totals, strict=True) if n != most)
    text = f"Accuracy in % on {most:,} test images{f' ({others})' if others else ''}, with 95% intervals over images"
    if any(row[name]["paper"] is not None for row in rows.values() for name in columns):
        text += "; in parentheses, the paper's accuracy on CIFAR-10 at 8/255"
    left_out = [heading(name) for name in all_attacks(data) if name not in columns]
    return f"{text}. The CSV file also has {'; '.join(left_out)}." if left_out else f"{text}."


def formatted(data: Data, columns: Sequence[str], style: str) -> str:
    """The accuracies, in a table format of tabulate."""
    text = [[label, *(cell(numbers[name]) for name in columns)] for label, numbers in data["rows"].items()]
    return tabulate.tabulate(text, headers=["", *map(heading, columns)], tablefmt=style)


def heading(attack: str) -> str:
    """The heading of an attack's column."""
    return HEADINGS.get(attack, attack)


def cell(numbers: Data) -> str:
    """An accuracy with its interval and the paper's, in %."""
    return interval(numbers) + ("" if numbers["paper"] is None else f" ({numbers['paper']:.1f})")


def interval(numbers: Data) -> str:
    """An accuracy with its interval, in %.

    Example:
      >>> interval({"accuracy": 0.5, "low": 0.45, "high": 0.55})
      '50.0 [45.0, 55.0]'
    """
    return f"{100 * numbers['accuracy']:.1f} [{100 * numbers['low']:.1f}, {100 * numbers['high']:.1f}]"


def points(difference: Data) -> str:
    """A difference with its interval and verdict, in percentage points.

    Example:
      >>> points({"points": 1.24, "half": 0.5, "verdict": "equal"})
      '+1.2 ±0.5 equal'
    """
    return f"{difference['points']:+.1f} ±{difference['half']:.1f} {difference['verdict']}"


def differences(row: Data, columns: Sequence[str]) -> list[Data]:
    """Differences from the first row; empty for the first row itself, or if the first row is not finished."""
    return [row[name]["difference"] for name in columns if row[name]["difference"] is not None]


def spread_over_networks(data: Data, columns: Sequence[str]) -> str | None:
    """Standard deviation of the first row's accuracies over its networks, one for each fold and seed."""
    row = next(iter(data["rows"].values()))
    spread = {heading(name): np.std(row[name]["by_network"], ddof=1) for name in columns if row[name]["by_network"][1:]}
    if not spread:
        return None
    folds, seeds = len(data["images"]["datasets"]), len(data["seeds"])
    networks = " x ".join(f"{count} {name}" for count, name in ((folds, "folds"), (seeds, "seeds")) if count > 1)
    text = "; ".join(f"{name} {100 * value:.1f}" for name, value in spread.items())
    return f"Standard deviation of the first row over {networks}, in points: {text}."


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
