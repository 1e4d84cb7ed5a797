"""SVHN: photographs of digits in house numbers, 32 x 32 pixels."""

from pathlib import Path

import numpy as np

from fs_jax.data.types import DataInfo, Published


def _read_archive(files: list[Path]) -> dict[str, dict[str, np.ndarray]]:
    """Read the MATLAB files: X, uint8 [32, 32, 3, N], and y [N, 1] in 1, ..., 10, where 10 is the digit 0."""
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


# The URLs and checksums of TFDS.
SVHN_CROPPED = Published(
    DataInfo("svhn_cropped", (32, 32, 3), 10, flip=False, crop_padding=4, class_names=tuple("0123456789")),
    {
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat": (
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
        ),
        "http://ufldl.stanford.edu/housenumbers/test_32x32.mat": (
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"
        ),
    },
    _read_archive,
    id_format="{split}_{index:06d}",
)
