"""Attacks side by side: ours, an eager PyTorch loop, and torchattacks, on the same weights and images, in one process.

    pip install --no-deps torchattacks
    python -m experiments.benchmarks.attacks --reference autoattack_wrn_10_2.npz   # half an hour on two cores

Needs PyTorch and torchattacks. (Its requirements are old; what is used here needs none of them but PyTorch.) The file
with network and images is that of `experiments.autoattack_reference`.

- **PGD-20**, 1,000 images: ours, judged at the last iterate as the peers are, and judged at every iterate, so that
  images leave as they fall; a plain PyTorch loop and torchattacks' PGD, each with two batch sizes. Rounds in which each
  runs once, after a run that isn't counted; medians.
- **AutoAttack**, 200 images: ours, once with its compilation and once without; torchattacks' APGD, APGDT, FAB and
  Square with the standard version's steps (its own AutoAttack takes 10 where the authors take 100). Each on what those
  before it left standing. Beside them the seconds that the file records for the authors' code, by image.
- **What it saves that fallen images leave**: PGD-1000 from 5 starts, with images leaving and without.

Writes `attacks.json` and `attacks.md` to the results folder.
"""

import dataclasses
import functools
import pathlib
import statistics

import tyro

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn, timed
from experiments.output import made_on, write_files

EPSILON, STEP = 8 / 255, 2 / 255
PEER_BATCHES = (32, 100)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time attacks against PyTorch's."""

    reference: pathlib.Path
    """Network and images (.npz), and the seconds of the authors' code."""
    pgd_images: int = 1000
    """For PGD-20; the file's images are repeated."""
    autoattack_images: int = 200
    """For AutoAttack."""
    leaving_images: int = 50
    """For PGD-1000 from 5 starts."""
    rounds: int = 3
    """Times that each PGD-20 is run; the median counts."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_attacks")
    """Folder of the table and the JSON file."""


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.benchmarks.attacks")

    import torch
    import torchattacks

    from experiments import autoattack_reference
    from fs_jax._utils import backend
    from fs_jax.evaluation import as_float
    from fs_jax.models import as_logits_fn

    reference = autoattack_reference.read(arguments.reference, None)
    model, variables = autoattack_reference.network(reference)
    logits_fn, net = as_logits_fn(model, variables), torch_network(model, variables)
    images, labels = as_float(reference["images_nhwc"]), reference["labels"]
    recorded = sum(reference[f"standard/{name}_seconds"] for name in autoattack_reference.STAGES) / len(labels)
    summary = {
        "pgd": race_pgd(logits_fn, net, images, labels, arguments),
        "autoattack": race_autoattack(logits_fn, net, images, labels, arguments, float(recorded)),
        "leaving": with_and_without_leaving(logits_fn, images, labels, arguments),
        "arguments": {**dataclasses.asdict(arguments), "reference": arguments.reference.name},
        "environment": {
            **backend.describe(),
            "batch_size": backend.batch_size(backend.platform_of([])),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "torchattacks": torchattacks.__version__,
        },
    }
    text = table(summary, f"WRN-{model.depth}-{model.width}")
    write_files(arguments.results, {"attacks.json": summary, "attacks.md": text})
    print(text)


def torch_network(model, variables):
    """The same network in PyTorch, from images in [0, 1], channels first."""
    import torch

    from experiments.benchmarks import torch_feature_scatter as peer
    from fs_jax.models import convert

    net = peer.make(model.depth, model.width, model.num_classes).eval()
    net.load_state_dict({name: torch.tensor(array) for name, array in convert.to_torch(variables).items()})

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(2 * x - 1)[0]

    return Network().eval()


def race_pgd(logits_fn, net, images, labels, arguments: Arguments) -> list[dict]:
    """PGD-20's contestants: name, seconds, and the share of images that stand."""
    import numpy as np

    places = np.resize(np.arange(len(labels)), arguments.pgd_images)
    images, labels = images[places], labels[places]
    contestants = {
        f"ours, {judged}": functools.partial(our_pgd, logits_fn, images, labels, num_steps=20, last_only=last_only)
        for judged, last_only in (("last iterate", True), ("any iterate", False))
    }
    for name, attack in (("PyTorch, eager loop", eager_pgd), ("torchattacks.PGD", torchattacks_pgd)):
        for size in PEER_BATCHES:
            contestants[f"{name}, batches of {size}"] = functools.partial(
                in_batches, functools.partial(attack, net), net, images, labels, size
            )
    standing = {}

    def noting(name, run):
        standing[name] = run()

    programs = {name: functools.partial(noting, name, run) for name, run in contestants.items()}
    times = seconds_in_turn(programs, arguments.rounds, title="PGD-20")
    return [
        {"name": name, "seconds": statistics.median(times[name]), "all": times[name], "standing": standing[name]}
        for name in contestants
    ]


def our_pgd(logits_fn, images, labels, *, num_steps, last_only, num_runs=1, spent=None) -> float:
    """PGD on all images, in batches; the share that stands."""
    import jax
    import numpy as np

    from fs_jax import attacks

    attack = attacks.pgd_steps(
        epsilon=EPSILON, step_size=STEP, num_steps=num_steps, num_runs=num_runs, last_only=last_only
    )
    # Of several starts the paper reports the lowest single run: so all are made, of a misclassified image too.
    looks = attacks.packed(attack, logits_fn, jax.random.key(0), images, labels, every_run=num_runs > 1)
    fallen = np.zeros(len(labels), bool)
    for look in looks:
        for job in look.finished:
            fallen[job.image] |= job.misclassified
        if spent is not None:
            spent.append(look.backward)
    return float(1 - fallen.mean())


def eager_pgd(net, images, labels):
    """The loop that everybody writes."""
    import torch

    x = (images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    for _ in range(20):
        x.requires_grad_()
        loss = torch.nn.functional.cross_entropy(net(x), labels)
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() + STEP * gradient.sign()
        x = torch.min(torch.max(x, images - EPSILON), images + EPSILON).clamp(0, 1)
    return x


def torchattacks_pgd(net, images, labels):
    import torchattacks

    return torchattacks.PGD(net, eps=EPSILON, alpha=STEP, steps=20)(images, labels)


def in_batches(attack, net, images, labels, size) -> float:
    """An attack of PyTorch's on all images; the share that stands."""
    import torch

    standing = 0
    for begin in range(0, len(labels), size):
        x = torch.tensor(images[begin : begin + size]).permute(0, 3, 1, 2).contiguous()
        y = torch.tensor(labels[begin : begin + size])
        adversarial = attack(x, y)
        with torch.no_grad():
            standing += int((net(adversarial).argmax(1) == y).sum())
    return standing / len(labels)


def race_autoattack(logits_fn, net, images, labels, arguments: Arguments, recorded: float) -> list[dict]:
    """AutoAttack's contestants: name, seconds, and the share that stands after each attack."""
    import jax
    import torch

    from fs_jax import attacks

    images, labels = images[: arguments.autoattack_images], labels[: arguments.autoattack_images]
    rows = []
    our_chain = functools.partial(
        attacks.autoattack, logits_fn, jax.random.key(0), images, labels, epsilon=EPSILON, progress=True
    )
    for name in ("ours, compilation included", "ours"):
        seconds, record = timed(our_chain)
        rows.append({"name": name, "seconds": seconds, "stages": record.stages})

    def their_chain():
        x, y = torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
        stages = {}
        for name, attack in {"clean": None, **torchattacks_chain(net)}.items():
            standing = []
            for begin in range(0, len(y), PEER_BATCHES[-1]):
                part, of_part = x[begin : begin + PEER_BATCHES[-1]], y[begin : begin + PEER_BATCHES[-1]]
                adversarial = part if attack is None else attack(part, of_part)
                with torch.no_grad():
                    standing.append(net(adversarial).argmax(1) == of_part)
            standing = torch.cat([torch.zeros(0, dtype=torch.bool), *standing])
            x, y = x[standing], y[standing]
            stages[name] = len(y) / len(labels)
        return stages

    seconds, stages = timed(their_chain)
    rows.append({"name": "torchattacks", "seconds": seconds, "stages": stages})
    rows.append({"name": "authors' code, as recorded", "seconds": recorded * len(labels), "stages": {}})
    return rows


def torchattacks_chain(net):
    """Its attacks with the settings of AutoAttack's standard version."""
    import torchattacks

    return {
        "apgd-ce": torchattacks.APGD(net, eps=EPSILON, steps=100, loss="ce"),
        "apgd-t": torchattacks.APGDT(net, eps=EPSILON, steps=100),
        "fab-t": torchattacks.FAB(net, eps=EPSILON, steps=100, multi_targeted=True),
        "square": torchattacks.Square(net, eps=EPSILON, n_queries=5000, resc_schedule=False),
    }


def with_and_without_leaving(logits_fn, images, labels, arguments: Arguments) -> list[dict]:
    """PGD-1000 from 5 starts, both ways: seconds, passes, and the share that stands."""
    images, labels = images[: arguments.leaving_images], labels[: arguments.leaving_images]
    rows = []
    for name, last_only in (("fallen images leave", False), ("no image leaves", True)):
        attack = functools.partial(our_pgd, logits_fn, images, labels, last_only=last_only, num_runs=5)
        spent: list[int] = []
        seconds, standing = timed(functools.partial(attack, num_steps=1000, spent=spent))
        rows.append({"name": name, "seconds": seconds, "passes": sum(spent), "standing": standing})
    return rows


def table(summary, network: str) -> str:
    """All three in Markdown."""
    import tabulate

    def markdown(rows, headers):
        return tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)

    arguments, environment = summary["arguments"], summary["environment"]
    stages = list(summary["autoattack"][0]["stages"])
    ours, leaver, loop, torchattacks = (
        min((row for row in summary["pgd"] if row["name"].startswith(who)), key=lambda row: row["seconds"])
        for who in ("ours, last", "ours, any", "PyTorch", "torchattacks")
    )
    pgd = [
        [
            row["name"],
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / loop['seconds']:.2f}",
            f"{row['seconds'] / torchattacks['seconds']:.2f}",
            f"{100 * row['standing']:.1f}",
        ]
        for row in summary["pgd"]
    ]
    peer, recorded = (
        next(row for row in summary["autoattack"] if row["name"].startswith(who))["seconds"]
        for who in ("torchattacks", "authors")
    )
    autoattack = [
        [
            row["name"],
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / peer:.2f}",
            f"{row['seconds'] / recorded:.2f}",
            *(f"{100 * row['stages'][name]:.1f}" if row["stages"] else "" for name in stages),
        ]
        for row in summary["autoattack"]
    ]
    most = max(row["seconds"] for row in summary["leaving"])
    leaving = [
        [
            row["name"],
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / most:.2f}",
            f"{row['passes']:,}",
            f"{100 * row['standing']:.1f}",
        ]
        for row in summary["leaving"]
    ]
    parts = [
        f"## PGD-20, {arguments['pgd_images']:,} images",
        f"Seconds: median of {arguments['rounds']} rounds. Ratios: to the faster of the peer's batch sizes. Where the "
        f"last iterate decides, ours takes {ours['seconds'] / loop['seconds']:.2f} of the plain loop's time; where any "
        f"iterate does, {leaver['seconds'] / loop['seconds']:.2f}.",
        markdown(pgd, ["", "seconds", "of the loop's", "of torchattacks'", "stand, %"]),
        f"## AutoAttack, {arguments['autoattack_images']} images",
        "One run each. The record is of another machine, of two cores too, and scaled by the number of images.",
        markdown(autoattack, ["", "seconds", "of torchattacks'", "of the record", *stages]),
        f"## PGD-1000 from 5 starts, {arguments['leaving_images']} images",
        "Every start is made of every image; where no image leaves, the last iterate decides.",
        markdown(leaving, ["", "seconds", "ratio", "backward passes", "stand, %"]),
        f"{network}, radius 8/255, ours in batches of {environment['batch_size']}. {made_on(environment)}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    command_line.run(main)
