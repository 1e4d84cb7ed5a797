"""Download a data set and write it in the format of TFDS, without TensorFlow."""

import contextlib
import hashlib
import os
from pathlib import Path

from fs_jax._utils.extras import require
from fs_jax._utils.files import local_path, replacing
from fs_jax._utils.validation import check_choice
from fs_jax.data import tfds
from fs_jax.data.registry import DATASETS
from fs_jax.data.types import Bundled, Derived, Published, check_labels


def prepare(name: str, data_dir: str | os.PathLike, *, archive: str | os.PathLike | None = None) -> Path:
    """Download a data set and write it in the format of TFDS (array_record), without TensorFlow.

    TFDS writes the records and the metadata. Only the images are read here, because the readers of TFDS need
    TensorFlow. Images, ids and their order are the same as those that TFDS would write. Two things are missing: SVHN's
    "extra" split and the names of CIFAR-100's coarse labels.

    Args:
      name: "cifar10", "cifar100" or "svhn_cropped".
      data_dir: The TFDS data folder. It is created if necessary.
      archive: A local copy of the published file, instead of a download: cifar-10-binary.tar.gz or
        cifar-100-binary.tar.gz; for SVHN, the folder with train_32x32.mat and test_32x32.mat. Its checksum is not
        checked, so that a part of the data set can be used.

    Returns:
      The prepared folder, such as data_dir/cifar10/3.0.2. An existing one is not changed.

    Raises:
      ValueError: for an unknown name, or a wrong archive.
      FileNotFoundError: if the archive does not exist.
      NotADirectoryError: if data_dir is a file.
      ConnectionError: if the download fails. The message says where to put the file.

    Example:
      >>> prepare("cifar10", "~/tensorflow_datasets", archive="cifar-10-binary.tar.gz")  # doctest: +SKIP
      PosixPath('/home/you/tensorflow_datasets/cifar10/3.0.2')
    """
    if isinstance(source := DATASETS.get(name), Bundled):
        raise ValueError(
            f"name: expected a data set to prepare; got {name!r}, which needs no preparation. Load it directly."
        )
    if isinstance(source, Derived):
        raise ValueError(
            f"name: expected a data set to prepare; got {name!r}, which is made from {source.source}. Prepare that one."
        )
    published = {name: source for name, source in DATASETS.items() if isinstance(source, Published)}
    check_choice("name", name, published)
    require("tensorflow_datasets", "PIL", "requests")
    origin, data_dir = published[name], local_path("data_dir", data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise NotADirectoryError(f"data_dir: expected a folder; got the file {data_dir}. Choose another.")
    with contextlib.suppress(FileNotFoundError):
        return tfds.prepared_folder(name, data_dir)

    if archive is None:
        files = [_download(origin, url, sha256, data_dir) for url, sha256 in origin.files.items()]
    else:
        files = _archive_files(origin, Path(archive).expanduser())
    splits = origin.read_archive(files)
    for split, features in splits.items():
        check_labels(f"{files[0]}: {split} labels", features["label"])
        if features["label"].max() >= origin.info.num_classes:
            raise ValueError(
                f"{files[0]}: {split} labels: expected at most {origin.info.num_classes - 1}, as in {name}; got "
                f"{features['label'].max()}. Use the archive of {name}."
            )
    return tfds.write(origin.info, splits, origin.id_format, data_dir)


def _archive_files(origin: Published, archive: Path) -> list[Path]:
    """The published files: those in a folder, or a single file."""
    names = [os.path.basename(url) for url in origin.files]
    files = [archive / n for n in names] if archive.is_dir() or len(names) > 1 else [archive]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"archive: expected {' and '.join(names)}{' in one folder' if len(names) > 1 else ''}; "
                f"got no file {file}. The published files are {' and '.join(origin.files)}."
            )
    return files


def _download(origin: Published, url: str, sha256: str, data_dir: Path) -> Path:
    """Download a file to data_dir/downloads, unless it exists, and return its path.

    TFDS's download manager is not used: offline it retries for minutes, and its file names are hashes, so
    that users could not put a file there themselves.
    """
    import requests
    from tqdm import tqdm

    name, path = origin.info.name, data_dir / "downloads" / os.path.basename(url)
    if path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(
                f"{name}: expected a file with the SHA-256 {sha256}; {path} has {found}. Remove this file."
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with (
            requests.get(url, stream=True, timeout=30) as response,
            replacing(path) as file,
            tqdm(desc=path.name, unit="B", unit_scale=True, mininterval=1) as bar,
        ):
            response.raise_for_status()
            bar.reset(int(response.headers.get("Content-Length", 0)) or None)
            for block in response.iter_content(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
            if digest.hexdigest() != sha256:
                raise requests.RequestException(f"expected the SHA-256 {sha256}; got {digest.hexdigest()}")
    except requests.RequestException as error:
        raise ConnectionError(
            f"{name}: the download of {url} failed: {error}. Download it elsewhere and put it at {path}; or pass its "
            f"location: {tfds.prepare_command(name, data_dir, 'FOLDER' if len(origin.files) > 1 else 'FILE')}"
        ) from error
    return path
