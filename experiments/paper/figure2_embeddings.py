"""t-SNE of features, clean and attacked (the paper's figure 2): `python -m experiments.paper.figure2_embeddings`."""

import pathlib
from collections.abc import Sequence

import tabulate

from experiments.paper.experiment import (
    FEATURE_SCATTERING,
    STANDARD,
    Data,
    Experiment,
    Finished,
    Measurement,
    Network,
)
from experiments.paper.figures import IMAGE_LABELS, embeddings
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from fs_jax.config import TrainConfig

IMAGES = 500
NEIGHBOURS = 10
SEEDS = (0, 1, 2)


def run(network: Network, scale: Scale, path: pathlib.Path) -> Data:
    """Penultimate features of clean and attacked test images: purity of nearest neighbours, and a joint t-SNE."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import sklearn.manifold

    from fs_jax import attacks
    from fs_jax.evaluation import as_float

    epsilon, rng = scale.config.attack.epsilon, jax.random.key(network.config.seed)
    images, labels = jnp.asarray(as_float(network.images[:IMAGES])), jnp.asarray(network.labels[:IMAGES])
    supervised = attacks.pgd(network.logits_fn, rng, images, labels, epsilon=epsilon, step_size=epsilon / 4)
    batch = network.config.batch_size  # as in training, so that the transport problems have the same size
    scattered = jnp.concatenate([
        attacks.feature_scatter(
            network.logits_fn, jax.random.fold_in(rng, begin), images[begin : begin + batch],
            epsilon=epsilon, step_size=epsilon,
        )
        for begin in range(0, len(images), batch)
    ])  # fmt: skip
    features = jax.jit(lambda x: network.model.apply(network.variables, x, train=False)[1])
    sets = {
        name: np.asarray(features(x))
        for name, x in (("clean", images), ("supervised attack", supervised), ("feature scattering", scattered))
    }
    points = {}
    for seed in SEEDS:  # a joint embedding of all three sets
        joint = sklearn.manifold.TSNE(random_state=seed).fit_transform(np.concatenate(list(sets.values())))
        points[seed] = dict(zip(sets, np.round(np.split(joint, len(sets)), 2).tolist(), strict=True))
    return {
        "labels": np.asarray(labels).tolist(),
        "purity": {name: purity(of, np.asarray(labels)) for name, of in sets.items()},
        "points": points,
        "class_names": list(network.dataset.info.class_names),
    }


def purity(features, labels) -> Data:
    """Fraction of each image's nearest neighbours, in the same set, that have its label; mean and 95% interval."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    nearest = (
        NearestNeighbors(n_neighbors=NEIGHBOURS).fit(features).kneighbors(return_distance=False)
    )  # without the image itself
    shares = np.mean(labels[nearest] == labels[:, None], axis=1)
    half = 1.96 * shares.std(ddof=1) / np.sqrt(len(shares))
    return {"mean": float(shares.mean()), "half": float(half), "shares": shares.tolist()}


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    results = {of.row.label: of.results[0] for of in finished}
    return {
        "networks": {
            label: {"labels": of["labels"], "purity": of["purity"], "points": of["points"][str(SEEDS[0])],
                    "other_seeds": {seed: of["points"][str(seed)] for seed in SEEDS[1:]}}
            for label, of in results.items()
        },
        "class_names": next(iter(results.values()))["class_names"],
    }  # fmt: skip


def show(data: Data) -> str:
    first = next(iter(data["networks"].values()))
    header = ["", *(IMAGE_LABELS.get(name, name) for name in first["purity"])]
    text = [
        [label, *(f"{100 * p['mean']:.1f} ±{100 * p['half']:.1f}" for p in of["purity"].values())]
        for label, of in data["networks"].items()
    ]
    return "\n\n".join([
        tabulate.tabulate(text, headers=header, tablefmt="pipe"),
        f"Purity: the fraction of an image's {NEIGHBOURS} nearest neighbours that have its class, in %, with 95% "
        "intervals over images. Neighbours are images of the same column, in the space of penultimate features. The "
        "supervised attack is PGD-20, the scattering attack that of the paper's training. The figure is a joint "
        f"t-SNE of {len(first['purity'])} x {len(first['labels'])} images for each network; the JSON file has those "
        f"of {len(SEEDS)} random seeds.",
    ])  # fmt: skip


def passes(config: TrainConfig, scale: Scale, images: int) -> float:
    return 24 * min(images, IMAGES)


EXPERIMENT = Experiment(
    name="figure2_embeddings",
    title="Features, clean and attacked",
    source="figure 2 of the paper, where attacked clusters mix labels for the standard network only",
    rows=[STANDARD, FEATURE_SCATTERING],
    measurement=Measurement(
        run=run, settings=lambda scale: ["embeddings", "shares", IMAGES, NEIGHBOURS, SEEDS], passes=passes
    ),
    collect=collect,
    show=show,
    draw=embeddings,
    pooled=False,
    reading="t-SNE can show clusters that do not exist. Purity is measured on the features themselves.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
