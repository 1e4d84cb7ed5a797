"""Train a WRN-10-2 on CIFAR-10 for 5 epochs, as the released code does: `python -m experiments.cifar10_short`.

Trains feature scattering with the released code's Sinkhorn and with Algorithm 1 (tau 0.01, 50 iterations), about 20
minutes each on two CPU cores. Evaluates both: clean accuracy on all 10,000 test images, attacks on 2,000 of them. The
table compares them with the released code. This checks the training dynamics only: such a small network is not robust
after 5 epochs.
"""

import dataclasses
import pathlib

from experiments import command_line
from experiments.output import write_files


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a small network on CIFAR-10 with two transports: an hour on two CPU cores. To resume, rerun the command."""

    workdir: pathlib.Path = pathlib.Path("runs/cifar10_short")
    """Folder of the runs: a new one, or the one to resume."""
    results: pathlib.Path = pathlib.Path("experiments/results/cifar10_short")
    """Folder of the table and the figures."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    max_minutes: float | None = None
    """Stop training cleanly after this many minutes, with exit status 75. Rerun the same command to resume."""
    progress: bool = True
    """Show progress bars."""


EXAMPLES = """\
  python -m experiments.cifar10_short --data-dir ~/tensorflow_datasets
  python -m experiments.cifar10_short --max-minutes 55
"""

RELEASED = """\
| the released PyTorch code, % | clean | fgsm | pgd-20 | cw-20 |
| --- | --- | --- | --- | --- |
| seed 0 | 66.8 | 26.7 | 11.2 | 8.1 |
| seed 1 | 65.6 | 25.5 | 11.1 | 8.0 |

The second table is of the authors' code (github.com/Haichao-Zhang/FeatureScatter), with its own training, attacks and
Sinkhorn, at the same settings. It was run once per seed, on two CPU cores.
"""


def main(argv: list[str]) -> int:
    arguments = command_line.parse(Arguments, argv, prog="python -m experiments.cifar10_short", examples=EXAMPLES)

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
        print("Stopped. Rerun the same command to resume.")
        return command_line.STOPPED
    text = f"Written by `python -m experiments.cifar10_short`.\n\n{table}\n{RELEASED}"
    write_files(arguments.results, {"table.md": text})
    print(f"\n{text}\nTable and figures: {arguments.results}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
