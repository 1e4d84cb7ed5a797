"""Downloads a data set and writes it as TFDS would, without TensorFlow."""

import contextlib
import hashlib
import os
from pathlib import Path

from fs_jax._utils.extras import require
from fs_jax._utils.files import replacing
from fs_jax._utils.validation import check_choice
from fs_jax.data import tfds
from fs_jax.data.registry import DATASETS
from fs_jax.data.types import Bundled, Derived, Published, check_labels


def prepare(name: str, data_dir: str | os.PathLike, *, archive: str | os.PathLike | None = None) -> Path:
    """Download a data set and write it as TFDS would, in array_record, without TensorFlow.

    TFDS writes the records and the metadata. Only the images come to it from here, because its own readers need
    TensorFlow. Ids and keys are TFDS's, so the images and their order are too. Left out are SVHN's "extra" split and
    the names of CIFAR-100's coarse labels.

    Args:
      name: "cifar10", "cifar100" or "svhn_cropped".
      data_dir: The folder that holds TFDS's folders. It is made if it isn't there.
      archive: The published file, where it can't be downloaded: cifar-10-binary.tar.gz, cifar-100-binary.tar.gz; for
        SVHN the folder with train_32x32.mat and test_32x32.mat. Its checksum is not compared, so that a part will do.

    Returns:
      The prepared folder, as data_dir/cifar10/3.0.2. What is prepared already is left as it is.

    Raises:
      ValueError: the name is unknown, or the archive isn't the one that is meant.
      FileNotFoundError: no such archive.
      ConnectionError: the download failed; the message says where to put the file.

    Example:
      >>> prepare("cifar10", "~/tensorflow_datasets", archive="cifar-10-binary.tar.gz")  # doctest: +SKIP
      PosixPath('/home/you/tensorflow_datasets/cifar10/3.0.2')
    """
    if isinstance(source := DATASETS.get(name), Bundled):
        raise ValueError(f"name: expected a data set to prepare; got {name!r}, which comes with a library. Load it.")
    if isinstance(source, Derived):
        raise ValueError(f"name: expected a data set to prepare; got {name!r}, made of {source.source}. Prepare that.")
    published = {name: source for name, source in DATASETS.items() if isinstance(source, Published)}
    check_choice("name", name, published)
    require("tensorflow_datasets", "PIL", "requests")
    origin, data_dir = published[name], Path(data_dir).expanduser()
    if data_dir.exists() and not data_dir.is_dir():
        raise NotADirectoryError(f"data_dir: expected a folder; got the file {data_dir}. Name another.")
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
            raise ValueError(f"{files[0]}: {split} labels: expected {name}'s; got {features['label'].max()}.")
    return tfds.write(origin.info, splits, origin.id_format, data_dir)


def _archive_files(origin: Published, archive: Path) -> list[Path]:
    """The published files, in a folder or the only one itself."""
    names = [os.path.basename(url) for url in origin.files]
    files = [archive / n for n in names] if archive.is_dir() or len(names) > 1 else [archive]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"archive: expected {' and '.join(names)}{' in one folder' if len(names) > 1 else ''}; "
                f"got nothing at {file}. They are published as {' and '.join(origin.files)}."
            )
    return files


def _download(origin: Published, url: str, sha256: str, data_dir: Path) -> Path:
    """The file of this URL in data_dir/downloads, fetched if it isn't there.

    TFDS's download manager goes on trying for minutes where there is no network, and keeps files under names that a
    person who brings a file can't guess.
    """
    import requests
    from tqdm import tqdm

    name, path = origin.info.name, data_dir / "downloads" / os.path.basename(url)
    if path.is_file():
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
            f"{name}: {url} can't be downloaded: {error}. Fetch it elsewhere, put it at {path}, and run this again; "
            f"or say where it is: {tfds.prepare_command(name, data_dir, 'FOLDER' if len(origin.files) > 1 else 'FILE')}"
        ) from error
    return path
