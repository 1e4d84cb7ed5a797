"""Time convolutions and their derivatives against JAX and PyTorch, layer by layer, on a CPU.

    python -m experiments.benchmarks.convolutions

Convolutions take most of the time of a training step. The layers are those of a WRN-10-2 on 32 x 32 images and of a
WRN-10-1 on 8 x 8 images, in a batch of 60. For each layer, this times the convolution, its derivative with respect to
the images, and that with respect to the kernel: ours computed by `conv2d`, JAX's by `lax.conv_general_dilated`, each in
a program of its own, and PyTorch's with channels last. All take turns in one process. For one layer, it also times all
three passes inside `lax.scan`, as in a training step. Writes `convolutions.json` and `convolutions.md` to the results
folder.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import tabulate

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn
from experiments.output import made_on, write_files

# Height and width of the images, channels in and out, kernel size, stride.
LAYERS = {
    "WRN-10-2 on 32 x 32 images": (
        (32, 3, 16, 3, 1), (32, 16, 32, 3, 1), (32, 32, 32, 3, 1), (32, 16, 32, 1, 1), (32, 32, 64, 3, 2),
        (16, 64, 64, 3, 1), (32, 32, 64, 1, 2), (16, 64, 128, 3, 2), (8, 128, 128, 3, 1), (16, 64, 128, 1, 2),
    ),
    "WRN-10-1 on 8 x 8 images": (
        (8, 1, 16, 3, 1), (8, 16, 16, 3, 1), (8, 16, 16, 3, 1), (8, 16, 32, 3, 2), (4, 32, 32, 3, 1),
        (8, 16, 32, 1, 2), (4, 32, 64, 3, 2), (2, 64, 64, 3, 1), (4, 32, 64, 1, 2),
    ),
}  # fmt: skip
IN_A_LOOP = (16, 64, 64, 3, 1)
STEPS = 2  # of the loop: with JAX's derivatives, one takes seconds
LOOP_ROUNDS = 3
Layer = tuple[int, int, int, int, int]
PASSES = ("forward", "to the images", "to the kernel")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time convolutions against JAX and PyTorch (pip install -e ".[bench]"): four minutes on two CPU cores."""

    batch_size: int = 60
    """Images in a batch."""
    rounds: int = 15
    """Number of timed rounds. Medians are reported."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_convolutions")
    """Folder of the table and the JSON file."""


def main(argv: list[str]) -> None:
    prog = "python -m experiments.benchmarks.convolutions"
    arguments = command_line.parse(Arguments, argv, prog=prog, examples=f"  {prog} --rounds 5 --results results/bench")

    import torch

    from fs_jax._utils import backend

    networks = {name: timed(layers, arguments) for name, layers in LAYERS.items()}
    loop = in_a_loop(arguments.batch_size)
    environment = {**backend.describe(), "torch": torch.__version__}
    result = {
        "arguments": dataclasses.asdict(arguments),
        "environment": environment,
        "networks": networks,
        "loop": loop,
    }
    text = "\n\n".join(
        [
            *(as_markdown(name, network) for name, network in networks.items()),
            f"## Inside a loop\n\nThe three passes of the layer {words(IN_A_LOOP)}, inside `lax.scan`, take "
            f"{loop['ours']:.0f} ms per iteration, and **{loop['JAX']:.0f} ms** with JAX's derivatives (medians of "
            f"{LOOP_ROUNDS} rounds): in a loop, XLA's CPU backend does not choose a fast layout for these.",
            f"Medians in ms of {arguments.rounds} rounds, batch {arguments.batch_size}. {made_on(environment)}.\n",
        ]
    )
    write_files(arguments.results, {"convolutions.json": result, "convolutions.md": text})
    print(text)


def timed(layers: Sequence[Layer], arguments: Arguments) -> dict[str, Any]:
    """The medians of each layer in ms, their sums, and the time of the convolutions of a training step."""
    rows: list[dict[str, Any]] = []
    for layer in layers:
        programs = {(who, of): run for who, make in WHO.items() for of, run in make(arguments.batch_size, *layer)}
        times = seconds_in_turn(programs, arguments.rounds, pause=0.05, title=words(layer))
        medians = {of: {who: 1e3 * statistics.median(times[who, of]) for who in WHO} for of in PASSES}
        rows.append({"layer": layer, **medians})
    sums = {of: {who: sum(row[of][who] for row in rows) for who in WHO} for of in PASSES}
    # In the first layer, only the attack needs the backward pass to the images.
    step = {
        who: 3 * sums["forward"][who] + 2 * sums["to the images"][who] - rows[0]["to the images"][who]
        + sums["to the kernel"][who]
        for who in WHO
    }  # fmt: skip
    return {"layers": rows, "sums": sums, "step": step}


def in_a_loop(count: int) -> dict[str, float]:
    """Milliseconds of the three passes of a layer inside `lax.scan`, per iteration, with our derivatives and JAX's."""
    import jax

    from fs_jax._utils import backend

    side, channels, filters, size, stride = IN_A_LOOP
    images = jax.random.normal(jax.random.key(0), (count, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (size, size, channels, filters))
    options = backend.compiler_options(backend.platform_of([]), training=True)

    def loop(convolution):
        def step(arrays, _):
            y, backward = jax.vjp(convolution, *arrays)
            to_images, to_kernel = backward(y)
            return (arrays[0] - 1e-6 * to_images, arrays[1] - 1e-6 * to_kernel), None

        run = jax.jit(lambda *arrays: jax.lax.scan(step, arrays, length=STEPS)[0], compiler_options=options)
        return functools.partial(run, images, kernel)

    programs = {"ours": loop(convolution_of("ours", size, stride)), "JAX": loop(convolution_of("JAX", size, stride))}
    times = seconds_in_turn(programs, LOOP_ROUNDS, title="inside a loop")
    return {who: 1e3 * statistics.median(times[who]) / STEPS for who in programs}


def as_markdown(name: str, network: dict[str, Any]) -> str:
    """The table of a network's layers, and the time of a training step."""

    def cells(of: dict[str, Any]) -> list[str]:
        return [f"{of[kind][who]:.2f}" for kind in PASSES for who in WHO]

    table = tabulate.tabulate(
        [[words(row["layer"]), *cells(row)] for row in network["layers"]] + [["all of them", *cells(network["sums"])]],
        headers=["layer", *(f"{of}: {who}" for of in PASSES for who in WHO)],
        tablefmt="pipe",
        disable_numparse=True,
    )
    step = network["step"]
    return (
        f"## {name}\n\n{table}\n\nA step of feature scattering has 3 forward passes (natural, attack, training), 2 "
        "backward passes to the images (attack, training) and 1 to the kernels (training). Its convolutions take "
        f"{step['ours']:.1f} ms, against {step['JAX']:.1f} ms with JAX's (a ratio of "
        f"**{step['ours'] / step['JAX']:.2f}**) and {step['PyTorch']:.1f} ms with PyTorch's "
        f"(**{step['ours'] / step['PyTorch']:.2f}**)."
    )


def words(layer) -> str:
    side, channels, filters, size, stride = layer
    return f"{side} x {side} x {channels} to {filters}, {size} x {size}" + (f", stride {stride}" if stride > 1 else "")


def convolution_of(who, size, stride):
    """Our convolution or JAX's, as a function of images and kernel."""
    from jax import lax

    from fs_jax.models.convolution import conv2d

    if who == "ours":
        return functools.partial(conv2d, stride=stride)
    return functools.partial(
        lax.conv_general_dilated, window_strides=(stride, stride), padding=[(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def jitted(who, count, side, channels, filters, size, stride):
    """The three passes of our convolution or JAX's, compiled as in a training step, as functions without arguments."""
    import jax

    from fs_jax._utils import backend

    convolution = convolution_of(who, size, stride)
    images = jax.random.normal(jax.random.key(0), (count, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (size, size, channels, filters))
    jit = functools.partial(jax.jit, compiler_options=backend.compiler_options(backend.platform_of([]), training=True))
    forward = jit(convolution)
    y = forward(images, kernel)
    # Only the derivatives: XLA removes the unused forward pass.
    to_images = jit(lambda x, w, g: jax.vjp(lambda x: convolution(x, w), x)[1](g))
    to_kernel = jit(lambda x, w, g: jax.vjp(lambda w: convolution(x, w), w)[1](g))
    return [
        (PASSES[0], functools.partial(forward, images, kernel)),
        (PASSES[1], functools.partial(to_images, images, kernel, y)),
        (PASSES[2], functools.partial(to_kernel, images, kernel, y)),
    ]


def pytorchs(count, side, channels, filters, size, stride):
    """PyTorch's three passes, as functions without arguments."""
    import torch

    images = torch.randn(count, channels, side, side).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(filters, channels, size, size).contiguous(memory_format=torch.channels_last)
    padding = size // 2
    forward = functools.partial(torch.nn.functional.conv2d, images, kernel, stride=stride, padding=padding)
    y = forward()

    def backward(*wanted):
        torch.ops.aten.convolution_backward(
            y, images, kernel, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [*wanted, False]
        )

    return [
        (PASSES[0], forward),
        (PASSES[1], functools.partial(backward, True, False)),
        (PASSES[2], functools.partial(backward, False, True)),
    ]


WHO: dict[str, Callable[..., list[tuple[str, Callable]]]] = {
    "ours": functools.partial(jitted, "ours"),
    "JAX": functools.partial(jitted, "JAX"),
    "PyTorch": pytorchs,
}


if __name__ == "__main__":
    command_line.run(main)
