"""Ablation of attack, number of steps and label smoothing: `python -m experiments.paper.ablation`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.paper.attacked import apgd_t
from experiments.paper.experiment import (
    PGD_7,
    Data,
    Experiment,
    Finished,
    Row,
    at_equal_passes,
    full_step,
    quarter_step,
)
from experiments.paper.figures import pgd_against_apgd_t
from experiments.paper.matching import INDEPENDENT, IPOT
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from experiments.paper.tables import collected, difference, heading, points, pooled, shown, table

ATTACKS: dict[str, dict[str, Any]] = {
    "transport": {},
    "identity": {"transport.solver": "identity"},
    "cross-entropy": {"method": "pgd"},
}
STEPS: dict[int, dict[str, Any]] = {
    1: {"attack.num_steps": 1, "attack.step_size": full_step},
    7: {"attack.num_steps": 7, "attack.step_size": quarter_step},
}
GRID = [
    Row(
        f"{name}, {steps} step{'s' * (steps > 1)}, Δ = {delta:g}",
        {**changes, **STEPS[steps], "smoothing": delta},
    )
    for name, changes in ATTACKS.items()
    for steps in STEPS
    for delta in (0.5, 0.0)
]
NOISE = [Row(f"noise, Δ = {delta:g}", {"method": "noise", "smoothing": delta}) for delta in (0.5, 0.0)]
ONE_FACTOR = [
    IPOT,
    INDEPENDENT,
    Row("τ = 0.5", {"transport.reg": 0.5}),
    Row("penultimate features", {"method_settings": (("penultimate", 1),)}),
    Row("loss on clean and attacked images", {"method_settings": (("clean_weight", 0.5),)}),
]
SEVEN_STEPS = [row for row in GRID if "7 steps" in row.label and "Δ = 0.5" in row.label]


def with_plans(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """The table and, as `plans`, the mean difference of the identity plan from the transport.

    It is over all pairs of rows that differ in the plan only, and so has a smaller interval than a single pair.
    """
    data = collected(experiment, scale, finished)
    images = {of.row.label: pooled(of.results, len(scale.datasets)) for of in finished}
    pairs = [(label, label.replace("transport", "identity")) for label in images if label.startswith("transport")]
    pairs = [(transport, identity) for transport, identity in pairs if identity in images]
    if not pairs:
        return data
    plans: Data = {}
    for name in images[pairs[0][0]]:
        theirs, ours = (np.array([images[pair[plan]][name] for pair in pairs]) for plan in (0, 1))  # [pair, image]
        plans[name] = difference(ours.mean(0), theirs.mean(0), ours.mean(1).tolist(), theirs.mean(1).tolist())
    return {**data, "plans": {"pairs": len(pairs), "differences": plans}}


def with_plans_shown(data: Data, columns: Sequence[str]) -> str:
    """The table, and the mean difference over pairs of rows."""
    if "plans" not in data:
        return shown(data, columns)
    pairs, differences = data["plans"]["pairs"], data["plans"]["differences"]
    text = "; ".join(f"{heading(name)} {points(differences[name])}" for name in columns)
    return (
        f"{shown(data, columns)}\n\nThe same for the identity plan instead of the transport, on average over the "
        f"{pairs} pair{'s' * (pairs > 1)} of rows that differ in the plan only (95% intervals over images and, with "
        f"Student's t, over pairs, whose squares add): {text}."
    )


EXPERIMENT = table(
    name="ablation",
    title="Ablation of the method",
    source="not in the paper",
    rows=[*GRID, *NOISE, *ONE_FACTOR, *map(at_equal_passes, [*SEVEN_STEPS, PGD_7])],
    attacks=apgd_t,
    collect=with_plans,
    show=with_plans_shown,
    draw=pgd_against_apgd_t,
    reading="The first row is the paper's method. *transport*, *identity* and *cross-entropy* are the losses of the "
    "training's attack: the transport cost, that of the identity plan, and the supervised loss. *noise* is training "
    "on images with random noise, *penultimate features* takes the transport between the features before the last "
    "layer, and *loss on clean and attacked images* is the mean of the losses on both. *cross-entropy, 7 steps, Δ = 0* "
    "is PGD-7. All rows have the same number of training steps, except those at equal passes: a training step with a "
    "7-step attack takes about three times as many passes as one with a 1-step attack. A single step has the size of "
    "the radius, each of 7 steps a quarter of it. APGD-T, run alone, replaces AutoAttack here, because it determines "
    "AutoAttack's accuracy up to a few images (see *From PGD-20 to AutoAttack*).",
)

if __name__ == "__main__":
    main(EXPERIMENT)
