"""Types of data sets, and checks of their arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Description of a data set, without its images."""

    name: str
    """Name of the data set, or path of the `.npz` file, as in `load`."""
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    """Labels are 0, ..., num_classes - 1."""
    flip: bool
    """Whether training flips images horizontally. (Digits are not flipped.)"""
    crop_padding: int
    """Padding on each side for random crops, in pixels; 0 for no crops."""
    class_names: tuple[str, ...]
    """One name per label."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory."""

    info: DataInfo
    """Image shape, classes and augmentation."""
    train_images: UInt8[np.ndarray, "n h w c"]
    """Training images [N, H, W, C] in 0, ..., 255."""
    train_labels: Int32[np.ndarray, "n"]
    """Training labels [N]."""
    test_images: UInt8[np.ndarray, "m h w c"]
    """Test images [M, H, W, C] in 0, ..., 255."""
    test_labels: Int32[np.ndarray, "m"]
    """Test labels [M]."""


@dataclasses.dataclass(frozen=True)
class Bundled:
    """A source of data sets: a data set that comes with a library."""

    info: DataInfo
    """Description of the data set."""
    read: Callable[[], dict[str, np.ndarray]]
    """Function that returns the arrays named in `ARRAYS`."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A source of data sets: published files, which `prepare` converts to the format of TFDS."""

    info: DataInfo
    """Description of the data set. Its name must be TFDS's."""
    files: dict[str, str]
    """SHA-256 of each file, by URL."""
    read_archive: Callable[[list[Path]], dict[str, dict[str, np.ndarray]]]
    """Function from the paths of the files to an array for each of TFDS's features, by split."""
    id_format: str = "{split}_{index:05d}"
    """Format of TFDS's ids."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """A source of data sets: another data set with changed images and the same labels."""

    info: DataInfo
    """Description of the data set."""
    source: str
    """Name of the other data set."""
    change: Callable[[UInt8[np.ndarray, "n h w c"]], UInt8[np.ndarray, "n h2 w2 c2"]]
    """Function from the other data set's images to the new ones."""


def make_dataset(about: DataInfo, arrays: Mapping[str, np.ndarray], source: str) -> Dataset:
    """Check the arrays and make a `Dataset`."""
    for split in ("train", "test"):
        check_split(about, arrays[f"{split}_images"], arrays[f"{split}_labels"], f"{source}: {split}")
    return Dataset(
        about,
        train_images=arrays["train_images"],
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=arrays["test_images"],
        test_labels=arrays["test_labels"].astype(np.int32),
    )


def check_split(about: DataInfo, images: np.ndarray, labels: np.ndarray, argument: str) -> None:
    """Raise ValueError unless these are images and labels that `about` describes."""
    check_images(f"{argument}_images", images.dtype, images.shape)
    check_labels(f"{argument}_labels", labels)
    if images.shape[1:] != about.image_shape:
        raise ValueError(
            f"{argument}_images: expected images of shape {about.image_shape}; got {images.shape[1:]}. "
            "All images of a data set must have the same shape."
        )
    if len(labels) != len(images):
        raise ValueError(
            f"{argument}_labels: expected {len(images)}, one per image; got {len(labels)}. Give one "
            "label for each image."
        )
    if labels.max() >= about.num_classes:
        raise ValueError(
            f"{argument}_labels: expected 0 to {about.num_classes - 1}; got {labels.max()}. "
            "Number the classes from 0. If there are class_names, they must name all classes."
        )


def check_images(argument: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless these are uint8 images [N, H, W, C]."""
    if dtype != np.uint8:
        raise ValueError(
            f"{argument}: expected uint8 in 0, ..., 255; got {dtype}. "
            "Save np.rint(255 * images).astype(np.uint8) for images in [0, 1], images.astype(np.uint8) for 0 to 255."
        )
    if len(shape) != 4 or 0 in shape:
        advice = "Add a channel with images[..., None]." if len(shape) == 3 else "Save all images as one array."
        raise ValueError(f"{argument}: expected shape [N, height, width, channels]; got {tuple(shape)}. {advice}")
    if shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise ValueError(
            f"{argument}: expected channels last, [N, height, width, channels]; got {tuple(shape)}. "
            "Save images.transpose(0, 2, 3, 1)."
        )


def check_labels(argument: str, labels: np.ndarray) -> None:
    """Raise ValueError unless these are integers [N] of at least 0."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"{argument}: expected integers of shape [N]; got {labels.dtype} of shape {labels.shape}. "
            + (
                "Save labels.ravel()."
                if labels.ndim == 2 and labels.shape[1] == 1
                else "Save labels.argmax(1) for one-hot labels, labels.astype(np.int32) for floating-point labels."
            )
        )
    if labels.min() < 0:
        raise ValueError(
            f"{argument}: expected labels of at least 0; got {labels.min()}. Remove images without a label."
        )
