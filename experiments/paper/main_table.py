"""Standard, PGD-7, TRADES and feature scattering side by side: `python -m experiments.paper.main_table`."""

import dataclasses

from experiments.paper.attacked import and_autoattack
from experiments.paper.experiment import FEATURE_SCATTERING, PGD_7, STANDARD, TRADES
from experiments.paper.runner import main
from experiments.paper.tables import table

PAPER = {
    "clean": 90.0, "fgsm": 78.4, "pgd-20": 70.5, "pgd-100": 68.6, "cw-20": 62.4, "cw-100": 60.6, "square": 36.64,
}  # fmt: skip

EXPERIMENT = table(
    name="main_table",
    title="Training methods",
    source="tables 2 and 3 of the paper's supplement for feature scattering, and RobustBench for AutoAttack",
    rows=[dataclasses.replace(FEATURE_SCATTERING, paper=PAPER), STANDARD, PGD_7, TRADES],
    attacks=and_autoattack,
    columns=("clean", "fgsm", "pgd-20", "pgd-100", "cw-20", "cw-100", "apgd-ce", "apgd-t", "square"),
    reading="FGSM, PGD and CW are run alone, and judged at their last iterate, as in the paper; more steps can thus "
    "find slightly less. AutoAttack's four attacks run in turn, without PGD and CW: apgd-ce counts the images that "
    "are robust to APGD-CE, apgd-t those that are also robust to APGD-T, and AutoAttack those that are robust to all "
    "four. The numbers in parentheses are those of the paper's supplement (which has none for the other methods) and, "
    "for AutoAttack, of RobustBench.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
