"""Which part of the method is real: attack, steps and smoothing in turn: `python -m experiments.paper.ablation`."""

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
    title="Which part is real",
    source="(not in the paper)",
    rows=[*GRID, *NOISE, *ONE_FACTOR, *map(at_equal_passes, [*SEVEN_STEPS, PGD_7])],
    attacks=apgd_t,
    draw=pgd_against_apgd_t,
    reading="The first row is the paper's method. All have as many training steps, but those at equal passes: an "
    "attack of 7 steps takes three times the passes of one with 1. One step is as long as the radius, each of 7 a "
    "quarter of that. APGD-T stands for AutoAttack, whose accuracy it decides but for a few images (autoattack_gap).",
)

if __name__ == "__main__":
    main(EXPERIMENT)
