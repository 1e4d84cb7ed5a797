"""What the results say of the paper's claims: each claim is checked by numbers, and the sentence is made of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from experiments.paper.experiment import Data
from experiments.paper.tables import EQUAL
from fs_jax.evaluation.statistics import accuracy

Results = Mapping[str, Data]
"""A scale's results, by the experiment's name."""


class Finding(NamedTuple):
    """A claim, and what one scale's results say of it."""

    claim: str
    verdict: str
    """agrees, disagrees or undetermined."""
    evidence: str


def findings(results: Results) -> list[Finding]:
    """Of all claims that these results can check."""
    found = []
    for claim, check in CLAIMS:
        try:
            verdict, evidence = check(results)
        except KeyError:  # a row or an experiment that isn't there
            continue
        found.append(Finding(claim, verdict, evidence))
    return found


def percent(results: Results, experiment: str, row: str, attack: str) -> str:
    """An accuracy with its interval, as text."""
    return said(results[experiment]["rows"][row][attack])


def difference(results: Results, experiment: str, row: str, attack: str) -> tuple[str, str]:
    """Verdict and text of how a row differs from its table's first."""
    of = results[experiment]["rows"][row][attack]["difference"]
    if of is None:
        raise KeyError(row)
    return of["verdict"], f"{of['points']:+.1f} ±{of['half']:.1f} points, {of['verdict']}"


def better(results: Results, experiment: str, other: str) -> tuple[str, str]:
    """Whether the paper's method is more robust than another row, under AutoAttack: "equal" is not."""
    verdict, text = difference(results, experiment, other, "square")
    ours, theirs = (percent(results, experiment, row, "square") for row in ("feature scattering", other))
    return MORE[verdict], f"Under AutoAttack {ours}, {other} {theirs}: {text}."


MORE = {"lower": "agrees", "higher": "disagrees", "equal": "disagrees", "undetermined": "undetermined"}
"""What "it does more than the others" is, if these differ from it so."""


def stable(experiment: str) -> Callable[[Results], tuple[str, str]]:
    """Whether accuracies under PGD-20 are those of the table's first row, whatever the parameter.

    Of k rows, with intervals of 1 - 0.05 / k each (Bonferroni's), so that 95% hold for all of them together.
    """

    def check(results: Results) -> tuple[str, str]:
        reference = results[experiment]["reference"]
        parameter = reference.split()[0]
        rows = {
            label: row["pgd-20"]["difference"]
            for label, row in results[experiment]["rows"].items()
            if label.startswith(parameter) and row["pgd-20"]["difference"] is not None
        }
        if not rows:
            raise KeyError(experiment)
        wider = norm.ppf(1 - 0.025 / len(rows)) / norm.ppf(0.975)
        halves = {label: wider * of["half"] for label, of in rows.items()}
        text = ", ".join(f"{label} {of['points']:+.1f} ±{halves[label]:.1f}" for label, of in rows.items())
        evidence = f"Under PGD-20, in points from {reference}, intervals for all together: {text}."
        if all(abs(of["points"]) + halves[label] <= EQUAL for label, of in rows.items()):
            return "agrees", evidence
        differs = any(abs(of["points"]) > halves[label] for label, of in rows.items())
        return ("disagrees" if differs else "undetermined"), evidence

    return check


def smoothing_is_necessary(results: Results) -> tuple[str, str]:
    _, text = difference(results, "table2_label_smoothing", "Δ = 0", "pgd-20")
    verdict, judged = difference(results, "ablation", "transport, 1 step, Δ = 0", "apgd-t alone")
    return MORE[verdict], f"Without smoothing, under PGD-20: {text}; under APGD-T, which decides here: {judged}."


def transport_matters(results: Results) -> tuple[str, str]:
    _, text = difference(results, "matching", "identity plan", "pgd-20")
    verdict, judged = difference(results, "matching", "identity plan", "square")
    evidence = (
        f"With the identity plan in the transport's place, under PGD-20: {text}; under AutoAttack, which decides here: "
        f"{judged}."
    )
    if "mechanism" in results:
        plan = results["mechanism"]["points"][-1]["plans"]["Sinkhorn, τ = 0.01"]
        evidence += (
            f" At the end of training the plan has {100 * plan['diagonal']:.1f}% of its mass on the diagonal, and the "
            f"images' gradient the identity plan's sign in {100 * plan['identity_signs']:.1f}% of the pixels."
        )
    return MORE[verdict], evidence


def pgd_tells(results: Results) -> tuple[str, str]:
    networks = results["autoattack_gap"]["networks"]
    lost = {}
    for label in ("feature scattering", "PGD-7"):
        of = networks[label]
        shares = [share for part, share in of["parts"].items() if part not in ("misclassified", "PGD-20", "robust")]
        lost[label] = share_of(round(sum(shares) * of["total"]), of["total"])
    ours, pgd = lost["feature scattering"], lost["PGD-7"]
    evidence = (
        f"Of all test images {said(ours)} survive PGD-20 and fall to AutoAttack; of the network that is trained with "
        f"PGD-7, {said(pgd)}."
    )
    return none_to_speak_of(ours), evidence


def plateaus(results: Results) -> tuple[str, str]:
    of = results["figure1_loss_curves"]["networks"]["feature scattering"]
    falls, holds = of["outcomes"]["survives PGD-20, falls to APGD-T"], of["outcomes"]["robust"]
    if not falls + holds:
        raise KeyError("no image survives PGD-20")
    share = share_of(falls, falls + holds)
    risen = [curve["loss"]["mean"] for curve in of["curves"]]
    flat = sum(loss[20] - loss[0] >= 0.95 * (loss[-1] - loss[0]) for loss in risen)
    evidence = (
        f"{flat} of {len(risen)} curves have 95% of their rise after 20 steps: they do have a plateau. But of "
        f"{falls + holds} images that survive PGD-20, {falls} fall to APGD-T ({said(share)})."
    )
    return none_to_speak_of(share), evidence


def gradient_free_attacks_are_evidence(results: Results) -> tuple[str, str]:
    row = results["gradient_free"]["rows"]["feature scattering"]
    names = {
        "spsa, 1 step": "SPSA with the defaults of 2019's libraries", "spsa": "strong SPSA",
        "local search, 10 rounds": "local search of 10 rounds", "local-search-projected": "strong local search",
        "square alone": "Square",
    }  # fmt: skip
    told = ", ".join(f"{text} {said(row[name])}" for name, text in names.items())
    evidence = f"Clean {said(row['clean'])}; {told} of {row['square alone']['total']} images."
    weak = row["spsa, 1 step"]["low"] > row["square alone"]["high"]
    return ("disagrees" if weak else "undetermined"), evidence


def clusters_hold(results: Results) -> tuple[str, str]:
    networks = results["figure2_embeddings"]["networks"]
    drops = {}
    for label, of in networks.items():
        clean, attacked = of["purity"]["clean"], of["purity"]["supervised attack"]
        drops[label] = 100 * (clean["mean"] - attacked["mean"]), 100 * np.hypot(clean["half"], attacked["half"])
    told = "; ".join(
        f"{label}: {', '.join(f'{name} {said_of_purity(p)}' for name, p in of['purity'].items())}"
        for label, of in networks.items()
    )
    less = drops["standard"][0] - drops["feature scattering"][0]
    half = np.hypot(drops["standard"][1], drops["feature scattering"][1])
    verdict = "agrees" if less > half else "disagrees" if less < -half else "undetermined"
    return verdict, f"Neighbours of the same class. {told}."


def said_of_purity(purity: Data) -> str:
    return f"{100 * purity['mean']:.0f} ±{100 * purity['half']:.0f}%"


def share_of(count: int, total: int) -> Data:
    """A share with its interval."""
    return accuracy(np.arange(total) < count)


def none_to_speak_of(share: Data) -> str:
    """What a claim is that rests on a share's being nothing, within the points that rows may differ and be equal."""
    if 100 * share["low"] > EQUAL:
        return "disagrees"
    return "agrees" if 100 * share["high"] <= EQUAL else "undetermined"


def said(of: Data) -> str:
    """An accuracy or a share with its interval, as text."""
    return f"{100 * of['accuracy']:.1f}% [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"


CLAIMS: tuple[tuple[str, Callable[[Results], tuple[str, str]]], ...] = (
    (
        "Feature scattering is more robust than adversarial training with PGD.",
        lambda results: better(results, "main_table", "PGD-7"),
    ),
    (
        "One step is enough: at equal passes through the network it is better than seven of PGD.",
        lambda results: better(results, "equal_passes", "PGD-7, equal passes"),
    ),
    ("Accuracy under PGD is what the defence is worth.", pgd_tells),
    ("Loss curves that reach a plateau speak for robustness (figure 1).", plateaus),
    ("High accuracy under gradient-free attacks shows that no gradient is masked.", gradient_free_attacks_are_evidence),
    ("Matching by transport is what makes it work.", transport_matters),
    ("Label smoothing is necessary: without it the method is less robust (table 2).", smoothing_is_necessary),
    ("Results are stable in Sinkhorn's τ (table 3).", stable("table3_sinkhorn_tau")),
    ("Results are stable in IPOT's β (table 4).", stable("table4_ipot_beta")),
    ("Attacked, clusters of features keep their classes better than the standard network's (figure 2).", clusters_hold),
)
