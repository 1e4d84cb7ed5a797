"""`prepare` writes the published files as TFDS would; invalid files raise an error before anything is written."""

import dataclasses
import functools
import hashlib
import http.server
import shutil
import threading

import numpy as np
import pytest

from fs_jax import data
from tests.archives import ARRAYS, assert_equal, cifar_rows, random_split, run_python, write_tar


def test_cifar100_has_fine_labels(tmp_path):
    splits = {"train": random_split(6, 100), "test": random_split(3, 100, seed=1)}
    members = {f"cifar-100-binary/{s}.bin": cifar_rows(images, y // 5, y) for s, (images, y) in splits.items()}
    archive = write_tar(tmp_path / "cifar-100-binary.tar.gz", members)
    data.prepare("cifar100", tmp_path, archive=archive)
    arrays = dict(zip(ARRAYS, (*splits["train"], *splits["test"]), strict=True))
    assert_equal(data.load("cifar100", data_dir=tmp_path, cache_dir=tmp_path), arrays)


def test_label_ten_of_svhns_files_is_the_digit_zero(tmp_path):
    from scipy.io import savemat

    splits = {"train": random_split(12), "test": random_split(5, seed=1)}
    for split, (images, labels) in splits.items():
        labels[0] = 0
        y = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})
    data.prepare("svhn_cropped", tmp_path, archive=tmp_path)
    arrays = dict(zip(ARRAYS, (*splits["train"], *splits["test"]), strict=True))
    assert_equal(data.load("svhn_cropped", data_dir=tmp_path, cache_dir=tmp_path), arrays)


def test_the_script_prepares_and_prints_errors_in_one_line(cifar, tmp_path):
    command = ("-m", "experiments.prepare_data", "cifar10", "--data-dir", str(tmp_path), "--archive")
    run = run_python(*command, str(tmp_path / "nothing"))
    assert run.returncode == 2
    assert run.stderr.startswith("error: archive: expected cifar-10-binary.tar.gz; got no file ")
    run = run_python(*command, str(cifar[0]))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(tmp_path / "cifar10" / "3.0.2")


def test_a_prepared_data_set_is_not_changed(prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared[0].rglob("*")}
    assert data.prepare("cifar10", prepared[0]) == prepared[0] / "cifar10" / "3.0.2"  # without a download
    assert before == {path: path.stat().st_mtime_ns for path in prepared[0].rglob("*")}


@pytest.fixture
def published(cifar, monkeypatch):
    """Publishes the small archive on this machine, with the given checksum."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=cifar[0].parent)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def publish(name, sha256):
        source = dataclasses.replace(
            data.DATASETS["cifar10"], files={f"http://127.0.0.1:{server.server_port}/{name}": sha256}
        )
        monkeypatch.setitem(data.DATASETS, "cifar10", source)

    yield publish
    server.shutdown()
    server.server_close()


def test_a_download_is_prepared_and_saved(cifar, published, tmp_path):
    published(cifar[0].name, hashlib.sha256(cifar[0].read_bytes()).hexdigest())
    data.prepare("cifar10", tmp_path)
    assert_equal(data.load("cifar10", data_dir=tmp_path, cache_dir=tmp_path), cifar[1])
    assert (tmp_path / "downloads" / cifar[0].name).read_bytes() == cifar[0].read_bytes()


@pytest.mark.parametrize(("name", "problem"), [
    ("cifar-10-binary.tar.gz", "expected the SHA-256 1234; got "), ("gone.tar.gz", "404"),
])  # fmt: skip
def test_the_error_of_a_failed_download_says_where_to_put_the_file(published, tmp_path, name, problem):
    published(name, "1234")
    with pytest.raises(ConnectionError) as caught:
        data.prepare("cifar10", tmp_path)
    assert problem in str(caught.value)
    assert f"put it at {tmp_path}/downloads/{name}" in str(caught.value)
    assert f"data.prepare('cifar10', '{tmp_path}', archive='FILE')" in str(caught.value)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_file_in_the_downloads_folder_is_used(cifar, published, tmp_path):
    published(cifar[0].name, hashlib.sha256(cifar[0].read_bytes()).hexdigest())
    (tmp_path / "downloads").mkdir()
    shutil.copy(cifar[0], tmp_path / "downloads")
    assert data.prepare("cifar10", tmp_path).is_dir()


def test_a_wrong_file_in_the_downloads_folder_raises_an_error(cifar, published, tmp_path):
    published(cifar[0].name, "1234")
    (tmp_path / "downloads").mkdir()
    shutil.copy(cifar[0], tmp_path / "downloads")
    with pytest.raises(ValueError, match=rf"cifar10: expected a file with the SHA-256 1234; .*{cifar[0].name} has"):
        data.prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def cifar_members(batch, labels=(3,)):
    rows = cifar_rows(random_split(len(labels))[0], labels)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {f"cifar-10-batches-bin/{name}": rows for name in names} | batch


@pytest.mark.parametrize(("members", "message"), [
    ({"cifar-10-batches-py/data_batch_1": b""}, "Use the binary version, whose name ends in -binary.tar.gz"),
    (cifar_members({"cifar-10-batches-bin/test_batch.bin": b"12"}), "test_batch.bin: expected rows .* 3073 .* got 2"),
    (cifar_members({"cifar-10-batches-bin/test_batch.bin": b""}), "test_batch.bin: expected rows .* 3073 .* got 0"),
    (cifar_members({}, labels=(3, 10)), "train labels: expected at most 9, as in cifar10; got 10"),
])  # fmt: skip
def test_a_wrong_archive_raises_an_error_before_anything_is_written(members, message, tmp_path):
    archive = write_tar(tmp_path / "archive.tar.gz", members)
    with pytest.raises(ValueError, match=message):
        data.prepare("cifar10", tmp_path / "tfds", archive=archive)
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"not a tar"])
def test_a_damaged_archive_raises_an_error(cifar, tmp_path, damage):
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(damage(cifar[0].read_bytes()))
    with pytest.raises(ValueError, match=r"(?s)archive: expected a tar or tar.gz file; got .* Download it"):
        data.prepare("cifar10", tmp_path / "tfds", archive=archive)


def test_svhn_needs_a_folder_with_two_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected train_32x32.mat and test_32x32.mat in one folder; got no file"
    ):
        data.prepare("svhn_cropped", tmp_path, archive=tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}_32x32.mat").write_bytes(b"not MATLAB's")
    with pytest.raises(ValueError, match=r"expected SVHN's cropped digits.*train_32x32.mat.*Download it again"):
        data.prepare("svhn_cropped", tmp_path, archive=tmp_path)


def test_what_cannot_be_prepared_raises_an_error(cifar, tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of cifar10, .*; got 'cifar_10'. Did you mean 'cifar10'"):
        data.prepare("cifar_10", tmp_path)
    with pytest.raises(ValueError, match=r"digits.*needs no preparation"):
        data.prepare("digits", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="data_dir: expected a folder; got the file"):
        data.prepare("cifar10", tmp_path / "file")
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"cifar10/3.0.2: .* remove it and run this again"):
        data.prepare("cifar10", tmp_path, archive=cifar[0])
