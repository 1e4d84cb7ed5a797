"""Up to 1,000 steps from 5 random starts (the paper's table 1): `python -m experiments.paper.table1_strong_attacks`."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tabulate

from experiments.paper.experiment import Data, Experiment, Finished, Row
from experiments.paper.jobs import result_file
from experiments.paper.runner import main
from experiments.paper.scales import Scale
from experiments.paper.tables import about, collected, heading, interval, survived, table

PAPER = {"pgd-500x5": 64.5, "pgd-1000x5": 64.2, "cw-500x5": 56.8, "cw-1000x5": 56.6}


def attacks(scale: Scale) -> list[Any]:
    """The paper's four attacks, judged at any iterate."""
    from fs_jax.attacks import Attack

    strong: dict[str, Any] = {"restarts": 5, "any_iterate": True, "num_images": scale.strong_images}
    epsilon = scale.config.attack.epsilon
    return [
        Attack("clean", num_images=scale.strong_images),
        *(Attack(kind, epsilon, num_steps=steps, **strong) for kind in ("pgd", "cw") for steps in (500, 1000)),
    ]


def with_lowest_runs(experiment: Experiment, scale: Scale, finished: Sequence[Finished]) -> Data:
    """The table; the accuracy for each attack's strongest restart alone, which the paper reports; and other attacks.

    With several networks (folds or seeds), the strongest restart is that of each. The other attacks are PGD-20 and
    AutoAttack on the same images, if the main table is finished.
    """
    data = collected(experiment, scale, finished)
    for row, results, _folders in finished:
        for place, attack in enumerate(results[0]["attacks"]):
            runs = [result["attacks"][place] for result in results]
            if attack["lowest_single_run"] is not None:
                right = sum(run["lowest_single_run"] * run["total"] for run in runs)
                lowest = right / sum(run["total"] for run in runs)
                data["rows"][row.label][attack["name"]]["lowest_single_run"] = lowest
    return {**data, "others": on_the_same_images(scale, finished[0])}


def on_the_same_images(scale: Scale, of: Finished) -> dict[str, float]:
    """Accuracy of the same networks under attacks of the main table, on the images of this one.

    Empty if the main table is not finished, or has other networks, trained or measured on another machine.
    """
    paths = [result_file(folder, scale, "main_table") for folder in of.folders]
    if not all(path.exists() for path in paths):
        return {}
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if [result["weights"] for result in results] != [result["weights"] for result in of.results]:
        return {}
    first = slice(0, scale.strong_images)
    return {
        name: float(np.mean(np.concatenate([survived(result, name)[first] for result in results])))
        for name in ("pgd-20", "cw-100", "square")
    }


def with_both(data: Data, columns: Sequence[str]) -> str:
    """The table, with a row for the strongest restarts, beside which the paper's accuracies stand."""
    (row,) = data["rows"].values()
    lowest = [
        f"{100 * row[name]['lowest_single_run']:.1f} ({row[name]['paper']:.1f})"
        if row[name]["paper"] is not None
        else ""
        for name in columns
    ]
    worst = [interval(row[name]) for name in columns]
    text = [["worst case over 5 restarts", *worst], ["lowest of 5 restarts", *lowest]]
    parts = [about(data, columns), tabulate.tabulate(text, headers=["", *map(heading, columns)], tablefmt="pipe")]
    if data["others"]:
        others = ", ".join(f"{heading(name)} {100 * share:.1f}" for name, share in data["others"].items())
        parts += [f"Accuracy under attacks of the main table on these images: {others}."]
    return "\n\n".join(parts)


EXPERIMENT = table(
    name="table1_strong_attacks",
    title="Strong white-box attacks",
    source="table 1 of the paper's supplement (the lowest accuracy of 5 restarts)",
    rows=[Row("feature scattering", paper=PAPER)],
    attacks=attacks,
    collect=with_lowest_runs,
    show=with_both,
    reading="The network of the paper's method, attacked from 5 random starts; these are the first test images of each "
    "data set. In the first row, an image counts as robust if no iterate of any restart is misclassified. The second "
    "row has, for each network, the accuracy for its strongest restart alone, as in the paper. Each attack has its own "
    "random starts, so 1,000 steps can find slightly less than 500.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
