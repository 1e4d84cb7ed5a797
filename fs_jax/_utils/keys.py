"""Keys, one for each image and run, so that an image's random numbers don't depend on its batch or on the machine."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

IMPLEMENTATION = "threefry2x32"
"""The implementation of all keys for images. (With JAX's "rbg", random numbers depend on the batch.)"""


def image_keys(rng: Key[Array, ""] | Key[Array, "n"], count: int) -> Key[Array, "n"]:
    """One key per image: `rng` itself if it has one key per image, else `fold_in(rng, position)`.

    Keys of JAX's "rbg" implementations, a common default on TPUs, are converted to the threefry keys that they consist
    of, so that `jax.random.key(0)` gives the same numbers with either.

    Raises:
      TypeError, ValueError: if `rng` is neither a key nor `count` keys.

    Example:
      >>> image_keys(jax.random.key(0), 3).shape
      (3,)
      >>> bool((image_keys(jax.random.key(0, impl="rbg"), 3) == image_keys(jax.random.key(0), 3)).all())
      True
    """
    rng = threefry(rng)
    if rng.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
    if rng.shape != (count,):
        raise ValueError(f"rng: expected a key, or one for each of the {count} images; got keys of shape {rng.shape}.")
    return rng


def run_keys(keys: Key[Array, "n"], run: Int[Array, "n"]) -> Key[Array, "n"]:
    """The key of each image for its run: `fold_in(key, run)`.

    Example:
      >>> run_keys(jax.random.split(jax.random.key(0), 3), jnp.array([0, 0, 1])).shape
      (3,)
    """
    return jax.vmap(jax.random.fold_in)(keys, run)


def random_signs(rng: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Random signs, -1 or 1 with probability 1/2 each.

    `jax.random.rademacher` draws uniform numbers of JAX's default type, so its signs are different in 64-bit mode.
    These are the same in both modes.

    Example:
      >>> random_signs(jax.random.key(0), (4,), jnp.float32).tolist()
      [-1.0, -1.0, 1.0, 1.0]
    """
    return jnp.where(jax.random.bernoulli(rng, np.float32(0.5), shape), 1, -1).astype(dtype)


def threefry(rng: Key[Array, "..."]) -> Key[Array, "..."]:
    """Convert keys to `IMPLEMENTATION`.

    Raises:
      TypeError: if they aren't keys, or not of an implementation that comes with JAX.

    Example:
      >>> threefry(jax.random.key(0, impl="rbg")) == jax.random.key(0, impl="threefry2x32")
      Array(True, dtype=bool)
    """
    if not isinstance(rng, jax.Array):
        raise TypeError(f"rng: expected a key, such as jax.random.key(0); got {rng!r}.")
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        # An old-style key, jax.random.PRNGKey: an array of integers, with one more axis.
        rng = jax.random.wrap_key_data(rng)
    implementation = str(jax.random.key_impl(rng))
    if implementation == IMPLEMENTATION:
        return rng
    if implementation not in ("rbg", "unsafe_rbg"):
        raise TypeError(f"rng: expected a key of {IMPLEMENTATION} or rbg; got {implementation}.")
    # Both halves of an rbg key are threefry keys, which are equal if it was made by `key` and `fold_in`.
    return jax.random.wrap_key_data(jax.random.key_data(rng)[..., :2], impl=IMPLEMENTATION)
