"""Which part of the method is real: attack, steps and smoothing in turn: `python -m experiments.paper.ablation`."""

from typing import Any

from experiments.paper.runner import main
from experiments.paper.sweep import Row, Sweep, and_autoattack, full_step

ATTACKS: dict[str, dict[str, Any]] = {
    "transport": {"attack.step_size": full_step},
    "identity": {"attack.step_size": full_step, "transport.solver": "identity"},
    "cross-entropy": {"method": "pgd"},
}
STEPS: dict[int, dict[str, Any]] = {
    1: {"attack.num_steps": 1, "attack.step_size": full_step},
    7: {"attack.num_steps": 7},
}

SWEEP = Sweep(
    name="ablation",
    title="Which part is real",
    source="(not in the paper)",
    rows=[
        *(
            Row(f"{name}, {steps} step{'s' * (steps > 1)}, Δ = {delta:g}", {
                **changes, **STEPS[steps], "smoothing": delta,
            })
            for name, changes in ATTACKS.items()
            for steps in (1, 7)
            for delta in (0.5, 0.0)
        ),
        *(Row(f"noise, Δ = {delta:g}", {"method": "noise", "smoothing": delta}) for delta in (0.5, 0.0)),
    ],
    attacks=and_autoattack,
    reading="At equal steps of training. With 7 steps an attack makes four times the passes of one with 1.",
)  # fmt: skip

if __name__ == "__main__":
    main(SWEEP)
