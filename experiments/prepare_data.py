"""Downloads a data set and writes it in TFDS's format, without TensorFlow; CIFAR-10 takes a minute and 310 MB of disk.

    python -m experiments.prepare_data cifar10 --data-dir DIR
    python -m experiments.prepare_data cifar10 --data-dir DIR --archive cifar-10-binary.tar.gz    # without a network

A data set that is there already is left as it is.
"""

from pathlib import Path
from typing import Annotated

import tyro

from experiments import command_line
from fs_jax import data


def prepare(name: Annotated[str, tyro.conf.Positional], data_dir: Path, archive: Path | None = None) -> None:
    """Download a data set and write it in TFDS's format.

    Args:
      name: cifar10, cifar100 or svhn_cropped.
      data_dir: Folder that holds TFDS's folders, as TFDS_DATA_DIR.
      archive: Local copy of what would be downloaded: a .tar.gz, or for SVHN the folder with the two .mat files.
    """
    print(data.prepare(name, data_dir, archive=archive))


def main(argv: list[str]) -> None:
    tyro.cli(prepare, args=argv, prog="python -m experiments.prepare_data")


if __name__ == "__main__":
    command_line.run(main)
