"""Images as floating point."""

import numpy as np


def as_float(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1]: those of uint8 divided by 255.

    Example:
      >>> as_float(np.array([0, 255], np.uint8)).tolist()
      [0.0, 1.0]
    """
    return images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images
