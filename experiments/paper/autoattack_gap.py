"""Where the accuracy between PGD-20 and AutoAttack goes: `python -m experiments.paper.autoattack_gap`."""

from collections.abc import Sequence

import numpy as np
import tabulate

from experiments.paper.attacked import RESCALED, and_autoattack, attacked
from experiments.paper.experiment import FEATURE_SCATTERING, PGD_7, STANDARD, TRADES, Data, Experiment, Finished
from experiments.paper.figures import lost_images
from experiments.paper.matching import IDENTITY, INDEPENDENT, IPOT
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from experiments.paper.tables import pooled

STEPS = {
    "misclassified": "clean",
    "PGD-20": "pgd-20",
    "more steps (APGD-CE)": "apgd-ce",
    "another loss (APGD-T)": "apgd-t",
    "nearest boundary (FAB-T)": "fab-t",
    "no gradient (Square)": "square",
}


def parts(of: Finished, datasets: int) -> Data:
    """Shares of the test images: what each attack takes of those that all before it left, and what is left."""
    correct = {name: images == 1 for name, images in pooled(of.results, datasets).items()}  # by all seeds' networks
    left, found = np.ones(len(correct["clean"]), bool), {}
    for part, attack in STEPS.items():
        found[part] = float(np.mean(left & ~correct[attack]))
        left &= correct[attack]
    rescaled = {f"x {factor:g}": correct[f"pgd-20, logits x {factor:g}"] for factor in RESCALED}
    plain = correct["pgd-20"]
    return {
        "total": len(plain),
        "parts": {**found, "robust": float(np.mean(left))},
        "rescaled": {name: float(np.mean(plain & ~of_rescaled)) for name, of_rescaled in rescaled.items()},
    }


def collect(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    return {"networks": {of.row.label: parts(of, len(scale.datasets)) for of in finished}}


def show(data: Data) -> str:
    first, *_ = data["networks"].values()
    header = ["", *first["parts"], *(f"PGD-20 on logits {name}" for name in first["rescaled"])]
    text = [
        [label, *(f"{100 * share:.1f}" for share in (*of["parts"].values(), *of["rescaled"].values()))]
        for label, of in data["networks"].items()
    ]
    return "\n\n".join([
        tabulate.tabulate(text, headers=header, tablefmt="pipe"),
        "Shares of the test images, in %: those misclassified as they are, those that each attack takes of what all "
        "before it left, and those that are robust. The last columns: images that PGD-20 leaves, and that it takes "
        "where logits are that much smaller or larger.",
    ])  # fmt: skip


EXPERIMENT = Experiment(
    name="autoattack_gap",
    title="From PGD-20 to AutoAttack",
    source="60.6 and 36.64 for the released network, by the paper and by RobustBench",
    rows=[FEATURE_SCATTERING, STANDARD, PGD_7, TRADES, IPOT, IDENTITY, INDEPENDENT],
    measurement=attacked(and_autoattack),
    collect=collect,
    show=show,
    draw=lost_images,
    reading="PGD-20 is judged by its last iterate, as in the paper, AutoAttack by any. APGD-CE ascends PGD's loss with "
    "more steps, of sizes that adapt: for what it takes PGD-20 had too small a budget. What APGD-T takes, the "
    "cross-entropy leads away from. Only what is taken by Square, which sees no gradient, or by PGD-20 on rescaled "
    "logits, from the same start, suggests gradients that are masked.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
