"""Numbers as text."""

import math


def radius(epsilon: float) -> str:
    """A radius as text: 8/255, or 0.1 if it isn't a multiple of 1/255."""
    levels = 255 * epsilon
    whole = round(levels)
    return f"{whole}/255" if whole and math.isclose(levels, whole, rel_tol=1e-6) else f"{epsilon:.3g}"
