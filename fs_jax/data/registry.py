"""The registry of data sets. To add one, write a file like the others and list it here."""

import dataclasses
import os

from fs_jax._utils.validation import check_choice
from fs_jax.data import tfds
from fs_jax.data.cifar import CIFAR10, CIFAR10_16X16, CIFAR100
from fs_jax.data.digits import DIGITS_FOLDS
from fs_jax.data.npz import npz_info, read_npz
from fs_jax.data.svhn import SVHN_CROPPED
from fs_jax.data.types import Bundled, DataInfo, Dataset, Derived, Published, make_dataset

_SOURCES: tuple[Bundled | Published | Derived, ...] = (
    CIFAR10, CIFAR100, SVHN_CROPPED, CIFAR10_16X16, *DIGITS_FOLDS
)  # fmt: skip
DATASETS = {source.info.name: source for source in _SOURCES}


def info(name: str | os.PathLike) -> DataInfo:
    """Describe a data set without reading its images.

    Args:
      name: A name or path, as in `load`. For an `.npz` file, the labels and the header of the images are read.

    Returns:
      The data set's `DataInfo`.

    Raises:
      ValueError: for an unknown name (the message suggests the nearest one), or an invalid `.npz` file.
      FileNotFoundError: if the `.npz` file does not exist.

    Example:
      >>> info("digits").image_shape
      (8, 8, 1)
      >>> info("cifar11")
      Traceback (most recent call last):
      ValueError: dataset: expected one of cifar10, ..., FILE.npz; got 'cifar11'. Did you mean 'cifar10'?
    """
    name = os.fspath(name)
    if name.endswith(".npz"):
        return npz_info(name)
    check_choice("dataset", name, (*DATASETS, "FILE.npz"))
    return DATASETS[name].info


def load(
    name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> Dataset:
    """Read a data set into memory.

    The order of the images is fixed. It is that of the original files: "test_00042" of CIFAR-10 is test image 42, as in
    RobustBench and torchvision. TFDS folders without numbered ids have the order of TFDS's records, which are shuffled.

    Args:
      name: A name in `DATASETS`, or the path of an `.npz` file:

        - "cifar10", "cifar100", "svhn_cropped": a folder prepared by `prepare` or by TFDS;
        - "cifar10_16x16": CIFAR-10 with blocks of 2 x 2 pixels averaged;
        - "digits": scikit-learn's 1,797 digits of 8 x 8 pixels. Grey levels v = 0, ..., 16 become round(255 v / 16).
          With the images sorted by class, every fifth image is a test image: 1,437 training and 360 test images;
        - "digits_fold1" to "digits_fold4": the other four folds, so that each image is a test image in one of the five;
        - a path that ends in `.npz`: train_images, test_images (uint8 [N, H, W, C]), train_labels, test_labels
          (integers [N]) and optionally class_names (strings), flip (a bool) and crop_padding (pixels).

      data_dir: The TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      cache_dir: Folder for the decoded arrays of TFDS's folders; by default `fs_jax` in the user's cache folder, on
        Linux ~/.cache. File names contain the data set's name, its version and a hash of its records. The arrays are
        checked by a hash; a damaged file is rebuilt with a warning.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: for an unknown name (the message suggests the nearest one) or invalid data.
      FileNotFoundError: if the data do not exist. The message gives the command to run.

    Example:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.test_images.shape, digits.train_images.dtype
      ((1437, 8, 8, 1), (360, 8, 8, 1), dtype('uint8'))

    Sources: Krizhevsky, "Learning multiple layers of features from tiny images" (2009); Netzer et al., "Reading digits
    in natural images with unsupervised feature learning" (2011); Alpaydin and Kaynak, "Optical recognition of
    handwritten digits" (UCI, 1998); TensorFlow Datasets.
    """
    about = info(name)
    source = DATASETS.get(about.name)
    if source is None:
        return make_dataset(about, read_npz(about.name), source=about.name)
    if isinstance(source, Bundled):
        return make_dataset(about, source.read(), source=about.name)
    if isinstance(source, Derived):
        other = load(source.source, data_dir=data_dir, cache_dir=cache_dir)
        return dataclasses.replace(
            other,
            info=about,
            train_images=source.change(other.train_images),
            test_images=source.change(other.test_images),
        )
    folder, arrays = tfds.read(about, data_dir, cache_dir)
    return make_dataset(about, arrays, source=os.fspath(folder))
