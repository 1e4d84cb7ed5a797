"""`.npz` files are read unchanged; invalid ones raise an error with advice."""

import numpy as np
import pytest

from fs_jax import data
from tests.archives import assert_equal, flip_a_byte


@pytest.fixture
def write_npz(tmp_path):
    """Writes an .npz with 6 and 4 grey images in 3 classes, with these changes (None removes an array)."""

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


def test_an_npz_is_read_unchanged(write_npz):
    path = write_npz()
    dataset = data.load(path)
    assert_equal(dataset, np.load(path))
    assert dataset.info == data.DataInfo(
        str(path), (5, 7, 1), 3, flip=False, crop_padding=0, class_names=("0", "1", "2")
    )


def test_an_npz_can_name_its_classes(write_npz):
    names = ["ant", "bee", "cat", "dog"]
    about = data.info(write_npz(class_names=np.array(names)))
    assert about.num_classes == 4  # one of them without an image
    assert about.class_names == tuple(names)


def test_an_npz_can_set_its_augmentation(write_npz):
    about = data.info(write_npz(flip=True, crop_padding=2))
    assert (about.flip, about.crop_padding) == (True, 2)


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
    ({"train_images": IMAGES[..., 0]}, r"got \(6, 5, 7\). Add a channel with images\[..., None\]"),
    ({"train_images": IMAGES[:0], "train_labels": np.zeros(0, int)}, r"got \(0, 5, 7, 1\)"),
    ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"channels last.*Save images.transpose\(0, 2, 3, 1\)"),
    ({"test_images": np.zeros((4, 9, 9, 1), np.uint8)}, r"test_images: expected .* \(5, 7, 1\); got \(9, 9, 1\)"),
    ({"train_labels": np.arange(5) % 3}, "train_labels: expected 6, one per image; got 5"),
    ({"train_labels": np.eye(3)[[0, 1, 2, 0, 1, 2]]}, r"expected integers .*; got float64 of shape \(6, 3\)"),
    ({"test_labels": np.ones(4)}, r"test_labels: expected integers of shape \[N\]; got float64"),
    ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, "train_labels: expected labels of at least 0; got -1"),
    ({"train_labels": np.array([1, 2, 3, 1, 2, 3])}, "every class from 0 .*; got 3 classes between 1 and 3"),
    ({"test_labels": np.array([0, 1, 2, 3])}, "test_labels: expected 0 to 2; got 3"),
    ({"class_names": np.array(["ant", "bee"])}, "train_labels: expected 0 to 1; got 2"),
    ({"class_names": np.array("cat")}, r"class_names: expected a list of strings; got <U3 of shape \(\)"),
    ({"class_names": np.array([], str)}, "class_names: expected a list of strings"),
    ({"crop_padding": 5}, "crop_padding: expected an integer from 0 to 4, less than the images' side; got 5"),
    ({"crop_pading": 2}, "expected no array named crop_pading. Did you mean 'crop_padding'"),
    ({"train_labels": np.zeros((6, 1), int)}, r"expected integers of shape \[N\]; .* Save labels.ravel"),
    ({"flip": 1}, "flip: expected True or False; got int64"),
    ({"crop_padding": -1}, "crop_padding: expected an integer from 0 to 4, .*; got -1"),
    ({"train_images": np.array([None] * 6)}, "train_images: expected uint8.*; got object"),
    ({"train_labels": np.array([None] * 6)}, "train_labels: expected a plain array; .*allow_pickle=False"),
])  # fmt: skip
def test_an_invalid_npz_raises_an_error_with_advice(write_npz, changes, message):
    with pytest.raises(ValueError, match=message):
        data.load(write_npz(**changes))


def test_another_kind_of_file_raises_an_error(write_npz, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing.npz: expected an .npz file with train_images, .*; got no file"
    ):
        data.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text.npz: expected an .npz file; got another kind of file"):
        data.load(tmp_path / "text.npz")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"array.npz: expected an .npz file; got another kind of file"):
        data.load(tmp_path / "array.npz")
    path = write_npz()
    flip_a_byte(path)
    with pytest.raises(ValueError, match=r"images.npz"):
        data.load(path)
