"""Standard, PGD-7, TRADES and feature scattering side by side: `python -m experiments.paper.main_table`."""

from experiments.paper.runner import main
from experiments.paper.sweep import Row, Sweep, and_autoattack

SWEEP = Sweep(
    name="main_table",
    title="Training methods",
    source="the paper's supplement (tables 2 and 3 have feature scattering's row), and RobustBench for AutoAttack",
    rows=[
        Row(
            "feature scattering",
            paper={
                "clean": 90.0, "fgsm": 78.4, "pgd-20": 70.5, "pgd-100": 68.6, "cw-20": 62.4, "cw-100": 60.6,
                "square": 36.64,
            },
        ),
        Row("standard", {"method": "standard"}),
        Row("PGD-7", {"method": "pgd"}),
        Row("TRADES", {"method": "trades"}),
    ],
    attacks=and_autoattack,
)  # fmt: skip

if __name__ == "__main__":
    main(SWEEP)
