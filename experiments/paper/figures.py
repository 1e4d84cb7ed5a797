"""The figures of the paper's experiments, drawn from their data to a .png or .svg file."""

import pathlib
from typing import Any

import numpy as np

from experiments.paper.experiment import METHOD_PLAN, Data
from fs_jax.report._canvas import DASHED, GREY, PALETTE, colour_of, figure_path, legend_columns, new_figure, save


def pgd_against_apgd_t(data: Data, path: pathlib.Path) -> None:
    """The accuracy of each row under APGD-T against that under PGD-20, and both by row, with the same markers."""
    rows = data["rows"]
    # Rows with the same first word have the same colour; others are black. Open markers: without label smoothing.
    beginnings = [label.split(",")[0] for label in rows]
    families = [name for name in dict.fromkeys(beginnings) if beginnings.count(name) > 1]
    singles = [label for label, beginning in zip(rows, beginnings, strict=True) if beginning not in families]
    with new_figure(figsize=(11.0, max(4.6, 0.8 + 0.235 * len(rows)))) as figure:
        against, by_row = figure.subplots(1, 2)
        for place, (label, beginning, row) in enumerate(zip(rows, beginnings, rows.values(), strict=True)):
            colour = PALETTE[families.index(beginning)] if beginning in families else "black"
            marker = "PX*^sp"[singles.index(label) % 6] if label in singles else marker_of(label)
            style = {"color": colour, "markersize": 6, "markerfacecolor": colour}
            if label.endswith("Δ = 0") or label.startswith("PGD-7"):
                style["markerfacecolor"] = "white"
            weak, strong = (100 * row[name]["accuracy"] for name in ("pgd-20", "apgd-t alone"))
            of_weak, of_strong = (
                [[100 * (of["accuracy"] - of["low"])], [100 * (of["high"] - of["accuracy"])]]
                for of in (row["pgd-20"], row["apgd-t alone"])
            )
            against.errorbar(weak, strong, yerr=of_strong, xerr=of_weak, fmt=marker, elinewidth=0.5, **style)
            by_row.plot([strong, weak], [place, place], color=colour, linewidth=0.8)
            by_row.plot(weak, place, "|", color=colour, markersize=9)
            by_row.plot(strong, place, marker, **style)
        (left, right), (bottom, top) = against.get_xlim(), against.get_ylim()
        ends = min(left, bottom), max(right, top)
        against.plot(ends, ends, color=GREY, linestyle=DASHED, linewidth=1, zorder=0)
        against.annotate("equal", (ends[1], ends[1]), (-28, -12), textcoords="offset points", ha="right", color=GREY)
        against.set(xlim=ends, ylim=ends, xlabel="accuracy under PGD-20 (%)", ylabel="accuracy under APGD-T (%)")
        against.set_box_aspect(1)
        against.set_title("markers as on the right", fontsize=9)
        by_row.set_yticks(range(len(rows)), list(rows), fontsize=8)
        by_row.invert_yaxis()
        by_row.grid(visible=False, axis="y")
        by_row.set_xlabel("accuracy under APGD-T (marker) and PGD-20 (|), in %")
        save(figure, figure_path(path))


def clean_against_robust(data: Data, path: pathlib.Path) -> None:
    """Accuracy under APGD-T against clean accuracy, with a line through the rows of each method, by radius."""
    families: dict[str, list[str]] = {}
    for label in data["rows"]:
        families.setdefault(label.split(", radius x ")[0], []).append(label)
    with new_figure(figsize=(6.4, 4.6)) as figure:
        axes = figure.add_subplot()
        # Labels of radii are below the points of the first line and above those of the second, away from each other.
        beside = (((-5, -11), "right"), ((5, 5), "left"))
        styles = zip(PALETTE, "oD", beside, strict=False)
        for (colour, marker, (offset, side)), (name, labels) in zip(styles, families.items(), strict=False):
            labels.sort(key=factor_of)
            clean, robust = ([data["rows"][label][attack] for label in labels] for attack in ("clean", "apgd-t alone"))
            x, y = ([100 * of["accuracy"] for of in each] for each in (clean, robust))
            x_errors, y_errors = (
                100 * np.array([[of["accuracy"] - of["low"], of["high"] - of["accuracy"]] for of in each]).T
                for each in (clean, robust)
            )
            axes.errorbar(
                x, y, xerr=x_errors, yerr=y_errors, fmt=f"-{marker}", color=colour, linewidth=1, elinewidth=0.6,
                label=name,
            )  # fmt: skip
            for label, right, up in zip(labels, x, y, strict=True):
                axes.annotate(
                    f"x {factor_of(label):g}", (right, up), offset, textcoords="offset points", fontsize=8, ha=side
                )
        axes.set(xlabel="clean accuracy (%)", ylabel="accuracy under APGD-T (%)")
        axes.legend(title="radius in training: x times that of the attack", title_fontsize=8, fontsize=8)
        save(figure, figure_path(path))


def factor_of(label: str) -> float:
    """The factor of the radius in a row's label.

    Example:
      >>> factor_of("feature scattering, radius x 1.5"), factor_of("feature scattering")
      (1.5, 1.0)
    """
    return float(label.split(", radius x ")[1]) if ", radius x " in label else 1.0


def marker_of(label: str) -> str:
    """A circle for one attack step, a diamond for seven, a triangle for seven at equal passes."""
    if "equal passes" in label:
        return "v"
    return "D" if "7 steps" in label else "o"


def lost_images(data: Data, path: pathlib.Path) -> None:
    """A bar for each network: the images that are misclassified under each attack in turn; the rest are robust."""
    networks = data["networks"]
    parts = [part for part in next(iter(networks.values()))["parts"] if part != "robust"]
    in_order = ("#D9D9D9", PALETTE[4], PALETTE[5], PALETTE[1], PALETTE[3], PALETTE[2])
    colours = dict(zip(parts, in_order, strict=True))
    end = max(1.0, *(100 * (1 - of["parts"]["robust"]) for of in networks.values()))
    with new_figure(figsize=(8.2, 1.3 + 0.42 * len(networks))) as figure:
        axes = figure.add_subplot()
        for place, of in enumerate(networks.values()):
            begin = 0.0
            for part in parts:
                width = 100 * of["parts"][part]
                axes.barh(place, width, 0.72, begin, color=colours[part], label=part if place == 0 else None)
                if width >= 0.035 * end:
                    axes.text(begin + width / 2, place, f"{width:.1f}", ha="center", va="center", fontsize=7.5)
                begin += width
            axes.text(begin + 0.01 * end, place, f"robust: {100 * of['parts']['robust']:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(networks)), list(networks))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.16 * end)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, axes.get_xlim()[1])])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("test images (%)")
        figure.legend(loc="outside upper center", ncols=legend_columns(colours, 8.2), fontsize=8)
        save(figure, figure_path(path))


# Labels of the outcomes in the results of figure 1.
OUTCOME_LABELS = {
    "robust": "robust to PGD-20 and APGD-T",
    "survives PGD-20, falls to APGD-T": "robust to PGD-20, not to APGD-T",
    "falls to PGD-20": "not robust to PGD-20",
    "misclassified": "misclassified without an attack",
}


def loss_curves(data: Data, path: pathlib.Path) -> None:
    """Cross-entropy over the steps of PGD, mean and standard deviation over starts; margins for PGD on two losses."""
    networks = data["networks"]
    colours = dict(zip(OUTCOME_LABELS, (PALETTE[0], PALETTE[1], GREY), strict=False))
    titles = ("PGD on the cross-entropy: loss", "PGD on the cross-entropy: margin", "PGD on DLR: margin")
    with new_figure(figsize=(10.5, 3.1 * len(networks) + 0.4)) as figure:
        grid = figure.subplots(len(networks), 3, squeeze=False)
        for (label, of), axes_of_row in zip(networks.items(), grid, strict=True):
            for image in of["curves"]:
                for axes, name in zip(axes_of_row, ("loss", "margin", "margin_dlr"), strict=True):
                    mean, spread = np.array(image[name]["mean"]), np.array(image[name]["std"])
                    colour = colours[image["outcome"]]
                    axes.plot(mean, color=colour, linewidth=1.2)
                    axes.fill_between(range(len(mean)), mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
            for axes, unit in zip(
                axes_of_row, ("cross-entropy (nats)", "margin (logits)", "margin (logits)"), strict=True
            ):
                axes.set_ylabel(f"{label}\n{unit}" if axes is axes_of_row[0] else unit)
                axes.set_xlabel("PGD step")
            for axes in axes_of_row[1:]:
                axes.axhline(0, color="black", linewidth=0.8)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize=9)
        handles = [
            grid[0, 0].plot([], [], color=colour, label=OUTCOME_LABELS[name])[0] for name, colour in colours.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        save(figure, figure_path(path))


# Labels of images in the results of figure 2.
IMAGE_LABELS = {"feature scattering": "scattering attack"}


def embeddings(data: Data, path: pathlib.Path) -> None:
    """t-SNE of features: one row per network, one column per set of images, one colour per true class."""
    networks = data["networks"]
    sets = list(next(iter(networks.values()))["points"])
    with new_figure(figsize=(3.2 * len(sets), 3.2 * len(networks) + 0.4)) as figure:
        grid = figure.subplots(len(networks), len(sets), squeeze=False, sharex="row", sharey="row")
        names = data["class_names"]
        for (label, of), axes_of_row in zip(networks.items(), grid, strict=True):
            labels = np.array(of["labels"])
            for axes, (which, points) in zip(axes_of_row, of["points"].items(), strict=True):
                points = np.array(points)
                for each, name in enumerate(names):
                    axes.scatter(*points[labels == each].T, s=5, color=class_colour(each, len(names)), label=name, lw=0)
                purity = of["purity"][which]
                axes.set_title(f"{IMAGE_LABELS.get(which, which)}: purity {100 * purity['mean']:.0f}%", fontsize=9)
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
            axes_of_row[0].set_ylabel(f"network: {label}")
        handles, texts = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, texts, loc="outside lower center", ncols=min(10, len(names)), markerscale=2.5, handletextpad=0.1,
            title="true class",
        )  # fmt: skip
        save(figure, figure_path(path))


def class_colour(index: int, count: int):
    """The colour of a class: as different as possible for up to ten classes."""
    import matplotlib

    return matplotlib.colormaps["tab10"](index) if count <= 10 else colour_of(index, count)


def plans_over_training(data: Data, path: pathlib.Path) -> None:
    """The mass on the diagonal of each transport's plan, and the agreement of its gradient's signs with two others."""
    points = data["points"]
    epochs = [point["epoch"] for point in points]
    labels = list(points[0]["plans"])
    panels = {
        "diagonal": "mass on the plan's diagonal (%)",
        "identity_signs": "gradient signs equal to the identity plan's (%)",
        "cross_entropy_signs": "gradient signs equal to the cross-entropy's (%)",
    }
    with new_figure(figsize=(11.0, 3.7)) as figure:
        for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for index, label in enumerate(labels):
                values = [100 * point["plans"][label][name] for point in points]
                style = {"color": colour_of(index, len(labels)), "linestyle": line_of(label), "linewidth": 1.3}
                if label == METHOD_PLAN:  # wide and below the others, since the curves of some plans coincide with it
                    style = {"color": "black", "alpha": 0.35, "linewidth": 6, "zorder": 1.5}
                axes.plot(epochs, values, label=label if name == "diagonal" else None, marker=".", **style)
            if name != "diagonal":
                axes.axhline(50, color=GREY, linewidth=0.8, label="by chance" if name == "identity_signs" else None)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("epoch (0: before training)")
            axes.locator_params(axis="x", integer=True)
            if name != "cross_entropy_signs":  # all of which are near 50%
                axes.set_ylim(-2, 102)
        figure.legend(loc="outside upper center", ncols=legend_columns(dict.fromkeys([*labels, "by chance"]), 11.0))
        save(figure, figure_path(path))


def line_of(label: str) -> Any:
    """Solid for our Sinkhorn, dashed for IPOT, dotted for others, since the curves of equal plans coincide."""
    return "-" if label.startswith("Sinkhorn") else DASHED if label.startswith("IPOT") else ":"


def transfer_matrix(data: Data, path: pathlib.Path) -> None:
    """Accuracy of each network (rows) on the adversarial examples of each network (columns)."""
    rows = data["rows"]
    sources = list(next(iter(rows.values())))
    values = 100 * np.array([[of["accuracy"] for of in row.values()] for row in rows.values()])
    with new_figure(figsize=(3.0 + 0.95 * len(sources), 2.2 + 0.55 * len(rows))) as figure:
        axes = figure.add_subplot()
        shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=100)
        for row, column in np.ndindex(values.shape):
            light = values[row, column] > 60
            text = f"{values[row, column]:.1f}"
            axes.text(column, row, text, ha="center", va="center", color="black" if light else "white")
        axes.set_xticks(range(len(sources)), [name.replace(", ", ",\n") for name in sources], fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xlabel("adversarial examples of")
        axes.set_ylabel("accuracy of")
        axes.grid(visible=False)
        figure.colorbar(shown, label="accuracy (%)")
        save(figure, figure_path(path))
