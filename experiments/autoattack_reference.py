"""Compare our attacks with recorded results of their authors' code: an hour (WRN-10-2, 500 images, two CPU cores).

The reference file (.npz) is not in this repository. It is a recording of the authors' code: a Wide-ResNet, N images and
what their AutoAttack and the paper's attacks found for each image at radius 8/255. To make one, run their code in
PyTorch and save these arrays with numpy.savez:

- weights/NAME: each array of the network's state_dict, for fs_jax.models.convert.from_torch. The network takes images
  in [-1, 1];
- images_nhwc: uint8 [N, height, width, channels]; labels: integers [N]; clean_correct: bool [N], whether each image is
  classified correctly;
- standard/ATTACK_robust: bool [N], whether each image is robust after this stage of AutoAttack's standard version and
  the earlier ones (apgd-ce, apgd-t, fab-t, square);
- alone/ATTACK_robust: bool [M], the same for one of these attacks alone, on the first M <= N images;
- paper/ATTACK_robust: bool [N], for the paper's attacks (fgsm, pgd20, pgd100, cw20, cw100, pgd20_5starts);
- standard/ATTACK_seconds: a number, how long the stage took, for experiments.benchmarks.attacks.

Attacks without an array are not compared.

The script runs our attacks on the same network and images, and writes table.md and result.json to RESULTS/NAME. If
interrupted, rerun the command: it resumes.

Examples:
    python -m experiments.autoattack_reference --reference autoattack_wrn_10_2.npz
    python -m experiments.autoattack_reference --reference autoattack_wrn_10_2.npz --num-images 50 --results trial
"""

import dataclasses
import pathlib
from typing import Any

from experiments import command_line
from experiments.output import made_on, write_files

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
PAPER = {
    "fgsm": "fgsm", "pgd20": "pgd-20", "pgd100": "pgd-100", "cw20": "cw-20", "cw100": "cw-100",
    "pgd20_5starts": "pgd-20x5",
}  # fmt: skip

MOST_POINTS = 0.6  # largest difference after any stage: 3 of 500 images, which may depend on the random start
LEAST_AGREEMENT = 99  # % of the images, after the last stage


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    reference: pathlib.Path
    """The recording of the authors' code (.npz): a network, its images and the results, as described above."""
    results: pathlib.Path = pathlib.Path("experiments/results/autoattack_reference")
    """Folder of the tables; it gets one folder for each reference."""
    workdir: pathlib.Path = pathlib.Path("runs/autoattack_reference")
    """Folder of the records, for resuming."""
    num_images: int | None = None
    """Number of images, the first ones; by default all."""
    batch_size: int | None = None
    """The largest batch; by default 32 on a CPU, and 256 elsewhere."""
    seed: int = 0
    """Seed of the random starts."""
    progress: bool = True
    """Show a progress bar for each attack."""


def main(argv: list[str]) -> None:
    prog = "python -m experiments.autoattack_reference"
    arguments = command_line.parse(Arguments, argv, prog=prog, **command_line.documented(__doc__))

    from fs_jax._utils import backend
    from fs_jax.evaluation import evaluate
    from fs_jax.models import as_logits_fn

    reference = read(arguments.reference, arguments.num_images)
    model, variables = network(reference)
    images, labels = reference["images_nhwc"], reference["labels"]
    backend.enable_compilation_cache()
    name = arguments.reference.stem
    result = evaluate(
        as_logits_fn(model, variables), images, labels, [attack for _, attack in compared_attacks(reference)],
        batch_size=arguments.batch_size, seed=arguments.seed, journal=arguments.workdir / f"{name}.jsonl",
        progress=arguments.progress,
    )  # fmt: skip
    rows = compare(reference, result)
    summary = {
        "reference": arguments.reference.name,
        "images": len(labels),
        "agreement": rows,
        **result.summary,
    }
    folder = arguments.results / name
    text = table(summary, f"WRN-{model.depth}-{model.width}")
    write_files(folder, {"result.json": {**summary, "records": result.records}, "table.md": text})
    print(f"{text}\nWritten: {folder}")


def read(path: pathlib.Path, num_images: int | None) -> dict[str, Any]:
    """The arrays of the file, cut to the first `num_images` images."""
    import numpy as np

    with np.load(path) as file:
        return {
            name: array if name.startswith("weights/") or not array.ndim else array[:num_images]
            for name, array in file.items()
        }


def network(reference):
    from fs_jax.models import WideResNet, convert

    weights = {name.removeprefix("weights/"): a for name, a in reference.items() if name.startswith("weights/")}
    variables = convert.from_torch(weights)
    blocks = sum(name.startswith("block1_layer") for name in variables["params"])
    features, num_classes = variables["params"]["fc"]["kernel"].shape
    return WideResNet(6 * blocks + 4, features // 64, num_classes), variables


def compared_attacks(reference) -> list[tuple[str, Any]]:
    """Pairs of an array's name in the file and our attack to compare it with; the clean images come first."""
    from fs_jax.evaluation import Attack, parse_attack

    pairs = [("clean_correct", Attack("clean"))]
    pairs += [(f"paper/{theirs}_robust", parse_attack(ours)) for theirs, ours in PAPER.items()]
    before: tuple[str, ...] = ("clean",)
    for kind in STAGES:
        pairs.append((f"standard/{kind}_robust", Attack(kind, after=before)))
        before = (*before, kind)
    for kind in STAGES:
        count = len(reference.get(f"alone/{kind}_robust", ()))
        alone = Attack(kind, after=("clean",), num_images=count or None, label=f"{kind} alone", apart=True)
        pairs.append((f"alone/{kind}_robust", alone))
    return [(theirs, ours) for theirs, ours in pairs if theirs in reference]


def compare(reference, result) -> list[dict[str, Any]]:
    """For each attack, the shares of images that are robust to theirs and to ours, and on which both agree."""
    import numpy as np

    rows = []
    for name, attack in compared_attacks(reference):
        theirs = reference[name].astype(bool)
        # Images that an earlier attack misclassified have no record of this one.
        chain = (*attack.after, attack.name)
        robust = [all(record["misclassified_at"].get(link, 0) < 0 for link in chain) for record in result.records]
        ours = np.array(robust[: len(theirs)])
        rows.append(
            {
                "attack": attack.name,
                "images": len(theirs),
                "theirs": float(theirs.mean()),
                "ours": float(ours.mean()),
                "agree": float(np.mean(theirs == ours)),
                "only_theirs_fell": int(np.sum(~theirs & ours)),
                "only_ours_fell": int(np.sum(theirs & ~ours)),
            }
        )
    return rows


def table(summary: dict[str, Any], network: str) -> str:
    """The comparison in Markdown."""
    import tabulate

    rows = [
        [
            row["attack"],
            row["images"],
            f"{100 * row['theirs']:.1f}",
            f"{100 * row['ours']:.1f}",
            f"{100 * (row['ours'] - row['theirs']):+.1f}",
            f"{100 * row['agree']:.1f}",
            row["only_theirs_fell"],
            row["only_ours_fell"],
        ]
        for row in summary["agreement"]
    ]
    headers = [
        "attack", "images", "robust, theirs, %", "ours, %", "points", "agree, %", "broken only by theirs",
        "only by ours",
    ]  # fmt: skip
    stages = [row for row in summary["agreement"] if row["attack"] in STAGES]
    sentences = [f"Written by `python -m experiments.autoattack_reference --reference {summary['reference']}`."]
    if stages:
        difference = max(round(100 * abs(row["ours"] - row["theirs"]), 6) for row in stages)
        agree = 100 * stages[-1]["agree"]
        verdict = "as strong as" if difference <= MOST_POINTS and agree >= LEAST_AGREEMENT else "not like"
        sentences.append(
            f"AutoAttack: accuracies after each stage differ by at most {difference:.1f} points (limit {MOST_POINTS}), "
            f"and in the end {agree:.1f}% of the images agree (required {LEAST_AGREEMENT}%): **{verdict} the authors' "
            "own.**"
        )
    sentences.append(f"{network}, radius 8/255. Ours on {made_on(summary['environments'][-1])}.")
    body = tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"{body}\n\n" + "\n\n".join(sentences) + "\n"


if __name__ == "__main__":
    command_line.run(main)
