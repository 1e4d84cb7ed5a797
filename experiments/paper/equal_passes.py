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
    columns=("clean", "pgd-20", "cw-100", "apgd-t", "square"),
    reading="A training step of feature scattering takes 6 passes through the network (forward counts 1, backward to "
    "the images 1, to the images and the weights 2), a step of PGD-7 takes 17. So PGD-7 is trained for 6 / 17 of the "
    "epochs here, and all rows take about as many passes. This is a short training for PGD-7: see its clean accuracy.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
