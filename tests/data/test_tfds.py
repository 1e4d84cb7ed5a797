"""Prepared data sets are read without TensorFlow; damage is detected; decoded arrays are cached."""

import io
import json
import shutil
import warnings

import numpy as np
import pytest

from fs_jax import data
from fs_jax.data import tfds
from tests.archives import assert_equal, flip_a_byte, run_python


def test_cifar10_is_read_exactly_in_the_order_of_the_archive(load, prepared):
    # TFDS shuffles the records, so this also tests the order.
    assert_equal(load(), prepared[1])


def test_tfds_reads_the_prepared_folder(prepared):
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", split="test", data_dir=prepared[0])
    examples = {example["id"].decode(): example for example in source}
    assert sorted(examples) == [f"test_{i:05d}" for i in range(4)]
    for i in range(4):
        np.testing.assert_array_equal(examples[f"test_{i:05d}"]["image"], prepared[1]["test_images"][i])
    builder = tfds.builder("cifar10", data_dir=prepared[0], try_gcs=False)
    assert tuple(builder.info.features["label"].names) == data.info("cifar10").class_names


@pytest.fixture
def tfrecord_dir(prepared, tmp_path):
    """The prepared folder in tfrecord, TFDS's default, written by TensorBoard's writer of that format."""
    import tensorflow_datasets as tfds

    record_writer = pytest.importorskip("tensorboardX.record_writer")
    builder = tfds.builder_from_directory(prepared[0] / "cifar10" / "3.0.2")
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    about = json.loads((builder.data_path / "dataset_info.json").read_text(encoding="utf-8"))
    (folder / "dataset_info.json").write_text(json.dumps({**about, "fileFormat": "tfrecord"}), encoding="utf-8")
    shutil.copy(builder.data_path / "features.json", folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in ("train", "test"):
        writer = record_writer.RecordWriter(str(folder / f"cifar10-{split}.tfrecord-00000-of-00001"))
        for record in builder.as_data_source(split, deserialize_method=raw):
            writer.write(record)
        writer.close()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("stl10", (96, 96, 3))]
)
def test_other_data_sets_of_tfds_can_be_written_and_read(tmp_path, name, shape):
    # One channel; no ids; class names with and without TFDS's.
    about = data.DataInfo(name, shape, 10, flip=False, crop_padding=0, class_names=tuple("abcdefghij"))
    rng = np.random.default_rng(0)
    splits = {
        split: {"image": rng.integers(0, 256, (3, *shape), np.uint8), "label": np.array([0, 9, 4])}
        for split in ("train", "test")
    }
    folder = tfds.write(about, splits, "{split}_{index}", tmp_path)
    assert folder.parent.name == name
    _, arrays = tfds.read(about, tmp_path, tmp_path / "cache")
    for split, features in splits.items():  # in the order of the records, which have no numbers
        order = np.argsort(arrays[f"{split}_labels"])
        np.testing.assert_array_equal(arrays[f"{split}_images"][order], features["image"][[0, 2, 1]])


def test_cifar10_16x16_averages_blocks_of_four_pixels(prepared, tmp_path):
    small = data.load("cifar10_16x16", data_dir=prepared[0], cache_dir=tmp_path / "cache")
    for split in ("train", "test"):
        images = prepared[1][f"{split}_images"].astype(int)
        sums = images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2]
        np.testing.assert_array_equal(getattr(small, f"{split}_images"), (sums + 2) // 4)  # rounded, halves up
        np.testing.assert_array_equal(getattr(small, f"{split}_labels"), prepared[1][f"{split}_labels"])


def test_a_tfrecord_folder_is_read(tfrecord_dir, prepared, tmp_path):
    assert_equal(data.load("cifar10", data_dir=tfrecord_dir, cache_dir=tmp_path / "cache"), prepared[1])


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_a_truncated_tfrecord_raises_an_error(tfrecord_dir, tmp_path, cut):
    (path,) = tfrecord_dir.glob("cifar10/*/cifar10-test*")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"reading test record \d+ failed: .*expected complete records"):
        data.load("cifar10", data_dir=tfrecord_dir, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_records_raise_an_error(prepared, tmp_path):
    shutil.copytree(prepared[0] / "cifar10", tmp_path / "cifar10")
    (path,) = tmp_path.glob("cifar10/*/cifar10-test*")
    path.unlink()
    with pytest.raises(ValueError, match=r"cifar10/3.0.2: expected cifar10 as TFDS prepares it"):
        data.load("cifar10", data_dir=tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("file_format", "position"), [
    ("tfrecord", "length"), ("tfrecord", "label"), ("tfrecord", "checksum"), ("array_record", "label"),
])  # fmt: skip
def test_a_damaged_byte_raises_an_error(request, prepared, tmp_path, file_format, position):
    if file_format == "tfrecord":
        folder = request.getfixturevalue("tfrecord_dir")
    else:
        folder = tmp_path
        shutil.copytree(prepared[0] / "cifar10", folder / "cifar10")
    (path,) = folder.glob("cifar10/*/cifar10-test*")
    content = bytearray(path.read_bytes())
    # The checksum in the PNG does not cover the label. The label is at the end of the `tf.train.Example`: its name, the
    # lengths of feature, list and packed numbers, each after its tag, then the number.
    label = content.index(b"label") + len(b"label") + 6
    # The highest byte of the length: unchecked, it would request all memory.
    content[{"length": 7, "label": label, "checksum": -1}[position]] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"reading test record \d+ failed"):
        data.load("cifar10", data_dir=folder, cache_dir=tmp_path / "cache")


def test_only_numbered_ids_are_sorted():
    # Names such as CIFAR-10's "dump_truck_s_000431.png" would sort by class.
    assert tfds._original_order(["test_00002", "test_00000", "test_00001"]).tolist() == [1, 2, 0]
    assert tfds._original_order(["truck_2.png", "airplane_1.png"]).tolist() == [0, 1]
    assert tfds._original_order(["", ""]).tolist() == [0, 1]


def test_the_newest_version_is_read(prepared, tmp_path):
    for version in ("3.0.2", "3.0.10", "4.0.0.incomplete"):
        shutil.copytree(prepared[0] / "cifar10" / "3.0.2", tmp_path / "cifar10" / version)
    assert tfds.prepared_folder("cifar10", tmp_path).name == "3.0.10"


def test_the_default_folder_is_that_of_tfds(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_equal(data.load("cifar10"), prepared[1])
    assert [path.suffix for path in (tmp_path / "fs_jax").iterdir()] == [".npz"]


def test_neither_preparing_nor_reading_needs_tensorflow(cifar, tmp_path):
    code = f"""
import sys
class HideTensorFlow:  # as if it weren't installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "tensorflow" else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(HideTensorFlow, sys.meta_path)
from fs_jax import data
from fs_jax.data import tfds
heavy = {{"tensorflow_datasets", "sklearn", "scipy", "PIL", "jax"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
data.prepare("cifar10", {str(tmp_path)!r}, archive={str(cifar[0])!r})
print(data.load("cifar10", data_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r}).train_images.shape)
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "(15, 32, 32, 3)"
    # With the cache, TFDS is not even imported.
    code = f"""
import sys
from fs_jax import data
from fs_jax.data import tfds
data.load("cifar10", data_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r})
assert "tensorflow_datasets" not in sys.modules
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def cached(load, tmp_path):
    """The file of the cache, after a first load."""
    load()
    (path,) = (tmp_path / "cache").iterdir()
    return path


def test_the_second_load_decodes_nothing(load, prepared, cached, monkeypatch):
    monkeypatch.setattr(tfds, "_decode", None)
    assert_equal(load(), prepared[1])


def change_a_pixel(path):
    """Write a valid file with another pixel, so that only the hash is wrong."""
    arrays = dict(np.load(path))
    arrays["train_images"][7, 3, 3, 1] ^= 1
    np.savez(path, **arrays)


def drop_the_hash(path):
    arrays = dict(np.load(path))
    del arrays["sha256"]
    np.savez(path, **arrays)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [flip_a_byte, change_a_pixel, drop_the_hash, truncate])
def test_a_damaged_cache_is_rebuilt_with_a_warning(load, prepared, cached, damage):
    good = cached.read_bytes()
    damage(cached)
    with pytest.warns(UserWarning, match="cached data set is damaged and will be decoded again: .*cifar10"):
        assert_equal(load(), prepared[1])
    assert dict(np.load(cached))["sha256"] == dict(np.load(io.BytesIO(good)))["sha256"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(load(), prepared[1])


def test_other_records_have_another_cache(load, cached, prepared, tmp_path):
    # Another test set, in a folder with the same name and version.
    folder = shutil.copytree(prepared[0], tmp_path / "tfds")
    same = tfds._fingerprint(folder / "cifar10" / "3.0.2")
    assert same == tfds._fingerprint(prepared[0] / "cifar10" / "3.0.2")  # a copy uses the same cache
    (records,) = folder.glob("cifar10/*/cifar10-test*")
    flip_a_byte(records)
    assert tfds._fingerprint(folder / "cifar10" / "3.0.2") != same


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_file(load, prepared, tmp_path, monkeypatch, error):
    def savez(file, **_):
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", savez)
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match="cannot be cached at .*: disk full. Pass another cache_dir"):
            assert_equal(load(), prepared[1])
    else:
        with pytest.raises(KeyboardInterrupt):
            load()
    assert not list((tmp_path / "cache").iterdir())


def test_data_are_read_without_a_writable_cache(load, prepared, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert_equal(load(), prepared[1])


@pytest.mark.parametrize(("folder", "found"), [("", "a folder without cifar10"), ("missing", "no such folder")])
def test_the_error_for_a_missing_data_set_has_the_command_to_run(tmp_path, folder, found):
    data_dir = tmp_path / folder
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar10", data_dir=data_dir)
    assert f"under {data_dir}; got {found}" in str(caught.value)
    assert f"python -c \"from fs_jax import data; data.prepare('cifar10', '{data_dir}')\"" in str(caught.value)
