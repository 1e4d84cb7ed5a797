"""Problems by kind: pure functions of a random generator and a shape. Each kind is difficult in its own way."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """A problem, in float64."""

    cost: np.ndarray
    a: np.ndarray
    b: np.ndarray
    reg: float
    family: str = ""
    number: int = -1

    @property
    def ratio(self) -> float:
        """The largest centred cost (minima of rows, then of columns, subtracted) over reg: how sharp the plan is."""
        there = self.cost[np.ix_(self.a > 0, self.b > 0)]
        centred = there - there.min(1, keepdims=True)
        return float(np.ptp(centred - centred.min(0)) / self.reg)


# Few shapes, since solvers are compiled for each.
SHAPES = ((1, 1), (1, 5), (4, 1), (2, 3), (6, 9), (13, 13), (30, 20), (60, 60))


def case(number: int) -> Case:
    """The problem with this number. Kinds take turns; shape and entries are drawn with the number as the seed.

    Example:
      >>> case(3).family, case(3).cost.shape == case(3).a.shape + case(3).b.shape
      ('zeros', True)

    Raises:
      ValueError: for a negative number.
    """
    if number < 0:
        raise ValueError(f"number: expected an integer of at least 0; got {number}")
    names = list(FAMILIES)
    name, rng = names[number % len(names)], np.random.default_rng(number)
    n, m = SHAPES[int(rng.integers(len(SHAPES)))]
    cost, a, b, reg = FAMILIES[name](rng, n, m)
    return Case(np.asarray(cost, float), a, b * (float(a.sum()) / float(b.sum())), float(reg), name, number)


def cases(numbers: Iterable[int]) -> Iterator[Case]:
    """The problems of these numbers."""
    return map(case, numbers)


def _weights(rng, size):
    weights = rng.uniform(0.5, 1.5, size)
    return weights / float(weights.sum())


def _points(rng, n, m, dimension=2):
    x, y = rng.normal(size=(n, dimension)), rng.normal(size=(m, dimension)) + 0.5
    return np.sum((x[:, None] - y) ** 2, -1)


def _reg(rng, low=-2.0, high=0.5):
    return 10 ** rng.uniform(low, high)


def uniform(rng, n, m):
    """Costs in [0, 2], uneven weights, a moderate reg."""
    return rng.uniform(0, 2, (n, m)), _weights(rng, n), _weights(rng, m), _reg(rng)


def training(rng, n, m):
    """Cosine costs between the logits of two batches that are similar in pairs, as in feature scattering."""
    x = rng.normal(size=(max(n, m), 10))
    x, y = x[:n], (x + 0.3 * rng.normal(size=x.shape))[:m]
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return np.maximum(0, 1 - x @ y.T), np.full(n, 1 / n), np.full(m, 1 / m), 10 ** rng.uniform(-3, 0)


def points(rng, n, m):
    """Squared distances between point clouds."""
    return _points(rng, n, m), _weights(rng, n), _weights(rng, m), _reg(rng)


def zeros(rng, n, m):
    """Some points without mass, with arbitrary costs."""
    a, b = (np.where(rng.random(size) < 0.4, 0.0, _weights(rng, size)) for size in (n, m))
    a[rng.integers(n)] += 0.3
    b[rng.integers(m)] += 0.3
    cost = np.where((a > 0)[:, None] & (b > 0), _points(rng, n, m), 1e6 * rng.normal(size=(n, m)))
    return cost, a / a.sum(), b / b.sum(), _reg(rng, -1.0)


def ties(rng, n, m):
    """Integer costs, with pairs of equal rows."""
    cost = rng.integers(0, 3, (n, m)).astype(float)
    cost[n // 2 :] = cost[: n - n // 2]
    return cost, _weights(rng, n), _weights(rng, m), _reg(rng)


def uneven_weights(rng, n, m):
    """Weights over ten orders of magnitude."""
    a, b = 10 ** rng.uniform(-10, 0, n), 10 ** rng.uniform(-10, 0, m)
    return _points(rng, n, m), a / a.sum(), b / b.sum(), _reg(rng, -1.0)


def other_mass(rng, n, m):
    """A total mass far from one."""
    mass = 10 ** rng.uniform(-3, 3)
    return _points(rng, n, m), mass * _weights(rng, n), mass * _weights(rng, m), _reg(rng, -1.0)


def sharp(rng, n, m):
    """Costs of up to ten thousand times reg."""
    return rng.uniform(0, 1, (n, m)), _weights(rng, n), _weights(rng, m), 10 ** rng.uniform(-4, -2)


def blurred(rng, n, m):
    """A reg far above the costs: the plan is nearly a bᵀ."""
    return rng.uniform(0, 1, (n, m)), _weights(rng, n), _weights(rng, m), 10 ** rng.uniform(1, 4)


def shifted(rng, n, m):
    """A constant in each row and each column, which changes the potentials but not the plan."""
    cost = _points(rng, n, m) + 10 * rng.normal(size=(n, 1)) + 10 * rng.normal(size=m)
    return cost, _weights(rng, n), _weights(rng, m), _reg(rng, -1.0)


def far_row(rng, n, m):
    """A row whose costs are larger than all others by orders of magnitude."""
    cost = _points(rng, n, m)
    cost[rng.integers(n)] += 10 ** rng.uniform(3, 7)
    return cost, _weights(rng, n), _weights(rng, m), _reg(rng, -0.5)


def far_column(rng, n, m):
    """A column whose costs are larger than all others by orders of magnitude."""
    cost, a, b, reg = far_row(rng, m, n)
    return cost.T, b, a, reg


def blocks(rng, n, m):
    """Two groups with almost no mass between them, so a constant can move between their potentials."""
    cost = _points(rng, n, m)
    group = (np.arange(n) % 2)[:, None] != np.arange(m) % 2
    return cost + 30 * group, _weights(rng, n), _weights(rng, m), _reg(rng, -0.5)


def negative(rng, n, m):
    """Costs of both signs, such as a negative similarity."""
    return rng.normal(size=(n, m)), _weights(rng, n), _weights(rng, m), _reg(rng)


def scaled(rng, n, m):
    """Costs and reg in very large or very small units."""
    unit = 10 ** rng.uniform(-6, 6)
    return unit * _points(rng, n, m), _weights(rng, n), _weights(rng, m), unit * _reg(rng, -1.0)


Make = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray, np.ndarray, float]]
FAMILIES: dict[str, Make] = {
    make.__name__: make
    for make in (
        uniform, training, points, zeros, ties, uneven_weights, other_mass, sharp, blurred, shifted, far_row,
        far_column, blocks, negative, scaled,
    )
}  # fmt: skip
"""Kinds of problems, by name."""
