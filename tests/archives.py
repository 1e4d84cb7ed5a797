"""Write small data sets with random images, in the layouts of the published files."""

import io
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
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
