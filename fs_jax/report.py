"""From recorded numbers to Markdown tables and PNG figures. Pure functions: data in, a string or a file out.

matplotlib is loaded when the first figure is drawn, and no display or global state is used: each function draws a
`Figure` of its own, writes it in one move (a reader never sees half a file), and returns it.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tabulate
from jaxtyping import Float, Int

from fs_jax.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any common colour blindness can tell apart (yellow left out: too pale).
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_RIGHT, _WRONG = "#00724F", "#C24A00"  # its green and vermilion, darkened for text
_GREY = "#555555"
_STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_DPI = 160
_WORST = "worst case"


def accuracy_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of accuracies in percent with their 95% intervals: a row per network, a column per attack.

    Args:
      evaluations: Network's name to its evaluation, as `fs_jax.evaluation` writes it: a dictionary with `attacks`, a
        list of records, and `worst`, one record; a record has `accuracy`, `low` and `high` in [0, 1], those of
        `attacks` a `name`. Columns are in the order of the records, the worst case over attacks is last, and an
        attack that a network was spared leaves a dash.

    Returns:
      The table in GitHub's Markdown.

    Example:
      >>> clean = {"name": "clean", "accuracy": 0.9, "low": 0.88, "high": 0.92}
      >>> pgd = {"name": "pgd-20", "accuracy": 0.45, "low": 0.42, "high": 0.48}
      >>> print(accuracy_table({"ours": {"attacks": [clean, pgd], "worst": pgd}}))
      | network   | clean             | pgd-20            | worst case        |
      |:----------|:------------------|:------------------|:------------------|
      | ours      | 90.0 [88.0, 92.0] | 45.0 [42.0, 48.0] | 45.0 [42.0, 48.0] |
    """
    attacks, records = _records(evaluations)
    rows = [[name, *(_cell(of_network.get(attack)) for attack in attacks)] for name, of_network in records.items()]
    return tabulate.tabulate(
        rows, headers=["network", *attacks], tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(rows[0])
    )


def caption(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """State what a table or a figure of these evaluations shows: images, radius, restarts, interval.

    Args:
      evaluations: As in `accuracy_table`; records may also have `total`, `epsilon` and `restarts`.

    Returns:
      One sentence without its full stop. What differs between records is given as a range.

    Example:
      >>> record = {"name": "pgd-20", "accuracy": 0.45, "low": 0.42, "high": 0.48}
      >>> record |= {"total": 10_000, "epsilon": 8 / 255, "restarts": 5}
      >>> caption({"ours": {"attacks": [record], "worst": record}})
      'Accuracy in % of 10,000 images with 95% intervals; L∞ radius 8/255; 5 restarts'
    """
    _, networks = _records(evaluations)
    records = [record for of_network in networks.values() for record in of_network.values()]

    attacked = [
        record for record in records if record["name"] != "clean"
    ]  # a clean pass has neither radius nor restarts

    def values(among: Sequence[Mapping[str, Any]], key: str) -> list:
        return sorted({record[key] for record in among if key in record})

    def span(numbers: Sequence[str]) -> str:
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    text = "Accuracy in %"
    if totals := values(records, "total"):
        text += f" of {span([f'{total:,}' for total in totals])} images"
    text += " with 95% intervals"
    if radii := values(attacked, "epsilon"):
        text += f"; L∞ radius {span([radius(value) for value in radii])}"
    if (restarts := values(attacked, "restarts")) and restarts[-1] > 1:
        text += f"; {span([str(number) for number in restarts])} restarts"
    return text


def accuracy_bars(
    evaluations: Mapping[str, Mapping[str, Any]], path: str | os.PathLike, *, title: str | None = None
) -> "Figure":
    """Draw accuracies as bars with their 95% intervals: a group per attack, a colour per network.

    Args:
      evaluations: As in `accuracy_table`.
      path: The PNG file to write.
      title: A title above the bars.

    Returns:
      The figure; its one axes has a container of bars per network, each with a bar per attack.

    Example:
      >>> import pathlib, tempfile
      >>> clean = {"name": "clean", "accuracy": 0.9, "low": 0.88, "high": 0.92}
      >>> figure = accuracy_bars({"ours": {"attacks": [clean], "worst": clean}}, tempfile.mkdtemp() + "/bars.png")
      >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
      ['clean', 'worst case']
    """
    attacks, networks = _records(evaluations)
    path = _png(path)
    share = 0.84 / len(networks)  # of the unit between two groups
    inches = max(5.0, 1.0 + 0.42 * len(attacks) * (len(networks) + 0.6))
    with _figure(figsize=(inches, 3.5)) as figure:
        axes = figure.add_subplot()
        for index, (name, records) in enumerate(networks.items()):
            offset = (index - (len(networks) - 1) / 2) * share
            drawn = [(place, records[attack]) for place, attack in enumerate(attacks) if attack in records]
            places = [place + offset for place, _ in drawn]
            heights = np.array([100 * record["accuracy"] for _, record in drawn])
            lows = np.array([100 * record["low"] for _, record in drawn])
            highs = np.array([100 * record["high"] for _, record in drawn])
            axes.bar(
                places, heights, 0.92 * share, label=name, color=_colour(index, len(networks)),
                yerr=np.maximum(0, [heights - lows, highs - heights]),
                error_kw={"elinewidth": 0.9, "capsize": 2.0, "capthick": 0.9, "ecolor": "#222222"},
            )  # fmt: skip
            for place, height, high in zip(places, heights, highs, strict=True):
                axes.annotate(
                    f"{height:.1f}", (place, max(height, high)), (0, 2), textcoords="offset points",
                    ha="center", va="bottom", fontsize=7, color=_GREY,
                )  # fmt: skip
        axes.set_xticks(range(len(attacks)), attacks)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlim(-0.55, len(attacks) - 0.45)
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("accuracy (%)")
        if _WORST in attacks and len(attacks) > 1:  # set apart what isn't an attack of its own
            axes.axvline(len(attacks) - 1.5, color="#BBBBBB", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel(caption(evaluations), color=_GREY, fontsize=8, labelpad=6)
        # As the legend's title, since constrained layout would let a title of the figure and the legend overlap.
        figure.legend(loc="outside upper center", ncols=_columns(networks, inches), title=title, title_fontsize=10)
        _save(figure, path)
    return figure


def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> "Figure":
    """Draw loss and accuracies over epochs, a colour per run.

    Args:
      metrics: Run's name to its rows, as `fs_jax.files.read_jsonl` gives them. Each has `step` and `epoch` (those seen,
        a fraction inside one) and some of `loss` (nats), `accuracy` and `natural_accuracy` (in [0, 1], on the images
        trained on and on these before the attack), `monitor_clean` and `monitor_robust` (in [0, 1], on the
        monitored images). A resumed run may log a step again: the later value counts.
      path: The PNG file to write.

    Returns:
      The figure: an axes for the loss, one for the accuracies in training, and one for the monitored images where a
      row has them.

    Example:
      >>> import tempfile
      >>> rows = [{"step": s, "epoch": s / 10, "loss": 2 / s, "accuracy": 0.3, "natural_accuracy": 0.5} for s in (1, 2)]
      >>> figure = training_curves({"ours": rows}, tempfile.mkdtemp() + "/curves.png")
      >>> [axes.get_title() for axes in figure.axes]
      ['training loss', 'training accuracy']
    """
    if not metrics or not any(metrics.values()):
        raise ValueError(f"metrics: expected rows of at least one run; got {dict(metrics)!r}.")
    path = _png(path)
    runs = {name: _by_step(name, rows) for name, rows in metrics.items()}
    monitored = any("monitor_clean" in row or "monitor_robust" in row for rows in runs.values() for row in rows)
    panels = 3 if monitored else 2
    with _figure(figsize=(3.6 * panels, 3.3)) as figure:
        loss, training, *held_out = figure.subplots(1, panels, sharex=True)
        smoothed = False
        for index, (name, rows) in enumerate(runs.items()):
            colour = _colour(index, len(runs))
            smoothed |= _curve(loss, rows, "loss", colour, label=name)
            smoothed |= _curve(training, rows, "natural_accuracy", colour, scale=100, linestyle=_CLEAN)
            smoothed |= _curve(training, rows, "accuracy", colour, scale=100)
            for axes in held_out:
                marks = {"scale": 100, "marker": "o", "markersize": 3.5, "smooth": False}
                _curve(axes, rows, "monitor_clean", colour, linestyle=_CLEAN, **marks)
                _curve(axes, rows, "monitor_robust", colour, **marks)
        loss.set_title("training loss")
        loss.set_ylabel("cross-entropy (nats)")
        accuracies = [(training, "training accuracy", "as trained on")]
        accuracies += [(axes, "accuracy on monitored images", "attacked") for axes in held_out]
        for axes, title, solid in accuracies:
            axes.set_title(title)
            axes.set_ylabel("accuracy (%)")
            axes.set_ylim(0, 100)
            _line_style_legend(axes, solid)
        for axes in figure.axes:
            axes.set_xlabel("epoch")
            axes.margins(x=0.02)
            axes.locator_params(axis="x", integer=True, nbins=6)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=_columns(runs, 3.6 * panels))
        if smoothed:
            figure.supxlabel("pale: values as logged; strong: their running mean", fontsize=8, color=_GREY)
        _save(figure, path)
    return figure


def attack_table(evaluation: Mapping[str, Any]) -> str:
    """Markdown table of one network's evaluation: a row per attack, and the worst case last.

    Args:
      evaluation: What `fs_jax.evaluation.evaluate` sums up: `attacks`, records with `name`, `judged_by`, `attacked`,
        `total`, `accuracy`, `low`, `high`, `lowest_single_run` (a dash where there was one run), `seconds`, and
        `forward` and `backward`, the passes of single images; and, if there is one, `worst`.

    Returns:
      The table in GitHub's Markdown.

    Example:
      >>> clean = {"name": "clean", "judged_by": "the image", "attacked": 50, "total": 50, "seconds": 0.12}
      >>> clean |= {"accuracy": 0.9, "low": 0.79, "high": 0.96, "lowest_single_run": None, "forward": 50, "backward": 0}
      >>> print(attack_table({"attacks": [clean], "worst": clean}))
      | attack     | decides   | images   | accuracy, %       | lowest run   | seconds   | forward   | backward   |
      |:-----------|:----------|:---------|:------------------|:-------------|:----------|:----------|:-----------|
      | clean      | the image | 50 of 50 | 90.0 [79.0, 96.0] | –            | 0.1       | 50        | 0          |
      | worst case |           |          | 90.0 [79.0, 96.0] |              |           |           |            |
    """
    rows = [
        [
            record["name"],
            record["judged_by"],
            f"{record['attacked']:,} of {record['total']:,}",
            _cell(record),
            f"{100 * record['lowest_single_run']:.1f}" if record["lowest_single_run"] is not None else "–",
            f"{record['seconds']:,.1f}",
            f"{record['forward']:,}",
            f"{record['backward']:,}",
        ]
        for record in evaluation["attacks"]
    ]
    if "worst" in evaluation:
        rows.append([_WORST, "", "", _cell(evaluation["worst"]), "", "", "", ""])
    headers = ["attack", "decides", "images", "accuracy, %", "lowest run", "seconds", "forward", "backward"]
    return tabulate.tabulate(
        rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(headers)
    )


def attack_strength(
    attacks: Sequence[Mapping[str, Any]],
    radii: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    worst: float | None = None,
) -> "Figure":
    """Draw accuracy against the strength of attacks: against their steps, and against the radius.

    Args:
      attacks: Records of an evaluation with `name`. Those with `by_step`, pairs of a number of steps and the accuracy
        after it, become lines; the others have `num_steps` and `accuracy`, and become marks.
      radii: Accuracies at several radii: `epsilon`, `accuracy`, `low`, `high`.
      path: The PNG file to write.
      worst: The accuracy over all attacks, for a dashed line.

    Returns:
      The figure: an axes for the steps and one for the radii, each if there is something to show.

    Example:
      >>> import tempfile
      >>> attack = {"name": "apgd-ce", "accuracy": 0.3, "by_step": [(0, 0.6), (10, 0.4), (100, 0.3)]}
      >>> figure = attack_strength([attack], [], tempfile.mkdtemp() + "/strength.png")
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['apgd-ce']
    """
    path = _png(path)
    panels = bool(attacks) + bool(radii)
    if not panels:
        raise ValueError("attacks: expected at least one, or one radius; got none.")
    with _figure(figsize=(4.6 * panels, 3.6)) as figure:
        places = iter(figure.subplots(1, panels, squeeze=False)[0])
        if attacks:
            _against_steps(next(places), attacks, worst)
        if radii:
            axes = next(places)
            radii = sorted(radii, key=lambda record: record["epsilon"])
            levels = [255 * record["epsilon"] for record in radii]
            low, accuracy, high = (100 * np.array([r[key] for r in radii]) for key in ("low", "accuracy", "high"))
            axes.fill_between(levels, low, high, color=_PALETTE[0], alpha=0.15, linewidth=0)
            axes.plot(levels, accuracy, "o-", color=_PALETTE[0], markersize=3.5, linewidth=1.5)
            axes.set_xlabel("radius · 255")
            axes.set_xlim(0, levels[-1])
        for axes in figure.axes:
            axes.set_ylabel("accuracy (%)")
            axes.set_ylim(0, 100)
        _save(figure, path)
    return figure


def _against_steps(axes: "Axes", attacks: Sequence[Mapping[str, Any]], worst: float | None) -> None:
    lines = [record for record in attacks if "by_step" in record]
    for index, record in enumerate(lines):
        steps, accuracies = np.array(record["by_step"], dtype=np.float64).T
        axes.step(
            steps, 100 * accuracies, where="post", label=record["name"], color=_colour(index, len(lines)), linewidth=1.5
        )
    for record in attacks:
        if "by_step" not in record:
            place = (record["num_steps"], 100 * record["accuracy"])
            axes.plot(*place, "o", color=_GREY, markersize=4)
            axes.annotate(record["name"], place, (4, 4), textcoords="offset points", fontsize=7, color=_GREY)
    if worst is not None:
        axes.axhline(100 * worst, color="black", linewidth=0.9, linestyle=_CLEAN, label="all attacks together")
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps of the attack")
    if lines or worst is not None:
        axes.legend(fontsize=8)


def loss_surfaces(
    losses: Float[np.ndarray, "n k k"],
    margins: Float[np.ndarray, "n k k"],
    path: str | os.PathLike,
    *,
    epsilon: float,
    titles: Sequence[str],
) -> "Figure":
    """Draw the loss around images: along the sign of the gradient, and along random signs.

    Args:
      losses: [n, k, k]; the middle one is the image's own, rows go along the random signs, columns along the gradient.
      margins: [n, k, k], above 0 where the image is classified correctly; a line is drawn where they change sign.
      path: The PNG file to write.
      epsilon: Both axes go from minus to plus this, in units of [0, 1].
      titles: A title for each image.

    Returns:
      The figure, with an axes per image, and those of the colour bars.

    Example:
      >>> import tempfile
      >>> slope = np.linspace(0, 1, 5)[None, None] * np.ones((1, 5, 1))
      >>> figure = loss_surfaces(slope, 0.5 - slope, tempfile.mkdtemp() + "/surface.png", epsilon=0.1, titles=["cat"])
      >>> figure.axes[0].get_title()
      'cat'
    """
    from matplotlib.ticker import MaxNLocator

    path = _png(path)
    count, size, _ = losses.shape
    columns = min(4, count)
    rows = -(-count // columns)
    line = 255 * epsilon * np.linspace(-1, 1, size)
    with _figure(figsize=(0.4 + 2.5 * columns, 0.4 + 2.2 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[count:]:
            axes.set_visible(False)
        for axes, loss, margin, title in zip(grid.flat, losses, margins, titles, strict=False):
            drawn = axes.contourf(line, line, loss, 24, cmap="viridis")
            figure.colorbar(drawn, ax=axes, shrink=0.85, ticks=MaxNLocator(4)).ax.tick_params(labelsize=7)
            if margin.min() < 0 < margin.max():
                axes.contour(line, line, margin, [0.0], colors="white", linewidths=1.4)
            axes.plot(0, 0, "+", color="white", markersize=7)
            axes.set_title(title, fontsize=8)
            axes.grid(visible=False)
        figure.supxlabel("along the sign of the gradient · 255", fontsize=9)
        figure.supylabel("along random signs · 255", fontsize=9)
        _save(figure, path)
    return figure


def attack_examples(
    images: Float[np.ndarray, "n h w c"],
    adversarial: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    clean_predictions: Int[np.ndarray, "n"] | Float[np.ndarray, "n classes"],
    adversarial_predictions: Int[np.ndarray, "n"] | Float[np.ndarray, "n classes"],
    path: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    epsilon: float,
    title: str | None = None,
) -> "Figure":
    """Draw images, their perturbations magnified, and the attacked images, with what a network says of them.

    Args:
      images: [n, h, w, c] in [0, 1], with 1 channel or 3; each makes a column.
      adversarial: [n, h, w, c], the same images attacked.
      labels: [n], the true classes.
      clean_predictions: Classes predicted for `images` [n], or logits [n, classes], which give a probability too.
      adversarial_predictions: The same for `adversarial`.
      path: The PNG file to write.
      class_names: The classes' names; numbers by default.
      epsilon: The attack's radius: grey is no change, black and white are a change by minus and plus epsilon. What
        goes further is clipped.
      title: A title above the columns.

    Returns:
      The figure, with 3 n axes: the originals, the perturbations, the attacked images.

    Example:
      >>> import tempfile
      >>> images, labels = np.full((2, 8, 8, 1), 0.5), np.array([3, 7])
      >>> figure = attack_examples(
      ...   images, images + 0.1, labels, labels, np.array([3, 1]), tempfile.mkdtemp() + "/examples.png", epsilon=0.1
      ... )
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['✓ 3', '✓ 7', '', '', '✓ 3', '✗ 1']
    """
    images, adversarial, labels = np.asarray(images), np.asarray(adversarial), np.asarray(labels)
    path = _png(path)
    _check_images(images, adversarial, labels, epsilon)
    count = len(images)
    predictions = [
        _predictions(argument, given, count, class_names)
        for argument, given in (
            ("clean_predictions", clean_predictions),
            ("adversarial_predictions", adversarial_predictions),
        )
    ]
    names = [f"true: {_class_name(label, class_names)}" for label in labels]
    # Differences in the images' own type would wrap around or lose digits.
    change = 0.5 + (adversarial.astype(np.float64) - images.astype(np.float64)) / (2 * epsilon)
    rows = (
        ("original", images, predictions[0]),
        (f"perturbation\n×{_significant(1 / (2 * epsilon))}", change, None),
        ("attacked", adversarial, predictions[1]),
    )
    texts = [text for said in predictions for _, text in said] + names
    column = max(1.15, 0.3 + 0.068 * max(map(len, texts)))  # inches; 8-point letters are about 0.068 wide
    inches = max(0.5 + column * count, 0.1 * len(title or ""))
    with _figure(figsize=(inches, 4.1 + 0.25 * bool(title))) as figure:
        grid = figure.subplots(3, count, squeeze=False)
        for axes_row, (what, pictures, said) in zip(grid, rows, strict=True):
            axes_row[0].set_ylabel(what, fontsize=9, labelpad=6)
            for index, axes in enumerate(axes_row):
                axes.imshow(
                    np.clip(pictures[index].squeeze(-1) if images.shape[-1] == 1 else pictures[index], 0, 1),
                    cmap="gray", vmin=0, vmax=1, interpolation="nearest",
                )  # fmt: skip
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                for spine in axes.spines.values():
                    spine.set(visible=True, color="#BBBBBB", linewidth=0.6)
                if said is not None:
                    predicted, text = said[index]
                    right = predicted == labels[index]
                    axes.set_xlabel(
                        ("✓ " if right else "✗ ") + text, color=_RIGHT if right else _WRONG, fontsize=8, labelpad=3
                    )
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, fontsize=9, pad=4)
        if title:
            figure.suptitle(title)
        _save(figure, path)
    return figure


# What evaluations hold.


def _records(
    evaluations: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], dict[str, dict[str, Mapping[str, Any]]]]:
    """The columns in order, and for each network its records by column."""
    if not evaluations:
        raise ValueError("evaluations: expected at least one network; got none.")
    networks = {}
    for network, evaluation in evaluations.items():
        for key in ("attacks", "worst"):
            if key not in evaluation:
                raise ValueError(f"evaluations[{network!r}]: expected the key {key!r}; got {sorted(evaluation)}.")
        of_network = {}
        for record in (*evaluation["attacks"], {**evaluation["worst"], "name": _WORST}):
            _check_record(network, record)
            if record["name"] in of_network:
                raise ValueError(
                    f"evaluations[{network!r}]: expected attacks of different names; got two of {record['name']!r}."
                )
            of_network[record["name"]] = record
        networks[network] = of_network
    attacks = dict.fromkeys(name for of_network in networks.values() for name in of_network if name != _WORST)
    return [*attacks, _WORST], networks


def _check_record(network: str, record: Mapping[str, Any]) -> None:
    for key in ("name", "accuracy", "low", "high"):
        if key not in record:
            raise ValueError(f"evaluations[{network!r}]: expected records with {key!r}; got one with {sorted(record)}.")
        if key != "name" and not 0 <= record[key] <= 1:
            raise ValueError(
                f"evaluations[{network!r}], {record['name']}: expected {key} in [0, 1]; got {record[key]!r}."
            )


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "–"
    accuracy, low, high = (100 * record[key] for key in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"


def radius(epsilon: float) -> str:
    """A radius as people write it: 8/255, or 0.1 where it isn't a multiple of 1/255."""
    levels = 255 * epsilon
    whole = round(levels)
    return f"{whole}/255" if whole and math.isclose(levels, whole, rel_tol=1e-6) else f"{epsilon:.3g}"


# What metrics hold.


def _by_step(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, in order; where a step was logged twice, the later values."""
    merged: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if "step" not in row or "epoch" not in row:
            raise ValueError(f"metrics[{name!r}], row {number}: expected 'step' and 'epoch'; got {sorted(row)}.")
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


_CLEAN = (0, (3.5, 1.6))  # dashes
_SMOOTH_ABOVE = 80  # points: more than these are hard to read as they are


def _curve(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, colour: str, *,
    scale: float = 1.0, smooth: bool = True, **line: Any,
) -> bool:  # fmt: skip
    """Draw one quantity over epochs; true if it took a running mean to be readable."""
    points = [(row["epoch"], scale * row[key]) for row in rows if row.get(key) is not None]
    if not points:
        return False
    epochs, values = np.array(points, dtype=np.float64).T
    smooth = smooth and len(values) > _SMOOTH_ABOVE
    if smooth:
        axes.plot(epochs, values, color=colour, linewidth=0.6, alpha=0.25)
        values = _running_mean(values, len(values) // 25)
    axes.plot(epochs, values, color=colour, **{"linewidth": 1.6, **line})
    return smooth


def _running_mean(values: Float[np.ndarray, "n"], window: int) -> Float[np.ndarray, "n"]:
    """Means over a centred window, of the values that there are at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _line_style_legend(axes: "Axes", solid: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_GREY, linewidth=1.4, linestyle=style, label=label)
        for style, label in ((_CLEAN, "clean"), ("-", solid))
    ]
    axes.legend(handles=handles, loc="best", fontsize=8, handlelength=2.4)


# What examples hold.


def _check_images(images: np.ndarray, adversarial: np.ndarray, labels: np.ndarray, epsilon: float) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images: expected [n, h, w, 1 or 3] with n of at least 1; got shape {images.shape}.")
    if adversarial.shape != images.shape:
        raise ValueError(f"adversarial: expected the images' shape {images.shape}; got {adversarial.shape}.")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels: expected {len(images)} integers; got {labels.dtype} of shape {labels.shape}.")
    if not epsilon > 0:
        raise ValueError(f"epsilon: expected a positive radius; got {epsilon!r}.")
    for argument, pictures in (("images", images), ("adversarial", adversarial)):
        low, high = pictures.min(), pictures.max()
        if pictures.dtype.kind != "f" or not (low >= -1e-6 and high <= 1 + 1e-6):
            raise ValueError(f"{argument}: expected floats in [0, 1]; got {pictures.dtype} in [{low}, {high}].")


def _predictions(
    argument: str, given: np.ndarray, count: int, class_names: Sequence[str] | None
) -> list[tuple[int, str]]:
    """Class and words for each image."""
    given = np.asarray(given)
    if given.shape == (count,) and given.dtype.kind in "iu":
        return [(int(label), _class_name(label, class_names)) for label in given]
    if given.ndim == 2 and len(given) == count and given.dtype.kind == "f":
        exponentials = np.exp(given.astype(np.float64) - given.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        classes = given.argmax(1)
        return [
            (int(label), f"{_class_name(label, class_names)} {100 * row[label]:.0f}%")
            for label, row in zip(classes, probabilities, strict=True)
        ]
    raise ValueError(
        f"{argument}: expected {count} integers, or logits of shape ({count}, classes); "
        f"got {given.dtype} of shape {given.shape}."
    )


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    if class_names is None:
        return str(label)
    if not 0 <= label < len(class_names):
        raise ValueError(f"class_names: expected a name for class {label}; got {len(class_names)} names.")
    return class_names[label]


def _significant(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


# Figures.


@contextlib.contextmanager
def _figure(**arguments: Any) -> Iterator["Figure"]:
    """A figure in the project's style, apart from pyplot: no display is opened, and nothing has to be closed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(layout="constrained", **arguments)


def _colour(index: int, count: int) -> Any:
    if count <= len(_PALETTE):
        return _PALETTE[index]
    import matplotlib

    return matplotlib.colormaps["viridis"](0.95 * index / (count - 1))


def _columns(names: Mapping[str, Any], inches: float) -> int:
    """How many entries of a legend fit side by side."""
    return max(1, min(len(names), int(inches / (0.55 + 0.075 * max(map(len, names))))))


def _png(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: expected a name that ends in .png; got {str(path)!r}.")
    return path


def _save(figure: "Figure", path: pathlib.Path) -> None:
    """Write a PNG whole or not at all; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
