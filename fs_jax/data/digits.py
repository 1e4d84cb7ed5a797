"""The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""

import functools

import numpy as np

from fs_jax._utils.extras import require
from fs_jax.data.types import Bundled, DataInfo


def _read_digits(fold: int) -> dict[str, np.ndarray]:
    """Every fifth of the images sorted by class, from number `fold`, is a test image."""
    require("sklearn")
    from sklearn.datasets import load_digits  # a second to import, for those who want digits only

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.zeros(len(images), bool)
    test[np.argsort(digits.target, kind="stable")[fold::5]] = True
    return {
        "train_images": images[~test],
        "train_labels": digits.target[~test],
        "test_images": images[test],
        "test_labels": digits.target[test],
    }


# Five folds, so that in turn each image is a test image.
DIGITS_FOLDS = tuple(
    Bundled(
        DataInfo(name, (8, 8, 1), 10, flip=False, crop_padding=1, class_names=tuple("0123456789")),
        functools.partial(_read_digits, fold),
    )
    for fold, name in enumerate(("digits", "digits_fold1", "digits_fold2", "digits_fold3", "digits_fold4"))
)
