"""What is judged of an answer: backward errors first, then what it says of itself, then derivatives."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fs_jax.ot.testing.families import Case
from fs_jax.ot.testing.reference import Reference, gradients, least_squares, solve_exactly
from fs_jax.ot.testing.solvers import Solver


class Finding(NamedTuple):
    """Something that is wrong with an answer."""

    check: str
    """Which check it failed: the name by which findings are counted, and kept while a problem is shrunk."""
    text: str
    error: float
    """As the check measures it."""
    allowed: float


DERIVATIVES_EVERY = 26
"""Of how many problems one has its derivatives checked, if nothing else is said: of each kind in turn, since 26 and the
number of kinds, 15, have no common factor."""


GAVE_UP = "gave up"
"""Not a defect by itself: the solver says that it hasn't solved the problem, by `converged` or NaN throughout."""


def findings(solver: Solver, problem: Case, *, derivatives: bool = False) -> list[Finding]:
    """What is wrong with a solver's answer to a problem; nothing where the problem is outside of its claims.

    Args:
      solver: The solver.
      problem: The problem.
      derivatives: Whether to look at what costs more too: derivatives, `jax.jit` and `jax.vmap`.

    Example:
      >>> from fs_jax.ot.testing import case, load
      >>> findings(load("fs_jax-stabilized-float32"), case(0))
      []
    """
    if not is_claimed(solver, problem):
        return []
    seen = as_seen(solver, problem)
    with _wide_enough(solver):
        try:
            given = solver.solve(*arguments(solver, seen))
        except Exception as error:  # whatever it raises is the finding
            return [_finding("raises", f"{type(error).__name__}: {str(error).strip()[:200]}")]
        if not isinstance(given, Mapping):
            return [_finding("shape", f"expected a mapping with plan; got {type(given).__name__}")]
        answer = {name: np.asarray(given[name], float) for name in _shapes(seen) if name in given}
        for name, shape in _shapes(seen).items():
            if name in answer and answer[name].shape != shape:
                return [_finding("shape", f"expected {name} of shape {shape}; got {answer[name].shape}")]
        found = list(_judged(solver, seen, answer))
        if derivatives and not found:
            if (reference := solve_exactly(seen)) is not None:
                found += _differentiated(solver, seen, reference)
            found += _transformed(solver, seen, answer)
    return found


def _shapes(problem: Case) -> dict[str, tuple[int, ...]]:
    """What an answer may have."""
    n, m = problem.cost.shape
    scalars: dict[str, tuple[int, ...]] = dict.fromkeys(("primal_cost", "marginal_error", "converged"), ())
    return {"plan": (n, m), "f": (n,), "g": (m,), **scalars}


def _wide_enough(solver: Solver):
    """JAX in 64 bits, for a solver of JAX that computes in them."""
    if solver.claims.dtype == "float64" and (solver.claims.batched or solver.claims.gradients):
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def is_claimed(solver: Solver, problem: Case) -> bool:
    """Whether a solver says that it solves such problems."""
    claims = solver.claims
    if not claims.zeros and not ((problem.a > 0).all() and (problem.b > 0).all()):
        return False
    # To the letter, a kernel doesn't take constants out.
    ratio = problem.ratio if np.isinf(claims.largest_ratio) else float(np.abs(problem.cost).max() / problem.reg)
    return ratio <= claims.largest_ratio


def as_seen(solver: Solver, problem: Case) -> Case:
    """The problem with its numbers rounded to the solver's dtype: it is judged by what it was given."""
    dtype = np.dtype(solver.claims.dtype)

    def rounded(x):
        return np.asarray(x, dtype).astype(float)

    a, b = rounded(problem.a), rounded(problem.b)
    return problem._replace(cost=rounded(problem.cost), a=a, b=b, reg=float(rounded(problem.reg)))


def arguments(solver: Solver, problem: Case) -> tuple:
    """Cost, a, b and reg in the solver's dtype."""
    dtype = np.dtype(solver.claims.dtype)
    return (*(np.asarray(x, dtype) for x in problem[:3]), dtype.type(problem.reg))


def _finding(check: str, text: str, error: Any = np.inf, allowed: Any = 0.0) -> Finding:
    return Finding(check, text, float(error), float(allowed))


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
        yield _finding("masked", f"mass {plan[absent].sum():.3g} at points without", plan[absent].sum())

    # Sums of n and of m numbers, each rounded; and the marginals themselves, whose sums differ by their rounding.
    sums = 2 * (sum(cost.shape) + 8) * eps * mass + abs(a.sum() - b.sum())
    off = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
    allowed = solver.claims.marginal_error + sums
    if off > allowed:
        if converged is False:
            yield _finding(GAVE_UP, f"marginals off by {off / mass:.3g} of the mass", off, allowed)
            return
        yield _finding("marginals", f"off by {off / mass:.3g} of the mass, {_said(converged)}", off, allowed)
    if "marginal_error" in answer and not answer["marginal_error"] >= off * (1 - 1e-3) - sums:
        told = float(answer["marginal_error"])
        yield _finding("marginal_error", f"says {told:.3g}; the plan's is {off:.3g}", off - told, sums)

    yield from _of_the_form(problem, plan, eps)
    yield from _costs(problem, answer, plan, eps)


def _said(converged):
    return "and says nothing of it" if converged is None else "and says that it has converged"


def _rounding(problem: Case, eps: float) -> float:
    """Of exponents (f + g - C) / reg, whose parts are as large as the costs, with the constants that they hold."""
    there = problem.cost[np.ix_(problem.a > 0, problem.b > 0)]
    return 128 * eps * (8 + np.abs(there).max() / problem.reg)


def _of_the_form(problem: Case, plan: np.ndarray, eps: float):
    """Whether log plan + C / reg is a sum of a row's and a column's number, where the plan's entries have digits."""
    cost, a, b, reg, *_ = problem
    tiny = np.finfo(np.float32).tiny if eps > 1e-10 else np.finfo(float).tiny
    there = (plan > 1e4 * tiny) & (a > 0)[:, None] & (b > 0)
    if not there.any():
        return
    exponents = np.log(np.where(there, plan, 1)) + (cost - cost[there].min()) / reg
    weights = there.astype(float)
    x, y = least_squares(weights, (weights * exponents).sum(1), (weights * exponents).sum(0))
    rest = np.abs(np.where(there, exponents - x[:, None] - y, 0))
    allowed = _rounding(problem, eps)
    if rest.max() > allowed:
        yield _finding(
            "form",
            f"the plan isn't diag(u) exp(-C / reg) diag(v): off by a factor e^{rest.max():.3g}",
            rest.max(),
            allowed,
        )
    # An entry that is too small to have digits must be so in the solution of this form as well.
    fitted = x[:, None] + y - (cost - cost[there].min()) / reg
    known = there.any(1)[:, None] & there.any(0) & (a > 0)[:, None] & (b > 0)
    lost = np.exp(np.minimum(fitted, 700))[known & ~there & (fitted > np.log(1e6 * tiny))]
    if lost.sum() > 1e-6 * a.sum():
        yield _finding("lost entries", f"mass {lost.sum():.3g} where the plan is zero", lost.sum(), 1e-6 * a.sum())


def _costs(problem: Case, answer: Mapping[str, np.ndarray], plan: np.ndarray, eps: float):
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
    if "f" in answer and "g" in answer:
        f, g = (np.where(w > 0, answer[name], 0) for w, name in ((a, "f"), (b, "g")))
        exponents = (f[:, None] + g - np.where(there, cost, 0)) / reg
        parts = (np.abs(f).max() + np.abs(g).max() + np.abs(cost[there]).max()) / reg
        off = np.abs(np.exp(np.minimum(exponents, 700)) - plan)[there].sum()
        allowed = 16 * eps * (1 + parts) * a.sum()
        if not off <= allowed:
            yield _finding("potentials", f"exp((f + g - C) / reg) isn't the plan: off by {off:.3g} in L1", off, allowed)


def _differentiated(solver: Solver, problem: Case, reference: Reference):
    """First derivatives of Σ W · plan against those of the solution, and second ones against differences of these."""
    if not solver.claims.gradients or not determined(solver, problem, reference):
        return
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(max(problem.number, 0))
    weights = rng.normal(size=problem.cost.shape)
    given = arguments(solver, problem)
    there = {"cost": (problem.a > 0)[:, None] & (problem.b > 0), "a": problem.a > 0, "b": problem.b > 0}
    expected = gradients(problem, reference, weights)

    def value(cost, a, b):
        return jnp.sum(jnp.asarray(weights, given[0].dtype) * solver.solve(cost, a, b, given[3])["plan"])

    for place, name in enumerate(("cost", "a", "b")):
        if name not in solver.claims.gradients:
            continue
        try:
            got = np.asarray(jax.grad(value, argnums=place)(*map(jnp.asarray, given[:3])), float)
        except Exception as error:
            yield _finding(f"gradient by {name}", f"raises {type(error).__name__}: {str(error).strip()[:200]}")
            continue
        wanted = np.where(there[name], expected[name], 0)
        got = np.where(there[name], got, 0)
        if name != "cost":  # weights move with their mass held
            got, wanted = (np.where(there[name], g - g[there[name]].mean(), 0) for g in (got, wanted))
        # A tenth: what the solver may leave in the plan is at most a fiftieth, and there are some factors of order one.
        scale = problem.a.sum() / problem.reg if name == "cost" else 1.0
        allowed = (
            0.1 * np.abs(wanted).max() + np.sqrt(np.finfo(solver.claims.dtype).eps) * np.abs(weights).max() * scale
        )
        off = np.abs(got - wanted).max()
        if not off <= allowed:
            yield _finding(
                f"gradient by {name}", f"off by {off:.3g}, of {np.abs(wanted).max():.3g} at most", off, allowed
            )
    if solver.claims.second_order:
        yield from _second_order(solver, problem, value, given, weights, rng)


def determined(solver: Solver, problem: Case, reference: Reference) -> bool:
    """Whether a plan as good as the solver claims says what the derivatives are: to a fiftieth.

    A marginal error of δ may be all in the smallest weight, and loose parts of the plan amplify it by 1 / (1 - σ²).
    """
    rows, columns = problem.a > 0, problem.b > 0
    plan = reference.plan[np.ix_(rows, columns)]
    smallest = min(problem.a[rows].min(), problem.b[columns].min())
    scaled = plan / np.sqrt(np.outer(plan.sum(1), plan.sum(0)))
    values = np.linalg.svd(scaled, compute_uv=False)
    gap = 1 - values[1] ** 2 if len(values) > 1 else 1.0
    return solver.claims.marginal_error <= 0.02 * smallest * max(gap, 0.0)


def _second_order(solver: Solver, problem: Case, value: Callable, given, weights, rng):
    """The second derivative along a direction, against a difference of certified first ones."""
    import jax
    import jax.numpy as jnp

    direction = rng.normal(size=problem.cost.shape) * ((problem.a > 0)[:, None] & (problem.b > 0))
    step = 1e-3 * problem.reg
    around = []
    for sign in (1, -1):
        moved = problem._replace(cost=problem.cost + sign * step * direction)
        if (at := solve_exactly(moved)) is None:
            return
        around.append(np.sum(gradients(moved, at, weights)["cost"] * direction))
    wanted = (around[0] - around[1]) / (2 * step)

    def slope(t):
        cost = jnp.asarray(given[0]) + t * jnp.asarray(direction, given[0].dtype)
        return jax.jvp(lambda c: value(c, *map(jnp.asarray, given[1:3])), (cost,), (jnp.asarray(direction),))[1]

    got = float(jax.jacfwd(slope)(0.0))
    size = np.abs(weights).max() * problem.a.sum() * np.abs(direction).max() ** 2 / problem.reg**2
    allowed = 0.05 * abs(wanted) + 1e-3 * size
    if not abs(got - wanted) <= allowed:
        text = f"{got:.6g} along a direction; differences give {wanted:.6g}"
        yield _finding("second derivative", text, abs(got - wanted), allowed)


def _transformed(solver: Solver, problem: Case, answer: Mapping[str, np.ndarray]):
    """Under `jax.jit` and `jax.vmap`, beside another problem, the answer is as good as without."""
    if not solver.claims.batched:
        return
    import jax
    import jax.numpy as jnp

    cost, a, b, reg = map(jnp.asarray, arguments(solver, problem))
    other = cost[::-1]

    def plan(cost):
        return solver.solve(cost, a, b, reg)["plan"]

    try:
        both = np.asarray(jax.jit(jax.vmap(plan))(jnp.stack([cost, other])), float)
    except Exception as error:
        yield _finding("vmap", f"raises {type(error).__name__}: {str(error).strip()[:200]}")
        return
    found = list(_judged(solver, problem, {**answer, "plan": both[0]}))
    for of in found:
        if of.check in ("marginals", "form", "not finite", "masked", "lost entries"):
            yield of._replace(check=f"vmap: {of.check}")
