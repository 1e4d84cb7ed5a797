"""Statistics of accuracies: intervals, and paired differences."""

import numpy as np
import scipy.stats


def accuracy(correct: np.ndarray) -> dict[str, float | int | None]:
    """The share of correct images with its 95% Wilson interval; None if there are no images.

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

    With d_i = 1 if only the first is right on image i, -1 if only the second is, and 0 otherwise, the interval is
    mean(d) +- 1.96 sd(d) / sqrt(n). Images on which both agree add no variance, so it is narrower than an interval from
    the two accuracies alone. It is never narrower than +- (1 - 0.05^(1/n)): if n images show no difference, the share
    of all images with a difference may still be as large as this, with 95% confidence.

    Raises:
      ValueError: if the numbers of images differ, or there are fewer than 2.

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
