"""Certified solutions in float64, by Newton's method on the dual with a decreasing reg; without JAX."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.special import logsumexp

from fs_jax.ot.testing.families import Case


class Reference(NamedTuple):
    """A solution and its error."""

    plan: np.ndarray
    f: np.ndarray
    """Potentials, plan = exp((f + g - cost) / reg); -inf at points without mass."""
    g: np.ndarray
    marginal_error: float
    """L1 error of both marginals, relative to the mass."""


GOOD = 1e-11


def solve_exactly(case: Case) -> Reference | None:
    """The solution, or None if its marginal error exceeds `GOOD` because exponents of size cost / reg are rounded.

    The dual, max over f, g of Σ a f + Σ b g - reg Σ exp((f + g - C) / reg), is solved for a reg that is halved down to
    the given one: each time by some Sinkhorn iterations in the log domain, and then by a damped Newton method.

    Example:
      >>> from fs_jax.ot.testing import case
      >>> solve_exactly(case(0)).marginal_error < 1e-11
      True
    """
    rows, columns = case.a > 0, case.b > 0
    cost, mass = case.cost[np.ix_(rows, columns)], case.a.sum()
    a, b = case.a[rows] / mass, case.b[columns] / mass
    shift_rows = cost.min(1)
    shift_columns = (cost - shift_rows[:, None]).min(0)
    cost = cost - shift_rows[:, None] - shift_columns
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for reg in _schedule(float(np.ptp(cost)), case.reg):
        f, g = _newton(cost, a, b, reg, *_sinkhorn(cost, a, b, reg, f, g, 20))
    plan = np.exp((f[:, None] + g - cost) / case.reg)
    error = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
    if not error <= GOOD:
        return None
    whole = np.zeros(case.cost.shape)
    whole[np.ix_(rows, columns)] = mass * plan
    all_f, all_g = np.full(len(case.a), -np.inf), np.full(len(case.b), -np.inf)
    all_f[rows], all_g[columns] = f + shift_rows + case.reg * np.log(mass), g + shift_columns
    return Reference(whole, all_f, all_g, float(error))


def _schedule(size, reg):
    """Regularisations from the size of the costs down to reg."""
    steps = max(0, int(np.ceil(np.log2(max(size, 1e-300) / reg))))
    return [reg * 2.0**k for k in range(min(steps, 60), -1, -1)]


def _sinkhorn(cost, a, b, reg, f, g, count):
    for _ in range(count):
        g = reg * (np.log(b) - logsumexp((f[:, None] - cost) / reg, axis=0))
        f = reg * (np.log(a) - logsumexp((g - cost) / reg, axis=1))
    return f, g


def _newton(cost, a, b, reg, f, g):

    def residual(f, g):
        plan = np.exp(np.minimum((f[:, None] + g - cost) / reg, 50))
        return plan, a - plan.sum(1), b - plan.sum(0)

    plan, off_a, off_b = residual(f, g)
    size = np.abs(off_a).sum() + np.abs(off_b).sum()
    for _ in range(60):
        if size <= 1e-15:
            break
        x, y = least_squares(plan, off_a, off_b)
        step = 1.0
        while step > 1e-4:
            new = f + step * reg * x, g + step * reg * y
            new_plan, new_a, new_b = residual(*new)
            new_size = np.abs(new_a).sum() + np.abs(new_b).sum()
            if new_size < size:
                break
            step /= 2
        else:
            break
        (f, g), plan, off_a, off_b, size = new, new_plan, new_a, new_b, new_size
    return f, g


def least_squares(plan, right_rows, right_columns):
    """The least-norm solution of diag(T 1) x + T y = r, Tᵀ x + diag(Tᵀ 1) y = c, for Newton steps and for gradients.

    The system is scaled by the square roots of the marginals, so that small weights count too.
    """
    rows, columns = plan.sum(1), plan.sum(0)
    root_rows, root_columns = (np.sqrt(np.where(sums > 0, sums, 1)) for sums in (rows, columns))
    scaled = plan / root_rows[:, None] / root_columns
    left, values, right = scipy.linalg.svd(scaled, full_matrices=True)
    # In the bases of singular vectors it consists of 2 x 2 systems: x + s y = p, s x + y = q.
    p, q = left.T @ (right_rows / root_rows), right @ (right_columns / root_columns)
    x, y = p.copy(), q.copy()
    k = len(values)
    loose = values > 1 - 1e-13  # a constant that can move between f and g
    gap = np.where(loose, 1, 1 - values**2)
    x[:k] = np.where(loose, (p[:k] + q[:k]) / 4, (p[:k] - values * q[:k]) / gap)
    y[:k] = np.where(loose, (p[:k] + q[:k]) / 4, (q[:k] - values * p[:k]) / gap)
    return (left @ x) / root_rows, (right.T @ y) / root_columns


def gradients(case: Case, reference: Reference, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Derivatives of Σ weights · plan by cost, a and b; those by a and b are determined up to a constant."""
    plan = reference.plan
    weighted = plan * weights
    x, y = least_squares(plan, weighted.sum(1), weighted.sum(0))
    return {"cost": -plan * (weights - x[:, None] - y) / case.reg, "a": x, "b": y}


def gradients_of_iterations(case: Case, weights: np.ndarray, error: float, limit: int = 2000) -> dict[str, np.ndarray]:
    """Derivatives of Σ weights · plan through Sinkhorn iterations from zero, until the plan's error is at most `error`.

    They converge to the solution's derivatives somewhat later than the plan does. If an iteration multiplies errors by
    σ², the plan is off by about σ²ᵏ after k iterations, and its derivative by k σ²ᵏ.

    Args:
      case: The problem.
      weights: [k, n, m]: derivatives of k sums.
      error: The iterations stop when the plan's L1 marginal error over the mass is at most this.
      limit: Largest number of iterations.

    Returns:
      Derivatives by `cost` [k, n, m], `a` [k, n] and `b` [k, m], zero for points without mass. Those by a and b are
      determined up to a constant.
    """
    rows, columns = case.a > 0, case.b > 0
    present, mass = np.ix_(rows, columns), case.a.sum()
    cost, a, b = case.cost[present] / case.reg, case.a[rows], case.b[columns]
    f, log_a, log_b = np.zeros(len(a)), np.log(a), np.log(b)
    path = []
    for _ in range(limit):
        g = log_b - logsumexp(f[:, None] - cost, axis=0)
        path.append((f, g))
        f = log_a - logsumexp(g - cost, axis=1)
        plan = np.exp(f[:, None] + g - cost)
        if np.abs(plan.sum(0) - b).sum() <= error * mass:
            break
    weighted = weights[:, *present] * plan
    of_f, of_g, of_cost = weighted.sum(2), weighted.sum(1), -weighted
    of_a, of_b = np.zeros_like(of_f), np.zeros_like(of_g)
    for before, g in reversed(path):
        of_rows = np.exp(f[:, None] + g - cost) * (of_f / a)[:, :, None]
        of_a, of_cost, of_g = of_a + of_f / a, of_cost + of_rows, of_g - of_rows.sum(1)
        of_columns = np.exp(before[:, None] + g - cost) * (of_g / b)[:, None]
        of_b, of_cost, of_f = of_b + of_g / b, of_cost + of_columns, -of_columns.sum(2)
        f, of_g = before, np.zeros_like(of_g)
    whole = {"cost": np.zeros(weights.shape), "a": np.zeros(weights.shape[:2]), "b": np.zeros(weights.shape[::2])}
    whole["cost"][:, *present], whole["a"][:, rows], whole["b"][:, columns] = of_cost / case.reg, of_a, of_b
    return whole
