"""Loss and margin over PGD's steps (the paper's figure 1): `python -m experiments.paper.figure1_loss_curves`."""

import functools
import pathlib
from collections.abc import Sequence

import tabulate

from experiments.paper.experiment import (
    FEATURE_SCATTERING,
    PGD_7,
    Data,
    Experiment,
    Finished,
    Measurement,
    Network,
    at_equal_passes,
)
from experiments.paper.figures import OUTCOME_LABELS, loss_curves
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from fs_jax.config import TrainConfig

NUM_IMAGES = 200  # random test images that are attacked
SHOWN = 3  # images drawn for each outcome
STARTS = 20
STEPS = 100
# Keys of the results.
OUTCOMES = ("robust", "survives PGD-20, falls to APGD-T", "falls to PGD-20")


def run(network: Network, scale: Scale, path: pathlib.Path) -> Data:
    """Find random test images with each outcome, and record PGD on them from several random starts."""
    import numpy as np

    from fs_jax.attacks import Attack, cross_entropy, dlr
    from fs_jax.evaluation import as_float, evaluate

    epsilon = scale.config.attack.epsilon
    order = np.random.default_rng(network.config.seed).permutation(len(network.labels))[:NUM_IMAGES]
    images, labels = as_float(network.images[order]), network.labels[order]
    attacks = [Attack("clean"), Attack("pgd", epsilon), Attack("apgd-t", epsilon, after=("clean",))]
    records = evaluate(network.logits_fn, images, labels, attacks, progress=False).records
    outcomes = [outcome(record["misclassified_at"]) for record in records]
    curves = []
    for name in OUTCOMES:
        for place in [place for place, of in enumerate(outcomes) if of == name][:SHOWN]:
            one = (network.model, network.variables, images[place], labels[place], epsilon)
            (loss, margin), (_, margin_dlr) = trajectory()(cross_entropy, *one), trajectory()(dlr, *one)
            curves.append(
                {
                    "image": int(order[place]),
                    "outcome": name,
                    "loss": summed_up(loss),
                    "margin": summed_up(margin),
                    "margin_dlr": summed_up(margin_dlr),
                }
            )
    counts = {name: outcomes.count(name) for name in (*OUTCOMES, "misclassified")}
    return {"curves": curves, "outcomes": counts}


def outcome(misclassified_at: dict[str, int]) -> str:
    if misclassified_at["clean"] >= 0:
        return "misclassified"
    if misclassified_at["pgd-20"] >= 0:
        return OUTCOMES[2]
    return OUTCOMES[0] if misclassified_at["apgd-t"] < 0 else OUTCOMES[1]


@functools.cache
def trajectory():
    """A function of a loss, a network, an image, its label and the radius, which runs PGD from several random starts.

    It returns the cross-entropy and the margin of the iterates, [steps + 1, starts]. It is made once, and JAX is only
    imported here.
    """
    import jax
    import jax.numpy as jnp

    from fs_jax.attacks import cross_entropy, logit_margin, pgd, random_start
    from fs_jax.models import as_logits_fn

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def ascend(loss, model, variables, image, label, epsilon):
        logits_fn = as_logits_fn(model, variables)
        images, labels = jnp.stack([image] * STARTS), jnp.full(STARTS, label)
        keys = jax.random.split(jax.random.key(0), STARTS)

        def step(x, _):
            logits = logits_fn(x)
            moved = pgd(
                logits_fn, keys, images, labels,
                epsilon=epsilon, step_size=epsilon / 4, num_steps=1, loss=loss, start=x,
            )  # fmt: skip
            return moved, (cross_entropy(logits, labels), logit_margin(logits, labels))

        start = jnp.clip(random_start(keys, images, epsilon), 0, 1)
        return jax.lax.scan(step, start, length=STEPS + 1)[1]

    return ascend


def summed_up(values) -> dict[str, list[float]]:
    """Mean and standard deviation over starts, at each step, to 5 digits."""
    import numpy as np

    values = np.asarray(values, float)
    return {name: [float(f"{v:.5g}") for v in of] for name, of in (("mean", values.mean(1)), ("std", values.std(1)))}


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    fields = ("curves", "outcomes")
    return {"networks": {of.row.label: {field: of.results[0][field] for field in fields} for of in finished}}


def show(data: Data) -> str:
    header = ["", *(OUTCOME_LABELS[name] for name in next(iter(data["networks"].values()))["outcomes"])]
    text = [[label, *of["outcomes"].values()] for label, of in data["networks"].items()]
    return "\n\n".join([
        tabulate.tabulate(text, headers=header, tablefmt="pipe"),
        f"Number of images with each outcome, of {NUM_IMAGES} random test images (all, if there are fewer), for "
        f"PGD-20 from one random start. The figure shows the first {SHOWN} images with each outcome: mean and "
        f"standard deviation over {STARTS} other random starts, so that an image can end on the other side of 0. The "
        "margin is the logit of the true class minus the largest other logit; an image with a negative margin is "
        "misclassified.",
    ])  # fmt: skip


def passes(config: TrainConfig, scale: Scale, images: int) -> float:
    return min(images, NUM_IMAGES) * (20 + 0.6 * 900) + 2 * len(OUTCOMES) * SHOWN * STARTS * 1.4 * STEPS


def settings(scale: Scale) -> list:
    return ["loss curves", NUM_IMAGES, SHOWN, STARTS, STEPS]


def least_classes(scale: Scale) -> int:
    """The smallest number of classes that APGD-T needs."""
    return 4


EXPERIMENT = Experiment(
    name="figure1_loss_curves",
    title="Loss over PGD's steps",
    source="figure 1 of the paper, where the loss increases consistently to a plateau, with small variance",
    rows=[FEATURE_SCATTERING, at_equal_passes(PGD_7)],
    measurement=Measurement(run=run, settings=settings, passes=passes, least_classes=least_classes),
    collect=collect,
    show=show,
    draw=loss_curves,
    pooled=False,
    reading="A plateau alone is not evidence of robustness: images that APGD-T misclassifies have one too.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
