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
