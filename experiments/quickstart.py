"""Three networks on scikit-learn's digits, in two minutes on two cores: `python -m experiments.quickstart`.

Trains by the standard method, by PGD adversarial training and by feature scattering, evaluates them under attack, and
writes into `runs/quickstart`: a folder for each run (metrics as JSONL and for TensorBoard, checkpoints), `table.md`,
a JSON file for each network, and the figures `training.png`, `accuracy.png` and `attacks.png`. Run it again to go on
where it was stopped.
"""

import dataclasses
import pathlib
from typing import Literal

import tyro

from experiments import command_line


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train three networks on scikit-learn's digits and compare them under attack."""

    workdir: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder of the runs and the results: a new one, or the one to resume."""
    methods: tuple[Literal["standard", "pgd", "feature_scatter"], ...] = ("standard", "pgd", "feature_scatter")
    """Which networks to train."""
    epochs: int | None = None
    """Epochs of each run; by default the preset's."""
    attacked_images: int | None = None
    """Test images that the attacks are run on, the first so many; by default all."""
    progress: bool = True
    """Show progress bars."""


METHODS = {"standard": "standard", "pgd": "PGD training", "feature_scatter": "feature scattering"}


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.quickstart")

    from experiments.comparison import compare
    from fs_jax import data
    from fs_jax._utils import backend
    from fs_jax._utils.validation import check_number
    from fs_jax.config import preset
    from fs_jax.evaluation import parse_attack

    workdir = arguments.workdir
    if not arguments.methods:
        raise ValueError(f"methods: expected one or more of {', '.join(METHODS)}; got none.")
    runs = [workdir / method / "config.json" for method in METHODS]
    if workdir.is_dir() and any(workdir.iterdir()) and not any(run.exists() for run in runs):
        raise ValueError(f"workdir: expected a new folder or one of the quickstart; got {workdir}. Choose another.")
    if arguments.attacked_images is not None:
        check_number("attacked_images", arguments.attacked_images, at_least=1, integer=True)
    base = preset("digits")
    if arguments.epochs is not None:
        decays = tuple(epoch for epoch in base.decay_epochs if epoch < arguments.epochs)
        base = dataclasses.replace(base, epochs=arguments.epochs, decay_epochs=decays)
    backend.enable_compilation_cache()
    table = compare(
        {method: (METHODS[method], dataclasses.replace(base, method=method)) for method in arguments.methods},
        data.load("digits"),
        [parse_attack(word, epsilon=base.attack.epsilon) for word in ("clean", "fgsm", "pgd-20", "cw-20")],
        arguments.workdir,
        arguments.workdir,
        title="scikit-learn's digits",
        attacked_images=arguments.attacked_images,
        progress=arguments.progress,
    )
    if table is None:
        print("Stopped. The same command goes on.")
        return command_line.STOPPED
    print(f"\n{table}\nFigures, metrics and checkpoints: {arguments.workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
