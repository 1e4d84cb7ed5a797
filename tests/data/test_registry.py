"""The registry of data sets; scikit-learn's digits."""

import numpy as np
import pytest

from fs_jax import data


def test_info_does_not_read_data():
    about = {name: data.info(name) for name in ("cifar10", "cifar100", "svhn_cropped", "digits")}
    assert {name: (i.flip, i.crop_padding) for name, i in about.items()} == {
        "cifar10": (True, 4), "cifar100": (True, 4), "svhn_cropped": (False, 4), "digits": (False, 1),
    }  # fmt: skip
    for name, i in about.items():
        assert i.name == name
        assert len(set(i.class_names)) == i.num_classes
    assert list(about["cifar100"].class_names) == sorted(about["cifar100"].class_names)  # CIFAR-100's order


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"dataset: expected one of cifar10, .*, FILE.npz; got 'svhn'. Did you mean 'svhn_"
    ):
        data.load("svhn")


def test_digits_are_split_in_proportion_to_the_classes():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    # Every fifth of the images sorted by class: a class of n has n/5 test images, rounded up or down.
    assert (np.abs(test - (train + test) / 5) < 1).all()
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32


def test_each_digit_is_a_test_image_in_one_fold():
    folds = [data.load(name) for name in ("digits", *(f"digits_fold{k}" for k in (1, 2, 3, 4)))]
    assert sum(len(fold.test_labels) for fold in folds) == 1797
    tested = np.concatenate([fold.test_images for fold in folds])
    everything = np.concatenate([folds[0].train_images, folds[0].test_images])
    assert sorted(image.tobytes() for image in tested) == sorted(image.tobytes() for image in everything)
    for fold in folds:
        assert (np.abs(np.bincount(fold.test_labels) - np.bincount(fold.train_labels) / 4) <= 1).all()


def test_digits_are_those_of_scikit_learn_scaled_to_255():
    from sklearn.datasets import load_digits

    digits, source = data.load("digits"), load_digits()
    images = np.concatenate([digits.train_images, digits.test_images])[..., 0]
    # Grey levels are 255/16 = 15.9 apart, so they can be recovered.
    grey = np.rint(images * (16 / 255))
    assert np.abs(images - grey * 255 / 16).max() <= 0.5
    key = lambda pixels, label: (label, pixels.astype(int).tobytes())  # noqa: E731
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    ours = sorted(key(g, int(y)) for g, y in zip(grey, labels, strict=True))
    theirs = sorted(key(g, int(y)) for g, y in zip(source.images, source.target, strict=True))
    assert ours == theirs
