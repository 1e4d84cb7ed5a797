"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

import functools

import numpy as np

from fs_jax._utils.extras import require
from fs_jax.data.types import Bundled, DataInfo


def _read_digits(fold: int) -> dict[str, np.ndarray]:
    """With the images sorted by class, every fifth image is a test image, starting from number `fold`."""
    require("sklearn")
    from sklearn.datasets import load_digits  # here, as the import takes a second

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


# Five folds for cross-validation: each image is a test image in one of them.
DIGITS_FOLDS = tuple(
    Bundled(
        DataInfo(name, (8, 8, 1), 10, flip=False, crop_padding=1, class_names=tuple("0123456789")),
        functools.partial(_read_digits, fold),
    )
    for fold, name in enumerate(("digits", "digits_fold1", "digits_fold2", "digits_fold3", "digits_fold4"))
)
