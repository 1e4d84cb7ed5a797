"""Time a feature-scattering training step against the sum of its parts and against PyTorch.

    python -m experiments.benchmarks.training_step
    python -m experiments.benchmarks.training_step --depth 28 --width 10 --dtype bfloat16 --results results/gpu

All programs take turns in one process, so that noise affects all of them alike. Medians over rounds and their ratios
are reported. The parts of the step are jitted separately:

- the natural forward pass;
- the forward and backward pass to the images, with a fixed direction in place of the transport;
- the transport, with its cost and derivative;
- the forward and backward pass to the weights.

The PyTorch implementations are in `torch_feature_scatter.py`. One makes the passes of the released code,
including three natural passes and unused weight gradients in the attack. The other is minimal, without unused passes,
with channels last, in which PyTorch's convolutions are fastest. (The released code's logging passes are not timed.)
With `--compiled`, the minimal one also runs with `torch.compile`. In bfloat16, PyTorch's networks use its autocast.

On a GPU, the step's arithmetic is compared with the rate of one large matrix product in the same type. A step takes six
times the operations of a forward pass: a natural forward pass, a forward and a backward pass to the images, and a
forward pass and two backward passes to the weights.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, Literal

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn, timed
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    compiled: bool = False
    """Also time PyTorch with torch.compile, which takes minutes to compile."""
    transports: tuple[Literal["released_sinkhorn", "sinkhorn"], ...] = ("released_sinkhorn", "sinkhorn")
    """Solvers of the step."""
    rounds: int = 15
    """Number of timed rounds. Medians are reported."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_training_step")
    """Folder of the table and the JSON file."""


RELEASED = "PyTorch, the released code's passes"
MINIMAL = "PyTorch, minimal, channels last"
COMPILED = "PyTorch, minimal, torch.compile"


def main(argv: list[str]) -> None:
    prog = "python -m experiments.benchmarks.training_step"
    arguments = command_line.parse(Arguments, argv, prog=prog, examples=f"  {prog} --rounds 5 --results results/bench")
    contestants: dict[str, Callable[[], Any]] = {}
    for solver in arguments.transports:
        contestants |= {f"{solver}: {name}": run for name, run in jax_contestants(arguments, solver).items()}
        for name, run in torch_contestants(arguments, solver).items():
            contestants[f"{solver}: {name}"] = run
    seconds = seconds_in_turn(contestants, arguments.rounds, pause=0.1, title="Training steps")
    medians = {name: 1e3 * statistics.median(of) for name, of in seconds.items()}

    from fs_jax._utils import backend

    rows: list[list[str]] = []
    rates: list[str] = []
    summary: dict[str, Any] = {}
    for solver in arguments.transports:
        times = {name.split(": ")[1]: ms for name, ms in medians.items() if name.startswith(solver + ":")}
        step, released, minimal = (times.pop(name) for name in ("step", RELEASED, MINIMAL))
        compiled = times.pop(COMPILED, None)
        total = sum(times.values())
        rows += [[solver, name, f"{ms:.1f}"] for name, ms in times.items()]
        rows += [
            [solver, "sum of the parts", f"{total:.1f}"],
            [solver, "**our step**", f"{step:.1f} ({step / total:.2f} of the sum)"],
            [solver, RELEASED, f"{released:.1f} (ours: {step / released:.2f})"],
            [solver, MINIMAL, f"{minimal:.1f} (ours: {step / minimal:.2f})"],
        ]
        if compiled is not None:
            rows.append([solver, COMPILED, f"{compiled:.1f} (ours: {step / compiled:.2f})"])
        summary[solver] = {
            "parts_ms": times, "step_ms": step, "torch_ms": released, "minimal_torch_ms": minimal,
            "compiled_torch_ms": compiled, "of_the_sum": step / total, "of_torch": step / released,
            "of_minimal_torch": step / minimal, "of_compiled_torch": None if compiled is None else step / compiled,
            "images_per_second": 1e3 * arguments.batch_size / step,
        }  # fmt: skip
        rate = f"{summary[solver]['images_per_second']:,.0f} images per second"
        if backend.platform_of([]) != "cpu":
            summary[solver] |= arithmetic(arguments, step)
            rate += f", {summary[solver]['of_the_peak']:.0%} of the rate of a large matrix product"
        rates.append(f"{solver}: {rate}.")

    import tabulate
    import torch

    environment = {**backend.describe(), "torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    table = tabulate.tabulate(
        rows, headers=["transport", "what", "ms, median"], tablefmt="github", disable_numparse=True
    )
    caption = (
        f"WRN-{arguments.depth}-{arguments.width}, batch {arguments.batch_size}, {arguments.dtype}, "
        f"{arguments.rounds} rounds, {made_on(environment)}. Our step: {' '.join(rates)}"
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
        model=ModelConfig(arguments.depth, arguments.width, dtype=arguments.dtype),
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    images = 2 * torch.rand(arguments.batch_size, 3, 32, 32, device=device) - 1
    labels = torch.randint(0, 10, (arguments.batch_size,), device=device)
    transport = {"released_sinkhorn": peer.released_sinkhorn, "sinkhorn": peer.sinkhorn}[solver]

    class Autocast(torch.nn.Module):
        """The network in the chosen type, with results in float32."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            with torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                logits, features = self.net(images)
            return logits.float(), features.float()

    def contestant(step, memory_format, compiled=False):
        net = Autocast(peer.make(arguments.depth, arguments.width)).to(device, memory_format=memory_format)
        optimizer, inputs = peer.make_optimizer(net), images.contiguous(memory_format=memory_format)
        net = torch.compile(net) if compiled else net

        def run():
            step(net, optimizer, inputs, labels, transport=transport)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    contestants = {
        RELEASED: contestant(peer.feature_scatter_step, torch.contiguous_format),
        MINIMAL: contestant(peer.minimal_step, torch.channels_last),
    }
    if arguments.compiled:
        contestants[COMPILED] = contestant(peer.minimal_step, torch.channels_last, compiled=True)
    return contestants


def arithmetic(arguments: Arguments, step_ms: float) -> dict[str, float]:
    """Operations of a step, its rate, and the rate of a large matrix product in the same type, in TFLOP/s."""
    import jax
    import jax.numpy as jnp

    from fs_jax.config import ModelConfig, TrainConfig
    from fs_jax.training import create_state, make_model

    config = TrainConfig(model=ModelConfig(arguments.depth, arguments.width))
    model, image = make_model(config, 10), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda: create_state(config, jax.random.key(0)).variables)
    logits = jax.jit(lambda variables, image: model.apply(variables, image)[0])
    forward = logits.lower(variables, image).cost_analysis()["flops"]  # type: ignore[index]  # never None here

    size, products = 8192, 20
    a, b = jax.random.normal(jax.random.key(1), (2, size, size), arguments.dtype)
    b = b / size**0.5  # so that a product is as large as its factor

    @jax.jit
    def multiply(a, b):  # in turn, so that the host is not waited for in between
        return jax.lax.fori_loop(0, products, lambda _, x: x @ b, a)

    jax.block_until_ready(multiply(a, b))
    seconds = [timed(lambda: multiply(a, b))[0] / products for _ in range(3)]
    peak, rate = 2 * size**3 / min(seconds) / 1e12, 6 * forward * arguments.batch_size / step_ms / 1e9
    return {"gflop_per_image": 6 * forward / 1e9, "tflop_per_second": rate, "peak": peak, "of_the_peak": rate / peak}


if __name__ == "__main__":
    command_line.run(main)
