"""Time our attacks, an eager PyTorch loop and torchattacks in one process: half an hour on two CPU cores.

PyTorch's network computes in the memory format channels last, which is the fastest on a CPU.

Needs PyTorch and torchattacks: pip install --no-deps torchattacks. (Its requirements are old; the attacks used here
need PyTorch only.) The reference file (.npz) is a recording of the authors' code on a network. It is not in this
repository; `python -m experiments.autoattack_reference --help` describes its arrays and how to make one.

- PGD-20, 1,000 images: ours, an eager PyTorch loop, and torchattacks' PGD, the last two with two batch sizes each. All
  are judged at the last iterate. Ours is also timed with every iterate judged, so that misclassified images are
  dropped. Each is run once per round, after a warm-up round; times are medians over rounds.
- AutoAttack, 200 images: ours, with and without compilation; torchattacks' APGD, APGDT, FAB and Square with the
  standard version's steps (torchattacks' own AutoAttack makes 10 steps, the authors' 100) and two batch sizes. Each
  attack is run on the images that the earlier ones didn't misclassify. The seconds of the authors' code are from the
  file, scaled by the number of images.
- Savings by dropping misclassified images: PGD-1000 with 5 restarts, with and without dropping.

Writes attacks.json and attacks.md to the results folder.

Examples:
    python -m experiments.benchmarks.attacks --reference autoattack_wrn_10_2.npz
    python -m experiments.benchmarks.attacks --reference autoattack_wrn_10_2.npz --rounds 1 --results trial
"""

import dataclasses
import functools
import pathlib
import statistics

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn, timed
from experiments.output import made_on, write_files

EPSILON, STEP = 8 / 255, 2 / 255
PEER_BATCHES = (32, 100)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    reference: pathlib.Path
    """The recording of the authors' code (.npz): a network, images, and the seconds of each stage of AutoAttack."""
    pgd_images: int = 1000
    """Number of images for PGD-20; the file's images are repeated."""
    autoattack_images: int = 200
    """Number of images for AutoAttack."""
    dropping_images: int = 50
    """Number of images for PGD-1000 with 5 restarts, with and without dropping misclassified images."""
    rounds: int = 3
    """How often each PGD-20 is timed; the result is the median."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_attacks")
    """Folder for the table and the JSON file."""


def main(argv: list[str]) -> None:
    prog = "python -m experiments.benchmarks.attacks"
    arguments = command_line.parse(Arguments, argv, prog=prog, **command_line.documented(__doc__))

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
        "dropping": with_and_without_dropping(logits_fn, images, labels, arguments),
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
    """The same network in PyTorch, from images in [0, 1] with channels first.

    Inside, the memory format is channels last, the fastest on a CPU. Attacks see the other one, which torchattacks' FAB
    needs.
    """
    import torch

    from experiments.benchmarks import torch_feature_scatter as peer
    from fs_jax.models import convert

    net = peer.make(model.depth, model.width, model.num_classes).eval()
    net.load_state_dict({name: torch.tensor(array) for name, array in convert.to_torch(variables).items()})

    class ChannelsLast(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.contiguous(memory_format=torch.channels_last)

        @staticmethod
        def backward(context, gradient):
            return gradient.contiguous()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(2 * ChannelsLast.apply(x) - 1)[0]

    return Network().eval().to(memory_format=torch.channels_last)


def race_pgd(logits_fn, net, images, labels, arguments: Arguments) -> list[dict]:
    """Times of PGD-20 for each contestant, with the share of robust images."""
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
    robust = {}

    def recorded(name, run):
        robust[name] = run()

    programs = {name: functools.partial(recorded, name, run) for name, run in contestants.items()}
    times = seconds_in_turn(programs, arguments.rounds, title="PGD-20")
    return [
        {"name": name, "seconds": statistics.median(times[name]), "all": times[name], "robust": robust[name]}
        for name in contestants
    ]


def our_pgd(logits_fn, images, labels, *, num_steps, last_only, num_runs=1, spent=None) -> float:
    """Run our PGD on all images; returns the share of robust images."""
    import jax
    import numpy as np

    from fs_jax import attacks

    attack = attacks.pgd_steps(
        epsilon=EPSILON, step_size=STEP, num_steps=num_steps, num_runs=num_runs, last_only=last_only
    )
    # With restarts, all runs are made, also for misclassified images: the paper reports the lowest single run.
    reports = attacks.packed(attack, logits_fn, jax.random.key(0), images, labels, every_run=num_runs > 1)
    misclassified = np.zeros(len(labels), bool)
    for report in reports:
        for job in report.finished:
            misclassified[job.image] |= job.misclassified
        if spent is not None:
            spent.append(report.backward)
    return float(1 - misclassified.mean())


def eager_pgd(net, images, labels):
    """The usual PyTorch loop."""
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


def channels_first(images):
    """Images [N, H, W, C] as a PyTorch tensor [N, C, H, W]."""
    import torch

    return torch.tensor(images).permute(0, 3, 1, 2).contiguous()


def in_batches(attack, net, images, labels, size) -> float:
    """Run a PyTorch attack on all images, in batches; returns the share of robust images."""
    import torch

    robust = 0
    for begin in range(0, len(labels), size):
        x, y = channels_first(images[begin : begin + size]), torch.tensor(labels[begin : begin + size])
        adversarial = attack(x, y)
        with torch.no_grad():
            robust += int((net(adversarial).argmax(1) == y).sum())
    return robust / len(labels)


def race_autoattack(logits_fn, net, images, labels, arguments: Arguments, recorded: float) -> list[dict]:
    """Times of AutoAttack for each contestant, with the share of robust images after each attack."""
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

    def their_chain(size):
        x, y = channels_first(images), torch.tensor(labels)
        stages = {}
        for name, attack in {"clean": None, **torchattacks_chain(net)}.items():
            robust = []
            for begin in range(0, len(y), size):
                part, of_part = x[begin : begin + size], y[begin : begin + size]
                adversarial = part if attack is None else attack(part, of_part)
                with torch.no_grad():
                    robust.append(net(adversarial).argmax(1) == of_part)
            robust = torch.cat([torch.zeros(0, dtype=torch.bool), *robust])
            x, y = x[robust], y[robust]
            stages[name] = len(y) / len(labels)
        return stages

    for size in PEER_BATCHES:
        seconds, stages = timed(functools.partial(their_chain, size))
        rows.append({"name": f"torchattacks, batches of {size}", "seconds": seconds, "stages": stages})
    rows.append({"name": "authors' code, as recorded", "seconds": recorded * len(labels), "stages": {}})
    return rows


def torchattacks_chain(net):
    """Attacks of torchattacks with the settings of AutoAttack's standard version."""
    import torchattacks

    return {
        "apgd-ce": torchattacks.APGD(net, eps=EPSILON, steps=100, loss="ce"),
        "apgd-t": torchattacks.APGDT(net, eps=EPSILON, steps=100),
        "fab-t": torchattacks.FAB(net, eps=EPSILON, steps=100, multi_targeted=True),
        "square": torchattacks.Square(net, eps=EPSILON, n_queries=5000, resc_schedule=False),
    }


def with_and_without_dropping(logits_fn, images, labels, arguments: Arguments) -> list[dict]:
    """Times of PGD-1000 with 5 restarts, with and without dropping misclassified images."""
    images, labels = images[: arguments.dropping_images], labels[: arguments.dropping_images]
    rows = []
    for name, last_only in (("misclassified images dropped", False), ("no image dropped", True)):
        attack = functools.partial(our_pgd, logits_fn, images, labels, last_only=last_only, num_runs=5)
        spent: list[int] = []
        seconds, robust = timed(functools.partial(attack, num_steps=1000, spent=spent))
        rows.append({"name": name, "seconds": seconds, "passes": sum(spent), "robust": robust})
    return rows


def table(summary, network: str) -> str:
    """The three tables in Markdown."""
    import tabulate

    def markdown(rows, headers):
        return tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)

    arguments, environment = summary["arguments"], summary["environment"]
    stages = list(summary["autoattack"][0]["stages"])
    ours, dropping, loop, torchattacks = (
        min((row for row in summary["pgd"] if row["name"].startswith(who)), key=lambda row: row["seconds"])
        for who in ("ours, last", "ours, any", "PyTorch", "torchattacks")
    )
    pgd = [
        [
            row["name"],
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / loop['seconds']:.2f}",
            f"{row['seconds'] / torchattacks['seconds']:.2f}",
            f"{100 * row['robust']:.1f}",
        ]
        for row in summary["pgd"]
    ]
    peer, recorded = (
        min(row["seconds"] for row in summary["autoattack"] if row["name"].startswith(who))
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
    most = max(row["seconds"] for row in summary["dropping"])
    savings = [
        [
            row["name"],
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / most:.2f}",
            f"{row['passes']:,}",
            f"{100 * row['robust']:.1f}",
        ]
        for row in summary["dropping"]
    ]
    parts = [
        f"## PGD-20, {arguments['pgd_images']:,} images",
        f"Seconds: median, number of rounds: {arguments['rounds']}. The ratios divide by the time of the PyTorch loop "
        "or of torchattacks with its faster batch size. If the last iterate decides, ours takes "
        f"{ours['seconds'] / loop['seconds']:.2f} of the PyTorch loop's time; if any iterate decides, "
        f"{dropping['seconds'] / loop['seconds']:.2f}.",
        markdown(pgd, ["", "seconds", "ratio to the loop", "to torchattacks", "robust, %"]),
        f"## AutoAttack, {arguments['autoattack_images']} images",
        "Timed once each. The ratios divide by the time of torchattacks with its faster batch size, and by that of the "
        "authors' code, which was recorded on another machine with two cores and is scaled by the number of images.",
        markdown(autoattack, ["", "seconds", "ratio to torchattacks", "to the authors' code", *stages]),
        f"## PGD-1000 with 5 restarts, {arguments['dropping_images']} images",
        "All restarts are run on all images. If no image is dropped, the last iterate decides.",
        markdown(savings, ["", "seconds", "ratio", "backward passes", "robust, %"]),
        f"{network}, radius 8/255, ours in batches of {environment['batch_size']}; PyTorch with channels last. "
        f"{made_on(environment)}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    command_line.run(main)
