"""Tables of a sweep: ours, the paper's, and which rows differ; as Markdown, CSV and LaTeX."""

import csv
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tabulate

from experiments.output import made_on
from experiments.paper.jobs import configurations, evaluation_file, folder_of
from experiments.paper.scales import SCALES
from experiments.paper.sweep import Sweep
from fs_jax._utils.text import radius
from fs_jax.evaluation.statistics import accuracy, paired_difference

EQUAL = 2.0  # points: rows whose difference lies within are equal


def files(chosen: Sweep, scale: str, seeds: Sequence[int], workdir: pathlib.Path) -> dict[str, Any] | None:
    """The table's files by name; None if a row isn't finished."""
    rows = []
    for row in chosen.rows:
        evaluations = []
        for config in configurations(SCALES[scale], row, seeds):
            path = evaluation_file(folder_of(workdir, scale, config), SCALES[scale], chosen.name)
            if not path.exists():
                return None
            evaluations.append(json.loads(path.read_text(encoding="utf-8")))
        rows.append((row, pooled(evaluations)))
    names = list(rows[0][1])
    first, reference = rows[0]
    header = ["", *names]
    text = [[row.label, *(cell(numbers[name], row.paper.get(name)) for name in names)] for row, numbers in rows]
    verdicts = [
        [row.label, *(verdict(numbers[name], reference[name]) for name in names)]
        for row, numbers in rows[1:]
    ]  # fmt: skip
    last = evaluations[-1]
    caption = (
        f"{SCALES[scale].summary} Radius {radius(SCALES[scale].config.attack.epsilon)}, "
        f"{rows[0][1]['clean']['total']:,} images, seeds {', '.join(map(str, seeds))}. Accuracy in % with 95% "
        f"intervals; in brackets the paper's: {chosen.source}. On {made_on(last['environments'][-1])}."
    )
    parts = [f"# {chosen.title}", tabulate.tabulate(text, headers=header, tablefmt="pipe"), caption, chosen.reading]
    if verdicts:
        parts += [
            f"Points that each row differs from *{first.label}*, on the same images, with 95% "
            f"intervals; equal: within ±{EQUAL:g} for sure.",
            tabulate.tabulate(verdicts, headers=header, tablefmt="pipe"),
        ]
    numbers = {
        row.label: {name: {key: of[key] for key in ("correct", "total", "accuracy", "low", "high")}
                    for name, of in pooled_row.items()}
        for row, pooled_row in rows
    }  # fmt: skip
    return {
        f"{chosen.name}.md": "\n\n".join(filter(None, parts)) + "\n",
        f"{chosen.name}.csv": as_csv(rows, names),
        f"{chosen.name}.tex": tabulate.tabulate(text, headers=header, tablefmt="latex_booktabs") + "\n",
        f"{chosen.name}.json": {"scale": scale, "seeds": list(seeds), "rows": numbers},
    }


def pooled(evaluations: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By attack, the accuracy over the images of all folds and seeds, and which were classified correctly.

    An attack after others counts what those left: as AutoAttack's do, in its order.
    """
    found: dict[str, dict[str, Any]] = {}
    for attack in evaluations[0]["attacks"]:
        chain = (*attack["after"], attack["name"])
        correct = np.concatenate([
            [all(record["misclassified_at"].get(name, 0) < 0 for name in chain) for record in records_of(e, attack)]
            for e in evaluations
        ]).astype(bool)  # fmt: skip
        found[attack["name"]] = {**accuracy(correct), "images": correct}
    return found


def records_of(evaluation: dict[str, Any], attack: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of the images that the attack was meant for."""
    return evaluation["records"][: attack["num_images"]]


def cell(numbers: dict[str, Any], paper: float | None) -> str:
    text = f"{100 * numbers['accuracy']:.1f} ±{50 * (numbers['high'] - numbers['low']):.1f}"
    return text if paper is None else f"{text} ({paper:.1f})"


def verdict(numbers: dict[str, Any], reference: dict[str, Any]) -> str:
    """The paired difference, and what it says."""
    difference, half = paired_difference(numbers["images"], reference["images"])
    low, high = 100 * (difference - half), 100 * (difference + half)
    if low >= -EQUAL and high <= EQUAL:
        word = "equal"
    elif low > 0:
        word = "higher"
    else:
        word = "lower" if high < 0 else "undetermined"
    return f"{100 * difference:+.1f} ±{100 * half:.1f} {word}"


def as_csv(rows, names) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "attack", "correct", "total", "accuracy", "low", "high", "paper"])
    for row, numbers in rows:
        for name in names:
            of = numbers[name]
            writer.writerow([
                row.label, name, of["correct"], of["total"], of["accuracy"], of["low"], of["high"],
                row.paper.get(name, ""),
            ])  # fmt: skip
    return file.getvalue()
