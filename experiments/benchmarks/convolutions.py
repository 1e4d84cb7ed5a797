"""Time convolutions and their derivatives against PyTorch, layer by layer, on a CPU.

    python -m experiments.benchmarks.convolutions

Convolutions take most of the time of a training step. The layers are those of a WRN-10-2 on 32 x 32 images in a batch
of 60. For each layer, this times the convolution, its derivative with respect to the images, and that with respect to
the kernel: ours computed by `conv2d`, each in a program of its own, and PyTorch's with channels last. All take turns in
one process. Writes `convolutions.json` and `convolutions.md` to the results folder.
"""

import dataclasses
import functools
import pathlib
import statistics
from typing import Any

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn
from experiments.output import made_on, write_files

# Height and width of the images, channels in and out, kernel size, stride. Each layer occurs once in the network.
LAYERS = (
    (32, 3, 16, 3, 1), (32, 16, 32, 3, 1), (32, 32, 32, 3, 1), (32, 16, 32, 1, 1), (32, 32, 64, 3, 2),
    (16, 64, 64, 3, 1), (32, 32, 64, 1, 2), (16, 64, 128, 3, 2), (8, 128, 128, 3, 1), (16, 64, 128, 1, 2),
)  # fmt: skip
PASSES = ("forward", "to the images", "to the kernel")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time convolutions against PyTorch (pip install -e ".[bench]"): two minutes on two CPU cores."""

    batch_size: int = 60
    """Images in a batch."""
    rounds: int = 15
    """Number of timed rounds. Medians are reported."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_convolutions")
    """Folder of the table and the JSON file."""


def main(argv: list[str]) -> None:
    prog = "python -m experiments.benchmarks.convolutions"
    arguments = command_line.parse(Arguments, argv, prog=prog, examples=f"  {prog} --rounds 5 --results results/bench")

    import tabulate
    import torch

    from fs_jax._utils import backend

    rows: list[dict[str, Any]] = []
    for layer in LAYERS:
        programs = {(who, of): run for who, make in WHO.items() for of, run in make(arguments.batch_size, *layer)}
        times = seconds_in_turn(programs, arguments.rounds, pause=0.05, title=words(layer))
        medians = {of: {who: 1e3 * statistics.median(times[who, of]) for who in WHO} for of in PASSES}
        rows.append({"layer": layer, **medians})
    sums = {of: {who: sum(row[of][who] for row in rows) for who in WHO} for of in PASSES}
    # A step has three forward passes (natural, attack, training), two backward passes to the images (attack, training)
    # and one to the kernels. In the first layer, only the attack needs the backward pass to the images.
    step = {
        who: 3 * sums["forward"][who] + 2 * sums["to the images"][who] - rows[0]["to the images"][who]
        + sums["to the kernel"][who]
        for who in WHO
    }  # fmt: skip

    def cells(times):
        return [f"{times['ours']:.2f}", f"{times['PyTorch']:.2f}", f"{times['ours'] / times['PyTorch']:.2f}"]

    table = tabulate.tabulate(
        [[words(row["layer"]), *(cell for of in PASSES for cell in cells(row[of]))] for row in rows]
        + [["all of them", *(cell for of in PASSES for cell in cells(sums[of]))]],
        headers=["layer", *(word for of in PASSES for word in (f"{of}: ours, ms", "PyTorch's", "ratio"))],
        tablefmt="pipe", disable_numparse=True,
    )  # fmt: skip
    environment = {**backend.describe(), "torch": torch.__version__}
    text = (
        f"{table}\n\nA step of feature scattering has 3 forward passes, 2 backward passes to the images and 1 to the "
        f"kernels: {step['ours']:.0f} ms of convolutions, against {step['PyTorch']:.0f} ms for PyTorch, a ratio of "
        f"**{step['ours'] / step['PyTorch']:.2f}**.\n\n"
        f"Batch {arguments.batch_size}, {arguments.rounds} rounds, medians. {made_on(environment)}.\n"
    )
    result = {
        "arguments": dataclasses.asdict(arguments), "environment": environment, "layers": rows, "sums": sums,
        "step": step,
    }  # fmt: skip
    write_files(arguments.results, {"convolutions.json": result, "convolutions.md": text})
    print(text)


def words(layer) -> str:
    side, channels, filters, size, stride = layer
    return f"{side} x {side} x {channels} to {filters}, {size} x {size}" + (f", stride {stride}" if stride > 1 else "")


def ours(count, side, channels, filters, size, stride):
    """Our three passes, as functions without arguments."""
    import jax

    from fs_jax._utils import backend
    from fs_jax.models.convolution import conv2d

    images = jax.random.normal(jax.random.key(0), (count, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (size, size, channels, filters))
    jit = functools.partial(jax.jit, compiler_options=backend.compiler_options(backend.platform_of([]), training=True))
    forward = jit(lambda x, w: conv2d(x, w, stride))
    y = forward(images, kernel)
    # Only the derivatives: XLA removes the unused forward pass.
    to_images = jit(lambda x, w, g: jax.vjp(lambda x: conv2d(x, w, stride), x)[1](g))
    to_kernel = jit(lambda x, w, g: jax.vjp(lambda w: conv2d(x, w, stride), w)[1](g))
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


WHO = {"ours": ours, "PyTorch": pytorchs}


if __name__ == "__main__":
    command_line.run(main)
