"""The data sets by name: a new one is one file beside this one, and its line here."""

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
    """What is known of a data set without reading its images.

    Args:
      name: As `load` takes it. Of an `.npz`, one header and the labels are read.

    Returns:
      Its `DataInfo`.

    Raises:
      ValueError: the name is unknown (the nearest is named), or the `.npz` isn't one that `load` can read.
      FileNotFoundError: no such `.npz`.

    Example:
      >>> info("digits").image_shape
      (8, 8, 1)
      >>> info("cifar11")
      Traceback (most recent call last):
      ValueError: name: expected one of cifar10, ..., FILE.npz; got 'cifar11'. Did you mean 'cifar10'?
    """
    name = os.fspath(name)
    if name.endswith(".npz"):
        return npz_info(name)
    check_choice("name", name, (*DATASETS, "FILE.npz"))
    return DATASETS[name].info


def load(
    name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> Dataset:
    """Read a data set into memory.

    The order of images never changes: where TFDS numbered them, it is that of the original files ("test_00042" is test
    image 42, as it is in RobustBench and torchvision); elsewhere it is that of TFDS's records, which are shuffled.

    Args:
      name: One of
        - "cifar10", "cifar100", "svhn_cropped": folders that `prepare`, or TFDS, has prepared;
        - "digits": the 1,797 images of 8x8 pixels that come with scikit-learn. Grey levels 0, ..., 16 become
          round(255 v / 16). Of the images sorted by class every fifth, from the first, is a test image: 1,437 to train
          and 360 to test, all classes in proportion, and no randomness. "digits_fold1" to "digits_fold4" begin with
          the next ones, so that in turn each image is a test image;
        - "cifar10_16x16": CIFAR-10, of whose images each pixel is the mean of 2 x 2;
        - the path of an `.npz` with train_images, test_images (uint8 [N, H, W, C]), train_labels, test_labels (integers
          [N]) and, if wanted, class_names (strings), and for training flip (a bool) and crop_padding (pixels).
      data_dir: The folder that holds TFDS's folders; $TFDS_DATA_DIR or else ~/tensorflow_datasets by default.
      cache_dir: Where the decoded arrays of TFDS's folders are kept; $XDG_CACHE_HOME/fs_jax or else ~/.cache/fs_jax by
        default. They are found by name, version and a hash of the records, so that they never stand in for other
        records, and are checked by a hash of their own: a damaged file is rebuilt, with a warning.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: the name is unknown, or the data aren't as they should be.
      FileNotFoundError: the data aren't there; the message says what to run.

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
