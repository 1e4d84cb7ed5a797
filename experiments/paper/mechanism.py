"""What the transport's plan is during training, and what it changes: `python -m experiments.paper.mechanism`."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import tabulate

from experiments.output import write_files
from experiments.paper.experiment import FEATURE_SCATTERING, Data, Experiment, Finished, Measurement, Network
from experiments.paper.figures import plans_over_training
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from fs_jax.config import TrainConfig, TransportConfig

PLANS = {
    **{f"Sinkhorn, τ = {reg:g}": TransportConfig(reg=reg) for reg in (0.001, 0.005, 0.01, 0.05, 0.5)},
    "released Sinkhorn": TransportConfig(solver="released_sinkhorn"),
    **{f"IPOT, β = {beta:g}": TransportConfig(solver="ipot", beta=beta) for beta in (0.5, 1.0)},
    "independent plan": TransportConfig(solver="independent"),
}
POINTS = 16  # at which a training is looked at, at most
BATCHES = 4


def run(network: Network, scale: Scale, path: pathlib.Path) -> Data:
    """Train another network of this configuration, and look at batches of its training images on the way."""
    import json

    import jax

    from fs_jax import training
    from fs_jax._utils.files import read_jsonl

    config, seen = network.config, path.with_suffix(".points.jsonl")
    points = read_jsonl(seen) if seen.exists() else []
    config = dataclasses.replace(config, train_size=len(network.dataset.train_labels))
    every = -(-config.epochs // POINTS)
    while True:  # an epoch at a time
        run = training.train(
            config, network.dataset, path.with_name("mechanism"), devices=jax.local_devices()[:1], monitor_images=0,
            progress=False, max_minutes=0, steps_per_dispatch=config.steps_per_epoch,
        )  # fmt: skip
        epoch = int(run.state.step) // config.steps_per_epoch
        if (epoch % every == 0 or run.finished) and epoch not in {point["epoch"] for point in points}:
            points.append({"epoch": epoch, "plans": look(config, network, run.variables)})
            write_files(seen.parent, {seen.name: "".join(f"{json.dumps(point)}\n" for point in points)})
        if run.finished:
            return {"points": points}


def look(config: TrainConfig, network: Network, variables) -> Data:
    """Of each transport, on the same batches and noise: its plan, and the signs of the gradient that images get."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fs_jax.evaluation import as_float
    from fs_jax.models import as_logits_fn
    from fs_jax.training.transports import make_transport

    rng = np.random.default_rng(config.seed)
    chosen = rng.choice(len(network.dataset.train_labels), (BATCHES, config.batch_size), replace=False)
    found: Data = {label: [] for label in PLANS}
    transports = {label: make_transport(of) for label, of in PLANS.items()}
    identity = make_transport(TransportConfig(solver="identity"))
    for place, batch in enumerate(chosen):
        images, labels = as_float(network.dataset.train_images[batch]), network.dataset.train_labels[batch]
        looked = _look(
            tuple(transports.values()), identity, as_logits_fn(network.model, variables),
            jax.random.fold_in(jax.random.key(config.seed), place), jnp.asarray(images), jnp.asarray(labels),
            epsilon=config.attack.epsilon,
        )  # fmt: skip
        for label, values in zip(found, looked, strict=True):
            found[label].append({name: float(value) for name, value in values.items()})
    return {label: {name: float(np.mean([v[name] for v in of])) for name in of[0]} for label, of in found.items()}


def _look(transports, identity, logits_fn, rng, images, labels, *, epsilon):
    import jax
    import jax.numpy as jnp

    from fs_jax import ot
    from fs_jax.attacks import cross_entropy, random_start

    start = random_start(jax.random.split(rng, len(images)), images, epsilon)
    natural = logits_fn(images)

    @functools.partial(jax.jit, static_argnums=0)
    def signs(transport, start):
        def objective(x):
            solved = transport(ot.cosine_cost(natural, logits_fn(x)))
            return solved.primal_cost, solved

        gradient, solved = jax.grad(objective, has_aux=True)(start)
        return jnp.sign(gradient), solved

    same = signs(identity, start)[0]
    supervised = jnp.sign(jax.grad(lambda x: cross_entropy(logits_fn(x), labels).sum())(start))
    for transport in transports:
        sign, solved = signs(transport, start)
        yield {
            "diagonal": jnp.trace(solved.plan) / jnp.sum(solved.plan),
            "marginal_error": solved.marginal_error,
            "identity_signs": jnp.mean(sign == same),
            "cross_entropy_signs": jnp.mean(sign == supervised),
        }


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    return {"points": finished[0].results[0]["points"]}


def show(data: Data) -> str:
    last = data["points"][-1]
    columns = {
        "diagonal": "on the diagonal, %", "marginal_error": "marginal error (L1)",
        "identity_signs": "signs as the identity plan's, %", "cross_entropy_signs": "signs as the cross-entropy's, %",
    }  # fmt: skip
    text = [
        [label, *(f"{of[name]:.1e}" if name == "marginal_error" else f"{100 * of[name]:.1f}" for name in columns)]
        for label, of in last["plans"].items()
    ]
    return "\n\n".join([
        tabulate.tabulate(text, headers=["transport", *columns.values()], tablefmt="pipe", disable_numparse=True),
        f"At the end of training (epoch {last['epoch']}), means over {BATCHES} batches of training images with noise. "
        "The network is trained by the paper's method; each transport is solved for the same logits.",
    ])  # fmt: skip


def passes(config: TrainConfig, scale: Scale, images: int) -> float:
    """The training, and a gradient for each transport at each point."""
    points = min(POINTS, config.epochs)
    return config.batch_size * (2.4 * config.total_steps + points * BATCHES * (len(PLANS) + 2))


EXPERIMENT = Experiment(
    name="mechanism",
    title="What the transport does",
    source="(not in the paper)",
    rows=[FEATURE_SCATTERING],
    measurement=Measurement(run, lambda scale: ["mechanism", list(PLANS), POINTS, BATCHES], passes),
    collect=collect,
    show=show,
    draw=plans_over_training,
    pooled=False,
    reading="Where the plan has nearly all of its mass on the diagonal, each image is matched with itself, and the "
    "transport's attack is that of the identity plan: each image goes away from its own natural features.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
