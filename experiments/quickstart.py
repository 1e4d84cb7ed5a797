"""Three networks on scikit-learn's digits, two minutes on a laptop: `python -m experiments.quickstart`.

Trains by the standard method, by PGD adversarial training and by feature scattering, evaluates them under attack, and
writes into `runs/quickstart`: a folder for each run (metrics as JSONL and for TensorBoard, checkpoints), `table.md`,
`evaluation.json`, and the figures `training.png`, `accuracy.png` and `attacks.png`. Run it again to go on where it was
stopped.
"""

import dataclasses
import json
import pathlib

import tyro

from experiments import command_line


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train three networks on scikit-learn's digits and compare them under attack."""

    workdir: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder of the results: a new one, or the one to go on with."""
    epochs: int | None = None
    """Epochs of each run; by default the preset's."""
    progress: bool = True
    """Show progress bars."""


# Method, its name in the table, and its label smoothing: the paper's for its method, none for the two it is compared to.
METHODS = (
    ("standard", "standard", 0.0),
    ("pgd", "PGD training", 0.0),
    ("feature_scatter", "feature scattering", 0.5),
)
ATTACKS = ("clean", "fgsm", "pgd-20", "cw-20")


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.quickstart")

    import jax

    from experiments.evaluate import draw_examples
    from experiments.train import STOPPED
    from fs_jax import backend, data, report, training
    from fs_jax.config import preset, to_dict
    from fs_jax.evaluation import evaluate, parse_attack
    from fs_jax.files import write_text

    backend.enable_compilation_cache()
    digits = data.load("digits")
    base = preset("digits")
    if arguments.epochs is not None:
        decays = tuple(epoch for epoch in base.decay_epochs if epoch < arguments.epochs)
        base = dataclasses.replace(base, epochs=arguments.epochs, decay_epochs=decays)
    attacks = [parse_attack(word, epsilon=base.attack.epsilon) for word in ATTACKS]

    evaluations, metrics = {}, {}
    for method, name, smoothing in METHODS:
        config = dataclasses.replace(base, method=method, smoothing=smoothing)
        workdir = arguments.workdir / method
        run = training.train(config, digits, workdir, monitor_images=0, progress=arguments.progress)
        if not run.finished:
            print("Stopped. The same command goes on.")
            return STOPPED
        model, variables = training.make_model(config), jax.device_put(run.state.variables)
        result = evaluate(
            model, variables, digits.test_images, digits.test_labels, attacks, progress=arguments.progress
        )
        evaluations[name] = {**result.summary, "config": to_dict(config), "environment": backend.describe()}
        metrics[name] = report.read_jsonl(workdir / "metrics.jsonl")

    table = f"{report.accuracy_table(evaluations)}\n\n{report.caption(evaluations)}\n"
    write_text(arguments.workdir / "table.md", table)
    write_text(arguments.workdir / "evaluation.json", json.dumps(evaluations, indent=1) + "\n")
    report.training_curves(metrics, arguments.workdir / "training.png")
    report.accuracy_bars(evaluations, arguments.workdir / "accuracy.png", title="scikit-learn's digits")
    draw_examples(model, variables, attacks[2], digits, arguments.workdir / "attacks.png")
    print(f"\n{table}\nFigures, metrics and checkpoints: {arguments.workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
