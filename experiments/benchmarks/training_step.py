"""Time a feature-scattering training step against the sum of its parts and against PyTorch.

    python -m experiments.benchmarks.training_step

All programs take turns in one process, so that noise affects all of them alike. Medians over rounds and their ratios
are reported. The parts of the step are jitted separately:

- the natural forward pass;
- the forward and backward pass to the images, with a fixed direction in place of the transport;
- the transport, with its cost and derivative;
- the forward and backward pass to the weights.

There are two PyTorch implementations, both in `torch_feature_scatter.py`. One makes the passes of the released code,
including three natural passes and unused weight gradients in the attack. The other is minimal, without unused passes,
with channels last, in which PyTorch's convolutions are fastest on a CPU. (The released code's logging passes are not
timed.)
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn
from experiments.output import made_on, write_files


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time a training step against PyTorch (pip install -e ".[bench]"): two minutes on two CPU cores."""

    depth: int = 10
    """Depth of the Wide-ResNet."""
    width: int = 2
    """Width of the Wide-ResNet."""
    batch_size: int = 60
    """Images in a batch."""
    rounds: int = 15
    """Number of timed rounds. Medians are reported."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_training_step")
    """Folder of the table and the JSON file."""


RELEASED = "PyTorch, the released code's passes"
MINIMAL = "PyTorch, minimal, channels last"


def main(argv: list[str]) -> None:
    prog = "python -m experiments.benchmarks.training_step"
    arguments = command_line.parse(Arguments, argv, prog=prog, examples=f"  {prog} --rounds 5 --results results/bench")
    contestants: dict[str, Callable[[], Any]] = {}
    for solver in ("released_sinkhorn", "sinkhorn"):
        contestants |= {f"{solver}: {name}": run for name, run in jax_contestants(arguments, solver).items()}
        for name, run in torch_contestants(arguments, solver).items():
            contestants[f"{solver}: {name}"] = run
    seconds = seconds_in_turn(contestants, arguments.rounds, pause=0.1, title="Training steps")
    medians = {name: 1e3 * statistics.median(of) for name, of in seconds.items()}

    rows, summary = [], {}
    for solver in ("released_sinkhorn", "sinkhorn"):
        times = {name.split(": ")[1]: ms for name, ms in medians.items() if name.startswith(solver + ":")}
        step, released, minimal = (times.pop(name) for name in ("step", RELEASED, MINIMAL))
        total = sum(times.values())
        rows += [[solver, name, f"{ms:.1f}"] for name, ms in times.items()]
        rows += [
            [solver, "sum of the parts", f"{total:.1f}"],
            [solver, "**our step**", f"{step:.1f} ({step / total:.2f} of the sum)"],
            [solver, RELEASED, f"{released:.1f} (ours: {step / released:.2f})"],
            [solver, MINIMAL, f"{minimal:.1f} (ours: {step / minimal:.2f})"],
        ]
        summary[solver] = {
            "parts_ms": times, "step_ms": step, "torch_ms": released, "minimal_torch_ms": minimal,
            "of_the_sum": step / total, "of_torch": step / released, "of_minimal_torch": step / minimal,
        }  # fmt: skip

    import tabulate
    import torch

    from fs_jax._utils import backend

    environment = {**backend.describe(), "torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    table = tabulate.tabulate(
        rows, headers=["transport", "what", "ms, median"], tablefmt="github", disable_numparse=True
    )
    caption = (
        f"WRN-{arguments.depth}-{arguments.width}, batch {arguments.batch_size}, {arguments.rounds} rounds, "
        f"{made_on(environment)}."
    )
    results = {"arguments": dataclasses.asdict(arguments), "environment": environment, **summary}
    write_files(arguments.results, {"times.json": results, "table.md": f"{table}\n\n{caption}\n"})
    print(f"{table}\n\n{caption}")


def jax_contestants(arguments: Arguments, solver: str):
    """Our training step, and its parts, as functions without arguments."""
    import jax
    import jax.numpy as jnp

    from fs_jax import ot
    from fs_jax._utils import backend
    from fs_jax.config import ModelConfig, TrainConfig, TransportConfig
    from fs_jax.training import (
        create_state,
        make_model,
        make_transport,
        pmap_train_step,
        replicate,
        smoothed_cross_entropy,
    )

    config = TrainConfig(
        model=ModelConfig(arguments.depth, arguments.width),
        transport=TransportConfig(solver=solver),
        batch_size=arguments.batch_size,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.uniform(keys[0], (config.batch_size, 32, 32, 3))
    labels = jax.random.randint(keys[1], (config.batch_size,), 0, 10)
    model, state = make_model(config, 10), create_state(config, keys[2])
    variables = state.variables
    jit = functools.partial(jax.jit, compiler_options=backend.compiler_options(backend.platform_of([]), training=True))

    @jit
    def natural(variables, images):
        return model.apply(variables, images)[0]

    logits = natural(variables, images)
    moved = natural(variables, jnp.clip(images + 0.03, 0, 1))

    @jit
    def to_images(variables, images):
        return jax.grad(lambda images: jnp.vdot(model.apply(variables, images)[0], logits))(images)

    @jit
    def transport(logits, moved):
        solve = make_transport(config.transport)
        return jax.value_and_grad(lambda moved: solve(ot.cosine_cost(logits, moved)).primal_cost)(moved)

    @jit
    def to_weights(variables, images, labels):
        def loss(params):
            (logits, _), updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(smoothed_cross_entropy(logits, labels, 0.5)), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    step = pmap_train_step(config, jax.local_devices()[:1])
    batch = {"images": images[None], "labels": labels[None]}
    carried = [replicate(state, jax.local_devices()[:1])]

    def run_step():
        carried[0], metrics = step(carried[0], batch, keys[2])
        return metrics

    return {
        "natural forward pass": functools.partial(natural, variables, images),
        "forward and backward to the images": functools.partial(to_images, variables, images),
        "transport": functools.partial(transport, logits, moved),
        "forward and backward to the weights": functools.partial(to_weights, variables, images, labels),
        "step": run_step,
    }


def torch_contestants(arguments: Arguments, solver: str):
    """The same step in eager PyTorch, as functions without arguments."""
    import torch

    from experiments.benchmarks import torch_feature_scatter as peer

    torch.manual_seed(0)
    images = 2 * torch.rand(arguments.batch_size, 3, 32, 32) - 1
    labels = torch.randint(0, 10, (arguments.batch_size,))
    transport = {"released_sinkhorn": peer.released_sinkhorn, "sinkhorn": peer.sinkhorn}[solver]

    def contestant(step, memory_format):
        net = peer.make(arguments.depth, arguments.width).to(memory_format=memory_format)
        optimizer, inputs = peer.make_optimizer(net), images.contiguous(memory_format=memory_format)
        return lambda: step(net, optimizer, inputs, labels, transport=transport)

    return {
        RELEASED: contestant(peer.feature_scatter_step, torch.contiguous_format),
        MINIMAL: contestant(peer.minimal_step, torch.channels_last),
    }


if __name__ == "__main__":
    command_line.run(main)
