"""A figure of images before and after an attack."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from fs_jax.report._canvas import RIGHT, WRONG, figure_path, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """Draw images, their magnified perturbations and the attacked images, with the predictions of a network.

    Args:
      images: [n, h, w, c] in [0, 1], with 1 or 3 channels; there is one column for each.
      adversarial: [n, h, w, c], the same images attacked.
      labels: [n], the true classes.
      clean_predictions: Classes predicted for `images` [n], or logits [n, classes], which give a probability too.
      adversarial_predictions: The same for `adversarial`.
      path: The .png or .svg to write.
      class_names: Names of the classes; numbers by default.
      epsilon: The attack's radius: grey is no change, black and white are a change by minus and plus epsilon. Larger
        changes are clipped.
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
    path = figure_path(path)
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
    # In float64, as differences in the type of the images would lose digits.
    change = 0.5 + (adversarial.astype(np.float64) - images.astype(np.float64)) / (2 * epsilon)
    rows = (
        ("original", images, predictions[0]),
        (f"perturbation\n×{_significant(1 / (2 * epsilon))}", change, None),
        ("attacked", adversarial, predictions[1]),
    )
    texts = [text for of_row in predictions for _, text in of_row] + names
    column = max(1.15, 0.3 + 0.068 * max(map(len, texts)))  # inches; 8-point letters are about 0.068 wide
    inches = max(0.5 + column * count, 0.1 * len(title or ""))
    with new_figure(figsize=(inches, 4.1 + 0.25 * bool(title))) as figure:
        grid = figure.subplots(3, count, squeeze=False)
        for axes_row, (row_name, pictures, predicted_texts) in zip(grid, rows, strict=True):
            axes_row[0].set_ylabel(row_name, fontsize=9, labelpad=6)
            for index, axes in enumerate(axes_row):
                axes.imshow(
                    np.clip(pictures[index].squeeze(-1) if images.shape[-1] == 1 else pictures[index], 0, 1),
                    cmap="gray", vmin=0, vmax=1, interpolation="nearest",
                )  # fmt: skip
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                for spine in axes.spines.values():
                    spine.set(visible=True, color="#BBBBBB", linewidth=0.6)
                if predicted_texts is not None:
                    predicted, text = predicted_texts[index]
                    right = predicted == labels[index]
                    axes.set_xlabel(
                        ("✓ " if right else "✗ ") + text, color=RIGHT if right else WRONG, fontsize=8, labelpad=3
                    )
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, fontsize=9, pad=4)
        if title:
            figure.suptitle(title)
        save(figure, path)
    return figure


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
    """The predicted class of each image, and its text."""
    given = np.asarray(given)
    if given.shape == (count,) and given.dtype.kind in "iu":
        return [(int(label), _class_name(label, class_names)) for label in given]
    if given.ndim == 2 and len(given) == count and given.dtype.kind == "f":
        probabilities, classes = scipy.special.softmax(given.astype(np.float64), axis=1), given.argmax(1)
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
