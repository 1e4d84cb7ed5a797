"""Fingerprints of networks and data: hashes of arrays."""

import hashlib

import jax
import numpy as np
from jaxtyping import PyTree


def fingerprint(tree: PyTree) -> str:
    """A hash of the names, shapes, types and values of a tree of arrays. It doesn't depend on the device.

    Example:
      >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.zeros(2)}) != fingerprint({"w": np.ones(2)})
      True
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
