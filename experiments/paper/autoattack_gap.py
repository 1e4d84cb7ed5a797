"""Why AutoAttack's accuracy is lower than PGD-20's: `python -m experiments.paper.autoattack_gap`."""

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
    """`parts_of_seed`, as means over the seeds."""
    seeds = len(of.results) // datasets
    each = [parts_of_seed(of.results[seed::seeds], datasets) for seed in range(seeds)]
    return {
        "total": each[0]["total"],
        **{
            field: {name: float(np.mean([of_seed[field][name] for of_seed in each])) for name in each[0][field]}
            for field in ("parts", "rescaled")
        },
    }


def parts_of_seed(results: Sequence[Data], datasets: int) -> Data:
    """Fractions of the test images: misclassified under each attack but not under the ones before it, and robust.

    Args:
      results: Evaluations of the networks of one seed, one for each data set.
      datasets: Number of data sets, or folds.
    """
    correct = {name: images == 1 for name, images in pooled(results, datasets).items()}
    robust, found = np.ones(len(correct["clean"]), bool), {}
    for part, attack in STEPS.items():
        found[part] = float(np.mean(robust & ~correct[attack]))
        robust &= correct[attack]
    rescaled = {f"x {factor:g}": correct[f"pgd-20, logits x {factor:g}"] for factor in RESCALED}
    plain = correct["pgd-20"]
    return {
        "total": len(plain),
        "parts": {**found, "robust": float(np.mean(robust))},
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
        tabulate.tabulate(text, headers=header, tablefmt="pipe", disable_numparse=True),
        "Fractions of the test images, in %. The columns up to *robust* are disjoint: images that are misclassified "
        "without an attack, images that are misclassified under an attack but not under the attacks before it, and "
        "robust images. The other columns overlap with these: images that are robust to PGD-20 but not to PGD-20 on "
        "rescaled logits.",
    ])  # fmt: skip


EXPERIMENT = Experiment(
    name="autoattack_gap",
    title="From PGD-20 to AutoAttack",
    source="60.6 (CW-100, the paper) and 36.64 (AutoAttack, RobustBench) for the released network",
    rows=[FEATURE_SCATTERING, STANDARD, PGD_7, TRADES, IPOT, IDENTITY, INDEPENDENT],
    measurement=attacked(and_autoattack),
    collect=collect,
    show=show,
    draw=lost_images,
    reading="PGD-20 is judged at its last iterate, as in the paper, and counts as the first attack here; AutoAttack is "
    "judged at any iterate. APGD-CE has PGD's loss, but more steps and adaptive step sizes: the images that it adds "
    "show what PGD-20's budget misses. The images that APGD-T adds show what another loss, with targets, finds. "
    "PGD-20 on logits x 10 shows this too, since the cross-entropy of large logits is nearly the margin. Two kinds of "
    "images suggest masked gradients: those that Square adds, since it uses no gradients, and those that PGD-20 adds "
    "on logits x 0.1, whose gradients do not underflow.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
