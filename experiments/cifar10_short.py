"""Five epochs of CIFAR-10 with a WRN-10-2, beside the released code's own: `python -m experiments.cifar10_short`.

A check of the training dynamics, not of robustness: so short a run of so small a network has little. Trains feature
scattering with the released code's Sinkhorn and with Algorithm 1 (tau 0.01, 50 iterations), which takes some 20 minutes
each on two cores, and evaluates both: clean accuracy on all 10,000 test images, attacks on 2,000 of them. Run it again
to go on where it was stopped.
"""

import dataclasses
import pathlib

import tyro

from experiments import command_line
from experiments.output import write_files


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a small network on CIFAR-10 with two transports, and compare it with the released code's."""

    workdir: pathlib.Path = pathlib.Path("runs/cifar10_short")
    """Folder of the runs: a new one, or the one to resume."""
    results: pathlib.Path = pathlib.Path("experiments/results/cifar10_short")
    """Folder of the table and the figures."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    max_minutes: float | None = None
    """Stop training cleanly after so many minutes, with exit status 75; the same command goes on."""
    progress: bool = True
    """Show progress bars."""


RELEASED = """\
| the released PyTorch code, % | clean | fgsm | pgd-20 | cw-20 |
| --- | --- | --- | --- | --- |
| seed 0 | 66.8 | 26.7 | 11.2 | 8.1 |
| seed 1 | 65.6 | 25.5 | 11.1 | 8.0 |

The second table: the authors' code (github.com/Haichao-Zhang/FeatureScatter), its own training and attacks with these
settings, run once for each seed on two CPU cores. Its Sinkhorn is the released one.
"""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.cifar10_short")

    from experiments.comparison import compare
    from fs_jax import data
    from fs_jax._utils import backend
    from fs_jax.config import TransportConfig, preset
    from fs_jax.evaluation import parse_attack

    def configure(**transport):
        return dataclasses.replace(preset("cifar10_wrn10_2"), smoothing=0.5, transport=TransportConfig(**transport))

    backend.enable_compilation_cache()
    table = compare(
        {
            "released_sinkhorn": ("released Sinkhorn", configure(solver="released_sinkhorn")),
            "sinkhorn": ("Algorithm 1, 50 iterations", configure(solver="sinkhorn", num_iters=50)),
        },
        data.load("cifar10", data_dir=arguments.data_dir),
        [parse_attack(word) for word in ("clean", "fgsm", "pgd-20", "cw-20")],
        arguments.workdir,
        arguments.results,
        title="CIFAR-10, WRN-10-2, 5 epochs",
        attacked_images=2000,
        max_minutes=arguments.max_minutes,
        progress=arguments.progress,
    )
    if table is None:
        print("Stopped. The same command goes on.")
        return command_line.STOPPED
    text = f"Written by `python -m experiments.cifar10_short`.\n\n{table}\n{RELEASED}"
    write_files(arguments.results, {"table.md": text})
    print(f"\n{text}\nTable and figures: {arguments.results}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
