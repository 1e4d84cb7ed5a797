"""Images and labels as arrays in memory: TFDS's folders, scikit-learn's digits, or an `.npz`.

    dataset = load("cifar10", data_dir="~/tensorflow_datasets")
    dataset.train_images.shape, dataset.info.num_classes         # (50000, 32, 32, 3), 10

Nothing here needs TensorFlow. `prepare` writes a folder in TFDS's own format, and `load` reads such a folder, TFDS's
own too, in array_record or in tfrecord. CIFAR-10 is 184 MB of pixels: it is decoded once, kept in a cache that is
checked by its hash, and goes to the device whole. There is no input pipeline.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import re
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from fs_jax._utils.files import cache_home, local_path, replacing
from fs_jax._utils.validation import check_choice

# --- What there is ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before its images are read."""

    name: str
    """The name, or the path of the `.npz`, that `load` takes."""
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    """Labels are 0, ..., num_classes - 1."""
    flip: bool
    """Whether an image's mirror image is in its class (not so for digits)."""
    crop_padding: int
    """Pixels of padding on each side for random crops; 0 for none."""
    class_names: tuple[str, ...]
    """One name per label."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory."""

    info: DataInfo
    """Shapes, classes, and how to augment."""
    train_images: UInt8[np.ndarray, "n h w c"]
    """Training images [N, H, W, C] in 0, ..., 255."""
    train_labels: Int32[np.ndarray, "n"]
    """Training labels [N]."""
    test_images: UInt8[np.ndarray, "m h w c"]
    """Test images [M, H, W, C] in 0, ..., 255."""
    test_labels: Int32[np.ndarray, "m"]
    """Test labels [M]."""


_DIGITS = tuple("0123456789")
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
    """.split()  # noqa: SIM905 - a hundred quoted names would hide them
)
_INFOS = {
    "cifar10": DataInfo("cifar10", (32, 32, 3), 10, flip=True, crop_padding=4, class_names=_CIFAR10),
    "cifar100": DataInfo("cifar100", (32, 32, 3), 100, flip=True, crop_padding=4, class_names=_CIFAR100),
    "svhn_cropped": DataInfo("svhn_cropped", (32, 32, 3), 10, flip=False, crop_padding=4, class_names=_DIGITS),
    "digits": DataInfo("digits", (8, 8, 1), 10, flip=False, crop_padding=1, class_names=_DIGITS),
}


def info(name: str | os.PathLike) -> DataInfo:
    """What is known of a data set without reading its images.

    Args:
      name: As `load` takes it. Of an `.npz`, one header and the labels are read; it is neither flipped nor cropped.

    Returns:
      Its `DataInfo`.

    Raises:
      ValueError: the name is unknown (the nearest is named), or the `.npz` isn't one that `load` can read.
      FileNotFoundError: no such `.npz`.

    Example:
      >>> info("digits").image_shape
      (8, 8, 1)
      >>> info("cifar11")
      Traceback (most recent call last):
      ValueError: name: expected one of cifar10, cifar100, svhn_cropped, digits, FILE.npz; got 'cifar11'. ...
    """
    name = os.fspath(name)
    if name.endswith(".npz"):
        return _npz_info(name)
    check_choice("name", name, (*_INFOS, "FILE.npz"))
    return _INFOS[name]


def load(
    name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> Dataset:
    """Read a data set into memory.

    The order of images never changes: where TFDS numbered them, it is that of the original files ("test_00042" is test
    image 42, as it is in RobustBench and torchvision); elsewhere it is that of TFDS's records, which are shuffled.

    Args:
      name: One of
        - "cifar10", "cifar100", "svhn_cropped": folders that `prepare`, or TFDS, has prepared;
        - "digits": the 1,797 images of 8x8 pixels that come with scikit-learn. Grey levels 0, ..., 16 become
          round(255 v / 16). Of the images sorted by class every fifth, from the first, is a test image: 1,437 to train
          and 360 to test, all classes in proportion, and no randomness;
        - the path of an `.npz` with train_images, test_images (uint8 [N, H, W, C]), train_labels, test_labels (integers
          [N]) and, if wanted, class_names (strings).
      data_dir: The folder that holds TFDS's folders; $TFDS_DATA_DIR or else ~/tensorflow_datasets by default.
      cache_dir: Where the decoded arrays of TFDS's folders are kept; $XDG_CACHE_HOME/fs_jax or else ~/.cache/fs_jax by
        default. They are found by name, version and a hash of the records, so that they never stand in for other
        records, and are checked by a hash of their own: a damaged file is rebuilt, with a warning.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: the name is unknown, or the data aren't as they should be.
      FileNotFoundError: the data aren't there; the message says what to run.

    Example:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.test_images.shape, digits.train_images.dtype
      ((1437, 8, 8, 1), (360, 8, 8, 1), dtype('uint8'))

    Sources: Krizhevsky, "Learning multiple layers of features from tiny images" (2009); Netzer et al., "Reading digits
    in natural images with unsupervised feature learning" (2011); Alpaydin and Kaynak, "Optical recognition of
    handwritten digits" (UCI, 1998); TensorFlow Datasets.
    """
    about = info(name)
    if about.name.endswith(".npz"):
        return _dataset(about, _read_npz(about.name), source=about.name)
    if about.name == "digits":
        return _dataset(about, _read_digits(), source="digits")
    folder = _prepared_folder(about.name, _tfds_dir(data_dir))
    cache = _cache_dir(cache_dir) / f"{about.name}-{folder.name}-{_fingerprint(folder)[:16]}.npz"
    return _dataset(about, _cached(cache, lambda: _read_tfds(about, folder)), source=os.fspath(folder))


def _dataset(about: DataInfo, arrays: Mapping[str, np.ndarray], source: str) -> Dataset:
    """The arrays as a `Dataset`, if they are fit to be one."""
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        _check_images(f"{source}: {split}_images", images.dtype, images.shape)
        _check_labels(f"{source}: {split}_labels", labels)
        if images.shape[1:] != about.image_shape:
            raise ValueError(
                f"{source}: {split}_images: expected images of shape {about.image_shape}; got {images.shape[1:]}. "
                "All images of a data set have one size."
            )
        if len(labels) != len(images):
            raise ValueError(
                f"{source}: {split}_labels: expected {len(images)}, one for each of {split}_images; got {len(labels)}. "
                "Make both again from their source."
            )
        if labels.max() >= about.num_classes:
            raise ValueError(
                f"{source}: {split}_labels: expected 0 to {about.num_classes - 1}; got {labels.max()}. "
                "Number the classes from 0."
            )
    return Dataset(
        about,
        train_images=arrays["train_images"],
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=arrays["test_images"],
        test_labels=arrays["test_labels"].astype(np.int32),
    )


def _check_images(argument: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8:
        raise ValueError(
            f"{argument}: expected uint8 in 0, ..., 255; got {dtype}. "
            "Of images in [0, 1] save np.rint(255 * images).astype(np.uint8)."
        )
    if len(shape) != 4 or 0 in shape:
        advice = "Add the channel with images[..., None]." if len(shape) == 3 else "Save all images as one array."
        raise ValueError(f"{argument}: expected shape [N, height, width, channels]; got {tuple(shape)}. {advice}")
    if shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise ValueError(
            f"{argument}: expected channels last, [N, height, width, channels]; got {tuple(shape)}. "
            "Save images.transpose(0, 2, 3, 1)."
        )


def _check_labels(argument: str, labels: np.ndarray) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"{argument}: expected integers of shape [N]; got {labels.dtype} of shape {labels.shape}. "
            "Of one-hot labels save labels.argmax(1), of whole numbers in floats labels.astype(np.int32)."
        )
    if labels.min() < 0:
        raise ValueError(f"{argument}: expected labels from 0; got {labels.min()}. Drop images without a label.")


# --- Digits ----------------------------------------------------------------------------------------------------------


def _read_digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits  # a second to import, for those who want digits only

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.zeros(len(images), bool)
    test[np.argsort(digits.target, kind="stable")[::5]] = True
    return {
        "train_images": images[~test],
        "train_labels": digits.target[~test],
        "test_images": images[test],
        "test_labels": digits.target[test],
    }


# --- .npz: what users bring, and what the cache keeps ----------------------------------------------------------------

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _open_npz(path: str | os.PathLike) -> np.lib.npyio.NpzFile:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: expected an .npz with {', '.join(_ARRAYS)}; got no file there. "
            "Check the path, or write it with np.savez."
        )
    try:
        data = np.load(path, allow_pickle=False)
        members = data.files  # a .npy under another name has none
    except Exception as error:
        raise ValueError(
            f"{path}: expected an .npz; got another kind of file ({error}). Save it with np.savez."
        ) from error
    if missing := [key for key in _ARRAYS if key not in members]:
        data.close()
        raise ValueError(
            f"{path}: expected the arrays {', '.join(_ARRAYS)}; got {', '.join(members) or 'none'}. "
            f"Add {', '.join(missing)}."
        )
    return data


@contextlib.contextmanager
def _reading(path: str | os.PathLike, key: str) -> Iterator[None]:
    """Errors of any kind, while an array is read, as one that says which."""
    try:
        yield
    except Exception as error:  # truncated, damaged, or pickled (which could run code)
        raise ValueError(
            f"{path}: {key}: expected a plain array; got one that can't be read ({error}). Save it again with np.savez."
        ) from error


def _npz_info(path: str) -> DataInfo:
    """Read one header and the labels: kilobytes, whatever the images weigh."""
    with _open_npz(path) as data:
        with _reading(path, "train_images"), data.zip.open("train_images.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        with _reading(path, "train_labels"):
            labels = data["train_labels"]
        with _reading(path, "class_names"):
            names = data["class_names"] if "class_names" in data.files else None

    _check_images(f"{path}: train_images", dtype, shape)
    if names is None:
        _check_labels(f"{path}: train_labels", labels)
        present = np.unique(labels)
        # Labels 1 to 10 would otherwise make a network with an eleventh output that is never right.
        if not np.array_equal(present, np.arange(len(present))):
            raise ValueError(
                f"{path}: train_labels: expected every class from 0 to the largest label; got {len(present)} classes "
                f"between {present[0]} and {present[-1]}. Number the classes from 0, or save class_names for all."
            )
        names = present
    return DataInfo(
        path, tuple(shape[1:]), len(names), flip=False, crop_padding=0, class_names=tuple(str(n) for n in names)
    )


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, and "sha256" if it has one, which then is that of the others.

    Raises:
      FileNotFoundError: no such file.
      ValueError: anything else that is wrong with it.
    """
    with _open_npz(path) as data:
        arrays = {}
        for key in (*_ARRAYS, "sha256") if "sha256" in data.files else _ARRAYS:
            with _reading(path, key):
                arrays[key] = data[key]
    if "sha256" in arrays and str(arrays["sha256"]) != _sha256(arrays):
        raise ValueError(f"{path}: expected arrays of the SHA-256 saved with them; got others. Save them again.")
    return arrays


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in _ARRAYS:
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _cache_dir(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return cache_home()


def _cached(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays saved at `path`; if they aren't there, made and saved. Where nothing can be saved, made each time."""
    if path.exists():
        try:
            arrays = _read_npz(path)
            if "sha256" not in arrays:
                raise ValueError(f"{path}: expected a SHA-256 with the arrays; got none.")
            return arrays
        except ValueError as error:
            warnings.warn(f"The cached data set is damaged and is decoded anew: {error}", stacklevel=3)
    arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays, sha256=np.array(_sha256(arrays)))
    except OSError as error:
        warnings.warn(f"The decoded data set can't be kept at {path}: {error}; pass another cache_dir", stacklevel=3)
    return arrays


# --- TFDS: reading ---------------------------------------------------------------------------------------------------

_CACHE_FORMAT = 1  # raise it when the decoded arrays or their order change


def _tfds_dir(data_dir: str | os.PathLike | None) -> Path:
    """The folder of TFDS's folders: TFDS's own default, without importing TFDS."""
    return local_path("data_dir", data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _prepared_folder(name: str, data_dir: Path) -> Path:
    """The folder of the newest prepared version, as data_dir/cifar10/3.0.2."""
    versions = [
        (tuple(int(part) for part in folder.name.split(".")), folder)
        for folder in data_dir.glob(f"{name}/*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / "dataset_info.json").is_file()
    ]
    if versions:
        return max(versions)[1]
    found = f"a folder without {name}" if data_dir.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"data_dir: expected {name}/<version>/dataset_info.json under {data_dir}; got {found}. Name the folder that "
        f"holds TFDS's folders, or run: python -m experiments.prepare_data {name} --data-dir {data_dir}"
    )


def _fingerprint(folder: Path) -> str:
    """The SHA-256 of what `load` reads of a folder: its bytes, so that a copy has the same."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT}".encode())
    name = folder.parent.name
    paths = [folder / "dataset_info.json", *folder.glob(f"{name}-train*"), *folder.glob(f"{name}-test*")]
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _read_tfds(about: DataInfo, folder: Path) -> dict[str, np.ndarray]:
    """Decode a folder that TFDS prepared."""
    import tensorflow_datasets as tfds  # half a second, and not needed once the cache is there
    from PIL import Image
    from tqdm import tqdm

    builder = tfds.builder_from_directory(folder)
    # TFDS's own decoder is slower, and advises to install OpenCV.
    as_bytes = {"image": tfds.decode.SkipDecoding()}
    arrays, ids = {}, []
    try:
        for split in ("train", "test"):
            count = builder.info.splits[split].num_examples
            images, labels, ids = np.empty((count, *about.image_shape), np.uint8), np.empty(count, np.int32), []
            for record in tqdm(_records(builder, split), f"Decoding {about.name} {split}", count, mininterval=1):
                example = builder.info.features.deserialize_example_np(record, decoders=as_bytes)
                image = np.asarray(Image.open(io.BytesIO(example["image"])))
                images[len(ids)] = image.reshape(about.image_shape)  # PIL drops the axis of a single channel
                labels[len(ids)] = example["label"]
                ids.append(example.get("id", b"").decode())
            if len(ids) != count:
                raise ValueError(f"expected {count} records; got {len(ids)}.")
            order = _original_order(ids)
            arrays |= {f"{split}_images": images[order], f"{split}_labels": labels[order]}
    except Exception as error:
        raise ValueError(
            f"{folder}: expected {about.name} as TFDS prepares it; reading {split} record {len(ids)} failed: {error} "
            f"Prepare it anew: python -m experiments.prepare_data {about.name} --data-dir ANOTHER_FOLDER"
        ) from error
    return arrays


def _records(builder: Any, split: str) -> Iterator[bytes]:
    """Serialized examples in the order of the records; TFDS itself reads tfrecord with TensorFlow only."""
    import tensorflow_datasets as tfds

    file_format = builder.info.file_format.value
    if file_format == "array_record":
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        for start in range(0, len(source), 1000):  # one by one takes 15 times as long
            yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))
    elif file_format == "tfrecord":
        for path in builder.info.splits[split].filepaths:
            yield from _read_tfrecord(path)
    else:
        raise ValueError(f"file format: expected array_record or tfrecord; got {file_format}.")


def _read_tfrecord(path: os.PathLike) -> Iterator[bytes]:
    """The records of a TFRecord file, each framed as length (uint64), CRC of the length, data, CRC of the data.

    The CRCs (CRC-32C, minutes in Python) aren't checked: PNG's own checksum covers the pixels.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while file.tell() < size:
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            if length > size - file.tell() - 4:
                raise ValueError(f"{path}: expected whole records; got one cut short or damaged.")
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)


def _original_order(ids: list[str]) -> np.ndarray:
    """Positions that sort TFDS's numbered ids; where they are something else, that order would group the classes."""
    numbered = all(re.fullmatch(r"(train|test)_\d+", i) for i in ids)
    return np.argsort(ids, kind="stable") if numbered else np.arange(len(ids))


# --- TFDS: preparing -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a data set is published, and how its files are read."""

    files: dict[str, str]
    """SHA-256 by URL."""
    read: Callable[[list[Path]], dict[str, dict[str, np.ndarray]]]
    """From files to TFDS's features, one array each, by split."""
    id_format: str = "{split}_{index:05d}"


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
    if name == "digits":
        raise ValueError("name: expected a data set to prepare; got 'digits', which comes with scikit-learn. Load it.")
    check_choice("name", name, _ORIGINS)
    origin, data_dir = _ORIGINS[name], Path(data_dir).expanduser()
    if data_dir.exists() and not data_dir.is_dir():
        raise NotADirectoryError(f"data_dir: expected a folder; got the file {data_dir}. Name another.")
    with contextlib.suppress(FileNotFoundError):
        return _prepared_folder(name, data_dir)

    if archive is None:
        files = [_download(name, url, sha256, data_dir) for url, sha256 in origin.files.items()]
    else:
        files = _archive_files(name, Path(archive).expanduser())
    splits = origin.read(files)
    for split, features in splits.items():
        _check_labels(f"{files[0]}: {split} labels", features["label"])
        if features["label"].max() >= _INFOS[name].num_classes:
            raise ValueError(f"{files[0]}: {split} labels: expected {name}'s; got {features['label'].max()}.")

    import tensorflow_datasets as tfds
    from PIL import Image

    def examples(split, features):
        for index in range(len(features["label"])):
            example = {key: int(column[index]) for key, column in features.items() if key != "image"}
            # A PIL image: arrays are what TFDS encodes with TensorFlow.
            example["image"] = Image.fromarray(features["image"][index])
            example["id"] = origin.id_format.format(split=split, index=index)
            yield index, example  # the index is TFDS's key too, by which it shuffles

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    if builder.data_path.exists():
        raise FileExistsError(
            f"{builder.data_path}: expected no such folder, or one with dataset_info.json; got one without. It may be "
            "what a preparation left that was cut short: remove it and run this again."
        )
    builder.info.features["label"].names = list(_INFOS[name].class_names)
    builder._split_generators = lambda dl_manager: {split: examples(split, f) for split, f in splits.items()}
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return _prepared_folder(name, data_dir)


def _archive_files(name: str, archive: Path) -> list[Path]:
    """The published files, in a folder or the only one itself."""
    names = [os.path.basename(url) for url in _ORIGINS[name].files]
    files = [archive / n for n in names] if archive.is_dir() or len(names) > 1 else [archive]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"archive: expected {' and '.join(names)}{' in one folder' if len(names) > 1 else ''}; "
                f"got nothing at {file}. They are published as {' and '.join(_ORIGINS[name].files)}."
            )
    return files


def _download(name: str, url: str, sha256: str, data_dir: Path) -> Path:
    """The file of this URL in data_dir/downloads, fetched if it isn't there.

    TFDS's download manager goes on trying for minutes where there is no network, and keeps files under names that a
    person who brings a file can't guess.
    """
    import requests
    from tqdm import tqdm

    path = data_dir / "downloads" / os.path.basename(url)
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
            f"or run: python -m experiments.prepare_data {name} --data-dir {data_dir} --archive "
            f"{'FOLDER' if len(_ORIGINS[name].files) > 1 else 'FILE'}"
        ) from error
    return path


def _read_cifar(
    files: list[Path], *, folder: str, splits: dict[str, list[str]], labels: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Rows of label bytes and 3,072 pixels, channels first, in the members of a tar."""
    (path,) = files
    wanted = {f"{folder}/{member}" for members in splits.values() for member in members}
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:  # in the tar's order: going back in a gzip means reading it again
                if os.path.normpath(member.name) in wanted and (file := tar.extractfile(member)):
                    found[os.path.normpath(member.name)] = np.frombuffer(file.read(), np.uint8)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"archive: expected a whole tar or tar.gz; got {path}: {error}. Download it again.") from error
    if missing := sorted(wanted - found.keys()):
        raise ValueError(
            f"archive: expected {', '.join(sorted(wanted))}; got {path} without {', '.join(missing)}. "
            "Take the binary version, whose name ends in -binary.tar.gz."
        )
    row = len(labels) + 3072
    for member, data in found.items():
        if len(data) % row or not len(data):
            raise ValueError(
                f"{path}: {member}: expected rows of {row} bytes; got {len(data)} bytes. Download it again."
            )

    def features(members):
        rows = np.concatenate([found[f"{folder}/{member}"] for member in members]).reshape(-1, row)
        images = rows[:, len(labels) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return {"image": np.ascontiguousarray(images), **{key: rows[:, i] for i, key in enumerate(labels)}}

    return {split: features(members) for split, members in splits.items()}


def _read_svhn(files: list[Path]) -> dict[str, dict[str, np.ndarray]]:
    """MATLAB files with X, uint8 [32, 32, 3, N], and y, [N, 1] in 1, ..., 10, where 10 is the digit 0."""
    from scipy.io import loadmat

    def features(path):
        try:
            data = loadmat(path)
            images, labels = data["X"], data["y"].reshape(-1)
            if images.shape != (32, 32, 3, len(labels)) or images.dtype != np.uint8 or not len(labels):
                raise ValueError(f"X of shape {images.shape}, {images.dtype}")
        except Exception as error:
            raise ValueError(
                f"archive: expected SVHN's cropped digits, X uint8 [32, 32, 3, N] and y; got {path}: {error}. "
                "Download it again."
            ) from error
        return {"image": np.ascontiguousarray(images.transpose(3, 0, 1, 2)), "label": labels.astype(np.int64) % 10}

    return {split: features(path) for split, path in zip(("train", "test"), files, strict=True)}


# URLs and checksums as TFDS has them.
_ORIGINS = {
    "cifar10": _Origin(
        {
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": (
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
            )
        },
        functools.partial(
            _read_cifar,
            folder="cifar-10-batches-bin",
            splits={"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
            labels=["label"],
        ),
    ),
    "cifar100": _Origin(
        {
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz": (
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
            )
        },
        functools.partial(
            _read_cifar,
            folder="cifar-100-binary",
            splits={"train": ["train.bin"], "test": ["test.bin"]},
            labels=["coarse_label", "label"],
        ),
    ),
    "svhn_cropped": _Origin(
        {
            "http://ufldl.stanford.edu/housenumbers/train_32x32.mat": (
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
            ),
            "http://ufldl.stanford.edu/housenumbers/test_32x32.mat": (
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"
            ),
        },
        _read_svhn,
        id_format="{split}_{index:06d}",
    ),
}
