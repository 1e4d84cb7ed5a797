"""The figures of the paper's experiments, drawn from their data to a .png or .svg file."""

import pathlib

import numpy as np

from experiments.paper.experiment import Data
from fs_jax.report._canvas import DASHED, GREY, PALETTE, colour_of, figure_path, legend_columns, new_figure, save


def pgd_against_apgd_t(data: Data, path: pathlib.Path) -> None:
    """Plot the accuracy of each row under APGD-T against its accuracy under PGD-20."""
    rows = data["rows"]
    weak, strong = ([100 * row[name]["accuracy"] for row in rows.values()] for name in ("pgd-20", "apgd-t alone"))
    errors = [
        np.array([[100 * (row[name]["accuracy"] - row[name]["low"]) for row in rows.values()],
                  [100 * (row[name]["high"] - row[name]["accuracy"]) for row in rows.values()]])
        for name in ("pgd-20", "apgd-t alone")
    ]  # fmt: skip
    # Rows with the same first word have the same colour and different markers; single rows are black.
    beginnings = [label.split(",")[0] for label in rows]
    families = [name for name in dict.fromkeys(beginnings) if beginnings.count(name) > 1]
    members = [name if name in families else "" for name in beginnings]
    with new_figure(figsize=(9.6, 5.6)) as figure:
        axes = figure.add_subplot()
        limit = max(*weak, *strong) + 8
        axes.plot([0, limit], [0, limit], color=GREY, linestyle=DASHED, linewidth=1)
        axes.annotate("equal", (limit, limit), (-14, -24), textcoords="offset points", color=GREY, ha="right")
        for index, (label, x, y) in enumerate(zip(rows, weak, strong, strict=True)):
            colour = PALETTE[families.index(members[index])] if members[index] else "black"
            axes.errorbar(
                x, y, xerr=errors[0][:, [index]], yerr=errors[1][:, [index]], color=colour, label=label,
                fmt="osD^vPX*"[members[:index].count(members[index]) % 8], markersize=6, elinewidth=0.5,
                markerfacecolor="white" if label.endswith("Δ = 0") else colour,
            )  # fmt: skip
        axes.set_xlim(0, limit)
        axes.set_ylim(0, limit)
        axes.set_box_aspect(1)
        axes.set_xlabel("accuracy under PGD-20 (%)")
        axes.set_ylabel("accuracy under APGD-T (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7.5)
        save(figure, figure_path(path))


def lost_images(data: Data, path: pathlib.Path) -> None:
    """A bar for each network: the images that are misclassified under each attack in turn, and the robust ones."""
    networks = data["networks"]
    parts = list(next(iter(networks.values()))["parts"])
    in_order = ("#D9D9D9", PALETTE[4], PALETTE[5], PALETTE[1], PALETTE[3], PALETTE[6], PALETTE[2])
    colours = dict(zip(parts, in_order, strict=True))
    with new_figure(figsize=(8.2, 1.2 + 0.42 * len(networks))) as figure:
        axes = figure.add_subplot()
        for place, of in enumerate(networks.values()):
            begin = 0.0
            for part, share in of["parts"].items():
                width = 100 * share
                axes.barh(place, width, 0.72, begin, color=colours[part], label=part if place == 0 else None)
                if width >= 4:
                    dark = colours[part] == PALETTE[6]
                    axes.text(begin + width / 2, place, f"{width:.1f}", ha="center", va="center", fontsize=7.5,
                              color="white" if dark else "black")  # fmt: skip
                begin += width
        axes.set_yticks(range(len(networks)), list(networks))
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
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
    panels = ("cross-entropy (nats)", "margin, PGD on cross-entropy", "margin, PGD on DLR")
    with new_figure(figsize=(10.5, 3.1 * len(networks) + 0.4)) as figure:
        grid = figure.subplots(len(networks), 3, squeeze=False)
        for (label, of), axes_of_row in zip(networks.items(), grid, strict=True):
            for image in of["curves"]:
                for axes, name in zip(axes_of_row, ("loss", "margin", "margin_dlr"), strict=True):
                    mean, spread = np.array(image[name]["mean"]), np.array(image[name]["std"])
                    colour = colours[image["outcome"]]
                    axes.plot(mean, color=colour, linewidth=1.2)
                    axes.fill_between(range(len(mean)), mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
            for axes, panel in zip(axes_of_row, panels, strict=True):
                axes.set_title(f"{label}: {panel}", fontsize=9)
                axes.set_xlabel("PGD step")
            for axes in axes_of_row[1:]:
                axes.axhline(0, color="black", linewidth=0.8)
        handles = [
            grid[0, 0].plot([], [], color=colour, label=OUTCOME_LABELS[name])[0] for name, colour in colours.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        save(figure, figure_path(path))


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
                axes.set_title(f"network: {label}, images: {which}\npurity {100 * purity['mean']:.0f} %", fontsize=9)
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
        handles, texts = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=min(10, len(names)), markerscale=2.5)
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
        for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
            for index, label in enumerate(labels):
                values = [100 * point["plans"][label][name] for point in points]
                in_legend = label if name == "diagonal" else None
                axes.plot(
                    epochs, values, color=colour_of(index, len(labels)), label=in_legend, marker=".", linewidth=1.2
                )
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("epoch")
            axes.set_ylim(-2, 102)
        figure.legend(loc="outside upper center", ncols=legend_columns(dict.fromkeys(labels), 11.0))
        save(figure, figure_path(path))


def transfer_matrix(data: Data, path: pathlib.Path) -> None:
    """Accuracy of each network (rows) on the adversarial examples of each network (columns)."""
    rows = data["rows"]
    sources = list(next(iter(rows.values())))
    values = 100 * np.array([[of["accuracy"] for of in row.values()] for row in rows.values()])
    with new_figure(figsize=(3.0 + 0.95 * len(sources), 2.2 + 0.55 * len(rows))) as figure:
        axes = figure.add_subplot()
        shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=100)
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="black" if value > 60 else "white")
        axes.set_xticks(range(len(sources)), [name.replace(", ", ",\n") for name in sources], fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xlabel("adversarial examples of")
        axes.grid(visible=False)
        figure.colorbar(shown, label="accuracy (%)")
        save(figure, figure_path(path))
