"""The checks of an answer: the plan, the numbers that the solver reports with it, then derivatives."""

import contextlib
import functools
import inspect
import linecache
import pathlib
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components

from fs_jax.ot.testing.families import Case, case
from fs_jax.ot.testing.reference import Reference, gradients, gradients_of_iterations, least_squares, solve_exactly
from fs_jax.ot.testing.solvers import Solver


class Finding(NamedTuple):
    """A defect of an answer."""

    check: str
    """Name of the check that failed. Findings are counted by it; a shrunk problem fails the same check."""
    text: str
    error: float
    """The error, as the check measures it."""
    allowed: float


DERIVATIVES_EVERY = 10
"""By default, derivatives are checked on one problem in this many."""


_FLOAT32 = 'For a solver of float32, set solve.claims = Claims(dtype="float32").'

GAVE_UP = "gave up"
"""Not a defect by itself: the solver reports that it hasn't solved the problem, by `converged` or a plan of NaN."""


class Verdict(NamedTuple):
    """The result of checking an answer."""

    findings: list[Finding]
    differentiated: bool
    """Whether derivatives were checked and could have failed: the other checks passed, and the plan is accurate enough
    that a relative error of 25% in one of its derivatives would be found."""


@functools.lru_cache(maxsize=64)
def _with_derivatives(block: int, every: int) -> int:
    numbers = range(block * every, (block + 1) * every)
    drawn = np.random.default_rng([every, block]).permutation(numbers)
    # With a single row or column, the marginals determine the plan, so its derivatives test little.
    return int(next((number for number in drawn if min(case(int(number)).cost.shape) > 1), drawn[0]))


def has_derivatives_checked(number: int, every: int = DERIVATIVES_EVERY) -> bool:
    """Whether a problem is the one of its block of `every` whose derivatives, jit and vmap are checked.

    It is drawn from the block's problems with more than one row and column, if there are any.

    Example:
      >>> [number for number in range(40) if has_derivatives_checked(number)]
      [1, 10, 28, 33]
    """
    return number == _with_derivatives(number // every, every)


def findings(solver: Solver, problem: Case, *, derivatives: bool = False, only: str | None = None) -> list[Finding]:
    """Defects of a solver's answer to a problem; empty if the solver doesn't claim to solve it.

    Args:
      solver: The solver.
      problem: The problem.
      derivatives: Whether to run the expensive checks too: derivatives, `jax.jit` and `jax.vmap`.
      only: Name of the only expensive check to run; None for all.

    Returns:
      A list of findings.

    Example:
      >>> from fs_jax.ot.testing import case, load
      >>> findings(load("fs_jax-stabilized-float32"), case(0))
      []
    """
    return judged(solver, problem, derivatives=derivatives, only=only).findings


def judged(solver: Solver, problem: Case, *, derivatives: bool = False, only: str | None = None) -> Verdict:
    """The findings, and whether derivatives were checked."""
    if not is_claimed(solver, problem):
        return Verdict([], False)
    seen = as_seen(solver, problem)
    given = arguments(solver, seen)
    with _wide_enough(solver):
        try:
            answer = solver.solve(*given)
            if not isinstance(answer, Mapping):
                what = f"expected a mapping with plan; got {type(answer).__name__}"
                return Verdict([_finding("shape", what)], False)
            names = [name for name in _shapes(seen) if answer.get(name) is not None]
            if "plan" in names and (narrow := _narrower(answer["plan"], solver)):
                return Verdict(
                    [_finding("dtype", f"expected a plan of {solver.claims.dtype}; got {narrow}. {_FLOAT32}")], False
                )
            answer = {name: np.asarray(answer[name], float) for name in names}
        except Exception as error:  # any error is a finding
            return Verdict([_raised("raises", solver, error)], False)
        for name, shape in _shapes(seen).items():
            if name in answer and answer[name].shape != shape:
                wrong = _finding("shape", f"expected {name} of shape {shape}; got {answer[name].shape}")
                return Verdict([wrong], False)
        found = [*_changed(solver, seen, given), *_judged(solver, seen, answer)]
        if found or not derivatives:
            return Verdict(found, False)
        differentiated = False
        exact = balanced(seen)
        reference = solve_exactly(exact) if solver.claims.gradients else None
        if reference is not None:
            allowed = allowed_errors(solver, exact, reference, answer["plan"])
            differentiated = _tells(solver, allowed, 0.25)
            found += _differentiated(solver, exact, reference, answer, allowed, only)
        if only is None or only.startswith("vmap"):
            found += _transformed(solver, seen, answer)
    return Verdict(found, differentiated)


def _shapes(problem: Case) -> dict[str, tuple[int, ...]]:
    """Shapes of what an answer may contain."""
    n, m = problem.cost.shape
    scalars: dict[str, tuple[int, ...]] = dict.fromkeys(("primal_cost", "reg_cost", "marginal_error", "converged"), ())
    return {"plan": (n, m), "f": (n,), "g": (m,), **scalars}


def _wide_enough(solver: Solver):
    """Enables JAX's 64-bit types for a JAX solver of float64."""
    if solver.claims.dtype == "float64" and solver.claims.jax:
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def is_claimed(solver: Solver, problem: Case) -> bool:
    """Whether a solver claims to solve the problem."""
    claims = solver.claims
    if not claims.zeros and not ((problem.a > 0).all() and (problem.b > 0).all()):
        return False
    return float(np.abs(problem.cost).max() / problem.reg) <= claims.largest_ratio


def as_seen(solver: Solver, problem: Case) -> Case:
    """The problem rounded to the solver's dtype."""
    dtype = np.dtype(solver.claims.dtype)

    def rounded(x):
        return np.asarray(x, dtype).astype(float)

    a, b = rounded(problem.a), rounded(problem.b)
    return problem._replace(cost=rounded(problem.cost), a=a, b=b, reg=float(rounded(problem.reg)))


def balanced(problem: Case) -> Case:
    """The problem with equal total masses, so that it has an exact solution; rounding has made them differ."""
    return problem._replace(b=problem.b * (float(problem.a.sum()) / float(problem.b.sum())))


def arguments(solver: Solver, problem: Case) -> tuple:
    """Cost, a, b and reg in the solver's dtype. They are copies, so that a solver cannot change the problem."""
    dtype = np.dtype(solver.claims.dtype)
    return (*(np.array(x, dtype) for x in problem[:3]), dtype.type(problem.reg))


def _finding(check: str, text: str, error: Any = np.inf, allowed: Any = 0.0) -> Finding:
    return Finding(check, text, float(error), float(allowed))


def _raised(check: str, solver: Solver, error: Exception) -> Finding:
    """The error, with the last line of its traceback in the solver's package, or else in a library."""
    package = inspect.unwrap(solver.solve).__module__.partition(".")[0]
    frames = [
        (frame.f_globals.get("__name__", ""), frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    frames = [of for of in frames if not of[0].startswith(__package__)]
    frames = [of for of in frames if of[0].partition(".")[0] == package] or frames
    where = ""
    if frames:
        _, frame, number = frames[-1]
        file = frame.f_code.co_filename
        where = f" ({pathlib.Path(file).name}, line {number}: {linecache.getline(file, number).strip()})"
    text = f"{type(error).__name__}: {str(error).strip()}"
    _, traced, inner = text.rpartition("Traceback (most recent call last):")
    if traced and (cause := re.search(r"^[\w.]+: .+", inner, re.MULTILINE)):  # an error in a callback
        text = cause[0]
    hint = f" {_FLOAT32}" if isinstance(error, TypeError) and solver.claims.dtype == "float64" else ""
    return _finding(check, f"{' '.join(text.split())[:200]}{where}{hint}")


def _narrower(plan: Any, solver: Solver) -> str | None:
    """The plan's dtype, if it is narrower than the claimed one."""
    dtype = np.asarray(plan).dtype
    is_narrower = dtype.kind == "f" and dtype.itemsize < np.dtype(solver.claims.dtype).itemsize
    return dtype.name if is_narrower else None


def _changed(solver: Solver, problem: Case, given: tuple):
    names = [
        name
        for name, now, before in zip(("cost", "a", "b"), given, arguments(solver, problem), strict=False)
        if not np.array_equal(now, before)
    ]
    if names:
        yield _finding("changes its arguments", f"{', '.join(names)}: the caller's arrays were changed by the call")


def _judged(solver: Solver, problem: Case, answer: Mapping[str, np.ndarray]):
    cost, a, b, *_ = problem
    plan, mass, eps = answer.get("plan"), a.sum(), float(np.finfo(solver.claims.dtype).eps)
    if plan is None:
        yield _finding("shape", "expected a plan; got none")
        return
    converged = None if "converged" not in answer else bool(answer["converged"])
    if not np.isfinite(plan).all():
        silent = converged is not False and not np.isnan(plan).all()
        what = "not finite" if silent or converged else GAVE_UP
        yield _finding(what, f"{np.sum(~np.isfinite(plan))} of {plan.size} entries aren't finite")
        return
    if plan.min() < 0:
        yield _finding("negative", f"smallest entry {plan.min():.3g}", -plan.min())
    absent = (a == 0)[:, None] | (b == 0)
    if plan[absent].sum() > 0:
        yield _finding("masked", f"mass {plan[absent].sum():.3g} at points without weight", plan[absent].sum())

    # Rounding of sums of n and of m numbers, plus the difference of the total masses, due to rounding of the weights.
    sums = 2 * (sum(cost.shape) + 8) * eps * mass + abs(a.sum() - b.sum())
    off = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
    allowed = solver.claims.marginal_error + sums
    wrong = []
    if off > allowed:
        wrong = [_finding("marginals", f"off by {off / mass:.3g} of the mass, {_said(converged)}", off, allowed)]
    wrong += _of_the_form(problem, plan, eps, solver.claims.marginal_error)
    if converged is False and wrong:
        yield _finding(GAVE_UP, "; ".join(of.text for of in wrong), wrong[0].error, wrong[0].allowed)
        return
    yield from wrong
    if "marginal_error" in answer and not answer["marginal_error"] >= off * (1 - 1e-3) - sums:
        told = float(answer["marginal_error"])
        yield _finding("marginal_error", f"says {told:.3g}; the plan's is {off:.3g}", off - told, sums)
    yield from _costs(problem, answer, plan, eps, off)


def _said(converged):
    if converged is None:
        return "and does not report it"
    return f"and says that it has {'' if converged else 'not '}converged"


def _rounding(problem: Case, eps: float) -> float:
    """Rounding error of exponents (f + g - C) / reg, whose terms are as large as the costs, including constants."""
    there = problem.cost[np.ix_(problem.a > 0, problem.b > 0)]
    # With M the largest |C| / reg, f / reg and g / reg are at most 2M (softmins of costs minus potentials), up to
    # logarithms of weights; the 8 is for these and for the rounding of exp and log. Three divisions and two sums, each
    # rounded by half an eps, give at most 5 eps M in an exponent; subtracting means of rows and columns combines four
    # exponents. (Measured for problems 0 to 1499, with our solvers and POT's in both dtypes: at most 3.3 instead of 20,
    # except for POT's "sinkhorn" at the end of its range.)
    return 20 * eps * (8 + np.abs(there).max() / problem.reg)


def _of_the_form(problem: Case, plan: np.ndarray, eps: float, marginal_error: float):
    """Checks that log plan + C / reg = x_i + y_j, wherever the plan's entries are not too small to be accurate."""
    cost, a, b, reg, *_ = problem
    tiny = np.finfo(np.float32).tiny if eps > 1e-10 else np.finfo(float).tiny
    there = (plan > 1e4 * tiny) & (a > 0)[:, None] & (b > 0)
    if not there.any():
        return
    exponents = np.log(np.where(there, plan, 1)) + (cost - cost[there].min()) / reg
    weights = there.astype(float)
    x, y, rest = np.zeros(len(a)), np.zeros(len(b)), np.where(there, exponents, 0)
    for _ in range(2):  # the second fit corrects the rounding errors of the first
        of_rows, of_columns = least_squares(weights, rest.sum(1), rest.sum(0))
        x, y = x + of_rows, y + of_columns
        rest = np.where(there, exponents - x[:, None] - y, 0)
    rest = np.abs(rest)
    # Deviations that are small relative to the claimed marginal error are accepted, even if they exceed rounding.
    allowed = max(_rounding(problem, eps), 0.01 * marginal_error)
    if rest.max() > allowed:
        yield _finding(
            "form",
            f"the plan isn't diag(u) exp(-C / reg) diag(v): off by a factor e^{rest.max():.3g}",
            rest.max(),
            allowed,
        )
    # Entries that are too small to be accurate must be as small in the fitted plan of this form. This is checked where
    # other entries connect the entry's row and column, since they determine x + y.
    fitted = x[:, None] + y - (cost - cost[there].min()) / reg
    graph = np.block([[np.zeros((len(a), len(a))), there], [there.T, np.zeros((len(b), len(b)))]])
    _, part = connected_components(graph, directed=False)
    known = (part[: len(a), None] == part[len(a) :]) & (a > 0)[:, None] & (b > 0)
    lost = np.exp(np.minimum(fitted, 700))[known & ~there & (fitted > np.log(1e6 * tiny))]
    if lost.sum() > 1e-6 * a.sum():
        yield _finding("lost entries", f"mass {lost.sum():.3g} where the plan is zero", lost.sum(), 1e-6 * a.sum())


def _costs(problem: Case, answer: Mapping[str, np.ndarray], plan: np.ndarray, eps: float, off: float):
    cost, a, b, reg, *_ = problem
    there = (a > 0)[:, None] & (b > 0)
    size = np.sum(plan * np.where(there, np.abs(cost), 0))
    allowed = (8 + 2 * np.sqrt(plan.size)) * eps * max(size, np.finfo(float).tiny)
    if "primal_cost" in answer:
        expected = np.sum(plan * np.where(there, cost, 0))
        if not abs(answer["primal_cost"] - expected) <= allowed:
            told = float(answer["primal_cost"])
            yield _finding(
                "primal_cost", f"says {told:.8g}; the plan's is {expected:.8g}", abs(told - expected), allowed
            )
    if "reg_cost" in answer:
        # Rounding of the logarithms, as of the exponents, and of sums, as for the marginals. Some solvers return the
        # dual objective, which differs by the marginal error times the potentials.
        ratios = np.log(np.where(there & (plan > 0), plan, 1) / np.where(there, np.outer(a, b), 1))
        expected = np.sum(np.where(there, plan * (cost + reg * ratios) + reg * np.outer(a, b), 0)) - reg * plan.sum()
        potential = 3 * np.abs(cost[there]).max() + reg * (1 + np.abs(np.log(np.outer(a, b)[there])).max())
        sums = 2 * (sum(cost.shape) + 8) * eps * (a.sum() * b.sum() * reg + a.sum() * potential)
        allowed = _rounding(problem, eps) * reg * a.sum() + sums + off * potential
        if not abs(answer["reg_cost"] - expected) <= allowed:
            told = float(answer["reg_cost"])
            yield _finding("reg_cost", f"says {told:.8g}; the plan's is {expected:.8g}", abs(told - expected), allowed)
    if "f" in answer and "g" in answer:
        f, g = (np.where(w > 0, answer[name], 0) for w, name in ((a, "f"), (b, "g")))
        exponents = (f[:, None] + g - np.where(there, cost, 0)) / reg
        parts = (np.abs(f).max() + np.abs(g).max() + np.abs(cost[there]).max()) / reg
        off = np.abs(np.exp(np.minimum(exponents, 700)) - plan)[there].sum()
        allowed = 16 * eps * (1 + parts) * a.sum()
        if not off <= allowed:
            yield _finding("potentials", f"exp((f + g - C) / reg) isn't the plan: off by {off:.3g} in L1", off, allowed)


def _centred(problem: Case) -> tuple[np.ndarray, float]:
    """Costs without constants of rows and columns, zero at points without mass; and the range of these constants."""
    rows, columns = problem.a > 0, problem.b > 0
    cost = problem.cost[np.ix_(rows, columns)]
    of_rows = cost.min(1, keepdims=True)
    of_columns = (cost - of_rows).min(0)
    whole = np.zeros(problem.cost.shape)
    whole[np.ix_(rows, columns)] = cost - of_rows - of_columns
    return whole, float(np.ptp(of_rows) + np.ptp(of_columns))


COSTS = ("primal_cost", "reg_cost")


def _differentiated(
    solver: Solver,
    problem: Case,
    reference: Reference,
    answer: Mapping[str, np.ndarray],
    allowed: Mapping[str, Mapping[str, "Allowed"]],
    only: str | None,
):
    """Compares derivatives of Σ W · plan and of the costs with the solution's.

    Second derivatives are compared with differences of first derivatives of solutions.
    """
    import jax.numpy as jnp

    names = ("plan", *(name for name in COSTS if name in answer))
    weights, direction = weights_and_direction(problem)
    given = [*map(jnp.asarray, arguments(solver, problem)), jnp.asarray(weights, solver.claims.dtype)]
    expected = expected_derivatives(problem, reference, weights)
    for place, name in enumerate(("cost", "a", "b")):
        if name not in solver.claims.gradients or not (only is None or only.endswith(f"by {name}")):
            continue
        try:
            got_of = _gradients(solver, given, names, place)
        except Exception as error:
            yield _raised(f"gradient by {name}", solver, error)
            continue
        for of, got in got_of.items():
            off = np.abs(_comparable(problem, name, got - expected[of][name][0])).max()
            largest, _, total = allowed[of][name]
            if not off <= total:
                what = f"gradient by {name}" if of == "plan" else f"gradient of {of} by {name}"
                yield _finding(what, f"off by {off:.3g}, of {largest:.3g} at most", off, total)
    # A second derivative amplifies the error of the plan once more, so it is checked only if first ones are accurate.
    by_cost = allowed["plan"]["cost"]
    if solver.claims.second_order and only in (None, "second derivative") and by_cost.total <= 0.02 * by_cost.largest:
        yield from _second_order(solver, problem, given, weights, direction)


def _comparable(problem: Case, name: str, derivative: np.ndarray) -> np.ndarray:
    """The derivative, 0 at points without mass. By a or b, minus its mean: their sum is fixed, so it has no effect."""
    if name == "cost":
        return np.where((problem.a > 0)[:, None] & (problem.b > 0), derivative, 0)
    there = getattr(problem, name) > 0
    return np.where(there, derivative - derivative[there].mean(), 0)


class Allowed(NamedTuple):
    """How exact a derivative has to be."""

    largest: float
    """Its largest entry."""
    rounding: float
    """What rounding may change in an entry."""
    total: float
    """`rounding`, and what the marginal error of the plan may change."""


def allowed_errors(
    solver: Solver, problem: Case, reference: Reference, plan: np.ndarray
) -> dict[str, dict[str, Allowed]]:
    """The allowed error of each of `expected_derivatives`, given the marginal error of the plan and rounding.

    A solver that has not converged exactly has other derivatives than the solution. If it differentiates the optimality
    conditions at its plan, they are the derivatives of a problem with the plan's marginals. If it differentiates its
    iterations, they are about those of Sinkhorn iterations, columns first or rows first, that reach the same error. All
    three are computed. Four times the largest difference from the solution's derivative is allowed, since a solver's
    iterations may start elsewhere or stop some steps earlier. (The errors of our own solvers on problems 0 to 250 are
    at most twice the difference.)
    """
    eps = float(np.finfo(solver.claims.dtype).eps)
    mass, (n, m) = problem.a.sum(), problem.cost.shape
    weights, _ = weights_and_direction(problem)
    wanted = expected_derivatives(problem, reference, weights)
    at_plan = expected_derivatives(problem, reference._replace(plan=plan), weights)
    # Derivatives of the costs are derivatives of such sums too: W is C for `primal_cost`, and the sum of the potentials
    # for `reg_cost`.
    there = (problem.a > 0)[:, None] & (problem.b > 0)
    potentials = sum(wanted["reg_cost"][name][0].reshape(shape) for name, shape in (("a", (n, 1)), ("b", (1, m))))
    of_sums = np.stack([np.where(there, of, 0) for of in (weights, problem.cost, potentials)])
    error = (np.abs(plan.sum(1) - problem.a).sum() + np.abs(plan.sum(0) - problem.b).sum()) / mass
    error += 2 * (n + m + 8) * eps  # the sums' own rounding
    columns_first = gradients_of_iterations(problem, of_sums, error)
    turned = Case(problem.cost.T, problem.b, problem.a, problem.reg)
    rows_first = gradients_of_iterations(turned, of_sums.swapaxes(1, 2), error)
    rows_first = {"cost": rows_first["cost"].swapaxes(1, 2), "a": rows_first["b"], "b": rows_first["a"]}
    # Rounded exponents give the plan's entries a relative error. The linear system for the derivatives, scaled by the
    # square roots of the row and column sums, then has an error of the same size. With the columns eliminated, its
    # smallest eigenvalue is 1 - σ², where σ is the second singular value of the scaled plan. Scaling back amplifies the
    # entry of a small weight by 1 / √weight. (A derivative by the cost isn't amplified: it is multiplied by the plan's
    # entry, which is at most the weight.)
    rounded = _rounding(problem, eps) / _gap(problem, reference.plan)
    smallest = min(problem.a[problem.a > 0].min(), problem.b[problem.b > 0].min()) / mass
    amplified = {"cost": rounded, "a": rounded / np.sqrt(smallest), "b": rounded / np.sqrt(smallest)}
    found: dict[str, dict[str, Allowed]] = {}
    for place, (of, by) in enumerate(wanted.items()):
        found[of] = {}
        for name, (derivative, size) in by.items():
            # The plan itself is part of the derivatives of costs by the cost.
            direct = reference.plan if name == "cost" and of != "plan" else 0.0
            others = [iterations[name][place] + direct for iterations in (columns_first, rows_first)]
            others.append(at_plan[of][name][0])
            left = max(np.abs(_comparable(problem, name, other - derivative)).max() for other in others)
            largest = float(np.abs(_comparable(problem, name, derivative)).max())
            rounding = float(amplified[name] * size)
            found[of][name] = Allowed(largest, rounding, 4 * float(left) + rounding)
    return found


def _gap(problem: Case, plan: np.ndarray) -> float:
    """1 - σ², σ the second singular value of the plan scaled by its marginals; tiny for a block-diagonal plan."""
    present = plan[np.ix_(problem.a > 0, problem.b > 0)]
    values = np.linalg.svd(present / np.sqrt(np.outer(present.sum(1), present.sum(0))), compute_uv=False)
    return max(1 - float(values[1]) ** 2, 1e-16) if len(values) > 1 else 1.0


def _tells(solver: Solver, allowed: Mapping[str, Mapping[str, Allowed]], part: float) -> bool:
    """Whether a relative error of `part` would be found in at least one of the claimed derivatives of the plan."""
    claimed = [allowed["plan"][name] for name in solver.claims.gradients]
    return any(of.total <= part * of.largest for of in claimed)


def expected_derivatives(problem: Case, reference: Reference, weights: np.ndarray) -> dict[str, dict[str, tuple]]:
    """Derivatives of Σ W · plan and of the costs by cost, a and b, each with the size of the terms that it sums."""
    cost, a, b, reg, *_ = problem
    mass, (centred, constants) = a.sum(), _centred(problem)
    there = (a > 0)[:, None] & (b > 0)
    largest, spread = np.abs(weights).max(), np.ptp(centred) + constants
    of_plan = gradients(problem, reference, weights)
    of_cost = gradients(problem, reference, np.where(there, cost, 0))
    # The regularised cost equals the dual's value: its derivatives are the plan and the potentials relative to a bᵀ.
    f = reference.f - reg * np.log(np.where(a > 0, a, 1))
    g = reference.g - reg * np.log(np.where(b > 0, b, 1))
    potential = reg + spread
    return {
        "plan": {
            "cost": (of_plan["cost"], largest * mass / reg),
            "a": (of_plan["a"], largest), "b": (of_plan["b"], largest),
        },
        "primal_cost": {
            "cost": (reference.plan + of_cost["cost"], mass * (1 + np.ptp(centred) / reg)),
            "a": (of_cost["a"], potential), "b": (of_cost["b"], potential),
        },
        "reg_cost": {"cost": (reference.plan, mass), "a": (f, potential), "b": (g, potential)},
    }  # fmt: skip


def _gradients(solver: Solver, given, names, place: int) -> dict[str, np.ndarray]:
    """Gradients of Σ W · plan and of the costs by one argument, each from the same program, to compile only once.

    The program differentiates a weighted sum of these values; a weight of one selects a value.
    """
    import jax.numpy as jnp

    found = {}
    for of, which in zip(names, jnp.eye(len(names), dtype=given[0].dtype), strict=True):
        gradient = _program(solver, f"gradient {place}")
        try:
            got = gradient(*given, dict(zip(names, which, strict=True)))
        # An error or a NaN may come from another of the values, even with a factor of zero: compute this one alone.
        except Exception:
            got = np.nan
        if not np.isfinite(got).all():
            got = gradient(*given, {of: jnp.ones_like(which[0])})
        found[of] = np.asarray(got, float)
    return found


@functools.lru_cache(maxsize=16)
def _program(solver: Solver, which: str) -> Callable:
    """A function of cost, a, b, reg, W and more; compiled once for each shape if the solver supports `jax.jit`."""
    import jax
    import jax.numpy as jnp

    def values(cost, a, b, reg, weights):
        answer = solver.solve(cost, a, b, reg)
        return {"plan": jnp.sum(weights * answer["plan"]), **{name: answer[name] for name in COSTS if name in answer}}

    def gradient(cost, a, b, reg, weights, factors):
        place = int(which.split()[1])

        def value(*given):
            of = values(*given, reg, weights)
            return sum(factor * of[name] for name, factor in factors.items())

        return jax.grad(value, place)(cost, a, b)

    def second(cost, a, b, reg, weights, direction):
        def slope(t):
            def value(cost):
                return values(cost, a, b, reg, weights)["plan"]

            return jax.jvp(value, (cost + t * direction,), (direction,))[1]

        return jax.jacfwd(slope)(jnp.zeros((), cost.dtype))

    def batch(costs, a, b, reg):
        return jax.vmap(lambda cost: solver.solve(cost, a, b, reg)["plan"])(costs)

    programs: dict[str, Callable] = {"second": second, "batch": batch}
    program = programs.get(which, gradient)
    return jax.jit(program) if solver.claims.batched else program


def weights_and_direction(problem: Case) -> tuple[np.ndarray, np.ndarray]:
    """W, and a direction of the costs for second derivatives, drawn with the problem's number as the seed."""
    rng = np.random.default_rng(max(problem.number, 0))
    weights, direction = rng.normal(size=(2, *problem.cost.shape))
    return weights, direction


def expected_second_derivative(problem: Case, weights, direction) -> float | None:
    """Second derivative of Σ W · plan along a direction, from certified gradients; None if they can't be certified."""
    step = 1e-3 * problem.reg
    around = []
    for sign in (1, -1):
        moved = problem._replace(cost=problem.cost + sign * step * direction)
        if (at := solve_exactly(moved)) is None:
            return None
        around.append(np.sum(gradients(moved, at, weights)["cost"] * direction))
    return float((around[0] - around[1]) / (2 * step))


def _second_order(solver: Solver, problem: Case, given, weights, direction):
    import jax.numpy as jnp

    direction = np.where((problem.a > 0)[:, None] & (problem.b > 0), direction, 0)
    if (wanted := expected_second_derivative(problem, weights, direction)) is None:
        return
    try:
        got = float(_program(solver, "second")(*given, jnp.asarray(direction, solver.claims.dtype)))
    except Exception as error:
        yield _raised("second derivative", solver, error)
        return
    size = np.abs(weights).max() * problem.a.sum() * np.abs(direction).max() ** 2 / problem.reg**2
    # Coarse on purpose: a rule that misses a term is off by a large part of the value. The errors that come from the
    # marginal error of the plan and from the step of the difference are well below this.
    allowed = 0.05 * abs(wanted) + 1e-3 * size
    if not abs(got - wanted) <= allowed:
        text = f"{got:.6g} along a direction; differences give {wanted:.6g}"
        yield _finding("second derivative", text, abs(got - wanted), allowed)


def _transformed(solver: Solver, problem: Case, answer: Mapping[str, np.ndarray]):
    """Checks that the answer under `jax.jit` and `jax.vmap`, in a batch with another problem, is as accurate."""
    if not solver.claims.batched:
        return
    import jax.numpy as jnp

    cost, a, b, reg = map(jnp.asarray, arguments(solver, problem))
    try:
        both = np.asarray(_program(solver, "batch")(jnp.stack([cost, cost[::-1]]), a, b, reg), float)
    except Exception as error:
        yield _raised("vmap", solver, error)
        return
    for of in _judged(solver, problem, {**answer, "plan": both[0]}):
        if of.check in ("marginals", "form", "not finite", "masked", "lost entries"):
            yield of._replace(check=f"vmap: {of.check}")
