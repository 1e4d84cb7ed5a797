"""Train a network: `python -m experiments.train PRESET --workdir DIR [overrides]`.

The same command again resumes a run that was stopped. `python -m experiments.train PRESET --help` lists every
setting.
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
    """How to run. But for `batch_per_device`, none of these changes the weights."""

    workdir: pathlib.Path
    """Folder of the run: a new one, or the one to resume."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    devices: int | None = None
    """How many devices to use; by default as many as share the batch evenly."""
    batch_per_device: int | None = None
    """Images per step on each device. The batch size is then this times the number of devices, whatever --batch-size
    says, and only as many devices resume the run."""
    max_minutes: float | None = None
    """Stop cleanly after so many minutes, with exit status 75; the same command goes on."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; there is one at each epoch's end as well."""
    steps_per_dispatch: int | None = None
    """Steps that run on the devices without the host; by default as many as take ten seconds, and 25 at most."""
    monitor_images: int = 512
    """Images whose clean and PGD-10 accuracy is measured after each epoch; 0 for none."""
    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the run, and every field of the preset's configuration."""

    options: Annotated[Options, tyro.conf.arg(name="")]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        from fs_jax.training.methods import METHODS

        presets = "".join(f"  {name:18} {text}\n" for name, (text, _) in PRESETS.items())
        methods = "".join(f"  {name:18} {entry.summary}\n" for name, entry in METHODS.items())
        print(f"{__doc__}\nPresets:\n{presets}\nMethods:\n{methods}", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    default = Arguments(Options(tyro.MISSING), preset(name))
    arguments = tyro.cli(
        Arguments, default=default, args=rest, prog=f"python -m experiments.train {name}", description=PRESETS[name][0]
    )
    options = dataclasses.asdict(arguments.options)

    import jax

    from fs_jax import data, training  # after the command line, which so answers at once
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
        print(f"Stopped at step {int(run.state.step)}. The same command goes on.")
        return command_line.STOPPED
    print(f"Finished. Next: python -m experiments.evaluate --workdir {arguments.options.workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
