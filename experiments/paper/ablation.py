"""Ablation of attack, number of steps and label smoothing: `python -m experiments.paper.ablation`."""

from typing import Any

from experiments.paper.attacked import apgd_t
from experiments.paper.experiment import PGD_7, Row, at_equal_passes, full_step, quarter_step
from experiments.paper.figures import pgd_against_apgd_t
from experiments.paper.matching import INDEPENDENT, IPOT
from experiments.paper.runner import main
from experiments.paper.tables import table

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

EXPERIMENT = table(
    name="ablation",
    title="Ablation of the method",
    source="not in the paper",
    rows=[*GRID, *NOISE, *ONE_FACTOR, *map(at_equal_passes, [*SEVEN_STEPS, PGD_7])],
    attacks=apgd_t,
    draw=pgd_against_apgd_t,
    reading="The first row is the paper's method. *transport*, *identity* and *cross-entropy* are the losses of the "
    "training's attack: the transport cost, that with the identity plan, and the supervised loss. *noise* is training "
    "on images with random noise, *penultimate features* takes the transport between the features before the last "
    "layer, and *loss on clean and attacked images* is the mean of the losses on both. *cross-entropy, 7 steps, Δ = 0* "
    "is PGD-7. All rows have the same number of training steps, except those at equal passes: a training step with a "
    "7-step attack takes about three times as many passes as one with a 1-step attack. A single step has the size of "
    "the radius, each of 7 steps a quarter of it. APGD-T, run alone, replaces AutoAttack here, because it determines "
    "AutoAttack's accuracy up to a few images (see *From PGD-20 to AutoAttack*).",
)

if __name__ == "__main__":
    main(EXPERIMENT)
