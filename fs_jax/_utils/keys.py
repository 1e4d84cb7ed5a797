"""Keys: one for each image, so that what an image draws depends on no other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def image_keys(rng: Key[Array, ""] | Key[Array, "n"], count: int) -> Key[Array, "n"]:
    """One key per image: `rng` itself where it holds them already, else `fold_in(rng, position)`.

    Raises:
      ValueError: if `rng` is neither a key nor `count` keys.

    Example:
      >>> image_keys(jax.random.key(0), 3).shape
      (3,)
    """
    if not isinstance(rng, jax.Array):
        raise TypeError(f"rng: expected a key, such as jax.random.key(0); got {rng!r}.")
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        # An old-style key, jax.random.PRNGKey: an array of integers, one axis more than the keys it holds.
        rng = jax.random.wrap_key_data(rng)
    if rng.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
    if rng.shape != (count,):
        raise ValueError(f"rng: expected a key, or one for each of the {count} images; got keys of shape {rng.shape}.")
    return rng
