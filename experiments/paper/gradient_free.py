"""SPSA and local search (the paper's gradient-free attacks): `python -m experiments.paper.gradient_free`."""

from collections.abc import Sequence
from typing import Any

from experiments.paper.experiment import Data, Experiment, Finished, Row
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from experiments.paper.tables import collected, table


def attacks(scale: Scale):
    """Each attack twice: weak, as by default in the libraries of 2019, and strong."""
    from fs_jax.attacks import Attack

    epsilon = scale.config.attack.epsilon
    few: dict[str, Any] = {"num_images": scale.gradient_free_images, "after": ("clean",)}
    return [
        Attack("clean"),
        Attack("spsa", epsilon, num_steps=1, label="spsa, 1 step", **few),
        Attack("spsa", epsilon, **few),
        Attack("local-search-projected", epsilon, num_steps=10, label="local search, 10 rounds", **few),
        Attack("local-search-projected", epsilon, **few),
        Attack("square", epsilon, label="square alone", **few),
    ]


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """The table, with the clean accuracy on the attacked images too."""

    def on_few(evaluation: Data) -> Data:
        few = [{**attack, "num_images": scale.gradient_free_images} for attack in evaluation["attacks"]]
        return {**evaluation, "attacks": few}

    return collected(experiment, scale, [of._replace(results=list(map(on_few, of.results))) for of in finished])


EXPERIMENT = table(
    name="gradient_free",
    title="Attacks without gradients",
    source="the paper's supplement",
    rows=[Row("feature scattering", paper={"spsa": 88.8, "local-search-projected": 89.9})],
    attacks=attacks,
    collect=collect,
    reading="An accuracy close to the clean one can mean a weak attack: compare weak and strong settings. Those with 1 "
    "step and with 10 rounds are the defaults of the libraries of 2019. The paper does not state its settings; its "
    "numbers stand beside the strong ones. Local search only moves pixels away from mid-gray, and each of its "
    "rounds ends with a projection on the ball: a weak attack.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
