"""CIFAR-10's archive with a few images, and the prepared data set."""

import functools

import pytest

from fs_jax import data
from tests.archives import ARRAYS, cifar_rows, random_split, write_tar


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """(archive in CIFAR-10's binary layout, its arrays): five files of three images, and one of four."""
    folder = tmp_path_factory.mktemp("archive")
    train_images, train_labels = random_split(15)
    test_images, test_labels = random_split(4, seed=1)
    members = {"cifar-10-batches-bin/batches.meta.txt": "\n".join(data.info("cifar10").class_names).encode()}
    for i in range(5):
        part = slice(3 * i, 3 * i + 3)
        members[f"cifar-10-batches-bin/data_batch_{i + 1}.bin"] = cifar_rows(train_images[part], train_labels[part])
    members["cifar-10-batches-bin/test_batch.bin"] = cifar_rows(test_images, test_labels)
    archive = write_tar(folder / "cifar-10-binary.tar.gz", members)
    return archive, dict(zip(ARRAYS, (train_images, train_labels, test_images, test_labels), strict=True))


@pytest.fixture(scope="module")
def prepared(cifar, tmp_path_factory):
    """(data_dir with the prepared CIFAR-10, its arrays). Tests must not change it."""
    data_dir = tmp_path_factory.mktemp("tfds")
    data.prepare("cifar10", data_dir, archive=cifar[0])
    return data_dir, cifar[1]


@pytest.fixture
def load(prepared, tmp_path):
    """Loads the prepared CIFAR-10 with a cache for this test only."""
    return functools.partial(data.load, "cifar10", data_dir=prepared[0], cache_dir=tmp_path / "cache")
