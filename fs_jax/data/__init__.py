"""Data sets as arrays in memory: CIFAR-10, CIFAR-100 and SVHN from TFDS, scikit-learn's digits, or your own `.npz`."""

from fs_jax.data.preparation import prepare
from fs_jax.data.registry import DATASETS, info, load
from fs_jax.data.types import Bundled, DataInfo, Dataset, Derived, Published

__all__ = ["DATASETS", "Bundled", "DataInfo", "Dataset", "Derived", "Published", "info", "load", "prepare"]
