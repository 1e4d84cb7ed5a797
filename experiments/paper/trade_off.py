"""Clean accuracy against robustness, for several radii in training: `python -m experiments.paper.trade_off`."""

from typing import Any

from experiments.paper.attacked import apgd_t
from experiments.paper.experiment import FEATURE_SCATTERING, Row
from experiments.paper.figures import clean_against_robust
from experiments.paper.runner import main
from experiments.paper.tables import table
from fs_jax.config import TrainConfig

CROSS_ENTROPY = "cross-entropy, 1 step"


def with_radius(label: str, factor: float, changes: dict[str, Any] | None = None) -> Row:
    """A row whose training attacks have another radius, in a single step of that size."""

    def radius(config: TrainConfig) -> float:
        return factor * config.attack.epsilon

    label = label if factor == 1 else f"{label}, radius x {factor:g}"
    return Row(label, {**(changes or {}), "attack.epsilon": radius, "attack.step_size": radius})


SUPERVISED = {"method": "pgd", "attack.num_steps": 1, "smoothing": 0.5}

EXPERIMENT = table(
    name="trade_off",
    title="Clean accuracy against robustness",
    source="not in the paper",
    rows=[
        FEATURE_SCATTERING,
        *(with_radius(FEATURE_SCATTERING.label, factor) for factor in (1.5, 2.0)),
        *(with_radius(CROSS_ENTROPY, factor, SUPERVISED) for factor in (1.0, 0.75, 0.5)),
    ],
    attacks=apgd_t,
    draw=clean_against_robust,
    reading="Is the higher clean accuracy of feature scattering worth its lower robustness? With a smaller radius in "
    "training, any adversarial training has a higher clean accuracy. So here two methods are trained with several "
    "radii. They differ in the loss of the training's attack only (*cross-entropy* is the supervised loss; both have "
    "label smoothing Δ = 0.5). All are attacked with the radius of the scale. A method is the better trade-off if it "
    "is more robust at the same clean accuracy: if its line in the figure is above the other.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
