"""CIFAR-10 and CIFAR-100: 32 x 32 photographs in 10 and 100 classes."""

import functools
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from fs_jax.data.types import DataInfo, Derived, Published

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 - more readable than a hundred quoted names
)


def _read_archive(
    files: list[Path], *, folder: str, splits: dict[str, list[str]], labels: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Read the binary version: tar members whose rows are label bytes and 3,072 pixels, channels first."""
    (path,) = files
    wanted = {f"{folder}/{member}" for members in splits.values() for member in members}
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:  # in the order of the tar, as seeking backwards in a gzip reads it again
                if os.path.normpath(member.name) in wanted and (file := tar.extractfile(member)):
                    found[os.path.normpath(member.name)] = np.frombuffer(file.read(), np.uint8)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"archive: expected a tar or tar.gz file; got {path}, which cannot be read: {error}. Download it again."
        ) from error
    if missing := sorted(wanted - found.keys()):
        raise ValueError(
            f"archive: expected {', '.join(sorted(wanted))}; got {path} without {', '.join(missing)}. "
            "Use the binary version, whose name ends in -binary.tar.gz."
        )
    row = len(labels) + 3072
    for name, data in found.items():
        if len(data) % row or not len(data):
            raise ValueError(f"{path}: {name}: expected rows of {row} bytes; got {len(data)} bytes. Download it again.")

    def features(members):
        rows = np.concatenate([found[f"{folder}/{member}"] for member in members]).reshape(-1, row)
        images = rows[:, len(labels) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return {"image": np.ascontiguousarray(images), **{key: rows[:, i] for i, key in enumerate(labels)}}

    return {split: features(members) for split, members in splits.items()}


# The URLs and checksums of TFDS.
CIFAR10 = Published(
    DataInfo("cifar10", (32, 32, 3), 10, flip=True, crop_padding=4, class_names=_CIFAR10),
    {
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": (
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
        )
    },
    functools.partial(
        _read_archive,
        folder="cifar-10-batches-bin",
        splits={"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        labels=["label"],
    ),
)
CIFAR100 = Published(
    DataInfo("cifar100", (32, 32, 3), 100, flip=True, crop_padding=4, class_names=_CIFAR100),
    {
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz": (
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
        )
    },
    functools.partial(
        _read_archive,
        folder="cifar-100-binary",
        splits={"train": ["train.bin"], "test": ["test.bin"]},
        labels=["coarse_label", "label"],
    ),
)


def _halved(images):
    """Average blocks of 2 x 2 pixels, rounded."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2, channels).astype(np.uint16)
    return ((blocks.sum((2, 4)) + 2) // 4).astype(np.uint8)


# For experiments on CPUs: a training step takes a quarter of the time.
CIFAR10_16X16 = Derived(
    DataInfo("cifar10_16x16", (16, 16, 3), 10, flip=True, crop_padding=2, class_names=_CIFAR10), "cifar10", _halved
)
