"""Properties of every problem: hypothesis draws problems, and each is solved in one batch with its variations.

The tolerance between two results (`rounding`). An iteration passes the potentials through log-sum-exps, which change by
no more than their terms do, so rounding errors add up over the iterations without being amplified. An iteration adds
the rounding of its exponents, which are as large as |C|, |f| and |g| in units of reg. The plan's entries are
exponentials of such sums, so the relative error of its mass has this size too. The largest error observed is a
thirtieth of this tolerance.
"""

import math
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fs_jax.ot import Status, ipot, sinkhorn
from tests.parameters import exact, mostly_slow

ITERATIONS = 30
SHAPES = [(1, 1), (4, 1), (6, 4)]  # few, since each is compiled

# The same problems in each run, so a failure in CI is due to a change in the code and not to chance.
every = settings(max_examples=30, deadline=None, derandomize=True)


class Problem(NamedTuple):
    """The arguments that vary between problems of one compiled solver."""

    cost: np.ndarray
    a: np.ndarray
    b: np.ndarray
    reg: float
    f: np.ndarray  # initial potentials; IPOT ignores them
    threshold: float = 0.0

    @property
    def mass(self):
        return self.a.sum()

    @property
    def size(self):
        return np.abs(self.cost).max()


def numbers(shape, low=-1, high=1):
    """Arrays that often have ties, zeros and constant parts; entries are zero or at least 6e-5 in absolute value."""
    return hnp.arrays(np.float64, shape, elements=st.floats(low, high, width=16, allow_subnormal=False))


@st.composite
def problems(draw, shapes=SHAPES, smallest_reg=1e-4):
    """Costs of 1e-6 to 1e6, some with equal rows; weights of 1e-25 to 1 or zero; any mass; reg relative to costs."""
    n, m = draw(st.sampled_from(shapes))
    scale = 10 ** draw(st.floats(-6, 6))
    cost = scale * draw(numbers((n, m)))
    if n > 1 and draw(st.booleans()):
        cost[1] = cost[0]
    weights = st.just(0.0) | st.floats(-25, 0).map(lambda exponent: 10**exponent)
    a, b = (draw(hnp.arrays(np.float64, size, elements=weights).filter(np.any)) for size in (n, m))
    mass = 10 ** draw(st.floats(-3, 3))
    a, b = mass * a / a.sum(), mass * b / b.sum()
    reg = scale * 10 ** draw(st.floats(np.log10(smallest_reg), 1))
    return Problem(cost, a, b, reg, reg * logarithm(a))


def logarithm(weights):
    return np.log(np.where(weights > 0, weights, 1))


class Variation(NamedTuple):
    """A problem whose plan is a known function of the original's plan, at every iteration."""

    problem: Problem
    expected: object
    shift: tuple = (0.0, 0.0)  # of the potentials


@st.composite
def variations(draw, original, columns_too):
    """The original and its variations. IPOT's start is fixed, so it is invariant to column shifts only in the limit."""
    cost, a, b, reg, start, _ = original
    n, m = cost.shape
    rows, columns = (np.array(draw(st.permutations(range(size)))) for size in (n, m))
    f, g = original.size * draw(numbers(n, -2, 2)), original.size * draw(numbers(m, -2, 2)) * columns_too
    factor = 10 ** draw(st.floats(-6, 6))
    elsewhere = np.where((a[:, None] > 0) & (b > 0), cost, original.size * draw(numbers(())))
    twins = n > 1 and (cost[0] == cost[1]).all()
    merge = np.eye(n)
    if twins:
        merge[0, 1], merge[1, 1] = 1, 0
    threshold = original.mass * 10 ** draw(st.floats(-4, 0))
    return {
        "original": Variation(original, lambda plan: plan),
        "permuted": Variation(
            original._replace(cost=cost[np.ix_(rows, columns)], a=a[rows], b=b[columns], f=start[rows]),
            lambda plan: plan[np.ix_(rows, columns)],
        ),
        "shifted": Variation(
            original._replace(cost=cost + f[:, None] + g, f=start + f), lambda plan: plan, shift=(f, g)
        ),
        "scaled": Variation(
            original._replace(cost=factor * cost, reg=factor * reg, f=factor * start), lambda plan: plan
        ),
        "masked costs changed": Variation(original._replace(cost=elsewhere), lambda plan: plan),
        # Two rows of equal costs are equivalent to one row with the mass of both, also at the start, which is u = a.
        "twins merged": Variation(
            original._replace(a=merge @ a, f=reg * logarithm(merge @ a)), lambda plan: merge @ plan
        ),
        "stopped": Variation(original._replace(threshold=threshold), None),
    }


def sinkhorn_by(method, problem):
    cost, a, b, reg, f, threshold = problem
    init = (f, jnp.zeros_like(b))
    return sinkhorn(cost, a, b, reg=reg, num_iters=ITERATIONS, threshold=threshold, init=init, method=method)


def ipot_by(problem):
    cost, a, b, beta, _, threshold = problem
    return ipot(cost, a, b, beta=beta, num_iters=ITERATIONS, threshold=threshold)


SOLVERS = {
    "stabilized": jax.jit(jax.vmap(partial(sinkhorn_by, "stabilized"))),
    "log": jax.jit(jax.vmap(partial(sinkhorn_by, "log"))),
    "ipot": jax.jit(jax.vmap(ipot_by)),
}


def batch(problems, dtype):
    return Problem(*(np.stack(field).astype(dtype) for field in zip(*problems, strict=True)))


def reached_reg(problem, result, solver):
    """The regularisation of the result: reg, or beta / t for step t of IPOT."""
    return problem.reg / result.num_iters if solver == "ipot" else problem.reg


def exponents(problem, result, reg):
    """The largest exponent in the computation of the plan."""
    potentials = (np.abs(x[w > 0]).max() for x, w in ((result.f, problem.a), (result.g, problem.b)))
    return 1 + (problem.size + sum(potentials)) / reg


@exact
@pytest.mark.parametrize(
    ("solver", "dtype"),
    mostly_slow(
        product(SOLVERS, (np.float32, np.float64)),
        ("stabilized", np.float32),
    ),
)  # fmt: skip
@every
@given(data=st.data())
def test_solutions(solver, dtype, data):
    varied = data.draw(variations(data.draw(problems()), columns_too=solver != "ipot"))
    given = batch([v.problem for v in varied.values()], dtype)
    results = jax.tree.map(np.asarray, SOLVERS[solver](given))
    # The problems rounded to the solver's dtype, as the solver sees them.
    given = [Problem(*(np.float64(x[i]) for x in given)) for i in range(len(varied))]
    assert results.plan.dtype == dtype
    results = {name: jax.tree.map(lambda x, i=i: x[i].astype(np.float64), results) for i, name in enumerate(varied)}
    regs = {name: reached_reg(varied[name].problem, result, solver) for name, result in results.items()}
    largest = {name: exponents(varied[name].problem, result, regs[name]) for name, result in results.items()}
    eps = np.finfo(dtype).eps

    for (name, result), rounded in zip(results.items(), given, strict=True):
        check_evidence(rounded, result, eps)
        check_cost_is_as_good_as_entropy_allows(varied[name].problem, result, regs[name], eps * largest[name])

    original, (cost, a, b, *_) = results["original"], varied["original"].problem
    rounding = eps * ITERATIONS * max(largest.values())
    for name, (_, expected, shift) in varied.items():
        if expected is None:
            continue
        result = results[name]
        assert np.abs(result.plan - expected(original.plan)).sum() <= rounding * a.sum()
        if name == "shifted" and result.num_iters == original.num_iters:
            # Only sums f + g, since a constant can move between them; with IPOT it drifts by rounding.
            moved = (result.f - original.f - shift[0])[:, None] + (result.g - original.g - shift[1])
            assert np.abs(moved[np.ix_(a > 0, b > 0)]).max() <= rounding * regs[name]
    if np.ptp(cost) == 0:
        assert np.abs(original.plan - np.outer(a, b) / a.sum()).sum() <= rounding * a.sum()
    if solver != "ipot":
        # Sinkhorn's marginal error never grows, since errors after a step are averages of those before it. So with more
        # iterations than the threshold needed, it is still met.
        assert original.marginal_error <= results["stopped"].marginal_error + rounding * a.sum()


def check_evidence(problem, result, eps):
    """The result's errors, costs and status are true of its plan."""
    cost, a, b = problem[:3]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert result.status in (Status.CONVERGED, Status.LIMIT, Status.STALLED)
    # Exact sums of the plan and the weights as the solver sees them, so the upper bound needs no tolerance.
    error = math.fsum(
        abs(math.fsum([*line, -weight]))
        for lines, weights in ((result.plan, a), (result.plan.T, b))
        for line, weight in zip(lines, weights, strict=True)
    )
    assert error <= result.marginal_error
    # The reported error is rounded up by a few units in the last place of the mass.
    np.testing.assert_allclose(result.marginal_error, error, atol=16 * eps * problem.mass, rtol=24 * eps)
    value = np.sum(result.plan * cost)
    np.testing.assert_allclose(result.primal_cost, value, atol=16 * eps * problem.mass * problem.size)
    assert not result.plan[a == 0].any()
    assert not result.plan[:, b == 0].any()
    assert (result.status == Status.CONVERGED) == (result.marginal_error <= problem.threshold)
    if result.status == Status.LIMIT:
        assert result.num_iters == ITERATIONS


def check_cost_is_as_good_as_entropy_allows(problem, result, reg, exponent_rounding):
    """⟨T, C⟩ is within reg·log min(n, m) of the optimum between T's own marginals.

    This holds at any iteration: diag(u) K diag(v) is the entropic optimum between its own marginals. Its entropy
    exceeds that of the exact solution, which is a vertex, by at most log min(n, m) per unit of mass.
    """
    size = problem.size or 1.0
    rows, columns, mass = result.plan.sum(1), result.plan.sum(0), result.plan.sum()
    exact = size * mass * pot.emd2(rows / mass, columns / mass, problem.cost / size)
    excess = np.sum(result.plan * problem.cost) - exact
    # POT's network simplex ignores 1e-9 of the mass.
    tolerance = size * problem.mass * (4 * exponent_rounding + 1e-8)
    assert -tolerance <= excess <= reg * mass * np.log(min(problem.cost.shape)) + tolerance


# Gradients of ⟨T, C⟩ satisfy the identities that follow from scaling (C, reg), scaling (a, b), and shifting C.


def with_gradients(solver):
    def value(*arguments):
        result = solver(*arguments)
        return result.primal_cost, result

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True))


GRADIENTS = {
    "unroll": with_gradients(lambda cost, a, b, reg: sinkhorn(cost, a, b, reg=reg, num_iters=ITERATIONS)),
    "unroll log": with_gradients(
        lambda cost, a, b, reg: sinkhorn(cost, a, b, reg=reg, num_iters=ITERATIONS, method="log")
    ),
    "implicit": with_gradients(
        lambda cost, a, b, reg: sinkhorn(cost, a, b, reg=reg, num_iters=10 * ITERATIONS, grad="implicit")
    ),
    "ipot": with_gradients(lambda cost, a, b, reg: ipot(cost, a, b, beta=reg, num_iters=ITERATIONS)),
}


@pytest.mark.parametrize(
    ("grad", "dtype"),
    mostly_slow(
        [*product(GRADIENTS, [np.float64]), ("unroll", np.float32), ("implicit", np.float32)],
        ("implicit", np.float64),
    ),
)
@every
@given(problem=problems(shapes=SHAPES[-1:]))
def test_gradients(grad, dtype, problem):
    cost, a, b, reg = problem[:4]
    solution = jax.tree.map(np.float64, GRADIENTS[grad](*(np.asarray(x, dtype) for x in (cost, a, b, reg))))
    (value, result), (d_cost, d_a, d_b, d_reg) = solution
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solution))
    largest = exponents(problem, result, reg / ITERATIONS if grad == "ipot" else reg)
    # The rounding of the plan, times that of the tangents, which are as large as the exponents.
    rounding = np.finfo(dtype).eps * ITERATIONS * largest**2 * problem.mass
    assert abs(np.sum(d_cost * cost) + d_reg * reg - value) <= rounding * problem.size
    if grad == "implicit" and result.marginal_error > 1e-13 * problem.mass:
        return  # the other identities hold at the fixed point only
    assert abs(np.sum(d_a * a) + np.sum(d_b * b) - value) <= rounding * problem.size
    # Shifts of the columns, which are updated first, have no effect after one iteration; shifts of the rows have none
    # at the fixed point.
    if grad != "ipot":
        assert np.abs(d_cost.sum(0) - result.plan.sum(0)).max() <= rounding
    if grad in ("ipot", "implicit"):
        assert np.abs(d_cost.sum(1) - result.plan.sum(1)).max() <= rounding
