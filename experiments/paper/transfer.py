"""Adversarial examples of one network evaluated on another: `python -m experiments.paper.transfer`."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tabulate

from experiments.paper.experiment import (
    FEATURE_SCATTERING,
    PGD_7,
    STANDARD,
    TRADES,
    Data,
    Experiment,
    Finished,
    Measurement,
    Network,
)
from experiments.paper.figures import transfer_matrix
from experiments.paper.jobs import weights_file
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from experiments.paper.tables import cell, mean_accuracy, mean_over_seeds
from fs_jax.config import TrainConfig

TARGETS = (FEATURE_SCATTERING, STANDARD, PGD_7, TRADES)
# The same kinds of networks with another seed, so that no network is attacked by its own adversarial examples.
SOURCES = tuple(dataclasses.replace(row, label=f"{row.label}, another seed", add_to_seed=1) for row in TARGETS)

ITSELF = "itself"


def run(network: Network, scale: Scale, path: pathlib.Path) -> Data:
    """Make adversarial examples with PGD-20, to evaluate other networks on them."""
    import numpy as np

    from fs_jax._utils.files import replacing
    from fs_jax.attacks.transfer import transfer

    attack = transfer(
        network.logits_fn, network.images, network.labels,
        epsilon=scale.config.attack.epsilon, seed=network.config.seed,
    )  # fmt: skip
    with replacing(path.with_name("adversaries.npz")) as file:
        np.savez(file, images=attack.images, labels=network.labels)
    return {}


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data | None:
    """Evaluate each target on its own adversarial examples and on those of each source. Only forward passes."""
    import jax
    import numpy as np

    from experiments.networks import load_network
    from fs_jax.models import as_logits_fn

    of = {each.row.label: each for each in finished}
    sources = [row.label for row in SOURCES if row.label in of]
    rows: Data = {}
    for target in [row.label for row in TARGETS if row.label in of]:
        correct: dict[str, list[np.ndarray]] = {name: [] for name in (ITSELF, *sources)}  # by network
        for place, folder in enumerate(of[target].folders):
            path = weights_file(folder) if weights_file(folder).exists() else folder / "run"
            model, variables, _about = load_network(path)
            predict = jax.jit(lambda x, v, model=model: as_logits_fn(model, v)(x).argmax(-1))
            for name in correct:
                source = folder if name == ITSELF else of[name].folders[place]
                with np.load(source / "adversaries.npz") as file:
                    images, labels = file["images"], file["labels"]
                batches = [slice(begin, begin + 256) for begin in range(0, len(labels), 256)]
                correct[name].append(
                    np.concatenate([predict(images[batch], variables) == labels[batch] for batch in batches])
                )
        rows[target] = {
            name: {**mean_accuracy(mean_over_seeds(right, len(scale.datasets))), "paper": None}
            for name, right in correct.items()
        }
    return {"rows": rows} if rows and sources else None


def show(data: Data) -> str:
    rows = data["rows"]
    first = next(iter(rows.values()))
    text = [[target, *map(cell, row.values())] for target, row in rows.items()]
    stronger = [target for target, row in rows.items() if any(of["high"] < row[ITSELF]["low"] for of in row.values())]
    conclusion = (
        f"Some transferred examples are stronger than the network's own for {', '.join(stronger)}: the intervals do "
        "not overlap."
        if stronger
        else "No transferred examples are stronger than the network's own (with intervals that do not overlap), so "
        "this test shows no masked gradients."
    )
    return "\n\n".join([
        tabulate.tabulate(text, headers=["", *first], tablefmt="pipe"),
        conclusion,
        f"Accuracy in % of the networks in the rows, on {first[ITSELF]['total']:,} adversarial examples that PGD-20 "
        "makes for the networks in the columns, with 95% intervals. The random starts differ from those of other "
        "tables.",
    ])  # fmt: skip


def passes(config: TrainConfig, scale: Scale, images: int) -> float:
    return 20.0 * images


EXPERIMENT = Experiment(
    name="transfer",
    title="Transferred attacks",
    source="the paper's table of black-box attacks, which is not in the supplement",
    rows=[*TARGETS, *SOURCES],
    measurement=Measurement(run=run, settings=lambda scale: ["transfer", "pgd-20"], passes=passes),
    collect=collect,
    show=show,
    draw=transfer_matrix,
    reading="If another network's adversarial examples are stronger than a network's own, its gradients are "
    "misleading. The column *itself* is the white-box attack.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
