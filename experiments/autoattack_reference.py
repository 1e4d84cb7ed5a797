"""Our attacks beside their authors' own, image by image: `python -m experiments.autoattack_reference --reference FILE`.

The file, an `.npz`, holds a network that was trained and attacked in PyTorch, and what broke each of its images:

- `weights/NAME`: the network by PyTorch's names (a Wide-ResNet that takes images in [-1, 1]);
- `images_nhwc` (uint8), `labels`, `clean_correct`;
- `standard/ATTACK_robust`: whether each image is robust after that stage of AutoAttack's standard version (apgd-ce,
  apgd-t, fab-t, square); `alone/ATTACK_robust`: after that attack alone, on the first images; `paper/ATTACK_robust`:
  after the paper's (fgsm, pgd20, pgd100, cw20, cw100, pgd20_5starts); all at radius 8/255;
- with each of AutoAttack's `_robust`, `_seconds`: how long it took, which `experiments.benchmarks.attacks` reads.

Runs ours on the same network and images, and writes `table.md` and `result.json` into RESULTS/NAME. Stopped, the same
command goes on.
"""

import dataclasses
import pathlib
from typing import Any

import tyro

from experiments import command_line
from experiments.output import made_on, write_files

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
PAPER = {
    "fgsm": "fgsm", "pgd20": "pgd-20", "pgd100": "pgd-100", "cw20": "cw-20", "cw100": "cw-100",
    "pgd20_5starts": "pgd-20x5",
}  # fmt: skip

MOST_POINTS = 0.6  # between theirs and ours after any stage: 3 of 500 images, which another start may break
LEAST_AGREEMENT = 99  # % of the images, in the end


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare our attacks with recorded results of their authors' code."""

    reference: pathlib.Path
    """The recorded results (.npz)."""
    results: pathlib.Path = pathlib.Path("experiments/results/autoattack_reference")
    """Folder of the tables; each reference has a folder of its own in it."""
    workdir: pathlib.Path = pathlib.Path("runs/autoattack_reference")
    """Folder of the records, to go on from."""
    num_images: int | None = None
    """The first so many images; by default all."""
    batch_size: int | None = None
    """Most images at a time; by default 32 on a CPU, and 256 elsewhere."""
    seed: int = 0
    """Of the random starts."""
    progress: bool = True
    """Show a progress bar for each attack."""


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.autoattack_reference")

    from fs_jax._utils import backend
    from fs_jax.evaluation import evaluate
    from fs_jax.models import as_logits_fn

    reference = read(arguments.reference, arguments.num_images)
    model, variables = network(reference)
    images, labels = reference["images_nhwc"], reference["labels"]
    backend.enable_compilation_cache()
    name = arguments.reference.stem
    result = evaluate(
        as_logits_fn(model, variables), images, labels, [attack for _, attack in rivals(reference)],
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
    """The file's arrays, of the first images."""
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


def rivals(reference) -> list[tuple[str, Any]]:
    """By the file's names of its results, the attack of ours that each is compared with; first the clean images."""
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
    """For each attack, how many images are robust to theirs and to ours, and on how many both agree."""
    import numpy as np

    rows = []
    for name, attack in rivals(reference):
        theirs = reference[name].astype(bool)
        # An image that an earlier attack broke has no record of this one.
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
    said = [f"Written by `python -m experiments.autoattack_reference --reference {summary['reference']}`."]
    if stages:
        apart = max(round(100 * abs(row["ours"] - row["theirs"]), 6) for row in stages)
        agree = 100 * stages[-1]["agree"]
        verdict = "as strong as" if apart <= MOST_POINTS and agree >= LEAST_AGREEMENT else "not like"
        said.append(
            f"AutoAttack stage by stage: at most {apart:.1f} points apart ({MOST_POINTS} are allowed), and in the end "
            f"{agree:.1f}% of the images agree ({LEAST_AGREEMENT}% are asked for): **{verdict} the authors' own.**"
        )
    said.append(f"{network}, radius 8/255. Ours on {made_on(summary['environments'][-1])}.")
    body = tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"{body}\n\n" + "\n\n".join(said) + "\n"


if __name__ == "__main__":
    command_line.run(main)
