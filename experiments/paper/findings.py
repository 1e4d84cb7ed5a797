"""Check the paper's claims against the results. Verdicts and evidence are computed from the numbers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from experiments.paper.experiment import METHOD_PLAN, Data
from experiments.paper.tables import EQUAL, half_width, heading
from experiments.paper.trade_off import SUPERVISED_ROWS
from fs_jax.evaluation.statistics import accuracy, paired_difference

Results = Mapping[str, Data]
"""Results of a scale, by the name of the experiment."""


class Finding(NamedTuple):
    """A claim of the paper, and the verdict of one scale's results."""

    claim: str
    verdict: str
    """agrees, disagrees or undetermined."""
    evidence: str


def findings(results: Results) -> list[Finding]:
    """Findings for all claims that these results can check."""
    found = []
    for claim, check in CLAIMS:
        try:
            verdict, evidence = check(results)
        except NotMeasured:
            continue
        found.append(Finding(claim, verdict, evidence))
    return found


class NotMeasured(LookupError):
    """Results do not have an experiment or a row."""


def result_of(results: Results, experiment: str) -> Data:
    """The result of an experiment."""
    if experiment not in results:
        raise NotMeasured(experiment)
    return results[experiment]


def part_of(results: Results, experiment: str, label: str, part: str = "rows") -> Data:
    """A row or, as another part of a result, a network."""
    parts = result_of(results, experiment)[part]
    if label not in parts:
        raise NotMeasured(f"{experiment}: {label}")
    return parts[label]


def percent(results: Results, experiment: str, row: str, attack: str) -> str:
    """An accuracy with its interval, as text."""
    return with_interval(part_of(results, experiment, row)[attack])


def difference(results: Results, experiment: str, row: str, attack: str) -> tuple[str, str]:
    """Verdict and text for the difference between a row and the first row of its table."""
    of = part_of(results, experiment, row)[attack]["difference"]
    if of is None:  # the first row is missing
        raise NotMeasured(experiment)
    return of["verdict"], f"{of['points']:+.1f} ±{of['half']:.1f} points, {of['verdict']}"


def better(results: Results, experiment: str, other: str) -> tuple[str, str]:
    """Whether the paper's method is more robust under AutoAttack than another row. Equal rows disagree."""
    verdict, text = difference(results, experiment, other, "square")
    ours, theirs = (percent(results, experiment, row, "square") for row in ("feature scattering", other))
    return MORE[
        verdict
    ], f"AutoAttack accuracy: feature scattering {ours}, {other} {theirs}. Difference of {other}: {text}."


SMOOTHED_PGD_7 = "cross-entropy, 7 steps, Δ = 0.5, equal passes"
"""The ablation's row of PGD-7 at equal passes, with the method's label smoothing."""


def one_step_is_enough(results: Results) -> tuple[str, str]:
    verdict, evidence = better(results, "equal_passes", "PGD-7, equal passes")
    if "feature scattering, Δ = 0" in results["equal_passes"]["rows"]:
        without = percent(results, "equal_passes", "feature scattering, Δ = 0", "square")
        evidence += f" PGD-7 has no label smoothing; without it, feature scattering has {without}."
    if SMOOTHED_PGD_7 in results.get("ablation", {}).get("rows", {}):
        _, text = difference(results, "ablation", SMOOTHED_PGD_7, "apgd-t alone")
        evidence += f" PGD-7 at equal passes with the method's smoothing, under APGD-T: {text}."
    clean = percent(results, "equal_passes", "PGD-7, equal passes", "clean")
    return verdict, f"{evidence} The clean accuracy of PGD-7 after this short training is {clean}."


def labels_are_not_needed(results: Results) -> tuple[str, str]:
    verdict, text = difference(results, "ablation", "cross-entropy, 1 step, Δ = 0.5", "apgd-t alone")
    evidence = f"With one step on the cross-entropy instead, under APGD-T: {text}."
    method, supervised = "transport, 1 step, Δ = 0", "cross-entropy, 1 step, Δ = 0"
    if {method, supervised} <= results["ablation"]["rows"].keys():
        ours, theirs = (percent(results, "ablation", row, "apgd-t alone") for row in (method, supervised))
        evidence += f" Without label smoothing: feature scattering {ours}, cross-entropy {theirs}."
    if "mechanism" in results:
        signs = results["mechanism"]["points"][-1]["plans"][METHOD_PLAN]["cross_entropy_signs"]
        evidence += (
            f" At the end of training, the method's gradient has the same sign as that of the cross-entropy in "
            f"{100 * signs:.1f}% of the pixels; 50% are equal by chance."
        )
    return MORE[verdict], evidence


def worth_its_clean_accuracy(results: Results) -> tuple[str, str]:
    """Whether all supervised rows that may be as accurate on clean images are less robust.

    The intervals, two for each of k rows, have level 1 - 0.05 / (2 k) (Bonferroni).
    """
    rows = {label: part_of(results, "trade_off", label) for label in SUPERVISED_ROWS}  # all, or there is no verdict
    if any(row["clean"]["difference"] is None for row in rows.values()):
        raise NotMeasured("trade_off")
    as_accurate, possibly, robust, less_robust, text = set(), set(), set(), set(), []
    for label, row in rows.items():
        (clean, clean_half), (attacked, attacked_half) = (
            (of["points"], half_width(of, 1 - 0.05 / (2 * len(rows))))
            for of in (row[name]["difference"] for name in ("clean", "apgd-t alone"))
        )
        text += [f"{label}: clean {clean:+.1f} ±{clean_half:.1f}, under APGD-T {attacked:+.1f} ±{attacked_half:.1f}"]
        if clean - clean_half >= -EQUAL:
            as_accurate.add(label)
        if clean + clean_half >= -EQUAL:
            possibly.add(label)
        if attacked - attacked_half >= -EQUAL:
            robust.add(label)
        elif attacked + attacked_half < 0:
            less_robust.add(label)
    ours = (percent(results, "trade_off", "feature scattering", name) for name in ("clean", "apgd-t alone"))
    evidence = (
        f"Feature scattering: clean {next(ours)}, under APGD-T {next(ours)}. Differences from it in percentage points, "
        f"with simultaneous 95% intervals (Bonferroni): {'; '.join(text)}."
    )
    if as_accurate & robust:
        return "disagrees", evidence
    if as_accurate and possibly <= less_robust:
        return "agrees", evidence
    if not as_accurate:
        evidence += " By these intervals, no row is certainly as accurate on clean images (at most 2 points less)."
    if not less_robust:
        evidence += " No row is less robust."
    return "undetermined", evidence


MORE = {"lower": "agrees", "higher": "disagrees", "equal": "disagrees", "undetermined": "undetermined"}
"""Verdict on the claim that the first row is more robust, by whether the other row is lower, higher or equal."""


def stable(experiment: str) -> Callable[[Results], tuple[str, str]]:
    """Whether accuracies under PGD-20 are equal to that of the table's first row for all values of the parameter.

    The intervals of k rows have level 1 - 0.05 / k (Bonferroni), so that they hold jointly with 95%.
    """

    def check(results: Results) -> tuple[str, str]:
        result = result_of(results, experiment)
        reference = result["reference"]
        parameter = reference.split()[0]
        if any(label.startswith(parameter) for label in result["missing"]):
            raise NotMeasured(experiment)
        rows = {
            label: row["pgd-20"]["difference"]
            for label, row in result["rows"].items()
            if label.startswith(parameter) and row["pgd-20"]["difference"] is not None
        }
        halves = {label: half_width(of, 1 - 0.05 / len(rows)) for label, of in rows.items()}
        text = ", ".join(f"{label} {of['points']:+.1f} ±{halves[label]:.1f}" for label, of in rows.items())
        level = "simultaneous 95% intervals (Bonferroni)" if len(rows) > 1 else "a 95% interval"
        evidence = f"Differences from {reference} under PGD-20, in percentage points, with {level}: {text}."
        if all(abs(of["points"]) + halves[label] <= EQUAL for label, of in rows.items()):
            return "agrees", evidence
        differs = any(abs(of["points"]) > halves[label] for label, of in rows.items())
        return ("disagrees" if differs else "undetermined"), evidence

    return check


def smoothing_is_necessary(results: Results) -> tuple[str, str]:
    row = "feature scattering, Δ = 0"
    _, text = difference(results, "equal_passes", row, "pgd-20")
    verdict, judged = difference(results, "equal_passes", row, "square")
    left = percent(results, "equal_passes", row, "square")
    evidence = (
        f"Without smoothing, under PGD-20: {text}. Under AutoAttack, which decides the verdict: {judged}; {left} "
        "remain."
    )
    rows = results.get("table2_label_smoothing", {}).get("rows", {})
    if {"Δ = 0.3", "Δ = 0.7"} <= rows.keys():
        least, most = (rows[label]["pgd-20"] for label in ("Δ = 0.3", "Δ = 0.7"))
        evidence += (
            f" From Δ = 0.3 to 0.7, accuracy under PGD-20 goes from {100 * least['accuracy']:.1f}% to "
            f"{100 * most['accuracy']:.1f}% here, and from {least['paper']:.1f}% to {most['paper']:.1f}% in the paper."
        )
    return MORE[verdict], evidence


def transport_matters(results: Results) -> tuple[str, str]:
    has = "identity plan" in results.get("matching", {}).get("rows", {})
    table = "matching" if has else "equal_passes"
    _, text = difference(results, table, "identity plan", "pgd-20")
    verdict, judged = difference(results, table, "identity plan", "square")
    evidence = (
        f"With the identity plan instead of the transport, under PGD-20: {text}. Under AutoAttack, which decides the "
        f"verdict: {judged}."
    )
    if "independent plan" in results[table]["rows"]:
        matters, independent = difference(results, table, "independent plan", "square")
        evidence += f" With the independent plan, under AutoAttack: {independent}."
        if matters == "lower" and verdict != "lower":
            evidence += (
                " So a plan that matches all images equally is worse, but a gain over matching each image with "
                "itself is not seen."
            )
    if plans := results.get("ablation", {}).get("plans"):
        of = plans["differences"]["apgd-t alone"]
        evidence += (
            f" On average over the {plans['pairs']} pairs of rows of the ablation that differ in the plan only, the "
            f"identity plan changes the accuracy under APGD-T by {of['points']:+.1f} ±{of['half']:.1f} points, "
            f"{of['verdict']}. In this interval, a gain by the transport is at most "
            f"{max(0.0, of['half'] - of['points']):.1f} points."
        )
    if "mechanism" in results:
        plan = results["mechanism"]["points"][-1]["plans"][METHOD_PLAN]
        evidence += (
            f" At the end of this method's training, its plan has {100 * plan['diagonal']:.1f}% of its mass on the "
            f"diagonal, and the gradient has the same sign as with the identity plan in "
            f"{100 * plan['identity_signs']:.1f}% of the pixels."
        )
        blurred = results.get("ablation", {}).get("rows", {}).get("τ = 0.5")
        if blurred is not None and blurred["apgd-t alone"]["difference"] is not None:
            _, text = difference(results, "ablation", "τ = 0.5", "apgd-t alone")
            diagonal = results["mechanism"]["points"][-1]["plans"]["Sinkhorn, τ = 0.5"]["diagonal"]
            evidence += f" The plan at τ = 0.5 has {100 * diagonal:.1f}% there; with it, under APGD-T: {text}."
    return MORE[verdict], evidence


def pgd_tells(results: Results) -> tuple[str, str]:
    lost = {}
    part_of(results, "autoattack_gap", "feature scattering", "networks")  # or there is no verdict
    for label, of in results["autoattack_gap"]["networks"].items():
        shares = [share for part, share in of["parts"].items() if part not in ("misclassified", "PGD-20", "robust")]
        lost[label] = share_of(round(sum(shares) * of["total"]), of["total"])
    ours = lost.pop("feature scattering")
    evidence = f"{with_interval(ours)} of all test images are robust to PGD-20 but not to AutoAttack."
    evidence += " (The released network has 34 points less under AutoAttack than the paper reports under PGD-20"
    evidence += ". These results do not explain such a gap.)" if 100 * ours["high"] < 34 else ".)"
    if lost:
        evidence += (
            f" For other networks: {'; '.join(f'{name} {with_interval(share)}' for name, share in lost.items())}."
        )
    return negligible(ours), evidence


def plateaus(results: Results) -> tuple[str, str]:
    method = part_of(results, "figure1_loss_curves", "feature scattering", "networks")
    losses = [curve["loss"]["mean"] for curve in method["curves"]]
    flat = sum(loss[20] - loss[0] >= 0.95 * (loss[-1] - loss[0]) for loss in losses)
    networks = results["figure1_loss_curves"]["networks"]
    lost = {label: share for label, each in networks.items() if (share := missed(each["outcomes"]))["total"]}
    if "feature scattering" not in lost:
        raise NotMeasured("feature scattering: images that are robust to PGD-20")
    shares = "; ".join(f"{label} {of['correct']} of {of['total']}, {with_interval(of)}" for label, of in lost.items())
    evidence = (
        f"For {flat} of feature scattering's {len(losses)} images in the figure, the mean loss reaches 95% of its "
        f"total increase within 20 steps: a plateau. Images that are robust to PGD-20 but not to APGD-T: {shares}."
    )
    ours = lost["feature scattering"]
    if negligible(share_of(0, ours["total"])) != "agrees":
        evidence += f" (With {ours['total']} images that are robust to PGD-20, no result could agree.)"
    return negligible(ours), evidence


def missed(outcomes: Data) -> Data:
    """The fraction of the images that are robust to PGD-20, but not to APGD-T."""
    lost, robust = outcomes["survives PGD-20, falls to APGD-T"], outcomes["robust"]
    return share_of(lost, lost + robust)


def gradient_free_attacks_are_evidence(results: Results) -> tuple[str, str]:
    row = part_of(results, "gradient_free", "feature scattering")
    accuracies = ", ".join(
        f"{heading(name)} {with_interval(row[name])}"
        for name in ("spsa, 1 step", "spsa", "local search, 10 rounds", "local-search-projected", "square alone")
    )
    clean, weak, strong = (row[name] for name in ("clean", "spsa, 1 step", "spsa"))
    evidence = f"On {strong['total']} images: clean {with_interval(clean)}, {accuracies}."
    if "feature scattering" in results.get("autoattack_gap", {}).get("networks", {}):
        added = results["autoattack_gap"]["networks"]["feature scattering"]["parts"]["no gradient (Square)"]
        evidence += f" Square adds {100 * added:.1f}% to what AutoAttack's attacks with gradients misclassify."
    if weak["low"] <= strong["high"]:
        return "undetermined", evidence
    return "disagrees", (
        f"{evidence} SPSA with 1 step misses what it finds with 100 steps, so a high number proves nothing. (This "
        "rejects the argument; it does not show that gradients are masked.)"
    )


def clusters_hold(results: Results) -> tuple[str, str]:
    labels = ("standard", "feature scattering")
    networks = {label: part_of(results, "figure2_embeddings", label, "networks") for label in labels}
    drops = {}
    for label, of in networks.items():
        clean, attacked = (np.array(of["purity"][which]["shares"]) for which in ("clean", "supervised attack"))
        drops[label] = clean - attacked  # for each image
    spread = ", ".join(
        f"{label} {100 * (of['purity']['clean']['mean'] - of['purity']['feature scattering']['mean']):.1f}"
        for label, of in networks.items()
    )
    losses = ", ".join(
        f"{label} {100 * drop.mean():.1f} points (from {purity_text(networks[label]['purity']['clean'])} to "
        f"{purity_text(networks[label]['purity']['supervised attack'])})"
        for label, drop in drops.items()
    )
    gain, half = (100 * value for value in paired_difference(drops["standard"], drops["feature scattering"]))
    verdict = "agrees" if gain > half else "disagrees" if gain < -half else "undetermined"
    return verdict, (
        "Purity is the fraction of nearest neighbours with the same class. Under a supervised attack, it falls by: "
        f"{losses}. Difference (standard minus feature scattering): {gain:+.1f} ±{half:.1f} points. Under the attack "
        f"of feature scattering, which the paper draws too, it falls by: {spread} points."
    )


def purity_text(purity: Data) -> str:
    return f"{100 * purity['mean']:.0f} ±{100 * purity['half']:.0f}%"


def share_of(count: int, total: int) -> Data:
    """A fraction with its interval."""
    return accuracy(np.arange(total) < count)


def negligible(share: Data) -> str:
    """The verdict on a claim that a fraction is 0. It agrees if the fraction is at most EQUAL points."""
    if 100 * share["low"] > EQUAL:
        return "disagrees"
    return "agrees" if 100 * share["high"] <= EQUAL else "undetermined"


def with_interval(of: Data) -> str:
    """An accuracy or fraction with its interval, as text."""
    return f"{100 * of['accuracy']:.1f}% [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"


CLAIMS: tuple[tuple[str, Callable[[Results], tuple[str, str]]], ...] = (
    (
        "Feature scattering is more robust than adversarial training with PGD.",
        lambda results: better(results, "main_table", "PGD-7"),
    ),
    (
        "One step is enough: at equal passes through the network, it is more robust than seven steps of PGD.",
        one_step_is_enough,
    ),
    ("An attack without labels makes training more robust than one step on the cross-entropy.", labels_are_not_needed),
    (
        "The higher clean accuracy of feature scattering is worth it: at the same clean accuracy, it is more robust "
        "than one step on the cross-entropy.",
        worth_its_clean_accuracy,
    ),
    ("The matching by optimal transport makes the method work.", transport_matters),
    (
        "Label smoothing makes the method more robust (the paper's table 2, which calls it necessary).",
        smoothing_is_necessary,
    ),
    ("Results are stable in Sinkhorn's τ (the paper's table 3).", stable("table3_sinkhorn_tau")),
    ("Results are stable in IPOT's β (the paper's table 4).", stable("table4_ipot_beta")),
    ("Accuracy under PGD measures the robustness of the defence.", pgd_tells),
    ("Loss curves with a plateau are evidence of robustness (the paper's figure 1).", plateaus),
    (
        "High accuracy under gradient-free attacks is evidence that gradients are not masked.",
        gradient_free_attacks_are_evidence,
    ),
    (
        "Under a supervised attack, clusters of features mix classes less than in the standard network (the paper's "
        "figure 2).",
        clusters_hold,
    ),
)
