"""The report of an evaluation: text in Markdown, and figures."""

import pathlib
from typing import Any

from experiments.output import made_on

HOW_TO_READ = """\
Accuracy in % with 95% intervals. *Decides*: *last iterate* judges an attack as the paper's code does, so that numbers
can be compared; *any iterate* is stronger, and drops an image as soon as it is misclassified. *Images*: the number of
attacked images, and the number that the accuracy counts. They differ if an attack skips images that the clean network
or earlier attacks misclassify; these count as misclassified. *Worst case*: the accuracy over all attacks together, on
the images that all of them cover; *unknown* is the number of other images. *Lowest run*: the accuracy after the
strongest random start alone; *accuracy* is that after all of them. *Seconds* include compilation. *Forward*,
*backward*: passes of single images (of local search, an upper bound)."""


def report_text(summary: dict[str, Any], figures: set[str]) -> str:
    """The report in Markdown, with the figures that were drawn."""
    import tabulate

    from fs_jax import report

    config = summary.get("config")
    origin = f"{config['method']}, step {summary['step']:,}" if config else summary["file"]
    together = [attack for attack in summary["attacks"] if not attack["apart"]]
    apart = [attack for attack in summary["attacks"] if attack["apart"]]
    several = len(summary["environments"]) > 1
    parts = [
        f"# {summary['network']} ({origin}) under attack",
        f"{summary['dataset']}, {summary['images']:,} {summary['split']} images, L∞ radius "
        f"{report.radius(summary['epsilon'])}, seed {summary['seed']}. Weights {summary['weights']}. On "
        f"{made_on(summary['environments'][-1])}."
        + (
            f" Parts were computed elsewhere, in {len(summary['environments'])} environments in total."
            if several
            else ""
        ),
        *(f"**Warning.** {warning}" for warning in summary["warnings"] or ()),
        report.attack_table({"attacks": together, "worst": summary["worst"]}),
        HOW_TO_READ,
    ]
    if apart:
        parts += [
            "Not in the worst case, as they have another radius, no radius, or another network's adversaries:",
            report.attack_table({"attacks": apart}),
        ]
    if "transfer_from" in summary:
        parts += [
            f"*Transfer*: adversaries that PGD-20 makes for `{summary['transfer_from']}`, classified by this network."
        ]
    if "strength" in figures:
        parts += ["![Accuracy against steps and radius](strength.png)"]
    if "examples" in figures:
        parts += ["![The first images and their worst adversaries](examples.png)"]
    if "autoattack" in summary:
        (last,) = (attack for attack in together if attack["name"] == "square")
        settings = "; ".join(
            f"{name}: {', '.join(f'{key} {value}' for key, value in of_attack.items())}"
            for name, of_attack in summary["autoattack"].items()
        )
        parts += [
            f"**AutoAttack, standard version: {100 * last['accuracy']:.2f}% are robust** ({last['correct']:,} of "
            f"{last['total']:,}). Each attack is run on the images that the earlier ones didn't misclassify. The "
            f"settings are the authors': {settings}."
        ]
    if "masking" in summary:
        rows = [[check["what"], check["verdict"], check["why"]] for check in summary["masking"]]
        parts += [
            "## Is the gradient masked?",
            "Properties of networks without gradient masking. A *no* is a sign that attacks with gradients may have "
            "found too little here. If all are *yes*, that proves nothing.",
            tabulate.tabulate(rows, headers=["expected", "met?", "numbers"], tablefmt="pipe"),
        ]
    if "surface" in figures:
        parts += [
            "![Loss surfaces](surface.png)",
            "Cross-entropy around the first images that are classified correctly. The class changes at white lines.",
        ]
    return "\n\n".join(parts) + "\n"


def draw_strength(summary: dict[str, Any], records: list[dict[str, Any]], output: pathlib.Path) -> None:
    """Draw accuracy against steps and radius, if there was any attack."""
    from fs_jax import report
    from fs_jax.evaluation import gradient_masking

    # Lines for the longest attack of each kind, on all images; marks for attacks whose last iterate decides.
    whole = [
        attack
        for attack in summary["attacks"]
        if not attack["apart"] and attack["num_images"] is None and attack["kind"] != "clean" and attack["total"]
        if attack["after"] in ([], ["clean"])
    ]
    longest = {attack["kind"]: attack for attack in whole if "by_step" in attack}
    shown = [*longest.values(), *(attack for attack in whole if "by_step" not in attack)]
    radii = gradient_masking.radius_points(summary, records)
    if shown or radii:
        # The worst case over the attacks on all images, as for the lines. (The report's may be of fewer images.)
        everywhere = [a["name"] for a in summary["attacks"] if not a["apart"] and a["num_images"] is None]
        at = [record["misclassified_at"] for record in records]
        robust = [all(of_image.get(name, -1) < 0 for name in everywhere) for of_image in at]
        report.attack_strength(shown, radii, output / "strength.png", worst=sum(robust) / len(robust))


def draw_adversaries(logits_fn, images, labels, adversaries, class_names, epsilon, output) -> None:
    """Draw the first images, if there is a perturbation and they have 1 or 3 channels."""
    from experiments.comparison import draw_examples

    if epsilon and images.shape[-1] in (1, 3):
        draw_examples(
            logits_fn, images[:SHOWN], adversaries[:SHOWN], labels[:SHOWN], class_names,
            output / "examples.png", epsilon=epsilon, title="worst case over all attacks",
        )  # fmt: skip


def draw_surfaces(logits_fn, images, labels, records, class_names, epsilon, output):
    """Draw loss surfaces of the first correctly classified images; return coarse ones, 3 x 3 points, of more images."""
    import jax

    from fs_jax import report
    from fs_jax.evaluation import as_float, gradient_masking

    key = jax.random.key(0)
    correct = [place for place, record in enumerate(records) if record["margin"]["clean"] > 0][:CHECKED_IMAGES]
    if not correct:
        return None
    few = correct[:SHOWN]
    losses, margins = gradient_masking.loss_surface(logits_fn, key, as_float(images[few]), labels[few], epsilon=epsilon)
    titles = [class_names[label] for label in labels[few]]
    report.loss_surfaces(losses, margins, output / "surface.png", epsilon=epsilon, titles=titles)
    losses, _ = gradient_masking.loss_surface(
        logits_fn, key, as_float(images[correct]), labels[correct], epsilon=epsilon, size=3
    )
    return losses


CHECKED_IMAGES = 100  # images whose loss surfaces are computed for the checklist


SHOWN = 8  # images in figures
