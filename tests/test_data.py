"""What goes into a data set comes out of it, without TensorFlow; what can't be read is refused by name."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings

import numpy as np
import pytest

from fs_jax import data

ROOT = pathlib.Path(__file__).parents[1]
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


# --- Data sets to read, made here: the published layouts, with a few random images -----------------------------------


def random_split(count, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, classes, count).astype(np.int32)


def cifar_rows(images, *labels):
    columns = [np.asarray(column, np.uint8)[:, None] for column in labels]
    return np.concatenate([*columns, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1).tobytes()


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """(archive in CIFAR-10's binary layout, its arrays): five files of three images, and one of four."""
    folder = tmp_path_factory.mktemp("archive")
    train_images, train_labels = random_split(15)
    test_images, test_labels = random_split(4, seed=1)
    members = {"cifar-10-batches-bin/batches.meta.txt": "\n".join(data.info("cifar10").class_names).encode()}
    for i in range(5):
        part = slice(3 * i, 3 * i + 3)
        members[f"cifar-10-batches-bin/data_batch_{i + 1}.bin"] = cifar_rows(train_images[part], train_labels[part])
    members["cifar-10-batches-bin/test_batch.bin"] = cifar_rows(test_images, test_labels)
    archive = write_tar(folder / "cifar-10-binary.tar.gz", members)
    return archive, dict(zip(ARRAYS, (train_images, train_labels, test_images, test_labels), strict=True))


@pytest.fixture(scope="module")
def prepared(cifar, tmp_path_factory):
    """(data_dir with CIFAR-10's archive prepared, its arrays); not to be written to."""
    data_dir = tmp_path_factory.mktemp("tfds")
    data.prepare("cifar10", data_dir, archive=cifar[0])
    return data_dir, cifar[1]


@pytest.fixture
def load(prepared, tmp_path):
    """Loads the prepared CIFAR-10 with a cache of this test's own."""
    return functools.partial(data.load, "cifar10", data_dir=prepared[0], cache_dir=tmp_path / "cache")


def assert_equal(dataset, arrays):
    for key in ARRAYS:
        np.testing.assert_array_equal(getattr(dataset, key), arrays[key])
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


# --- Preparing and reading TFDS's folders ----------------------------------------------------------------------------


def test_cifar10_comes_back_pixel_for_pixel_in_the_archives_order(load, prepared):
    # TFDS shuffles the records: this is a test of the order too.
    assert_equal(load(), prepared[1])


def test_cifar100_has_fine_labels(tmp_path):
    splits = {"train": random_split(6, 100), "test": random_split(3, 100, seed=1)}
    members = {f"cifar-100-binary/{s}.bin": cifar_rows(images, y // 5, y) for s, (images, y) in splits.items()}
    archive = write_tar(tmp_path / "cifar-100-binary.tar.gz", members)
    data.prepare("cifar100", tmp_path, archive=archive)
    arrays = dict(zip(ARRAYS, (*splits["train"], *splits["test"]), strict=True))
    assert_equal(data.load("cifar100", data_dir=tmp_path, cache_dir=tmp_path), arrays)


def test_svhn_is_read_from_matlabs_files_where_ten_is_the_digit_zero(tmp_path):
    from scipy.io import savemat

    splits = {"train": random_split(12), "test": random_split(5, seed=1)}
    for split, (images, labels) in splits.items():
        labels[0] = 0
        y = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})
    data.prepare("svhn_cropped", tmp_path, archive=tmp_path)
    arrays = dict(zip(ARRAYS, (*splits["train"], *splits["test"]), strict=True))
    assert_equal(data.load("svhn_cropped", data_dir=tmp_path, cache_dir=tmp_path), arrays)


def test_tfds_itself_reads_the_prepared_folder(prepared):
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
    about = json.loads((builder.data_path / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**about, "fileFormat": "tfrecord"}))
    shutil.copy(builder.data_path / "features.json", folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in ("train", "test"):
        writer = record_writer.RecordWriter(str(folder / f"cifar10-{split}.tfrecord-00000-of-00001"))
        for record in builder.as_data_source(split, deserialize_method=raw):
            writer.write(record)
        writer.close()
    return tmp_path


def test_a_tfrecord_folder_is_read_as_well(tfrecord_dir, prepared, tmp_path):
    assert_equal(data.load("cifar10", data_dir=tfrecord_dir, cache_dir=tmp_path / "cache"), prepared[1])


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_a_truncated_tfrecord_is_refused(tfrecord_dir, tmp_path, cut):
    (path,) = tfrecord_dir.glob("cifar10/*/cifar10-test*")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"reading test record \d+ failed: .*expected whole records"):
        data.load("cifar10", data_dir=tfrecord_dir, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_records_are_noticed(prepared, tmp_path):
    shutil.copytree(prepared[0] / "cifar10", tmp_path / "cifar10")
    (path,) = tmp_path.glob("cifar10/*/cifar10-test*")
    path.unlink()
    with pytest.raises(ValueError, match=r"cifar10/3.0.2: expected cifar10 as TFDS prepares it"):
        data.load("cifar10", data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_a_damaged_pixel_is_noticed(tfrecord_dir, tmp_path):
    (path,) = tfrecord_dir.glob("cifar10/*/cifar10-test*")
    content = bytearray(path.read_bytes())
    content[1500] ^= 1  # within the first image, which takes 3 kB
    path.write_bytes(content)
    with pytest.raises(ValueError, match="reading test record 0 failed"):
        data.load("cifar10", data_dir=tfrecord_dir, cache_dir=tmp_path / "cache")


def test_numbered_ids_give_the_order_and_other_ids_leave_it():
    # Names such as CIFAR-10's "dump_truck_s_000431.png" sort by class: the first thousand would be no sample.
    assert data._original_order(["test_00002", "test_00000", "test_00001"]).tolist() == [1, 2, 0]
    assert data._original_order(["truck_2.png", "airplane_1.png"]).tolist() == [0, 1]
    assert data._original_order(["", ""]).tolist() == [0, 1]


def test_the_newest_version_is_read(prepared, tmp_path):
    for version in ("3.0.2", "3.0.10", "4.0.0.incomplete"):
        shutil.copytree(prepared[0] / "cifar10" / "3.0.2", tmp_path / "cifar10" / version)
    assert data._prepared_folder("cifar10", tmp_path).name == "3.0.10"


def test_the_default_folder_is_tfdss_own(prepared, tmp_path, monkeypatch):
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
heavy = {{"tensorflow_datasets", "sklearn", "scipy", "PIL", "jax"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
data.prepare("cifar10", {str(tmp_path)!r}, archive={str(cifar[0])!r})
print(data.load("cifar10", data_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r}).train_images.shape)
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "(15, 32, 32, 3)"
    # From the cache, and TFDS is not even imported.
    code = f"""
import sys
from fs_jax import data
data.load("cifar10", data_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r})
assert "tensorflow_datasets" not in sys.modules
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr


def test_the_command_prepares_and_says_what_is_wrong_in_one_line(cifar, tmp_path):
    command = ("-m", "experiments.prepare_data", "cifar10", "--data-dir", str(tmp_path), "--archive")
    run = run_python(*command, str(tmp_path / "nothing"))
    assert run.returncode == 2
    assert run.stderr.startswith("error: archive: expected cifar-10-binary.tar.gz; got nothing at ")
    run = run_python(*command, str(cifar[0]))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(tmp_path / "cifar10" / "3.0.2")


def test_what_is_prepared_is_left_as_it_is(prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared[0].rglob("*")}
    assert data.prepare("cifar10", prepared[0]) == prepared[0] / "cifar10" / "3.0.2"  # and nothing is downloaded
    assert before == {path: path.stat().st_mtime_ns for path in prepared[0].rglob("*")}


# --- Downloading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(cifar, monkeypatch):
    """Publishes the small archive on this machine, with the given checksum."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=cifar[0].parent)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def publish(name, sha256):
        origin = dataclasses.replace(
            data._ORIGINS["cifar10"], files={f"http://127.0.0.1:{server.server_port}/{name}": sha256}
        )
        monkeypatch.setitem(data._ORIGINS, "cifar10", origin)

    yield publish
    server.shutdown()
    server.server_close()


def test_a_download_is_prepared_and_kept(cifar, published, tmp_path):
    published(cifar[0].name, hashlib.sha256(cifar[0].read_bytes()).hexdigest())
    data.prepare("cifar10", tmp_path)
    assert_equal(data.load("cifar10", data_dir=tmp_path, cache_dir=tmp_path), cifar[1])
    assert (tmp_path / "downloads" / cifar[0].name).read_bytes() == cifar[0].read_bytes()


@pytest.mark.parametrize(("name", "problem"), [
    ("cifar-10-binary.tar.gz", "expected the SHA-256 1234; got "), ("gone.tar.gz", "404"),
])  # fmt: skip
def test_a_failed_download_says_where_to_put_the_file(published, tmp_path, name, problem):
    published(name, "1234")
    with pytest.raises(ConnectionError) as caught:
        data.prepare("cifar10", tmp_path)
    assert problem in str(caught.value)
    assert f"put it at {tmp_path}/downloads/{name}" in str(caught.value)
    assert f"python -m experiments.prepare_data cifar10 --data-dir {tmp_path} --archive FILE" in str(caught.value)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_file_put_where_the_message_says_is_used(cifar, published, tmp_path):
    published(cifar[0].name, "1234")
    (tmp_path / "downloads").mkdir()
    shutil.copy(cifar[0], tmp_path / "downloads")
    assert data.prepare("cifar10", tmp_path).is_dir()


# --- Archives that won't do ------------------------------------------------------------------------------------------


def cifar_members(batch, labels=(3,)):
    rows = cifar_rows(random_split(len(labels))[0], labels)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {f"cifar-10-batches-bin/{name}": rows for name in names} | batch


@pytest.mark.parametrize(("members", "message"), [
    ({"cifar-10-batches-py/data_batch_1": b""}, "Take the binary version, whose name ends in -binary.tar.gz"),
    (cifar_members({"cifar-10-batches-bin/test_batch.bin": b"12"}), "test_batch.bin: expected rows .* 3073 .* got 2"),
    (cifar_members({"cifar-10-batches-bin/test_batch.bin": b""}), "test_batch.bin: expected rows .* 3073 .* got 0"),
    (cifar_members({}, labels=(3, 10)), "train labels: expected cifar10's; got 10"),
])  # fmt: skip
def test_a_foreign_archive_is_refused_before_anything_is_written(members, message, tmp_path):
    archive = write_tar(tmp_path / "archive.tar.gz", members)
    with pytest.raises(ValueError, match=message):
        data.prepare("cifar10", tmp_path / "tfds", archive=archive)
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"not a tar"])
def test_a_damaged_archive_is_refused(cifar, tmp_path, damage):
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(damage(cifar[0].read_bytes()))
    with pytest.raises(ValueError, match=r"(?s)archive: expected a whole tar or tar.gz; got .* Download it"):
        data.prepare("cifar10", tmp_path / "tfds", archive=archive)


def test_svhns_archive_is_a_folder_of_two_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected train_32x32.mat and test_32x32.mat in one folder; got nothing"
    ):
        data.prepare("svhn_cropped", tmp_path, archive=tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}_32x32.mat").write_bytes(b"not MATLAB's")
    with pytest.raises(ValueError, match=r"expected SVHN's cropped digits.*train_32x32.mat.*Download it again"):
        data.prepare("svhn_cropped", tmp_path, archive=tmp_path)


def test_preparing_refuses_what_it_cannot_prepare(cifar, tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of cifar10, .*; got 'cifar_10'. Did you mean 'cifar10'"):
        data.prepare("cifar_10", tmp_path)
    with pytest.raises(ValueError, match=r"digits.*comes with scikit-learn"):
        data.prepare("digits", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="data_dir: expected a folder; got the file"):
        data.prepare("cifar10", tmp_path / "file")
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"cifar10/3.0.2: .* remove it and run this again"):
        data.prepare("cifar10", tmp_path, archive=cifar[0])


# --- The cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(load, tmp_path):
    """The file that the first load left."""
    load()
    (path,) = (tmp_path / "cache").iterdir()
    return path


def test_the_second_time_nothing_is_decoded(load, prepared, cached, monkeypatch):
    monkeypatch.setattr(data, "_read_tfds", None)
    assert_equal(load(), prepared[1])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_pixel(path):
    """A well-formed file whose checksums are right, but for the hash."""
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
    with pytest.warns(UserWarning, match="cached data set is damaged and is decoded anew: .*cifar10"):
        assert_equal(load(), prepared[1])
    assert dict(np.load(cached))["sha256"] == dict(np.load(io.BytesIO(good)))["sha256"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(load(), prepared[1])


def test_other_records_are_not_taken_for_the_cached_ones(load, cached, prepared, tmp_path):
    # Prepared anew, with another test set, in a folder of the same name and version.
    folder = shutil.copytree(prepared[0], tmp_path / "tfds")
    same = data._fingerprint(folder / "cifar10" / "3.0.2")
    assert same == data._fingerprint(prepared[0] / "cifar10" / "3.0.2")  # a copy shares the cache
    (records,) = folder.glob("cifar10/*/cifar10-test*")
    flip_a_byte(records)
    assert data._fingerprint(folder / "cifar10" / "3.0.2") != same


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_behind(load, prepared, tmp_path, monkeypatch, error):
    def savez(file, **_):
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", savez)
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match="can't be kept at .*: disk full; pass another cache_dir"):
            assert_equal(load(), prepared[1])
    else:
        with pytest.raises(KeyboardInterrupt):
            load()
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_place_for_the_cache_the_data_are_read_all_the_same(load, prepared, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match="can't be kept"):
        assert_equal(load(), prepared[1])


# --- Names, folders, digits ------------------------------------------------------------------------------------------


def test_info_needs_no_data():
    about = {name: data.info(name) for name in ("cifar10", "cifar100", "svhn_cropped", "digits")}
    assert {name: (i.flip, i.crop_padding) for name, i in about.items()} == {
        "cifar10": (True, 4), "cifar100": (True, 4), "svhn_cropped": (False, 4), "digits": (False, 1),
    }  # fmt: skip
    for name, i in about.items():
        assert i.name == name
        assert len(set(i.class_names)) == i.num_classes
    assert list(about["cifar100"].class_names) == sorted(about["cifar100"].class_names)  # as CIFAR-100 numbers them


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(
        ValueError, match=r"name: expected one of cifar10, .*, FILE.npz; got 'svhn'. Did you mean 'svhn_"
    ):
        data.load("svhn")


@pytest.mark.parametrize(("folder", "found"), [("", "a folder without cifar10"), ("missing", "no such folder")])
def test_a_data_set_that_is_not_there_comes_with_the_command_to_run(tmp_path, folder, found):
    data_dir = tmp_path / folder
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar10", data_dir=data_dir)
    assert f"under {data_dir}; got {found}" in str(caught.value)
    assert f"python -m experiments.prepare_data cifar10 --data-dir {data_dir}" in str(caught.value)


def test_digits_are_split_in_proportion():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    # Every fifth of the images sorted by class: a class of n has n/5 test images, rounded up or down.
    assert (np.abs(test - (train + test) / 5) < 1).all()
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32


def test_digits_are_scikit_learns_in_0_to_255():
    from sklearn.datasets import load_digits

    digits, source = data.load("digits"), load_digits()
    images = np.concatenate([digits.train_images, digits.test_images])[..., 0]
    # Sixteen steps of 255/16 = 15.9, far enough apart to be told again.
    grey = np.rint(images * (16 / 255))
    assert np.abs(images - grey * 255 / 16).max() <= 0.5
    key = lambda pixels, label: (label, pixels.astype(int).tobytes())  # noqa: E731
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    ours = sorted(key(g, int(y)) for g, y in zip(grey, labels, strict=True))
    theirs = sorted(key(g, int(y)) for g, y in zip(source.images, source.target, strict=True))
    assert ours == theirs


# --- .npz ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_npz(tmp_path):
    """Writes an .npz of 6 and 4 grey images in 3 classes, with these changes (None: leave the array out)."""

    def write(**changes):
        arrays = {
            "train_images": np.arange(6 * 5 * 7, dtype=np.uint8).reshape(6, 5, 7, 1),
            "train_labels": np.array([0, 1, 2, 0, 1, 2]),
            "test_images": np.ones((4, 5, 7, 1), np.uint8),
            "test_labels": np.array([2, 2, 0, 0]),
        } | changes
        path = tmp_path / "images.npz"
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write


def test_an_npz_is_read_as_it_is(write_npz):
    path = write_npz()
    dataset = data.load(path)
    assert_equal(dataset, np.load(path))
    assert dataset.info == data.DataInfo(
        str(path), (5, 7, 1), 3, flip=False, crop_padding=0, class_names=("0", "1", "2")
    )


def test_an_npz_may_name_its_classes(write_npz):
    names = ["ant", "bee", "cat", "dog"]
    about = data.info(write_npz(class_names=np.array(names)))
    assert about.num_classes == 4  # one of them without an image
    assert about.class_names == tuple(names)


def test_info_of_an_npz_does_not_read_its_images(write_npz, monkeypatch):
    path = write_npz()
    read = []
    getitem = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: read.append(key) or getitem(self, key))
    assert data.info(path).image_shape == (5, 7, 1)
    assert read == ["train_labels"]


IMAGES = np.zeros((6, 5, 7, 1), np.uint8)


@pytest.mark.parametrize(("changes", "message"), [
    ({"test_images": None, "test_labels": None}, r"got train_images, train_labels. Add test_images, test_labels."),
    ({"train_images": IMAGES / 255}, r"train_images: expected uint8.*; got float64. .*np.rint\(255 \* images\)"),
    ({"test_images": IMAGES[:4] / 255}, r"test_images: expected uint8.*; got float64"),
    ({"train_images": IMAGES[..., 0]}, r"got \(6, 5, 7\). Add the channel with images\[..., None\]"),
    ({"train_images": IMAGES[:0], "train_labels": np.zeros(0, int)}, r"got \(0, 5, 7, 1\)"),
    ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"channels last.*Save images.transpose\(0, 2, 3, 1\)"),
    ({"test_images": np.zeros((4, 9, 9, 1), np.uint8)}, r"test_images: expected .* \(5, 7, 1\); got \(9, 9, 1\)"),
    ({"train_labels": np.arange(5) % 3}, "train_labels: expected 6, one for each of train_images; got 5"),
    ({"train_labels": np.eye(3)[[0, 1, 2, 0, 1, 2]]}, r"expected integers .*; got float64 of shape \(6, 3\)"),
    ({"test_labels": np.ones(4)}, r"test_labels: expected integers of shape \[N\]; got float64"),
    ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, "train_labels: expected labels from 0; got -1"),
    ({"train_labels": np.array([1, 2, 3, 1, 2, 3])}, "every class from 0 .*; got 3 classes between 1 and 3"),
    ({"test_labels": np.array([0, 1, 2, 3])}, "test_labels: expected 0 to 2; got 3"),
    ({"class_names": np.array(["ant", "bee"])}, "train_labels: expected 0 to 1; got 2"),
    ({"train_images": np.array([None] * 6)}, "train_images: expected uint8.*; got object"),
    ({"train_labels": np.array([None] * 6)}, "train_labels: expected a plain array; .*allow_pickle=False"),
])  # fmt: skip
def test_an_npz_that_will_not_do_is_refused_with_advice(write_npz, changes, message):
    with pytest.raises(ValueError, match=message):
        data.load(write_npz(**changes))


def test_a_file_that_is_no_npz_is_refused(write_npz, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing.npz: expected an .npz with train_images, .*; got no file there"
    ):
        data.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text.npz: expected an .npz; got another kind of file"):
        data.load(tmp_path / "text.npz")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"array.npz: expected an .npz; got another kind of file"):
        data.load(tmp_path / "array.npz")
    path = write_npz()
    flip_a_byte(path)
    with pytest.raises(ValueError, match=r"images.npz"):
        data.load(path)
