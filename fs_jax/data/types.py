"""What a data set is, and what its arrays must be."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before its images are read."""

    name: str
    """The name, or the path of the `.npz`, that `load` takes."""
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    """Labels are 0, ..., num_classes - 1."""
    flip: bool
    """Whether an image's mirror image is in its class (not so for digits)."""
    crop_padding: int
    """Pixels of padding on each side for random crops; 0 for none."""
    class_names: tuple[str, ...]
    """One name per label."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory."""

    info: DataInfo
    """Shapes, classes, and how to augment."""
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
    """A data set that comes with a library."""

    info: DataInfo
    """What is known of it before it is read."""
    read: Callable[[], dict[str, np.ndarray]]
    """The arrays of `ARRAYS`."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set that TFDS knows: where it is published, and how its files are read."""

    info: DataInfo
    """What is known of it before it is read; its name is TFDS's."""
    files: dict[str, str]
    """SHA-256 by URL."""
    read_archive: Callable[[list[Path]], dict[str, dict[str, np.ndarray]]]
    """From files to TFDS's features, one array each, by split."""
    id_format: str = "{split}_{index:05d}"
    """TFDS's ids."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """A data set that is made of another one's images; labels and classes stay."""

    info: DataInfo
    """What is known of it before it is read."""
    source: str
    """The name of the other one."""
    change: Callable[[UInt8[np.ndarray, "n h w c"]], UInt8[np.ndarray, "n h2 w2 c2"]]
    """From the other one's images to its own."""


def make_dataset(about: DataInfo, arrays: Mapping[str, np.ndarray], source: str) -> Dataset:
    """The arrays as a `Dataset`, if they are fit to be one."""
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        check_images(f"{source}: {split}_images", images.dtype, images.shape)
        check_labels(f"{source}: {split}_labels", labels)
        if images.shape[1:] != about.image_shape:
            raise ValueError(
                f"{source}: {split}_images: expected images of shape {about.image_shape}; got {images.shape[1:]}. "
                "All images of a data set have one size."
            )
        if len(labels) != len(images):
            raise ValueError(
                f"{source}: {split}_labels: expected {len(images)}, one for each of {split}_images; got {len(labels)}. "
                "Make both again from their source."
            )
        if labels.max() >= about.num_classes:
            raise ValueError(
                f"{source}: {split}_labels: expected 0 to {about.num_classes - 1}; got {labels.max()}. "
                "Number the classes from 0, and name all of them if class_names are given."
            )
    return Dataset(
        about,
        train_images=arrays["train_images"],
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=arrays["test_images"],
        test_labels=arrays["test_labels"].astype(np.int32),
    )


def check_images(argument: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless these are uint8 images [N, H, W, C]."""
    if dtype != np.uint8:
        raise ValueError(
            f"{argument}: expected uint8 in 0, ..., 255; got {dtype}. "
            "Of images in [0, 1] save np.rint(255 * images).astype(np.uint8), of 0 to 255 images.astype(np.uint8)."
        )
    if len(shape) != 4 or 0 in shape:
        advice = "Add the channel with images[..., None]." if len(shape) == 3 else "Save all images as one array."
        raise ValueError(f"{argument}: expected shape [N, height, width, channels]; got {tuple(shape)}. {advice}")
    if shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise ValueError(
            f"{argument}: expected channels last, [N, height, width, channels]; got {tuple(shape)}. "
            "Save images.transpose(0, 2, 3, 1)."
        )


def check_labels(argument: str, labels: np.ndarray) -> None:
    """Raise ValueError unless these are integers [N] from 0."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"{argument}: expected integers of shape [N]; got {labels.dtype} of shape {labels.shape}. "
            + (
                "Save labels.ravel()."
                if labels.ndim == 2 and labels.shape[1] == 1
                else "Of one-hot labels save labels.argmax(1), of whole numbers in floats labels.astype(np.int32)."
            )
        )
    if labels.min() < 0:
        raise ValueError(f"{argument}: expected labels from 0; got {labels.min()}. Drop images without a label.")
