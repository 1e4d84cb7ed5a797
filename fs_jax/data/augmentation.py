"""Random crops and flips, on the device, inside the training step. Each image uses its own key."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from fs_jax._utils.keys import image_keys
from fs_jax._utils.validation import check_number

Images = Float[Array, "n h w c"] | UInt8[Array, "n h w c"]


def augment(rng: Key[Array, ""] | Key[Array, "n"], images: Images, *, padding: int, flip: bool) -> Images:
    """Randomly crop each image after padding it, and flip it horizontally with probability 1/2.

    If you pass one key per image, derived from the index of the image in the data set, the result does not depend on
    the batch size or the number of devices.

    Args:
      rng: One key, from which image i uses `fold_in(rng, i)`; or one key per image.
      images: Images [N, H, W, C], floating point or uint8.
      padding: Width of the black padding on each side, in pixels; 0 for no crop.
      flip: Whether to flip.

    Returns:
      Images of the same shape and dtype. With padding 0 and flip False, the unchanged images.

    Raises:
      ValueError, TypeError: see `random_crop`.

    Example:
      >>> images = jnp.ones((2, 8, 8, 1), jnp.uint8)
      >>> augment(jax.random.key(0), images, padding=1, flip=False).shape
      (2, 8, 8, 1)

    Source: the paper's training code, which crops (with padding 4) and flips CIFAR's images.
    """
    _check_images(images)
    crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(image_keys(rng, len(images)))
    images = random_crop(crop_keys, images, padding=padding)
    return random_flip(flip_keys, images) if flip else images


def random_crop(rng: Key[Array, ""] | Key[Array, "n"], images: Images, *, padding: int) -> Images:
    """Pad each image with black, and crop it to its original size at a random position.

    With d and e uniform in 0, ..., 2 * padding, and x zero outside the image,

        y[i, j] = x[i + d - padding, j + e - padding]

    as in PyTorch's `RandomCrop(size, padding)`.

    Args:
      rng: One key, from which image i uses `fold_in(rng, i)`; or one key per image.
      images: Images [N, H, W, C], floating point or uint8.
      padding: Width of the padding on each side, in pixels; 0 for no crop.

    Returns:
      Images of the same shape and dtype.

    Raises:
      TypeError: for images that are neither floating point nor uint8, or a padding that is not an integer.
      ValueError: for images of the wrong rank, a negative padding, or a number of keys other than 1 or N.

    Example:
      >>> crop = random_crop(jax.random.key(0), jnp.ones((1, 8, 8, 1)), padding=1)
      >>> crop.shape, bool(crop[:, 1:-1, 1:-1].all())  # only the outermost pixels can be black
      ((1, 8, 8, 1), True)
    """
    _check_images(images)
    check_number("padding", padding, at_least=0, integer=True)
    keys = image_keys(rng, len(images))
    if padding == 0:
        return images
    frame = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def window(key, framed):
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1, jnp.int32)  # in 64-bit mode too
        return jax.lax.dynamic_slice(framed, (top, left, jnp.int32(0)), images.shape[1:])

    return jax.vmap(window)(keys, jnp.pad(images, frame))


def random_flip(rng: Key[Array, ""] | Key[Array, "n"], images: Images) -> Images:
    """Flip each image horizontally (exchange left and right) with probability 1/2.

    Args:
      rng: One key, from which image i uses `fold_in(rng, i)`; or one key per image.
      images: Images [N, H, W, C], floating point or uint8.

    Returns:
      Images of the same shape and dtype.

    Raises:
      TypeError, ValueError: see `random_crop`.

    Example:
      >>> images = jnp.arange(6).reshape(1, 2, 3, 1) / 6
      >>> flipped = random_flip(jax.random.key(0), images)
      >>> bool((flipped == images).all() | (flipped == images[:, :, ::-1]).all())
      True
    """
    _check_images(images)
    # With bernoulli's default, a number of JAX's default type, 64-bit mode has other flips.
    mirrored = jax.vmap(lambda key: jax.random.bernoulli(key, np.float32(0.5)))(image_keys(rng, len(images)))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def _check_images(images: Images) -> None:
    if images.ndim != 4:
        raise ValueError(f"images: expected shape [N, height, width, channels]; got {images.shape}.")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images: expected floating point or uint8; got {images.dtype}. Convert them first.")
