"""The report of an evaluation: text in Markdown, and figures."""

import pathlib
from typing import Any

from experiments.output import made_on

HOW_TO_READ = """\
Accuracy in % with 95% intervals. *Decides*: where the last iterate decides, the attack is judged as the paper's code
judges its own, so that the numbers compare; where any iterate does, it is stronger, and an image is dropped as soon as
it is misclassified. *Images*: how many were attacked, of how many the accuracy counts. An attack that spares images
spares those that are misclassified, at once or after an earlier attack, and counts them so. *Worst case*: of the images
that all its attacks were meant for; whether others are robust is unknown. *Lowest run*: of several random starts, the
one that found most; the accuracy is that after all of them. *Seconds*: with compilation. *Forward*, *backward*: passes
of one image that the attack took in all (of local search, the most that it can take)."""


def report_text(summary: dict[str, Any], figures: set[str]) -> str:
    """The report in Markdown, with those of its figures that were drawn."""
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
        + (f" Parts of it ran elsewhere, in {len(summary['environments'])} environments." if several else ""),
        *(f"**Warning.** {warning}" for warning in summary["warnings"] or ()),
        report.attack_table({"attacks": together, "worst": summary["worst"]}),
        HOW_TO_READ,
    ]
    if apart:
        parts += [
            "Apart from the worst case, as they have another radius, or none, or another network's adversaries:",
            report.attack_table({"attacks": apart}),
        ]
    if "transfer_from" in summary:
        parts += [f"*Transfer*: adversaries that PGD-20 makes for `{summary['transfer_from']}`, tried on this network."]
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
            f"{last['total']:,}). Each attack is run on the images that those before it didn't break. Their settings "
            f"are the authors': {settings}."
        ]
    if "masking" in summary:
        rows = [[check["what"], check["verdict"], check["why"]] for check in summary["masking"]]
        parts += [
            "## Is the gradient masked?",
            "What holds of a network whose gradients are honest. A *no* is a sign that attacks by gradients may have "
            "found too little here; *yes* everywhere proves nothing.",
            tabulate.tabulate(rows, headers=["expected", "is it so?", "numbers"], tablefmt="pipe"),
        ]
    if "surface" in figures:
        parts += [
            "![Loss surfaces](surface.png)",
            "Cross-entropy around the first images that are classified correctly; on the white line the class changes.",
        ]
    return "\n\n".join(parts) + "\n"


def draw_strength(summary: dict[str, Any], records: list[dict[str, Any]], output: pathlib.Path) -> None:
    """Accuracy against steps and radius, where there was an attack at all."""
    from fs_jax import report
    from fs_jax.evaluation import gradient_masking

    # Lines for attacks on all images, of each kind the longest; marks for those whose last iterate decides.
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
        # Of the attacks on all images, as the lines are: some of a suite's are on few, and so is the worst case.
        everywhere = [a["name"] for a in summary["attacks"] if not a["apart"] and a["num_images"] is None]
        at = [record["misclassified_at"] for record in records]
        robust = [all(of_image.get(name, -1) < 0 for name in everywhere) for of_image in at]
        report.attack_strength(shown, radii, output / "strength.png", worst=sum(robust) / len(robust))


def draw_adversaries(logits_fn, images, labels, adversaries, class_names, epsilon, output) -> None:
    """The first images, where there is something to see."""
    from experiments.comparison import draw_examples

    if epsilon and images.shape[-1] in (1, 3):
        draw_examples(
            logits_fn, images[:SHOWN], adversaries[:SHOWN], labels[:SHOWN], class_names,
            output / "examples.png", epsilon=epsilon, title="the worst of all attacks",
        )  # fmt: skip


def draw_surfaces(logits_fn, images, labels, records, class_names, epsilon, output):
    """Loss surfaces of the first images that are classified correctly; more of them, of 3 x 3 points, are returned."""
    import jax

    from fs_jax import report
    from fs_jax.evaluation import as_float, gradient_masking

    key = jax.random.key(0)
    correct = [place for place, record in enumerate(records) if record["margin"]["clean"] > 0][:LOOKED_AT]
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


LOOKED_AT = 100  # images that loss surfaces are drawn around


SHOWN = 8  # images in figures
