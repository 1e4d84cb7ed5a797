"""The most important results of all scales, in sentences and three tables at the beginning of the page."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tabulate

from experiments.paper.experiment import Data
from experiments.paper.findings import CLAIMS, SMOOTHED_PGD_7, Results, findings
from experiments.paper.tables import interval
from experiments.paper.trade_off import SUPERVISED_ROWS

METHOD = "feature scattering"

TRAINING = {
    "standard": "standard training",
    METHOD: "feature scattering, the paper's method",
    "feature scattering, Δ = 0": "feature scattering without label smoothing",
    "identity plan": "feature scattering with the identity plan instead of the transport",
    "PGD-7, equal passes": "PGD-7, as many passes as feature scattering",
    "PGD-7": "PGD-7, as many epochs, with 2.8 times the passes",
    "TRADES": "TRADES, as many epochs, with 4.5 times the passes",
    "cross-entropy, 1 step, Δ = 0": "one step on the cross-entropy (with labels) without label smoothing, with 0.8 "
    "times the passes",
    "cross-entropy, 1 step, radius x 0.5": "one step on the cross-entropy (with labels) with half the radius and label "
    "smoothing, with 0.8 times the passes",
}
"""Rows of main_table, equal_passes, the ablation and trade_off."""

MEASURED = (
    ("main_table", "square", ""), ("equal_passes", "square", ""), ("ablation", "apgd-t alone", "\\*"),
    ("trade_off", "apgd-t alone", "\\*"),
)  # fmt: skip
"""The tables that are searched for such a row, the attack, and a star for an attack that is not AutoAttack."""

PLANS = "the mean over all pairs of rows"

CHANGES = {
    "noise, Δ = 0.5": "random noise instead of an attack",
    "independent plan": "the independent plan instead of the transport",
    "identity, 1 step, Δ = 0.5": "the identity plan instead of the transport",
    PLANS: "the identity plan, on average over all pairs of rows that differ in the plan only",
    "IPOT, β = 1": "IPOT instead of Sinkhorn's algorithm",
    "transport, 1 step, Δ = 0": "no label smoothing",
    "transport, 7 steps, Δ = 0.5": "seven attack steps and 3 times the passes",
    "transport, 7 steps, Δ = 0.5, equal passes": "seven attack steps at equal passes",
    "cross-entropy, 1 step, Δ = 0.5": "an attack on the cross-entropy (with labels) instead of the transport cost",
    "cross-entropy, 1 step, Δ = 0": "an attack on the cross-entropy and no label smoothing",
    "cross-entropy, 7 steps, Δ = 0": "an attack on the cross-entropy and no label smoothing and seven steps (PGD-7), "
    "with 2.8 times the passes",
}
"""Rows of the ablation, which change the paper's method, and the mean over pairs of them."""


def summary(scales: Mapping[str, Results]) -> str:
    """Accuracies, effects of the method's parts, and verdicts, with a column for each scale; empty without results.

    Args:
      scales: Results by the name of their scale, each by the name of the experiment.
    """
    sentences = [text for name, results in scales.items() if (text := conclusions(name, results))]
    verdicts = {name: {each.claim: each.verdict for each in findings(results)} for name, results in scales.items()}
    parts = [
        (
            "**How robust is each method?** Accuracy under AutoAttack and, after the slash, clean accuracy, in % "
            "(\\*: under APGD-T alone, so AutoAttack's is at most that):",
            TRAINING,
            lambda name, label: robust(scales[name], label),
        ),
        (
            "**Which part does the work?** Change of the accuracy under APGD-T alone, in percentage points, if parts "
            "of the method are replaced (where AutoAttack was run too, its accuracy is within a few tenths):",
            CHANGES,
            lambda name, label: change(scales[name], label),
        ),
        (
            "**Which claims hold?** The paper's claims, and questions that they raise; the section *Findings* has the "
            "evidence:",
            {claim: claim for claim, _check in CLAIMS},
            lambda name, claim: verdicts[name].get(claim, ""),
        ),
    ]
    tables = [(text, by_scale(scales, rows, value)) for text, rows, value in parts]
    return "\n\n".join([*sentences, *(f"{heading}\n\n{table}" for heading, table in tables if table)])


def conclusions(name: str, results: Results) -> str:
    """How robust the method is, and which changes of it matter, in sentences; empty without results."""
    sentences = [*compared(results), *at_equal_passes(results), *at_closest_accuracy(results), *effects(results)]
    return f"**{name}:** {' '.join(sentences)}" if sentences else ""


def compared(results: Results) -> Iterator[str]:
    """Sentences on the method, and on the other rows of the main table; without it, on those at equal passes."""
    there = [name for name in ("main_table", "equal_passes") if METHOD in rows_of(results, name)]
    if not there:
        return
    rows = rows_of(results, there[0])
    yield f"Feature scattering has {accuracies(rows[METHOD])} under AutoAttack / on clean images."
    if len(results[there[0]]["seeds"]) > 1:
        networks = rows[METHOD]["square"]["by_network"]
        spread = 100 * np.std(networks, ddof=1)
        yield f"({len(networks)} networks; their standard deviation under AutoAttack is {spread:.1f} points.)"
    groups = by_sign({label: row["square"]["difference"] for label, row in rows.items()})
    text = [[f"{label} ({accuracies(rows[label])})" for label in group] for group in groups]
    if any(text):
        yield in_words(("More robust", "Less robust", "Not clearly more or less robust"), text)
    elif not any(len(rows_of(results, name)) > 1 for name in results):
        yield "No other method was run at this scale."


def at_equal_passes(results: Results) -> Iterator[str]:
    """Sentences on PGD-7 at equal passes, beside a main table, which has PGD-7 at equal epochs."""
    rows, ablation = (rows_of(results, name) for name in ("equal_passes", "ablation"))
    label = "PGD-7, equal passes"
    if METHOD in rows_of(results, "main_table") and (verdict := verdict_of(rows, label, "square")):
        yield f"At equal passes: PGD-7 ({accuracies(rows[label])}), {verdict}."
    if verdict := verdict_of(ablation, SMOOTHED_PGD_7, "apgd-t alone"):
        yield f"With the method's label smoothing, PGD-7 at equal passes is {verdict}, under APGD-T."


def at_closest_accuracy(results: Results) -> Iterator[str]:
    """A sentence on the supervised row whose clean accuracy is closest to the method's."""
    rows = rows_of(results, "trade_off")
    distance = {label: abs(of["points"]) for label in SUPERVISED_ROWS if (of := difference(rows, label, "clean"))}
    if distance:
        label = min(distance, key=lambda label: distance[label])
        clean, attacked = (in_points(rows[label][name]["difference"]) for name in ("clean", "apgd-t alone"))
        yield (
            f"Of the rows with one attack step on the cross-entropy, *{label}* has the closest clean accuracy: {clean} "
            f"points on clean images, and {attacked} under APGD-T."
        )


def effects(results: Results) -> Iterator[str]:
    """Sentences on the changes of the method."""
    groups = by_sign({text: from_method(results, label) for label, text in CHANGES.items() if label != PLANS})
    if any(groups):
        more = "Changes that make it more robust, under APGD-T"
        yield in_words((more, "Changes that make it less robust", "No clear effect"), groups)


def verdict_of(rows: Mapping[str, Data], label: str, attack: str) -> str | None:
    """How robust a row is, compared with the first, in words; None without the row or the first one."""
    of = difference(rows, label, attack)
    return None if of is None else ROBUST[of["verdict"]]


def difference(rows: Mapping[str, Data], label: str, attack: str) -> Data | None:
    """Difference of a row from the first; None without the row or the first one."""
    return rows[label][attack]["difference"] if label in rows else None


def in_points(difference: Data) -> str:
    """A difference with its interval, as text."""
    return f"{difference['points']:+.1f} ±{difference['half']:.1f}"


ROBUST = {
    "higher": "more robust", "lower": "less robust", "equal": "equally robust",
    "undetermined": "not clearly more or less robust",
}  # fmt: skip


def accuracies(row: Data) -> str:
    """Accuracy under AutoAttack / on clean images."""
    return f"{100 * row['square']['accuracy']:.1f}% / {100 * row['clean']['accuracy']:.1f}%"


def in_words(headings: Sequence[str], groups: Sequence[Sequence[str]]) -> str:
    """A sentence for each group that has members."""
    return " ".join(f"{heading}: {'; '.join(group)}." for heading, group in zip(headings, groups, strict=True) if group)


def by_sign(differences: Mapping[str, Data | None]) -> tuple[list[str], list[str], list[str]]:
    """The names whose difference is above 0, below 0, and equal or undetermined."""
    verdicts = {name: of["verdict"] for name, of in differences.items() if of is not None}
    above, below = ([name for name, of in verdicts.items() if of == verdict] for verdict in ("higher", "lower"))
    return above, below, [name for name in verdicts if name not in (*above, *below)]


def by_scale(scales: Iterable[str], rows: Mapping[str, str], value: Callable[[str, str], str]) -> str:
    """A table of `value(scale, key)`, without the rows that no scale has and the scales without rows; can be empty."""
    scales = [scale for scale in scales if any(value(scale, key) for key in rows)]
    text = [[label, *(value(scale, key) for scale in scales)] for key, label in rows.items()]
    text = [[label, *(cell or "not run" for cell in cells)] for label, *cells in text if any(cells)]
    return tabulate.tabulate(text, headers=["", *scales], tablefmt="pipe", disable_numparse=True) if text else ""


def robust(results: Results, label: str) -> str:
    """Accuracy of a row under AutoAttack or, with a star, APGD-T, and clean accuracy."""
    for name, attack, star in MEASURED:
        row = rows_of(results, name).get(label)
        if row is not None:
            return f"{interval(row[attack])}{star} / {100 * row['clean']['accuracy']:.1f}"
    return ""


def change(results: Results, label: str) -> str:
    """Difference of a row of the ablation from the paper's method, as text."""
    of = from_method(results, label)
    return "" if of is None else in_points(of)


def from_method(results: Results, label: str) -> Data | None:
    """Difference of a row of the ablation from the paper's method, under APGD-T; None without the row."""
    if label == PLANS:
        plans = results.get("ablation", {}).get("plans")
        return None if plans is None else plans["differences"]["apgd-t alone"]
    return difference(rows_of(results, "ablation"), label, "apgd-t alone")


def rows_of(results: Results, name: str) -> Mapping[str, Data]:
    """The rows of a table, if there are results of it."""
    return results.get(name, {}).get("rows", {})
