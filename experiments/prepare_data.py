"""Downloads a data set and writes it in TFDS's format, without TensorFlow; CIFAR-10 takes a minute and 310 MB of disk.

    python -m experiments.prepare_data cifar10 --data-dir DIR
    python -m experiments.prepare_data cifar10 --data-dir DIR --archive cifar-10-binary.tar.gz    # without a network

A data set that is there already is left as it is.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from fs_jax import data


def main(name: Annotated[str, tyro.conf.Positional], data_dir: Path, archive: Path | None = None) -> None:
    """Download a data set and write it in TFDS's format.

    Args:
      name: cifar10, cifar100 or svhn_cropped.
      data_dir: Folder that holds TFDS's folders, as TFDS_DATA_DIR.
      archive: Local copy of what would be downloaded: a .tar.gz, or for SVHN the folder with the two .mat files.
    """
    try:
        print(data.prepare(name, data_dir, archive=archive))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main)
