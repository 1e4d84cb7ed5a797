"""Shrinks a problem on which a solver fails, as long as it fails in the same way, and writes a script for it."""

import time
from collections.abc import Iterator

import numpy as np

from fs_jax.ot.testing.checks import (
    Finding,
    as_seen,
    balanced,
    expected_derivatives,
    expected_second_derivative,
    findings,
    weights_and_direction,
)
from fs_jax.ot.testing.families import Case
from fs_jax.ot.testing.reference import solve_exactly
from fs_jax.ot.testing.solvers import Solver


def shrunk(solver: Solver, problem: Case, finding: Finding, *, seconds: float = 60.0) -> Case:
    """The simplest problem found for which the same check fails.

    It tries fewer rows and columns, by halves and one by one, together and separately; uniform weights; costs with
    fewer digits; a rounder reg. A change is kept if the check still fails.

    Args:
      solver: The solver.
      problem: A problem on which it fails.
      finding: The failed check.
      seconds: Time limit of the search. (Each shape is compiled anew, with derivatives if their check failed.)

    Returns:
      The simplest problem found.
    """
    deadline = time.monotonic() + seconds

    def fails(candidate: Case) -> bool:
        found = findings(solver, candidate, derivatives=finding.check not in SOON, only=finding.check)
        return any(of.check == finding.check for of in found)

    changed = True
    while changed:
        changed = False
        for candidate in _simpler(problem):
            if time.monotonic() > deadline:
                return problem
            if fails(candidate):
                problem, changed = candidate, True
                break
    return problem


# Checks without derivatives.
SOON = frozenset({
    "raises", "shape", "dtype", "changes its arguments", "not finite", "negative", "masked", "marginals",
    "marginal_error", "form", "lost entries", "primal_cost", "reg_cost", "potentials", "gave up",
})  # fmt: skip


def _simpler(problem: Case) -> Iterator[Case]:
    """Simpler problems, the largest changes first."""
    n, m = problem.cost.shape
    # For a square matrix, rows and columns together first: some solvers fail only on square problems.
    for axes, size in (((0, 1), n if n == m else 0), ((0,), n), ((1,), m)):
        length = size // 2
        while length >= 1:
            for begin in range(0, size - length + 1, length):
                kept = np.delete(np.arange(size), slice(begin, begin + length))
                if (smaller := _restricted(problem, kept, axes)) is not None:
                    yield smaller
            length //= 2
    even_a, even_b = (np.full(size, problem.a.sum() / size) for size in (n, m))
    for a, b in ((even_a, even_b), (even_a, problem.b), (problem.a, even_b)):
        if not (np.array_equal(a, problem.a) and np.array_equal(b, problem.b)):
            yield problem._replace(a=a, b=b)
    if abs(problem.a.sum() - 1) > 1e-6:
        yield problem._replace(a=problem.a / problem.a.sum(), b=problem.b / problem.b.sum())
    for digits in (0, 1, 2, 3):
        cost = _rounded(problem.cost, digits)
        if not np.array_equal(cost, problem.cost):
            yield problem._replace(cost=cost)
    for reg in (1.0, float(f"{problem.reg:.0e}")):
        if reg != problem.reg and (reg != 1.0 or problem.reg < 1.0):
            yield problem._replace(reg=reg)
    if problem.cost.min() != 0:
        yield problem._replace(cost=problem.cost - problem.cost.min())


def _restricted(problem: Case, kept: np.ndarray, axes: tuple[int, ...]) -> Case | None:
    of_rows, of_columns = (kept if axis in axes else slice(None) for axis in (0, 1))
    cost, a, b = problem.cost[of_rows][:, of_columns], problem.a[of_rows], problem.b[of_columns]
    if not (a.sum() > 0 and b.sum() > 0):
        return None
    mass = min(float(a.sum()), float(b.sum())) if abs(problem.a.sum() - 1) > 1e-6 else 1.0
    return problem._replace(cost=cost, a=a * (mass / float(a.sum())), b=b * (mass / float(b.sum())))


def _rounded(cost: np.ndarray, digits: int) -> np.ndarray:
    """The cost rounded to this many digits after the first digit of its largest entry."""
    largest = np.abs(cost).max()
    unit = 10.0 ** float(np.floor(np.log10(largest)) - digits) if largest > 0 else 1.0
    return np.round(cost / unit) * unit


def script(solver: Solver, problem: Case, finding: Finding) -> str:
    """A program of about ten lines that reproduces the finding with only NumPy and the solver."""
    dtype = solver.claims.dtype
    numbers = {
        name: np.array2string(np.asarray(value, dtype), separator=", ", floatmode="unique", threshold=10**6)
        for name, value in (("cost", problem.cost), ("a", problem.a), ("b", problem.b))
    }
    again = findings(solver, problem, derivatives=finding.check not in SOON, only=finding.check)
    told = next((of.text for of in again if of.check == finding.check), finding.text)
    lines = [
        f"# {solver.name}: {finding.check}: {told}",
        *(_X64 if dtype == "float64" and solver.source.startswith("from ") and not solver.claims.jax else []),
        "import numpy as np",
        *(["import jax"] if solver.claims.jax and (dtype == "float64" or finding.check not in SOON) else []),
        *(['jax.config.update("jax_enable_x64", True)'] if dtype == "float64" and solver.claims.jax else []),
        solver.source,
        *(f"{name} = np.array({text}, np.{dtype})" for name, text in numbers.items()),
        f"reg = np.{dtype}({problem.reg!r})",
        *(
            _of_the_answer(problem, finding.check)
            if finding.check in SOON
            else _of_derivatives(solver, problem, finding.check)
        ),
    ]
    return "\n".join(lines) + "\n"


# The solver's module may import JAX. Otherwise this has no effect.
_X64 = ["import os", 'os.environ.setdefault("JAX_ENABLE_X64", "1")']


def _of_the_answer(problem: Case, check: str) -> list[str]:
    """Lines that call the solver, and print what shows the finding."""
    if check == "changes its arguments":
        return [
            "before = cost.copy(), a.copy(), b.copy()",
            "solve(cost, a, b, reg)",
            'print("changed by", max(abs(now - was).max() for now, was in zip((cost, a, b), before)))',
        ]
    if check in ("shape", "dtype"):
        return ["answer = solve(cost, a, b, reg)", "print(answer)"]
    lines = ["answer = solve(cost, a, b, reg)", 'plan = np.asarray(answer["plan"], float)', *_SHOWN.get(check, ())]
    if check == "lost entries" and (reference := solve_exactly(balanced(problem))) is not None:
        text = np.array2string(reference.plan, separator=", ", threshold=10**6)
        lines += [
            f"solution = np.array({text})",
            'print("mass of the solution where the plan is zero:", solution[plan == 0].sum())',
        ]
    return [
        *lines,
        'print("marginals off by", abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum(), "of", a.sum())',
        'print({name: value for name, value in answer.items() if name != "plan"})',
        "print(plan)",
    ]


_SHOWN = {
    "not finite": ['print("entries that aren\'t finite:", (~np.isfinite(plan)).sum())'],
    "negative": ['print("smallest entry:", plan.min())'],
    "masked": ['print("mass at points without weight:", plan[(a == 0)[:, None] | (b == 0)].sum())'],
    "form": [
        "rest = np.log(plan) + cost / reg  # x_i + y_j, if the plan has the form diag(u) exp(-C / reg) diag(v)",
        'print("largest deviation from this form:", abs(rest - rest[:, :1] - rest[:1] + rest[0, 0]).max())',
    ],
    "primal_cost": ['print("primal_cost of the plan:", (plan * cost).sum())'],
    "reg_cost": [
        "ratio = np.where(plan > 0, plan, 1) / np.where(plan > 0, np.outer(a, b), 1)",
        "entropy = (plan * np.log(ratio)).sum() - plan.sum() + a.sum() * b.sum()",
        'print("reg_cost of the plan:", (plan * cost).sum() + reg * entropy)',
    ],
    "potentials": [
        'f, g = np.asarray(answer["f"]), np.asarray(answer["g"])',
        "off = abs(np.exp((f[:, None] + g - cost) / reg) - plan)[(a > 0)[:, None] & (b > 0)].sum()",
        'print("exp((f + g - C) / reg) is off by", off)',
    ],
}
"""For each check, the lines of the script that print what it measures."""


def _of_derivatives(solver: Solver, problem: Case, check: str) -> list[str]:
    seen = balanced(as_seen(solver, problem))
    if check.startswith("vmap"):
        return [
            'plan = jax.jit(jax.vmap(lambda cost: solve(cost, a, b, reg)["plan"]))(np.stack([cost, cost[::-1]]))[0]',
            'print("marginals off by", abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum(), "of", a.sum())',
            "print(plan)",
        ]
    weights, direction = weights_and_direction(seen)
    lines = [
        f"rng = np.random.default_rng({max(problem.number, 0)})",
        f"weights, direction = rng.normal(size=(2, *cost.shape)).astype(np.{solver.claims.dtype})",
    ]
    if check == "second derivative":
        direction = np.where((seen.a > 0)[:, None] & (seen.b > 0), direction, 0)
        return [
            *lines,
            "direction *= (a[:, None] > 0) & (b > 0)",
            'value = lambda cost: (weights * solve(cost, a, b, reg)["plan"]).sum()',
            "slope = lambda t: jax.jvp(value, (cost + t * direction,), (direction,))[1]",
            'print("second derivative", jax.jacfwd(slope)(0.0))',
            f'print("of the solution", {expected_second_derivative(seen, weights, direction)!r})',
        ]
    what, name = check.removeprefix("gradient ").removeprefix("of ").split("by ")
    of = what.strip() or "plan"
    value = '(weights * solve(cost, a, b, reg)["plan"]).sum()' if of == "plan" else f'solve(cost, a, b, reg)["{of}"]'
    lines = [*(lines if of == "plan" else []), f"value = lambda cost, a, b: {value}"]
    lines += [f'print("jax.grad", jax.grad(value, {("cost", "a", "b").index(name)})(cost, a, b))']
    if (reference := solve_exactly(seen)) is not None:
        wanted, _ = expected_derivatives(seen, reference, weights)[of][name]
        text = np.array2string(wanted, separator=", ", threshold=10**6, precision=6)
        constant = "" if name == "cost" else ", up to a constant"
        lines += [f'print("of the solution{constant}", np.array({text}))']
    return lines
