"""Statistics of evaluations."""

import numpy as np
import scipy.stats


def accuracy(correct: np.ndarray) -> dict[str, float | int | None]:
    """Fraction of True, with its 95% Wilson interval; None of no images.

    Example:
      >>> {name: round(value, 2) for name, value in accuracy(np.array([True, False])).items()}
      {'correct': 1, 'total': 2, 'accuracy': 0.5, 'low': 0.09, 'high': 0.91}
    """
    count, total = int(np.sum(correct)), len(correct)
    if not total:
        return {"correct": 0, "total": 0, "accuracy": None, "low": None, "high": None}
    interval = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return {
        "correct": count,
        "total": total,
        "accuracy": count / total,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and half the width of its 95% interval.

    d_i in {-1, 0, 1} says which of the two is right on image i: mean(d) +- 1.96 sd(d) / sqrt(n). Of images on which
    both are right or both wrong nothing is learned, so that it is narrower than from the two accuracies alone. But n
    images without a difference leave room for one in 1 - 0.05^(1/n) of all: the interval is at least as wide.

    Raises:
      ValueError: for other numbers of images.

    Example:
      >>> difference, half = paired_difference(np.arange(100) < 90, np.arange(100) < 80)
      >>> round(difference, 2), round(half, 3)
      (0.1, 0.059)
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"theirs: expected as many images as ours, {len(ours)}, at least 2; got {len(theirs)}.")
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    half = max(scipy.stats.norm.ppf(0.975) * error, 1 - 0.05 ** (1 / len(differences)))
    return float(np.mean(differences)), float(half)
