"""Clean accuracy against robustness, for several radii in training: `python -m experiments.paper.trade_off`."""

from experiments.paper.attacked import apgd_t
from experiments.paper.experiment import FEATURE_SCATTERING, Row
from experiments.paper.figures import clean_against_robust
from experiments.paper.runner import main
from experiments.paper.tables import table
from fs_jax.config import TrainConfig


def with_radius(row: Row, factor: float) -> Row:
    """The row with another radius in training, in a single step of that size."""

    def radius(config: TrainConfig) -> float:
        return factor * config.attack.epsilon

    label = row.label if factor == 1 else f"{row.label}, radius x {factor:g}"
    return Row(label, {**row.changes, "attack.epsilon": radius, "attack.step_size": radius})


CROSS_ENTROPY = Row("cross-entropy, 1 step", {"method": "pgd", "attack.num_steps": 1, "smoothing": 0.5})
SUPERVISED = [with_radius(CROSS_ENTROPY, factor) for factor in (1.0, 0.75, 0.5)]
SUPERVISED_ROWS = [row.label for row in SUPERVISED]

EXPERIMENT = table(
    name="trade_off",
    title="Clean accuracy against robustness",
    source="not in the paper",
    rows=[
        FEATURE_SCATTERING,
        *(with_radius(FEATURE_SCATTERING, factor) for factor in (1.5, 2.0)),
        *SUPERVISED,
    ],
    attacks=apgd_t,
    draw=clean_against_robust,
    reading="Is the higher clean accuracy of feature scattering worth its lower robustness? With a smaller radius in "
    "training, adversarial training usually has a higher clean accuracy. So here two methods are trained with several "
    "radii. They differ in the loss of the training's attack only (*cross-entropy* is the supervised loss; both have "
    "label smoothing Δ = 0.5). All are attacked with the radius of the scale. A method is the better trade-off if it "
    "is more robust at the same clean accuracy: if its line in the figure is above the other. *Findings* judge the "
    "paper's method, with the radius of the attack.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
