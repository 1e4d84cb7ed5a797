"""Checks of images and labels, and conversion of images to floating point."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

Images = UInt8[np.ndarray | jax.Array, "..."] | Float[np.ndarray | jax.Array, "..."]


def as_float(images: Images) -> Float[np.ndarray | jax.Array, "..."]:
    """Images in [0, 1]: uint8 is divided by 255, in float32; float64 becomes float32, unless JAX is in 64-bit mode.

    NumPy arrays stay NumPy.

    Example:
      >>> as_float(np.array([0, 255], np.uint8)).tolist()
      [0.0, 1.0]
    """
    if images.dtype == np.uint8:
        return images.astype(jnp.float32) / np.float32(255)
    return images.astype(jax.dtypes.canonicalize_dtype(images.dtype))


def check_images(images: Images, *, uint8_too: bool = False) -> None:
    """Raise an error unless these are images [N, H, W, C] in [0, 1]. Under `jit`, values can't be checked.

    Example:
      >>> check_images(np.full((1, 2, 2, 1), 2.0))
      Traceback (most recent call last):
      ValueError: images: expected values in [0, 1]; got [2, 2]. Divide by 255, or put the normalisation inside...
    """
    if not hasattr(images, "dtype"):
        raise TypeError(f"images: expected an array; got {type(images).__name__}. Use jnp.asarray.")
    if images.ndim != 4:
        raise ValueError(f"images: expected shape [N, height, width, channels]; got {images.shape}.")
    if uint8_too and images.dtype == np.uint8:
        return
    if not jnp.issubdtype(images.dtype, jnp.floating):
        expected, hint = ("uint8, or ", "") if uint8_too else ("", " Divide uint8 images by 255.")
        raise TypeError(f"images: expected {expected}floating point in [0, 1]; got {images.dtype}.{hint}")
    values = known(images)
    if values is not None and values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"images: expected values in [0, 1]; got [{values.min():.4g}, {values.max():.4g}]. "
            "Divide by 255, or put the normalisation inside the network (logits_fn)."
        )


def check_labels(labels: Int[np.ndarray | jax.Array, "n"], images: Images) -> None:
    """Raise an error unless labels are integers, one for each image.

    Example:
      >>> check_labels(np.zeros(3), np.zeros((3, 2, 2, 1)))
      Traceback (most recent call last):
      TypeError: labels: expected integers; got float64.
    """
    if not hasattr(labels, "dtype"):
        raise TypeError(f"labels: expected an array of integers; got {type(labels).__name__}. Use jnp.asarray.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape {images.shape[:1]}, one for each image; got {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers; got {labels.dtype}.")


def check_classes(labels: Int[np.ndarray | jax.Array, "n"], num_classes: int) -> None:
    """Raise an error unless labels are classes of the network. Under `jit`, values can't be checked.

    Example:
      >>> check_classes(np.array([0, 5]), 5)
      Traceback (most recent call last):
      ValueError: labels: expected classes 0 to 4, as logits_fn has 5; got 0 to 5.
    """
    classes = known(labels)
    if classes is not None and classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}, as logits_fn has {num_classes}; "
            f"got {classes.min()} to {classes.max()}."
        )


def known(value: Any) -> np.ndarray | None:
    """The value as an array, or None if it is traced.

    Example:
      >>> jax.eval_shape(lambda x: known(x), 1.0) is None
      True
    """
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)
