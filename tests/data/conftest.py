"""Data sets to read, made here: the published layouts, with a few random images."""

import functools
import io
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from fs_jax import data

ROOT = pathlib.Path(__file__).parents[2]
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def random_split(count, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, classes, count).astype(np.int32)


def cifar_rows(images, *labels):
    columns = [np.asarray(column, np.uint8)[:, None] for column in labels]
    return np.concatenate([*columns, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1).tobytes()


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


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
    """(data_dir with CIFAR-10's archive prepared, its arrays); not to be written to."""
    data_dir = tmp_path_factory.mktemp("tfds")
    data.prepare("cifar10", data_dir, archive=cifar[0])
    return data_dir, cifar[1]


@pytest.fixture
def load(prepared, tmp_path):
    """Loads the prepared CIFAR-10 with a cache of this test's own."""
    return functools.partial(data.load, "cifar10", data_dir=prepared[0], cache_dir=tmp_path / "cache")


def assert_equal(dataset, arrays):
    for key in ARRAYS:
        np.testing.assert_array_equal(getattr(dataset, key), arrays[key])
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
