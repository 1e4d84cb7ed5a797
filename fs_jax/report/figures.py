"""PNG figures of recorded results: each function draws one figure, writes it to a file, and returns it."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from fs_jax.report._canvas import DASHED, GREY, PALETTE, colour_of, figure_path, legend_columns, new_figure, save
from fs_jax.report.tables import WORST, caption, records_by_network

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_bars(
    evaluations: Mapping[str, Mapping[str, Any]], path: str | os.PathLike, *, title: str | None = None
) -> "Figure":
    """Draw accuracies as bars with 95% intervals: one group for each attack, one colour for each network.

    Args:
      evaluations: As in `accuracy_table`.
      path: The .png or .svg to write.
      title: A title above the bars.

    Returns:
      The figure; its axes has one container of bars for each network, with one bar for each attack.

    Example:
      >>> import pathlib, tempfile
      >>> clean = {"name": "clean", "accuracy": 0.9, "low": 0.88, "high": 0.92}
      >>> figure = accuracy_bars({"ours": {"attacks": [clean], "worst": clean}}, tempfile.mkdtemp() + "/bars.png")
      >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
      ['clean', 'worst case']
    """
    attacks, networks = records_by_network(evaluations)
    path = figure_path(path)
    share = 0.84 / len(networks)  # width of a bar; groups are at distance 1
    inches = max(5.0, 1.0 + 0.42 * len(attacks) * (len(networks) + 0.6))
    with new_figure(figsize=(inches, 3.5)) as figure:
        axes = figure.add_subplot()
        for index, (name, records) in enumerate(networks.items()):
            offset = (index - (len(networks) - 1) / 2) * share
            drawn = [
                (place, records[attack])
                for place, attack in enumerate(attacks)
                if attack in records and records[attack]["accuracy"] is not None  # of no image
            ]
            places = [place + offset for place, _ in drawn]
            heights = np.array([100 * record["accuracy"] for _, record in drawn])
            lows = np.array([100 * record["low"] for _, record in drawn])
            highs = np.array([100 * record["high"] for _, record in drawn])
            axes.bar(
                places, heights, 0.92 * share, label=name, color=colour_of(index, len(networks)),
                yerr=np.maximum(0, [heights - lows, highs - heights]),
                error_kw={"elinewidth": 0.9, "capsize": 2.0, "capthick": 0.9, "ecolor": "#222222"},
            )  # fmt: skip
            for place, height, high in zip(places, heights, highs, strict=True):
                axes.annotate(
                    f"{height:.1f}", (place, max(height, high)), (0, 2), textcoords="offset points",
                    ha="center", va="bottom", fontsize=7, color=GREY,
                )  # fmt: skip
        axes.set_xticks(range(len(attacks)), attacks)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlim(-0.55, len(attacks) - 0.45)
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("accuracy (%)")
        if WORST in attacks and len(attacks) > 1:  # a line before the worst case, which isn't an attack
            axes.axvline(len(attacks) - 1.5, color="#BBBBBB", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel(caption(evaluations), color=GREY, fontsize=8, labelpad=6)
        # The title is the legend's, as constrained layout lets a title of the figure overlap with the legend.
        figure.legend(
            loc="outside upper center", ncols=legend_columns(networks, inches), title=title, title_fontsize=10
        )
        save(figure, path)
    return figure


def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> "Figure":
    """Draw loss and accuracies over epochs, with one colour for each training run.

    Args:
      metrics: The rows of each training run, from its `metrics.jsonl`, by the run's name. Each row has `step`, `epoch`
        (a fraction within an epoch) and some of `loss` (nats), `accuracy` and `natural_accuracy` (in [0, 1], on the
        images that the step trains on, and on the same images without the attack), `monitor_clean` and
        `monitor_robust` (in [0, 1], on the monitored images). If a resumed run logged a step twice, the later value is
        used.
      path: The .png or .svg to write.

    Returns:
      The figure: an axes for the loss, one for the accuracies in training, and one for the monitored images if any row
      has them.

    Example:
      >>> import tempfile
      >>> rows = [{"step": s, "epoch": s / 10, "loss": 2 / s, "accuracy": 0.3, "natural_accuracy": 0.5} for s in (1, 2)]
      >>> figure = training_curves({"ours": rows}, tempfile.mkdtemp() + "/curves.png")
      >>> [axes.get_title() for axes in figure.axes]
      ['training loss', 'training accuracy']
    """
    if not metrics or not any(metrics.values()):
        raise ValueError(f"metrics: expected rows of at least one run; got {dict(metrics)!r}.")
    path = figure_path(path)
    runs = {name: _by_step(name, rows) for name, rows in metrics.items()}
    monitored = any("monitor_clean" in row or "monitor_robust" in row for rows in runs.values() for row in rows)
    panels = 3 if monitored else 2
    with new_figure(figsize=(3.6 * panels, 3.3)) as figure:
        loss, training, *held_out = figure.subplots(1, panels, sharex=True)
        smoothed = False
        for index, (name, rows) in enumerate(runs.items()):
            colour = colour_of(index, len(runs))
            smoothed |= _curve(loss, rows, "loss", colour, label=name)
            smoothed |= _curve(training, rows, "natural_accuracy", colour, scale=100, linestyle=DASHED)
            smoothed |= _curve(training, rows, "accuracy", colour, scale=100)
            for axes in held_out:
                marks: dict[str, Any] = {"scale": 100, "marker": "o", "markersize": 3.5, "smooth": False}
                _curve(axes, rows, "monitor_clean", colour, linestyle=DASHED, **marks)
                _curve(axes, rows, "monitor_robust", colour, **marks)
        loss.set_title("training loss")
        loss.set_ylabel("cross-entropy (nats)")
        accuracies = [(training, "training accuracy", "images trained on")]
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
        figure.legend(
            *loss.get_legend_handles_labels(), loc="outside upper center", ncols=legend_columns(runs, 3.6 * panels)
        )
        if smoothed:
            figure.supxlabel("pale: logged values; strong: running mean", fontsize=8, color=GREY)
        save(figure, path)
    return figure


def attack_strength(
    attacks: Sequence[Mapping[str, Any]],
    radii: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    worst: float | None = None,
) -> "Figure":
    """Draw accuracy against the strength of attacks: the number of steps, and the radius.

    Args:
      attacks: Records of an evaluation with `name`. Those with `by_step`, pairs of a number of steps and the accuracy
        after it, are drawn as lines; the others have `num_steps` and `accuracy`, and are drawn as marks.
      radii: Accuracies at several radii: `epsilon`, `accuracy`, `low`, `high`.
      path: The .png or .svg to write.
      worst: The accuracy over all attacks, for a dashed line.

    Returns:
      The figure: an axes for the steps if there are attacks, and one for the radii if there are any.

    Example:
      >>> import tempfile
      >>> attack = {"name": "apgd-ce", "accuracy": 0.3, "by_step": [(0, 0.6), (10, 0.4), (100, 0.3)]}
      >>> figure = attack_strength([attack], [], tempfile.mkdtemp() + "/strength.png")
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['apgd-ce']
    """
    path = figure_path(path)
    panels = bool(attacks) + bool(radii)
    if not panels:
        raise ValueError("attacks: expected at least one, or one radius; got none.")
    with new_figure(figsize=(4.6 * panels, 3.6)) as figure:
        places = iter(figure.subplots(1, panels, squeeze=False)[0])
        if attacks:
            _against_steps(next(places), attacks, worst)
        if radii:
            axes = next(places)
            radii = sorted(radii, key=lambda record: record["epsilon"])
            levels = [255 * record["epsilon"] for record in radii]
            low, accuracy, high = (100 * np.array([r[key] for r in radii]) for key in ("low", "accuracy", "high"))
            axes.fill_between(levels, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
            axes.plot(levels, accuracy, "o-", color=PALETTE[0], markersize=3.5, linewidth=1.5)
            axes.set_xlabel("radius · 255")
            axes.set_xlim(0, levels[-1])
        for axes in figure.axes:
            axes.set_ylabel("accuracy (%)")
            axes.set_ylim(0, 100)
        save(figure, path)
    return figure


def _against_steps(axes: "Axes", attacks: Sequence[Mapping[str, Any]], worst: float | None) -> None:
    lines = [record for record in attacks if "by_step" in record]
    for index, record in enumerate(lines):
        steps, accuracies = np.array(record["by_step"], dtype=np.float64).T
        axes.step(
            steps,
            100 * accuracies,
            where="post",
            label=record["name"],
            color=colour_of(index, len(lines)),
            linewidth=1.5,
        )
    for record in attacks:
        if "by_step" not in record:
            place = (record["num_steps"], 100 * record["accuracy"])
            axes.plot(*place, "o", color=GREY, markersize=4)
            axes.annotate(record["name"], place, (4, 4), textcoords="offset points", fontsize=7, color=GREY)
    if worst is not None:
        axes.axhline(100 * worst, color="black", linewidth=0.9, linestyle=DASHED, label="all attacks together")
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
      losses: [n, k, k], with the image itself in the middle; rows change along the random signs, columns along the sign
        of the gradient.
      margins: [n, k, k], above 0 where the class is correct; a line shows where the sign changes.
      path: The .png or .svg to write.
      epsilon: Both axes are from -epsilon to epsilon, in units of [0, 1].
      titles: A title for each image.

    Returns:
      The figure, with one axes for each image, and those of the colour bars.

    Example:
      >>> import tempfile
      >>> slope = np.linspace(0, 1, 5)[None, None] * np.ones((1, 5, 1))
      >>> figure = loss_surfaces(slope, 0.5 - slope, tempfile.mkdtemp() + "/surface.png", epsilon=0.1, titles=["cat"])
      >>> figure.axes[0].get_title()
      'cat'
    """
    from matplotlib.ticker import MaxNLocator

    path = figure_path(path)
    count, size, _ = losses.shape
    columns = min(4, count)
    rows = -(-count // columns)
    line = 255 * epsilon * np.linspace(-1, 1, size)
    with new_figure(figsize=(0.4 + 2.5 * columns, 0.4 + 2.2 * rows)) as figure:
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
        save(figure, path)
    return figure


def _by_step(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step, in order; if a step was logged twice, the later values."""
    merged: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if "step" not in row or "epoch" not in row:
            raise ValueError(f"metrics[{name!r}], row {number}: expected 'step' and 'epoch'; got {sorted(row)}.")
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


_SMOOTH_ABOVE = 80  # a curve with more points gets a running mean


def _curve(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, colour: str, *,
    scale: float = 1.0, smooth: bool = True, **line: Any,
) -> bool:  # fmt: skip
    """Draw one quantity over epochs; returns whether a running mean was drawn."""
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
    """Means over a centred window, which is cut off at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _line_style_legend(axes: "Axes", solid: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, linewidth=1.4, linestyle=DASHED, label="clean"),
        Line2D([], [], color=GREY, linewidth=1.4, linestyle="-", label=solid),
    ]
    axes.legend(handles=handles, loc="best", fontsize=8, handlelength=2.4)
