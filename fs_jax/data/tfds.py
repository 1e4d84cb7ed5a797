"""Read TFDS's folders (array_record or tfrecord) and write them (array_record), without TensorFlow."""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fs_jax._utils.extras import require
from fs_jax._utils.files import cache_home, local_path
from fs_jax.data.npz import cached
from fs_jax.data.types import DataInfo

_CACHE_FORMAT = 1  # increase it when the decoded arrays or their order change


def read(
    about: DataInfo, data_dir: str | os.PathLike | None, cache_dir: str | os.PathLike | None
) -> tuple[Path, dict[str, np.ndarray]]:
    """The prepared folder of a data set, and its arrays, which are decoded and cached if necessary.

    See `load` for the arguments and errors.
    """
    tfds_dir = local_path("data_dir", data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    folder = prepared_folder(about.name, tfds_dir)
    caches = cache_home() if cache_dir is None else local_path("cache_dir", cache_dir)
    cache = caches / f"{about.name}-{folder.name}-{_fingerprint(folder)[:16]}.npz"
    return folder, cached(cache, lambda: _decode(about, folder))


def prepared_folder(name: str, data_dir: Path) -> Path:
    """The folder of the newest prepared version, such as data_dir/cifar10/3.0.2."""
    versions = [
        (tuple(int(part) for part in folder.name.split(".")), folder)
        for folder in data_dir.glob(f"{name}/*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / "dataset_info.json").is_file()
    ]
    if versions:
        return max(versions)[1]
    found = f"a folder without {name}" if data_dir.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"data_dir: expected {name}/<version>/dataset_info.json under {data_dir}; got {found}. Pass the TFDS data "
        f"folder, or prepare the data set: {prepare_command(name, data_dir)}"
    )


def prepare_command(name: str, data_dir: str | os.PathLike, archive: str | None = None) -> str:
    """The command that prepares a data set, for messages. It needs only the installed package."""
    call = f"prepare({name!r}, {os.fspath(data_dir)!r}{f', archive={archive!r}' if archive else ''})"
    return f'python -c "from fs_jax import data; data.{call}"'


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the files that `load` reads, by content, so that a copy of the folder has the same."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT}".encode())
    name = folder.parent.name
    paths = [folder / "dataset_info.json", *folder.glob(f"{name}-train*"), *folder.glob(f"{name}-test*")]
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _decode(about: DataInfo, folder: Path) -> dict[str, np.ndarray]:
    """Decode a folder prepared by TFDS."""
    require("tensorflow_datasets", "PIL")
    import tensorflow_datasets as tfds  # here, as the import takes half a second and is not needed with a cache
    from PIL import Image
    from tqdm import tqdm

    builder = tfds.builder_from_directory(folder)
    require("google_crc32c" if builder.info.file_format.value == "tfrecord" else "array_record")
    # TFDS's own decoder is slower, and warns if OpenCV is missing.
    as_bytes = {"image": tfds.decode.SkipDecoding()}
    arrays: dict[str, np.ndarray] = {}
    ids: list[str] = []
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
            f"Prepare it again: {prepare_command(about.name, 'ANOTHER_FOLDER')}"
        ) from error
    return arrays


def _records(builder: Any, split: str) -> Iterator[bytes]:
    """Serialized examples, in the order of the records. Reads tfrecord itself, as TFDS needs TensorFlow for that."""
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
    """The records of a TFRecord file.

    A record is stored as its length (uint64), the CRC of the length, the data, and the CRC of the data. A CRC is the
    CRC-32C, rotated right by 15 bits, plus a constant. Both are checked, since the checksum in a PNG does not cover the
    label.
    """
    from google_crc32c import value as crc32c

    def intact(data, stored):
        crc = crc32c(data)
        return len(stored) == 4 and ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32 == int.from_bytes(stored, "little")

    with open(path, "rb") as file:
        while length := file.read(8):
            record = None
            if intact(length, file.read(4)):  # otherwise a damaged length could request all memory
                record = file.read(int.from_bytes(length, "little"))
            if record is None or not intact(record, file.read(4)):
                raise ValueError(f"{path}: expected complete records; got a truncated or damaged one.")
            yield record


def _original_order(ids: list[str]) -> np.ndarray:
    """Positions that sort numbered ids. Other ids are not sorted, as their order would group the classes."""
    numbered = all(re.fullmatch(r"(train|test)_\d+", i) for i in ids)
    return np.argsort(ids, kind="stable") if numbered else np.arange(len(ids))


def write(about: DataInfo, splits: Mapping[str, Mapping[str, np.ndarray]], id_format: str, data_dir: Path) -> Path:
    """Write a data set of TFDS in the format of TFDS (array_record).

    TFDS writes the records and the metadata. Only the images are passed to it, because its own readers need TensorFlow.

    Args:
      about: Description of the data set; its name must be TFDS's.
      splits: For each split, one array for each of TFDS's features.
      id_format: Format of TFDS's ids, with {split} and {index}.
      data_dir: The TFDS data folder.

    Returns:
      The folder of the data set.

    Raises:
      FileExistsError: if the folder exists but is incomplete.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    base: Any = tfds.builder_cls(about.name)  # a class that is known only at run time

    class Builder(base, skip_registration=True):  # type: ignore[call-arg]  # a keyword of TFDS's class
        """TFDS's builder of the data set, with these images."""

        name = about.name

        def _split_generators(self, dl_manager):
            label = self.info.features["label"]
            if label.names == [
                str(number) for number in range(label.num_classes)
            ]:  # unnamed, or named when TFDS reads the images
                label.names = list(about.class_names)
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for index in range(len(splits[split]["label"])):
                example = {key: int(column[index]) for key, column in splits[split].items() if key != "image"}
                # A PIL image, as TFDS needs TensorFlow to encode arrays. A single channel has no axis in PIL.
                image = splits[split]["image"][index]
                example["image"] = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                if "id" in self.info.features:
                    example["id"] = id_format.format(split=split, index=index)
                yield index, example  # the index is also TFDS's key, by which it shuffles

    builder = Builder(data_dir=data_dir, file_format="array_record")
    if builder.data_path.exists():
        raise FileExistsError(
            f"{builder.data_path}: expected no folder, or one with dataset_info.json; got one without. It may "
            "come from an interrupted preparation: remove it and run this again."
        )
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return prepared_folder(about.name, data_dir)
