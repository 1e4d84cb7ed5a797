"""Data sets in `.npz` files: the user's, and the cache of decoded data sets."""

import contextlib
import difflib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from fs_jax._utils.files import replacing
from fs_jax.data.types import ARRAYS, DataInfo, check_images, check_labels

_OPTIONAL = {"class_names": None, "flip": False, "crop_padding": 0}  # with their defaults


def _open_npz(path: str | os.PathLike) -> np.lib.npyio.NpzFile:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: expected an .npz file with {', '.join(ARRAYS)}; got no file. Check the path, or write the file "
            "with np.savez."
        )
    try:
        data = np.load(path, allow_pickle=False)
        members = data.files  # a renamed .npy file has no members
    except Exception as error:
        raise ValueError(
            f"{path}: expected an .npz file; got another kind of file ({error}). Save it with np.savez."
        ) from error
    for key in set(members) - {*ARRAYS, *_OPTIONAL, "sha256"}:
        if near := difflib.get_close_matches(key, _OPTIONAL, cutoff=0.8):
            data.close()
            raise ValueError(f"{path}: expected no array named {key}. Did you mean {near[0]!r}?")
    if missing := [key for key in ARRAYS if key not in members]:
        data.close()
        raise ValueError(
            f"{path}: expected the arrays {', '.join(ARRAYS)}; got {', '.join(members) or 'none'}. "
            f"Add {', '.join(missing)}."
        )
    return data


@contextlib.contextmanager
def _reading(path: str | os.PathLike, key: str) -> Iterator[None]:
    """Convert any error while reading an array to a ValueError that names the array."""
    try:
        yield
    except Exception as error:  # truncated, damaged, or pickled (which is not read, as it could execute code)
        raise ValueError(
            f"{path}: {key}: expected a plain array; got an unreadable one ({error}). Save it again with np.savez."
        ) from error


def npz_info(path: str) -> DataInfo:
    """Describe a data set. Of the images, only the header is read, so this is fast for large files."""
    with _open_npz(path) as data:
        archive = cast(zipfile.ZipFile, data.zip)  # None only after closing
        with _reading(path, "train_images"), archive.open("train_images.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        with _reading(path, "train_labels"):
            labels = data["train_labels"]
        optional: dict[str, Any] = {}  # arrays or defaults
        for key, default in _OPTIONAL.items():
            with _reading(path, key):
                optional[key] = data[key] if key in data.files else default

    check_images(f"{path}: train_images", dtype, shape)
    _, height, width, channels = shape
    names, flip, padding = optional["class_names"], np.asarray(optional["flip"]), np.asarray(optional["crop_padding"])
    if flip.shape or flip.dtype != bool:
        raise ValueError(f"{path}: flip: expected True or False; got {flip.dtype} of shape {flip.shape}.")
    if padding.shape or not np.issubdtype(padding.dtype, np.integer) or not 0 <= padding < min(shape[1:3]):
        raise ValueError(
            f"{path}: crop_padding: expected an integer from 0 to {min(shape[1:3]) - 1}, less than the images' side; "
            f"got {optional['crop_padding']}."
        )
    if names is not None and (names.ndim != 1 or not names.size or names.dtype.kind not in "UiuT"):
        raise ValueError(
            f"{path}: class_names: expected a list of strings; got {names.dtype} of shape {names.shape}. "
            "Save np.array([name, ...])."
        )
    if names is None:
        check_labels(f"{path}: train_labels", labels)
        present = np.unique(labels)
        # Otherwise labels 1 to 10 would give a network with eleven outputs, one of them unused.
        if not np.array_equal(present, np.arange(len(present))):
            raise ValueError(
                f"{path}: train_labels: expected every class from 0 to the largest label; got {len(present)} classes "
                f"between {present[0]} and {present[-1]}. Number the classes from 0, or add class_names for all."
            )
        names = present
    return DataInfo(
        path,
        (height, width, channels),
        len(names),
        flip=bool(flip),
        crop_padding=int(padding),
        class_names=tuple(str(n) for n in names),
    )


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of an `.npz` file, and check their SHA-256 if the file contains one.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a valid data set.
    """
    with _open_npz(path) as data:
        arrays = {}
        for key in (*ARRAYS, "sha256") if "sha256" in data.files else ARRAYS:
            with _reading(path, key):
                arrays[key] = data[key]
    if "sha256" in arrays and str(arrays["sha256"]) != sha256(arrays):
        raise ValueError(f"{path}: expected arrays with the SHA-256 in the file; got other arrays. Save them again.")
    return arrays


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the images and labels, with their shapes and types."""
    digest = hashlib.sha256()
    for key in ARRAYS:
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def cached(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Read the arrays at `path`, or make and save them. If they cannot be saved, a warning says so."""
    if path.exists():
        try:
            arrays = read_npz(path)
            if "sha256" not in arrays:
                raise ValueError(f"{path}: expected a SHA-256 in the file; got none.")
            return arrays
        except ValueError as error:
            warnings.warn(f"The cached data set is damaged and will be decoded again: {error}", stacklevel=4)
    arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Any, because a type checker would also match the arrays with savez's flag `allow_pickle`.
        members: dict[str, Any] = {**arrays, "sha256": np.array(sha256(arrays))}
        with replacing(path) as file:
            np.savez(file, **members)
    except OSError as error:
        warnings.warn(
            f"The decoded data set cannot be cached at {path}: {error}. Pass another cache_dir.", stacklevel=4
        )
    return arrays
