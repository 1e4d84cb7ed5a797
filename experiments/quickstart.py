"""Train three networks on scikit-learn's digits and attack them: `python -m experiments.quickstart`.

The methods are standard training, PGD adversarial training and feature scattering. Writes to `runs/quickstart`: a
folder for each run (checkpoints, and metrics as JSONL and for TensorBoard), `table.md`, a JSON file for each network,
and the figures `training.png`, `accuracy.png` and `attacks.png`.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments import command_line


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train three networks on digits and attack them: a minute on two CPU cores. To resume, rerun the command."""

    workdir: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder of the runs and the results: a new one, or the one to resume."""
    methods: tuple[Literal["standard", "pgd", "feature_scatter"], ...] = ("standard", "pgd", "feature_scatter")
    """Training methods."""
    epochs: int | None = None
    """Epochs of each run; by default those of the preset digits."""
    attacked_images: int | None = None
    """Number of test images to attack, the first ones; by default all."""
    progress: bool = True
    """Show progress bars."""


EXAMPLES = """\
  python -m experiments.quickstart
  python -m experiments.quickstart --methods pgd feature_scatter --epochs 3 --workdir runs/short
"""

METHODS = {"standard": "standard", "pgd": "PGD training", "feature_scatter": "feature scattering"}


def main(argv: list[str]) -> int:
    arguments = command_line.parse(Arguments, argv, prog="python -m experiments.quickstart", examples=EXAMPLES)

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
        raise ValueError(f"workdir: expected a new folder, or one of the quickstart; got {workdir}. Choose another.")
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
        print("Stopped. Rerun the same command to resume.")
        return command_line.STOPPED
    print(f"\n{table}\nFigures, metrics and checkpoints: {arguments.workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
