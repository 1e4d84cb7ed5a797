"""Evaluate a trained network under attack: `python -m experiments.evaluate --workdir DIR [attacks, radius, ...]`.

Writes `NAME.json` (settings, accuracies with 95% intervals, a record for each image), `NAME.md` (the table) and
`NAME.png` (some images and what the last attack makes of them) into `DIR/evaluations`.
"""

import dataclasses
import json
import pathlib
from typing import Literal

import tyro

from experiments import command_line


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a trained network under attack, on every image of a split."""

    workdir: pathlib.Path
    """Folder of a run of experiments.train."""
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd-20", "cw-20")
    """clean, fgsm, pgd-K or cw-K with K steps; the worst case is over these."""
    epsilon: float | None = None
    """Radius on [0, 1] images; by default the run's own."""
    step_size: float | None = None
    """Step of PGD and CW; by default a quarter of the radius."""
    restarts: int = 1
    """Random starts; an image counts as robust if it survives them all."""
    num_images: int | None = None
    """The first so many images of the split; by default all."""
    split: Literal["test", "train"] = "test"
    checkpoint: Literal["latest", "best"] = "latest"
    """The last one, or the one with the best accuracy on the monitored images."""
    batch_size: int = 128
    seed: int = 0
    """Of the random starts."""
    name: str = "evaluation"
    """Name of the result's files; an existing result is never written over."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    progress: bool = True
    """Show a progress bar."""


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.evaluate")

    from experiments.comparison import draw_examples
    from fs_jax import backend, data, report
    from fs_jax.config import check_number, to_dict
    from fs_jax.evaluation import evaluate, parse_attack
    from fs_jax.files import write_text
    from fs_jax.training import Checkpoints, make_model
    from fs_jax.training.loop import read_config

    # Everything that can be wrong is found before the long work starts.
    config = read_config(arguments.workdir)
    epsilon = config.attack.epsilon if arguments.epsilon is None else arguments.epsilon
    attack_list = [
        parse_attack(word, epsilon=epsilon, step_size=arguments.step_size, restarts=arguments.restarts)
        for word in arguments.attacks
    ]
    folder = arguments.workdir / "evaluations"
    outputs = {kind: folder / f"{arguments.name}.{kind}" for kind in ("json", "md", "png")}
    for path in outputs.values():
        if path.exists():
            raise ValueError(f"name: expected a new result's name; {path} exists. Give another --name.")
    if arguments.num_images is not None:
        check_number("num_images", arguments.num_images, at_least=1, integer=True)
    backend.enable_compilation_cache()
    dataset = data.load(config.dataset, data_dir=arguments.data_dir)
    images, labels = {
        "test": (dataset.test_images, dataset.test_labels),
        "train": (dataset.train_images, dataset.train_labels),
    }[arguments.split]
    images, labels = images[: arguments.num_images], labels[: arguments.num_images]
    with Checkpoints(arguments.workdir, config, read_only=True) as checkpoints:
        state = checkpoints.restore_best() if arguments.checkpoint == "best" else checkpoints.restore_latest()
    if state is None:
        raise ValueError(
            f"workdir: expected a run with a {arguments.checkpoint} checkpoint; {arguments.workdir} has none."
        )

    model = make_model(config)
    folder.mkdir(exist_ok=True)  # if it can't be made, now is the time to say so
    result = evaluate(
        model,
        state.variables,
        images,
        labels,
        attack_list,
        batch_size=min(arguments.batch_size, len(labels)),
        seed=arguments.seed,
        progress=arguments.progress,
    )
    summary = {
        **result.summary,
        "network": f"WRN-{config.model.depth}-{config.model.width}",
        "step": int(state.step),
        "split": arguments.split,
        "config": to_dict(config),
        "environment": backend.describe(),
    }
    table = report.accuracy_table({f"{summary['network']}, {config.method}": summary})
    write_text(outputs["json"], json.dumps({**summary, "records": result.records}) + "\n")
    write_text(outputs["md"], f"{table}\n\n{report.caption({config.method: summary})}\n")
    shown = [attack for attack in attack_list if attack.kind != "clean" and attack.epsilon > 0]
    if shown and images.shape[-1] in (1, 3):
        names = dataset.info.class_names
        draw_examples(model, state.variables, shown[-1], images, labels, names, outputs["png"], seed=arguments.seed)
    print(table)
    print(f"Written: {folder / arguments.name}.json and, beside it, .md and .png")


if __name__ == "__main__":
    command_line.run(main)
