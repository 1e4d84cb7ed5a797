"""The transport plan during training, and its effect on the attack: `python -m experiments.paper.mechanism`."""

import functools
import pathlib
from collections.abc import Sequence

import tabulate

from experiments.output import write_files
from experiments.paper.experiment import FEATURE_SCATTERING, Data, Experiment, Finished, Measurement, Network
from experiments.paper.figures import plans_over_training
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from fs_jax.config import TrainConfig, TransportConfig, to_dict

PLANS = {
    **{f"Sinkhorn, τ = {reg:g}": TransportConfig(reg=reg) for reg in (0.001, 0.005, 0.01, 0.05, 0.5)},
    "released Sinkhorn": TransportConfig(solver="released_sinkhorn"),
    **{f"IPOT, β = {beta:g}": TransportConfig(solver="ipot", beta=beta) for beta in (0.5, 1.0)},
    "independent plan": TransportConfig(solver="independent"),
}
POINTS = 16  # largest number of epochs with a measurement
BATCHES = 4


def run(network: Network, scale: Scale, path: pathlib.Path) -> Data | None:
    """Train a network again with this configuration, and measure the plans on training batches at several epochs."""
    import json
    import time

    import jax

    from fs_jax import training
    from fs_jax._utils.files import read_jsonl

    seen, every = path.with_suffix(".points.jsonl"), -(-network.config.epochs // POINTS)
    points = {point["epoch"]: point for point in (read_jsonl(seen) if seen.exists() else [])}
    before = time.monotonic()

    def measure(epoch, variables):
        nonlocal before
        if epoch % every == 0 or epoch == network.config.epochs:
            found = plans(network, variables)
            now = time.monotonic()
            points[epoch] = {"epoch": epoch, "plans": found, "seconds": round(now - before, 1)}
            before = now
            write_files(seen.parent, {seen.name: "".join(f"{json.dumps(point)}\n" for point in points.values())})

    run = training.train(
        network.config, network.dataset, path.with_suffix(".run"), devices=jax.local_devices()[:1],
        monitor_images=0, progress=False, on_epoch=measure,
    )  # fmt: skip
    if not run.finished:
        return None
    # With the time in earlier processes, until their last measurement.
    return {
        "seconds": sum(point.pop("seconds", 0.0) for point in points.values()),
        "points": [points[epoch] for epoch in sorted(points)],
    }


def plans(network: Network, variables) -> Data:
    """Statistics of the plan and of the images' gradient for each transport, on the same batches and noise."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fs_jax.attacks import random_start
    from fs_jax.evaluation import as_float

    config, dataset = network.config, network.dataset
    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    found: Data = {label: [] for label in PLANS}
    for place, batch in enumerate(rng.choice(len(dataset.train_labels), (BATCHES, config.batch_size), replace=False)):
        images, labels = jnp.asarray(as_float(dataset.train_images[batch])), jnp.asarray(dataset.train_labels[batch])
        keys = jax.random.split(jax.random.fold_in(key, place), len(batch))
        start = random_start(keys, images, config.attack.epsilon)
        arguments = (network.model, variables, images, start)
        same, _ = signs(TransportConfig(solver="identity"), *arguments)
        supervised = supervised_signs(network.model, variables, start, labels)
        for label, transport in PLANS.items():
            sign, solved = signs(transport, *arguments)
            found[label].append(
                {
                    "diagonal": float(jnp.trace(solved.plan) / jnp.sum(solved.plan)),
                    "marginal_error": float(solved.marginal_error),
                    "identity_signs": float(jnp.mean(sign == same)),
                    "cross_entropy_signs": float(jnp.mean(sign == supervised)),
                }
            )
    return {label: {name: float(np.mean([v[name] for v in of])) for name in of[0]} for label, of in found.items()}


@functools.cache
def programs():
    """The jitted functions. They are made once, and JAX is only imported here."""
    import jax
    import jax.numpy as jnp

    from fs_jax import ot
    from fs_jax.attacks import cross_entropy
    from fs_jax.models import as_logits_fn
    from fs_jax.training.transports import make_transport

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def transported(config, model, variables, images, start):
        logits_fn = as_logits_fn(model, variables)
        natural = logits_fn(images)

        def objective(x):
            solved = make_transport(config)(ot.cosine_cost(natural, logits_fn(x)))
            return solved.primal_cost, solved

        gradient, solved = jax.grad(objective, has_aux=True)(start)
        return jnp.sign(gradient), solved

    @functools.partial(jax.jit, static_argnums=0)
    def supervised(model, variables, start, labels):
        return jnp.sign(jax.grad(lambda x: cross_entropy(as_logits_fn(model, variables)(x), labels).sum())(start))

    return transported, supervised


def signs(*arguments):
    """The signs of the gradient of the transport cost with respect to the images, and the transport."""
    return programs()[0](*arguments)


def supervised_signs(*arguments):
    """The signs of the gradient of the cross-entropy with respect to the images."""
    return programs()[1](*arguments)


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    return {"points": finished[0].results[0]["points"]}


def show(data: Data) -> str:
    last = data["points"][-1]
    columns = {
        "diagonal": "mass on the diagonal, %", "marginal_error": "marginal error (L1)",
        "identity_signs": "gradient signs equal to the identity plan's, %",
        "cross_entropy_signs": "gradient signs equal to the cross-entropy's, %",
    }  # fmt: skip
    text = [
        [label, *(f"{of[name]:.1e}" if name == "marginal_error" else f"{100 * of[name]:.1f}" for name in columns)]
        for label, of in last["plans"].items()
    ]
    return "\n\n".join([
        tabulate.tabulate(text, headers=["transport", *columns.values()], tablefmt="pipe", disable_numparse=True),
        f"At the end of training (epoch {last['epoch']}), means over {BATCHES} batches of training images with noise. "
        "The network is trained with the paper's method, and each transport is solved for the same logits. Gradients "
        "are those of the transport cost with respect to the images; the attack moves along their signs, of which "
        "50% are equal by chance. The last column has those of the cross-entropy with the true labels: a supervised "
        "attack.",
    ])  # fmt: skip


def settings(scale: Scale) -> list:
    return ["mechanism", {label: to_dict(transport) for label, transport in PLANS.items()}, POINTS, BATCHES]


def passes(config: TrainConfig, scale: Scale, images: int) -> float:
    """The passes of the training, and of a gradient for each transport at each measurement."""
    points = min(POINTS, config.epochs) + 1
    return config.batch_size * (2.4 * config.total_steps + points * BATCHES * (len(PLANS) + 2))


EXPERIMENT = Experiment(
    name="mechanism",
    title="What the transport does",
    source="not in the paper",
    rows=[FEATURE_SCATTERING],
    measurement=Measurement(run=run, settings=settings, passes=passes, trains=True),
    collect=collect,
    show=show,
    draw=plans_over_training,
    pooled=False,
    reading="A plan with almost all of its mass on the diagonal matches each image with itself. The attack is then "
    "that of the identity plan: it moves each image away from its own natural outputs. The wide grey curve is the "
    "method's plan.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
