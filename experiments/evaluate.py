"""Evaluate a network under attack: in 1 minute (500 images, WRN-10-2, two CPU cores), with all suites in 1.5 hours.

Without a suite, the attacks are FGSM, PGD-20 and CW-20. The suites, with the times for the same network and images:

- paper: FGSM, PGD and CW, with up to 1000 steps and 5 restarts (40 minutes);
- autoattack: the standard version (7 minutes; half an hour for a more robust network);
- gradient-free: SPSA and local search (45 minutes for 50 images, see --gradient-free-images);
- all: all of these (1.5 hours, with 50 images for gradient-free attacks).

A suite also runs a sweep over radii and a checklist for masked gradients.

Results are in DIR/evaluations/NAME, or in --output: records.jsonl (one line for each image and attack, written while
the attacks run), result.json (settings, accuracies with 95% intervals, costs, a record of each image, RobustBench's
fields), report.md (tables) and figures. If interrupted, rerun the command: it resumes. With another network, radius or
setting it stops with an error. Parts of the images can be evaluated separately (--shard) and merged (--merge).

Examples:
    python -m experiments.evaluate --workdir runs/cifar10
    python -m experiments.evaluate --workdir runs/cifar10 --suite all --num-images 1000
    python -m experiments.evaluate --workdir runs/cifar10 --attacks clean pgd-20 cw-100 --restarts 5 --epsilon 4/255
    python -m experiments.evaluate --weights network.safetensors --output results/network --suite autoattack

    python -m experiments.evaluate --weights net.npz --suite paper --shard 1/2 --output part1
    python -m experiments.evaluate --weights net.npz --suite paper --shard 2/2 --output part2
    python -m experiments.evaluate --weights net.npz --suite paper --merge part1 part2 --output merged
"""

import dataclasses
import pathlib
import re
from typing import Any, Literal, cast

from experiments import command_line
from experiments.evaluation_report import SHOWN, draw_adversaries, draw_strength, draw_surfaces, report_text
from experiments.networks import load_network
from experiments.output import write_files
from fs_jax._utils.files import local_path

SWEPT = 500  # images in the sweep over radii


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    workdir: pathlib.Path | None = None
    """Folder of a training run of experiments.train. Give this or --weights."""
    weights: pathlib.Path | None = None
    """File of weights (.safetensors, .npz, .pt, ...): this project's, the paper's, or RobustBench's."""
    suite: str | None = None
    """Attacks of a suite: paper, autoattack, gradient-free or all. Give this or --attacks."""
    attacks: tuple[str, ...] = ()
    """Attacks by name, each from the clean images; by default fgsm pgd-20 cw-20. Clean images are always evaluated
    too. --list has all names."""
    list: bool = False
    """List the names of all attacks with their settings, and stop."""
    epsilon: float | None = None
    """Radius on [0, 1] images, as a number or as 8/255; by default that of the training run, or 8/255 for weights."""
    step_size: float | None = None
    """Step size of PGD and CW, as a number or as 2/255; by default a quarter of the radius."""
    restarts: int = 1
    """Random starts of FGSM, PGD and CW in --attacks (other attacks have their own number). An image is robust if all
    fail."""
    num_images: int | None = None
    """Number of images of the split; by default all."""
    first: int = 0
    """Index of the first image in the split. The result for an image doesn't depend on it."""
    shard: str | None = None
    """Evaluate one of several parts of about the same size, such as 2/4. --merge combines their results."""
    merge: tuple[pathlib.Path, ...] = ()
    """Folders of evaluations of parts, made with the same arguments. Their results are copied to --output, a new
    folder, and only missing ones are computed."""
    gradient_free_images: int = 100
    """Number of images for SPSA and local search in a suite, which take some 100,000 forward passes per image."""
    spsa_directions: int = 128
    """Directions in each of the 100 steps of SPSA in a suite. The strong attack of its paper has 8192."""
    transfer_from: pathlib.Path | None = None
    """Another network, as the folder of a training run or a file of weights, whose adversaries are tried on this
    network. A file has to include the normalisation of images; experiments.convert_weights adds it."""
    split: Literal["test", "train"] = "test"
    """Split of the data set."""
    dataset: str | None = None
    """With --weights: cifar10 (the default), cifar100, svhn_cropped, digits, or the path of an .npz file. With
    --workdir: the new path of the training run's .npz file, if it was moved."""
    mean: tuple[float, ...] | None = None
    """For weights without a normalisation: the network takes (images - mean) / std. One number, or one for each
    channel."""
    std: tuple[float, ...] | None = None
    """See --mean."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Checkpoint of the training run: the last one, or the one with the best accuracy on the monitored images."""
    precision: Literal["float32", "default"] = "float32"
    """Precision of products: "default" leaves it to JAX, which rounds the factors on a TPU and some GPUs."""
    batch_size: int | None = None
    """The largest batch; by default 32 on a CPU, which fits in its cache, and 256 elsewhere."""
    seed: int = 0
    """Seed of all random numbers."""
    name: str | None = None
    """Name of the evaluation; by default that of the suite, or "attacks"."""
    output: pathlib.Path | None = None
    """Folder of the results; by default evaluations/NAME in the workdir."""
    save_images: bool = False
    """Write the worst adversary of each image, over all attacks, to adversarial.npz."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    progress: bool = True
    """Show a progress bar for each attack."""


def main(argv: list[str]) -> None:
    prog = "python -m experiments.evaluate"
    arguments = command_line.parse(Arguments, argv, prog=prog, **command_line.documented(__doc__))

    if arguments.list:
        print(list_of_attacks())
        return

    from fs_jax import attacks
    from fs_jax._utils import backend
    from fs_jax.evaluation import check_evaluation, evaluate, fingerprint, gradient_masking
    from fs_jax.models import as_logits_fn
    from fs_jax.training.loop import read_config

    # All checks come before the long computations.
    check_arguments(arguments)
    config = None if arguments.workdir is None else read_config(arguments.workdir)
    own_epsilon = 8 / 255 if config is None else config.attack.epsilon
    epsilon = own_epsilon if arguments.epsilon is None else arguments.epsilon
    chosen_attacks(arguments, epsilon)
    output = output_folder(arguments)
    backend.enable_compilation_cache()
    model, variables, origin = load_network(
        cast(pathlib.Path, arguments.workdir or arguments.weights),  # check_arguments has checked that one is given
        checkpoint=arguments.checkpoint,
        mean=arguments.mean,
        std=arguments.std,
    )
    dataset = load_data(arguments, config)
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
        "dataset": dataset.info.name if config is None else config.dataset,  # the same after the file was moved
        "split": arguments.split,
    }
    path, resumes = output / "adversaries.npy", (output / "records.jsonl").exists()
    adversaries = open_array(path, (kept, *images.shape[1:]), resumes=resumes)
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
    """A table of all attacks with their settings."""
    import tabulate

    from fs_jax.attacks import REGISTRY, Attack, Specification

    def word(attack: Specification) -> str:
        return attack.name + ("-K" if attack.steps_in_name else "") + ("[xN]" if attack.every_run else "")

    def text(value: object) -> str:
        return command_line.shown(value) if isinstance(value, float) else str(value)

    def settings(attack: Specification) -> str:
        given = {name: value for name, value in Attack(attack).settings.items() if value is not None}
        return ", ".join(f"{name} {text(value)}" for name, value in given.items())

    rows = [[word(attack), attack.summary, settings(attack)] for attack in REGISTRY.values()]
    table = tabulate.tabulate(rows, headers=["attack", "description", "settings"], maxcolwidths=[None, 50, 50])
    return f"{table}\n\nK: number of steps. N: number of restarts. Settings are those for radius 8/255."


def check_arguments(arguments: Arguments) -> None:
    """Check the arguments, before any file is read."""
    from fs_jax._utils.validation import check_choice, check_number
    from fs_jax.evaluation.suites import SUITES

    if (arguments.workdir is None) == (arguments.weights is None):
        got = "none" if arguments.workdir is None else "both"
        raise ValueError(
            f"workdir, weights: expected one network; got {got}. Give --workdir (a folder of experiments.train) or "
            "--weights (a file)."
        )
    if arguments.weights is not None and not arguments.weights.exists():
        raise ValueError(f"weights: expected a file; there is no file {arguments.weights}. Check the path.")
    if arguments.weights is not None and arguments.weights.is_dir():
        raise ValueError(
            f"weights: expected a file; {arguments.weights} is a folder. Give a training run's as --workdir."
        )
    for name in ("mean", "std"):
        if arguments.workdir is not None and getattr(arguments, name) is not None:
            raise ValueError(f"{name}: expected this option with --weights only; a training run has its own value.")
    if arguments.workdir is not None and not (arguments.dataset or "moved.npz").endswith(".npz"):
        raise ValueError(
            f"dataset: expected, with --workdir, the new path of the training run's .npz file; got {arguments.dataset}."
        )
    if arguments.weights is not None and arguments.output is None:
        raise ValueError("output: expected a folder for the results; --weights has no default.")
    if arguments.suite is not None:
        check_choice("suite", arguments.suite, SUITES)
    if arguments.suite is not None and (arguments.attacks or arguments.restarts != 1):
        raise ValueError("suite: expected no --attacks and no --restarts with it; a suite has its own.")
    if arguments.shard is not None and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", arguments.shard):
        raise ValueError(
            f"shard: expected the number of a part and of all parts, such as 2/4; got {arguments.shard!r}."
        )
    if arguments.shard is not None and int(arguments.shard.split("/")[0]) > int(arguments.shard.split("/")[1]):
        raise ValueError(f"shard: expected a part that is at most the number of parts; got {arguments.shard}.")
    if arguments.merge and arguments.output is not None and (arguments.output / "records.jsonl").exists():
        raise ValueError(
            f"merge: expected a new folder as --output; {arguments.output} has an evaluation. To resume it, omit "
            "--merge."
        )
    for part in arguments.merge:
        if not (part / "records.jsonl").exists():
            raise ValueError(f"merge: expected folders of evaluations; {part} has no records.jsonl.")
    check_number("first", arguments.first, at_least=0, integer=True)
    check_number("seed", arguments.seed, at_least=0, at_most=2**32 - 1, integer=True)
    for name in ("num_images", "gradient_free_images", "spsa_directions", "batch_size"):
        if getattr(arguments, name) is not None:
            check_number(name, getattr(arguments, name), at_least=1, integer=True)


def load_data(arguments: Arguments, config: Any) -> Any:
    """The data set: that of the training run, if there is a configuration of one, or that of the command line."""
    from fs_jax import data
    from fs_jax.training.loop import training_fingerprint

    if config is None:
        return data.load(arguments.dataset or "cifar10", data_dir=arguments.data_dir)
    from_file = config.dataset.endswith(".npz")
    if arguments.dataset is not None and not from_file:
        raise ValueError(f"dataset: expected none, as the training run's is {config.dataset}; got {arguments.dataset}.")
    name = arguments.dataset or config.dataset
    if from_file and not pathlib.Path(name).exists():
        raise ValueError(
            f"dataset: expected the training run's data, {config.dataset}; there is no file {name}. If it was moved, "
            "give its new path: --dataset FILE.npz."
        )
    dataset = data.load(name, data_dir=arguments.data_dir)
    if from_file and config.data not in (None, training_fingerprint(dataset)):
        raise ValueError(
            f"dataset: expected the data that the network was trained on, {config.dataset}; {name} has other training "
            "images or labels, or another augmentation. Give another file: --dataset FILE.npz."
        )
    return dataset


def chosen_images(arguments: Arguments, total: int) -> slice:
    """The images to evaluate, of a split with `total` images."""
    last = total if arguments.num_images is None else min(total, arguments.first + arguments.num_images)
    if not arguments.first < last:
        raise ValueError(
            f"first: expected less than {total}, the number of images in the split; got {arguments.first}."
        )
    if arguments.shard is None:
        return slice(arguments.first, last)
    part, parts = map(int, arguments.shard.split("/"))
    ends = [arguments.first + (last - arguments.first) * i // parts for i in (part - 1, part)]
    if ends[0] == ends[1]:
        raise ValueError(f"shard: expected at most as many parts as images, {last - arguments.first}; got {parts}.")
    return slice(*ends)


def chosen_attacks(arguments: Arguments, epsilon: float, num_classes: int = 10) -> list:
    """The attacks by name; or those of the suite, with the sweep over radii."""
    from fs_jax.evaluation import gradient_masking, parse_attack, suite

    if arguments.suite is None:
        words = dict.fromkeys(("clean", *(arguments.attacks or ("fgsm", "pgd-20", "cw-20"))))
        return [
            parse_attack(word, epsilon, step_size=arguments.step_size, restarts=arguments.restarts) for word in words
        ]
    chosen = suite(
        arguments.suite,
        epsilon=epsilon,
        step_size=arguments.step_size,
        gradient_free_images=arguments.gradient_free_images,
        num_directions=arguments.spsa_directions,
        num_classes=num_classes,
    )
    return [*chosen, *gradient_masking.radius_attacks(SWEPT, epsilon)]


def output_folder(arguments: Arguments) -> pathlib.Path:
    """The folder of the results: a new one, or one with an evaluation to resume."""
    name = arguments.name or arguments.suite or "attacks"
    # Without --output there is a workdir, as --weights needs an output.
    output = local_path("output", arguments.output or cast(pathlib.Path, arguments.workdir) / "evaluations" / name)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder; got the file {output}. Choose another.")
    begun = {"adversaries.npy", ".records.jsonl.lock"}  # of an evaluation that was killed before its first record
    there = {path.name for path in output.iterdir()} if output.exists() else set()
    if there - begun and "records.jsonl" not in there:
        raise ValueError(f"output: expected a new folder, or one with an evaluation; got {output}. Choose another.")
    return output


def open_array(path: pathlib.Path, shape: tuple[int, ...], *, resumes: bool):
    """A memory-mapped float32 array, which keeps what was written if the process is killed."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    if not (resumes and path.exists()):
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape:
        raise ValueError(f"save_images, num_images: expected the same as when {path} was made; got others.")
    return array


def take_adversaries(part: pathlib.Path, adversaries, first: int) -> None:
    """Copy the adversaries of a part of the images, as many as are kept."""
    import numpy as np

    from fs_jax.evaluation import Journal

    begin = Journal.header(part / "records.jsonl")["first"] - first
    of_part = np.load(part / "adversaries.npy", mmap_mode="r")[: max(0, len(adversaries) - begin)]
    wanted = min(Journal.header(part / "records.jsonl")["images"], len(adversaries) - begin)
    if begin < 0 or len(of_part) < wanted:
        raise ValueError(f"merge: expected a part of these images, with --save-images if it is given here; got {part}.")
    adversaries[begin : begin + len(of_part)] = of_part


def leaderboard(model, about: dict[str, Any], epsilon: float, summary: dict[str, Any]) -> dict[str, Any]:
    """AutoAttack's settings, and the result in RobustBench's format."""
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
    """Write each image's adversary of the lowest margin; `robust` is 1, 0, or -1 for unknown."""
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
