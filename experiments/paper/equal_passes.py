"""Compare 1-step scattering with PGD-7 at equal passes: `python -m experiments.paper.equal_passes`."""

from experiments.paper.attacked import and_autoattack
from experiments.paper.experiment import FEATURE_SCATTERING, PGD_7, Row, at_equal_passes
from experiments.paper.matching import IDENTITY
from experiments.paper.runner import main
from experiments.paper.tables import table

EXPERIMENT = table(
    name="equal_passes",
    title="One attack step or seven, at equal passes through the network",
    source="not in the paper",
    rows=[
        FEATURE_SCATTERING,
        Row("feature scattering, Δ = 0", {"smoothing": 0.0}),
        IDENTITY,
        at_equal_passes(PGD_7),
    ],
    attacks=and_autoattack,
    reading="PGD-7 is trained for fewer epochs, so that all rows take about as many passes through the network.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
