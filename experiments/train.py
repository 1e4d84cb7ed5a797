"""Train a network on a preset: a minute for `digits` on two CPU cores, a GPU or TPU for the paper's network.

    python -m experiments.train PRESET --workdir DIR [options]

If training is interrupted, rerun the same command: it resumes, and ends with the same weights.
`python -m experiments.train PRESET --help` lists all options.
"""

import dataclasses
import pathlib
import sys
from typing import Annotated

import tyro

from experiments import command_line
from fs_jax._utils.validation import check_number
from fs_jax.config import PRESETS, TrainConfig, preset


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the script. They do not change the weights, except `batch_per_device`, and `devices` if devices have a
    transport problem or BatchNorm of their own.
    """

    workdir: pathlib.Path
    """Folder of the run: a new one, or the one to resume."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    devices: int | None = None
    """Number of devices; by default the largest one that divides the batch evenly."""
    batch_per_device: int | None = None
    """Images per step on each device. It replaces --batch-size by this times the number of devices; to resume, use the
    same number of devices."""
    max_minutes: float | None = None
    """Stop cleanly after this many minutes, with exit status 75. Rerun the same command to resume."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints. One is also saved after each epoch."""
    steps_per_dispatch: int | None = None
    """Training steps per dispatch; by default as many as take ten seconds, at most 25."""
    monitor_images: int = 512
    """Number of images for the clean and PGD-10 accuracy after each epoch; 0 for none."""
    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the script, and all fields of the preset's configuration."""

    options: Annotated[Options, tyro.conf.arg(name="")]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


EXAMPLES = """\
  python -m experiments.train digits --workdir runs/digits
  python -m experiments.train cifar10_wrn10_2 --workdir runs/trades --method trades --attack.epsilon 8/255
  python -m experiments.train cifar10_wrn28_10 --workdir runs/mine --dataset images.npz --weight-average 0.999
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        from fs_jax.training.methods import METHODS

        presets = "".join(f"  {name:18} {text}\n" for name, (text, _) in PRESETS.items())
        methods = "".join(f"  {name:18} {entry.summary}\n" for name, entry in METHODS.items())
        text = f"{__doc__}\npresets:\n{presets}\nmethods:\n{methods}\nexamples:\n{EXAMPLES}"
        print(text, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    default = Arguments(Options(tyro.MISSING), preset(name))
    arguments = command_line.parse(
        Arguments, rest, examples=EXAMPLES, default=default, prog=f"python -m experiments.train {name}",
        description=PRESETS[name][0],
    )  # fmt: skip
    options = dataclasses.asdict(arguments.options)

    import jax

    from fs_jax import data, training  # here, so that --help does not wait for JAX
    from fs_jax._utils import backend

    backend.enable_compilation_cache()
    devices = jax.local_devices()
    config, per_device = arguments.config, options.pop("batch_per_device")
    if options["devices"] is not None:
        check_number("devices", options["devices"], at_least=1, at_most=len(devices), integer=True)
        options["devices"] = devices[: options["devices"]]
    if per_device is not None:
        check_number("batch_per_device", per_device, at_least=1, integer=True)
        config = dataclasses.replace(config, batch_size=per_device * len(options["devices"] or devices))
    dataset = data.load(config.dataset, data_dir=options.pop("data_dir"))
    run = training.train(config, dataset, **options)
    if not run.finished:
        print(f"Stopped at step {int(run.state.step)}. Rerun the same command to resume.")
        return command_line.STOPPED
    print(f"Finished. Next: python -m experiments.evaluate --workdir {arguments.options.workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
