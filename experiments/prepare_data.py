"""Download a data set and write it in the format of TFDS: `python -m experiments.prepare_data NAME --data-dir DIR`."""

from pathlib import Path
from typing import Annotated

import tyro

from experiments import command_line
from fs_jax import data


def prepare(name: Annotated[str, tyro.conf.Positional], data_dir: Path, archive: Path | None = None) -> None:
    """Download a data set and write it in the format of TFDS: a minute and 310 MB of disk for CIFAR-10.

    TensorFlow is not needed. An existing data set is not changed.

    Args:
      name: cifar10, cifar100 or svhn_cropped.
      data_dir: TFDS data folder, such as ~/tensorflow_datasets.
      archive: Local copy of the download: the .tar.gz file or, for SVHN, the folder with the two .mat files.
    """
    print(data.prepare(name, data_dir, archive=archive))


EXAMPLES = """\
  python -m experiments.prepare_data cifar10 --data-dir ~/tensorflow_datasets
  python -m experiments.prepare_data cifar10 --data-dir DIR --archive cifar-10-binary.tar.gz   # offline
"""


def main(argv: list[str]) -> None:
    command_line.parse(prepare, argv, prog="python -m experiments.prepare_data", examples=EXAMPLES)


if __name__ == "__main__":
    command_line.run(main)
