"""Evaluate a network under attack: `python -m experiments.evaluate --workdir DIR --suite paper`.

    python -m experiments.evaluate --workdir runs/cifar10 --suite all --num-images 1000
    python -m experiments.evaluate --workdir runs/cifar10 --attacks clean pgd-20 cw-100 --restarts 5
    python -m experiments.evaluate --weights network.safetensors --output results/network --suite autoattack

Suites: `paper` (FGSM, PGD and CW, with up to 1000 steps from 5 starts), `autoattack` (the standard version),
`gradient-free` (SPSA and local search), `all` (all these). A suite is followed by a sweep over radii and by the
checklist for masked gradients.

Writes into `DIR/evaluations/NAME`: `records.jsonl` (a line for each image and attack, as it goes), and in the end
`result.json` (settings, accuracies with 95% intervals, what they cost, a record for each image, RobustBench's fields),
`report.md` (the tables), and the figures. If interrupted, rerun the command: it resumes. With another network, radius
or setting it refuses to.

Parts of the images can be evaluated anywhere, and merged:

    python -m experiments.evaluate --weights net.npz --suite paper --shard 1/2 --output part1     # and 2/2, elsewhere
    python -m experiments.evaluate --weights net.npz --suite paper --merge part1 part2 --output whole
"""

import dataclasses
import fractions
import pathlib
import re
from typing import Any, Literal, cast

import tyro

from experiments import command_line
from experiments.evaluation_report import SHOWN, draw_adversaries, draw_strength, draw_surfaces, report_text
from experiments.networks import load_network
from experiments.output import write_files
from fs_jax._utils.files import local_path

SWEPT = 500  # images in the sweep over radii


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a network under attack, on the images of a split."""

    workdir: pathlib.Path | None = None
    """Folder of a run of experiments.train; or else --weights."""
    weights: pathlib.Path | None = None
    """A file of weights (.safetensors, .npz, .pt, ...): this project's, the paper's, or RobustBench's."""
    suite: Literal["paper", "autoattack", "gradient-free", "all"] | None = None
    """Attacks that belong together; or else --attacks."""
    attacks: tuple[str, ...] = ()
    """By default fgsm pgd-20 cw-20, each from the clean images; the clean images themselves are always judged too.
    --list has all attacks."""
    list: bool = False
    """List the attacks that can be named, and stop."""
    epsilon: str | None = None
    """Radius on [0, 1] images, as a number or as 8/255; by default the run's own, or 8/255 for weights."""
    step_size: str | None = None
    """Step of PGD and CW, likewise; by default a quarter of the radius."""
    restarts: int = 1
    """Random starts of the FGSM, PGD and CW of --attacks (the others have their own number); an image counts as robust
    if it survives them all."""
    num_images: int | None = None
    """So many images of the split; by default all."""
    first: int = 0
    """The first of them, by its index in the split. What happens to an image is the same in any part."""
    shard: str | None = None
    """Instead: one of several parts of about the same size, as in 2/4. --merge puts their results together."""
    merge: tuple[pathlib.Path, ...] = ()
    """Folders of evaluations of parts, with the same arguments: what they hold is taken over into --output, a new
    folder, and only what is missing is run."""
    gradient_free_images: int = 100
    """How many of these a suite's SPSA and local search attack: they ask the network some 100,000 times for each."""
    spsa_directions: int = 128
    """Directions in each of the 100 steps of a suite's SPSA. The strong attack of its paper has 8192."""
    transfer_from: pathlib.Path | None = None
    """Another network, a run's folder or a file of weights, whose adversaries are tried on this one. A file has to say
    how its images are normalised; experiments.convert_weights makes one that does."""
    split: Literal["test", "train"] = "test"
    dataset: str | None = None
    """For weights: cifar10 (by default), cifar100, svhn_cropped, digits, or the path of an .npz file. A run has its
    own."""
    mean: tuple[float, ...] | None = None
    """For weights that don't say it: the network takes (images - mean) / std. One number, or one for each channel."""
    std: tuple[float, ...] | None = None
    """As mean."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Of a run: the last one, or the one with the best accuracy on the monitored images."""
    precision: Literal["float32", "default"] = "float32"
    """Of products: "default" leaves it to JAX, which rounds their factors on a TPU and some GPUs."""
    batch_size: int | None = None
    """Most images at a time; by default 32 on a CPU, whose cache they fit, and 256 elsewhere."""
    seed: int = 0
    """Of the random starts."""
    name: str | None = None
    """Name of the evaluation; by default the suite's, or "attacks"."""
    output: pathlib.Path | None = None
    """Folder of the results; by default evaluations/NAME in the workdir."""
    save_images: bool = False
    """Write each image's worst adversary, over all attacks, to adversarial.npz."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    progress: bool = True
    """Show a progress bar for each attack."""


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.evaluate")

    if arguments.list:
        print(list_of_attacks())
        return

    from fs_jax import attacks, data
    from fs_jax._utils import backend
    from fs_jax.evaluation import check_evaluation, evaluate, fingerprint, gradient_masking
    from fs_jax.models import as_logits_fn
    from fs_jax.training.loop import read_config

    # Everything that can be wrong is found before the long work starts.
    check_arguments(arguments)
    config = None if arguments.workdir is None else read_config(arguments.workdir)
    own_epsilon = 8 / 255 if config is None else config.attack.epsilon
    epsilon = own_epsilon if arguments.epsilon is None else number("epsilon", arguments.epsilon)
    chosen_attacks(arguments, epsilon)
    output = output_folder(arguments)
    backend.enable_compilation_cache()
    model, variables, origin = load_network(
        cast(pathlib.Path, arguments.workdir or arguments.weights),  # one of them is given
        checkpoint=arguments.checkpoint,
        mean=arguments.mean,
        std=arguments.std,
    )
    dataset = data.load(
        arguments.dataset or "cifar10" if config is None else config.dataset, data_dir=arguments.data_dir
    )
    images, labels = {
        "test": (dataset.test_images, dataset.test_labels),
        "train": (dataset.train_images, dataset.train_labels),
    }[arguments.split]
    chosen = chosen_images(arguments, len(labels))
    images, labels = images[chosen], labels[chosen]
    logits_fn = as_logits_fn(model, variables)
    attack_list = chosen_attacks(arguments, epsilon, model.num_classes)
    check_evaluation(logits_fn, images, labels, attack_list)
    if arguments.transfer_from is not None:
        other, other_variables, _ = load_network(arguments.transfer_from)
        attack_list.append(
            attacks.transfer(
                as_logits_fn(other, other_variables), images, labels,
                epsilon=epsilon, source=fingerprint(other_variables), seed=arguments.seed, first=chosen.start,
                batch_size=arguments.batch_size,
            )
        )  # fmt: skip
    kept = len(labels) if arguments.save_images else min(SHOWN, len(labels))
    about = {
        "network": f"WRN-{model.depth}-{model.width}",
        "normalised": f"(images - {model.mean}) / {model.std}",
        "dataset": dataset.info.name,
        "split": arguments.split,
    }
    adversaries = open_array(output / "adversaries.npy", (kept, *images.shape[1:]))
    for part in arguments.merge:
        take_adversaries(part, adversaries, chosen.start)
    result = evaluate(
        logits_fn, images, labels, attack_list,
        seed=arguments.seed, batch_size=arguments.batch_size, precision=arguments.precision,
        first=chosen.start, journal=output / "records.jsonl", parts=[p / "records.jsonl" for p in arguments.merge],
        about=about, worst_images=adversaries, progress=arguments.progress,
    )  # fmt: skip
    summary = {**about, **origin, **result.summary, "suite": arguments.suite, "epsilon": epsilon}
    if arguments.transfer_from is not None:
        summary["transfer_from"] = arguments.transfer_from.name
    if arguments.suite is not None:
        names = dataset.info.class_names
        losses = draw_surfaces(logits_fn, images, labels, result.records, names, epsilon, output)
        checks = gradient_masking.checklist(result.summary, result.records, losses)
        summary["masking"] = [check._asdict() for check in checks]
    if arguments.suite in ("autoattack", "all"):
        summary |= leaderboard(model, about, epsilon, result.summary)
    draw_strength(summary, result.records, output)
    draw_adversaries(logits_fn, images, labels, adversaries, dataset.info.class_names, epsilon, output)
    if arguments.save_images:
        save_images(output / "adversarial.npz", adversaries, labels, result.records)
    text = report_text(summary, {path.stem for path in output.glob("*.png")})
    write_files(output, {"result.json": {**summary, "records": result.records}, "report.md": text})
    print(f"{text}\nWritten: {output}")


def list_of_attacks() -> str:
    """A table of the attacks that can be named, and what may be set of each."""
    import tabulate

    from fs_jax.attacks import REGISTRY, Attack, Specification

    def word(attack: Specification) -> str:
        return attack.name + ("-K" if attack.steps_in_name else "") + ("[xN]" if attack.every_run else "")

    def settings(attack: Specification) -> str:
        given = {name: value for name, value in Attack(attack).settings.items() if value is not None}
        return ", ".join(
            f"{name} {value if isinstance(value, bool) else f'{value:.4g}'}" for name, value in given.items()
        )

    rows = [[word(attack), attack.summary, settings(attack)] for attack in REGISTRY.values()]
    table = tabulate.tabulate(rows, headers=["attack", "what it is", "settings"], maxcolwidths=[None, 50, 50])
    return f"{table}\n\nK: number of steps. N: random starts. Settings are those at radius 8/255."


def check_arguments(arguments: Arguments) -> None:
    """What can be said of the command line by itself."""
    from fs_jax._utils.validation import check_number

    if (arguments.workdir is None) == (arguments.weights is None):
        raise ValueError("workdir, weights: expected one of them. Make a run with: python -m experiments.train")
    if arguments.weights is not None and arguments.weights.is_dir():
        raise ValueError(f"weights: expected a file; {arguments.weights} is a folder. A run's is for --workdir.")
    for name in ("dataset", "mean", "std"):
        if arguments.workdir is not None and getattr(arguments, name) is not None:
            raise ValueError(f"{name}: expected it for --weights only; a run has its own.")
    if arguments.weights is not None and arguments.output is None:
        raise ValueError("output: expected a folder for the results, as --weights has no workdir.")
    if arguments.suite is not None and (arguments.attacks or arguments.restarts != 1):
        raise ValueError("suite: expected it alone, without --attacks or --restarts; it has its own.")
    if arguments.shard is not None and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", arguments.shard):
        raise ValueError(f"shard: expected a part and the number of parts, such as 2/4; got {arguments.shard!r}.")
    if arguments.shard is not None and int(arguments.shard.split("/")[0]) > int(arguments.shard.split("/")[1]):
        raise ValueError(f"shard: expected a part of at most the number of parts; got {arguments.shard}.")
    if arguments.merge and arguments.output is not None and (arguments.output / "records.jsonl").exists():
        raise ValueError(f"merge: expected a new folder as --output; {arguments.output} is of an evaluation.")
    for part in arguments.merge:
        if not (part / "records.jsonl").exists():
            raise ValueError(f"merge: expected folders of evaluations; {part} has no records.jsonl.")
    check_number("first", arguments.first, at_least=0, integer=True)
    for name in ("num_images", "gradient_free_images", "spsa_directions", "batch_size"):
        if getattr(arguments, name) is not None:
            check_number(name, getattr(arguments, name), at_least=1, integer=True)


def number(name: str, text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}: expected a number, or a fraction such as 8/255; got {text!r}.") from None


def chosen_images(arguments: Arguments, total: int) -> slice:
    """Which images of a split of so many are evaluated."""
    last = total if arguments.num_images is None else min(total, arguments.first + arguments.num_images)
    if not arguments.first < last:
        raise ValueError(f"first: expected less than the split's {total} images; got {arguments.first}.")
    if arguments.shard is None:
        return slice(arguments.first, last)
    part, parts = map(int, arguments.shard.split("/"))
    ends = [arguments.first + (last - arguments.first) * i // parts for i in (part - 1, part)]
    if ends[0] == ends[1]:
        raise ValueError(f"shard: expected at most as many parts as images, {last - arguments.first}; got {parts}.")
    return slice(*ends)


def chosen_attacks(arguments: Arguments, epsilon: float, num_classes: int = 10) -> list:
    """Those that were named; or those of the suite, and the sweep over radii."""
    from fs_jax.evaluation import gradient_masking, parse_attack, suite

    step_size = None if arguments.step_size is None else number("step_size", arguments.step_size)
    if arguments.suite is None:
        words = dict.fromkeys(("clean", *(arguments.attacks or ("fgsm", "pgd-20", "cw-20"))))
        return [parse_attack(word, epsilon, step_size=step_size, restarts=arguments.restarts) for word in words]
    chosen = suite(
        arguments.suite,
        epsilon=epsilon,
        step_size=step_size,
        gradient_free_images=arguments.gradient_free_images,
        num_directions=arguments.spsa_directions,
        num_classes=num_classes,
    )
    return [*chosen, *gradient_masking.radius_attacks(SWEPT, epsilon)]


def output_folder(arguments: Arguments) -> pathlib.Path:
    """A new folder, or one of an evaluation; the journal in it knows of which."""
    name = arguments.name or arguments.suite or "attacks"
    # Without an output, which --weights needs, there is a run.
    output = local_path("output", arguments.output or cast(pathlib.Path, arguments.workdir) / "evaluations" / name)
    if output.exists() and not (output / "records.jsonl").exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: expected a new folder, or one of an evaluation; got {output}. Choose another.")
    return output


def open_array(path: pathlib.Path, shape: tuple[int, ...]):
    """A float32 array in a file, which keeps what is written though the process is killed."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape:
        raise ValueError(f"save_images, num_images: expected those that {path} was made with; got others.")
    return array


def take_adversaries(part: pathlib.Path, adversaries, first: int) -> None:
    """The adversaries of a part of the images, as far as they are kept."""
    import numpy as np

    from fs_jax.evaluation import Journal

    begin = Journal.header(part / "records.jsonl")["first"] - first
    of_part = np.load(part / "adversaries.npy", mmap_mode="r")[: max(0, len(adversaries) - begin)]
    wanted = min(Journal.header(part / "records.jsonl")["images"], len(adversaries) - begin)
    if begin < 0 or len(of_part) < wanted:
        raise ValueError(f"merge: expected a part of these images, made with --save-images as this; got {part}.")
    adversaries[begin : begin + len(of_part)] = of_part


def leaderboard(model, about: dict[str, Any], epsilon: float, summary: dict[str, Any]) -> dict[str, Any]:
    """AutoAttack's settings, and the result as RobustBench has it."""
    from fs_jax import attacks
    from fs_jax.models import convert

    accuracies = {attack["name"]: attack["accuracy"] for attack in summary["attacks"]}
    entry = convert.robustbench_entry(
        model,
        dataset=about["dataset"],
        epsilon=epsilon,
        clean_accuracy=accuracies["clean"],
        autoattack_accuracy=accuracies["square"],  # the last of the chain
    )
    return {
        "autoattack": {
            attack.name: attack.published(attack.steps(model.num_classes))
            for attack in attacks.autoattack_attacks(epsilon=epsilon, num_classes=model.num_classes)[1:]
        },
        "robustbench": {**entry, "footnote": f"Of {summary['images']:,} {about['split']} images."},
    }


def save_images(path: pathlib.Path, adversaries, labels, records) -> None:
    """Each image's adversary of the lowest margin, in the order of the split; `robust` is 1, 0, or -1 for unknown."""
    import numpy as np

    from fs_jax._utils.files import replacing

    with replacing(path) as file:
        np.savez_compressed(
            file,
            images=adversaries,
            labels=labels,
            robust=np.array([-1 if record["robust"] is None else record["robust"] for record in records], np.int8),
        )


if __name__ == "__main__":
    command_line.run(main)
