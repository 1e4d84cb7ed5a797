"""What the results say of the paper's claims: each claim is checked by numbers, and the sentence is made of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.paper.experiment import Data

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
    of = results[experiment]["rows"][row][attack]
    return f"{100 * of['accuracy']:.1f} ±{50 * (of['high'] - of['low']):.1f}%"


def difference(results: Results, experiment: str, row: str, attack: str) -> tuple[str, str]:
    """Verdict and text of how a row differs from the first one of its table."""
    of = results[experiment]["rows"][row][attack]["difference"]
    return of["verdict"], f"{of['points']:+.1f} ±{of['half']:.1f} points, {of['verdict']}"


def stable(experiment: str, parameter: str) -> Callable[[Results], tuple[str, str]]:
    """Whether accuracies under PGD-20 are those of the table's first row, whatever the parameter."""

    def check(results: Results) -> tuple[str, str]:
        rows = results[experiment]["rows"]
        first, *others = [row for row in rows if row.startswith(parameter)]
        told = {row: difference(results, experiment, row, "pgd-20") for row in others}
        verdicts = {verdict for verdict, _ in told.values()}
        if verdicts & {"higher", "lower"}:
            verdict = "disagrees"
        else:
            verdict = "agrees" if verdicts == {"equal"} else "undetermined"
        text = "; ".join(f"{row}: {difference_text}" for row, (_, difference_text) in told.items())
        return verdict, f"Under PGD-20, from {first}: {text}."

    return check


def smoothing_is_necessary(results: Results) -> tuple[str, str]:
    verdict, text = difference(results, "table2_label_smoothing", "Δ = 0", "pgd-20")
    evidence = f"Without smoothing, under PGD-20: {text}"
    judged, text = difference(results, "ablation", "transport, 1 step, Δ = 0", "apgd-t alone")
    evidence += f"; under APGD-T: {text}."
    if verdict == judged == "lower":
        return "agrees", evidence
    return ("undetermined" if judged == "undetermined" else "disagrees"), evidence


def better_than_pgd(results: Results) -> tuple[str, str]:
    ours = percent(results, "main_table", "feature scattering", "square")
    pgd = percent(results, "main_table", "PGD-7", "square")
    verdict, text = difference(results, "main_table", "PGD-7", "square")
    evidence = f"Under AutoAttack {ours} and PGD-7 training {pgd} (PGD-7 from scattering: {text})."
    return {"lower": "agrees", "higher": "disagrees"}.get(verdict, "undetermined"), evidence


def better_at_equal_passes(results: Results) -> tuple[str, str]:
    row = "PGD-7, equal passes"
    verdict, text = difference(results, "equal_passes", row, "square")
    ours = percent(results, "equal_passes", "feature scattering", "square")
    evidence = f"Under AutoAttack {ours} and PGD-7 {percent(results, 'equal_passes', row, 'square')} ({text})."
    return {"lower": "agrees", "higher": "disagrees"}.get(verdict, "undetermined"), evidence


def transport_matters(results: Results) -> tuple[str, str]:
    told = {attack: difference(results, "matching", "identity plan", attack) for attack in ("pgd-20", "square")}
    evidence = (
        f"With the identity plan in the transport's place, under PGD-20: {told['pgd-20'][1]}; under AutoAttack: "
        f"{told['square'][1]}."
    )
    if "mechanism" in results:
        plan = results["mechanism"]["points"][-1]["plans"]["Sinkhorn, τ = 0.01"]
        evidence += (
            f" The plan has {100 * plan['diagonal']:.1f}% of its mass on the diagonal, and its gradient the identity "
            f"plan's signs in {100 * plan['identity_signs']:.1f}% of the pixels."
        )
    verdict = told["square"][0]
    return {"lower": "agrees", "equal": "disagrees", "higher": "disagrees"}.get(verdict, "undetermined"), evidence


def pgd_tells(results: Results) -> tuple[str, str]:
    rows = results["main_table"]["rows"]
    lost = {}
    for label in ("feature scattering", "PGD-7"):
        lost[label] = 100 * (rows[label]["pgd-20"]["accuracy"] - rows[label]["square"]["accuracy"])
    pgd, judge = (percent(results, "main_table", "feature scattering", name) for name in ("pgd-20", "square"))
    evidence = (
        f"{pgd} under PGD-20 become {judge} under AutoAttack: {lost['feature scattering']:.1f} points less, and with "
        f"PGD-7 training {lost['PGD-7']:.1f}."
    )
    return ("disagrees" if lost["feature scattering"] > 2 * max(lost["PGD-7"], 1.0) else "agrees"), evidence


def plateaus(results: Results) -> tuple[str, str]:
    outcomes = results["figure1_loss_curves"]["networks"]["feature scattering"]["outcomes"]
    falls, holds = outcomes["survives PGD-20, falls to APGD-T"], outcomes["robust"]
    evidence = (
        f"Loss curves do have a plateau after some 10 steps; but of {falls + holds} images that survive PGD-20, "
        f"{falls} fall to APGD-T, and their curves look the same."
    )
    return ("disagrees" if falls > 0.05 * (falls + holds) else "agrees"), evidence


def gradient_free_attacks_are_evidence(results: Results) -> tuple[str, str]:
    of = {name: percent(results, "gradient_free", "feature scattering", name) for name in ("spsa, 1 step", "spsa")}
    square = percent(results, "gradient_free", "feature scattering", "square alone")
    evidence = (
        f"SPSA with the defaults of 2019's libraries leaves {of['spsa, 1 step']}, and strong {of['spsa']}; Square "
        f"leaves {square}."
    )
    rows = results["gradient_free"]["rows"]["feature scattering"]
    weak = rows["spsa, 1 step"]["accuracy"] - rows["square alone"]["accuracy"] > 0.1
    return ("disagrees" if weak else "undetermined"), evidence


def clusters_hold(results: Results) -> tuple[str, str]:
    networks = results["figure2_embeddings"]["networks"]
    purity = {label: {name: 100 * p["mean"] for name, p in of["purity"].items()} for label, of in networks.items()}
    told = "; ".join(
        f"{label}: {of['clean']:.0f}% clean, {of['supervised attack']:.0f}% under the supervised attack, "
        f"{of['feature scattering']:.0f}% scattered"
        for label, of in purity.items()
    )
    kept = {label: of["supervised attack"] / of["clean"] for label, of in purity.items()}
    agrees = kept["feature scattering"] > kept["standard"]
    return ("agrees" if agrees else "disagrees"), f"Neighbours of the same class: {told}."


CLAIMS: tuple[tuple[str, Callable[[Results], tuple[str, str]]], ...] = (
    ("Feature scattering is more robust than adversarial training with PGD.", better_than_pgd),
    ("One step is enough: at the same time of training it is better than seven of PGD.", better_at_equal_passes),
    ("Accuracy under PGD and CW is what the defence is worth.", pgd_tells),
    ("Loss curves that reach a plateau speak for robustness (figure 1).", plateaus),
    ("High accuracy under gradient-free attacks shows that no gradient is masked.", gradient_free_attacks_are_evidence),
    ("Matching by transport is what makes it work.", transport_matters),
    ("Label smoothing is necessary (table 2).", smoothing_is_necessary),
    ("Results are stable in Sinkhorn's τ (table 3).", stable("table3_sinkhorn_tau", "τ")),
    ("Results are stable in IPOT's β (table 4).", stable("table4_ipot_beta", "β")),
    ("Attacked, clusters of features keep their classes, and the standard network's do not (figure 2).", clusters_hold),
)
