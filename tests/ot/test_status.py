"""The status is true of the returned plan, without tolerance: float32, hard problems, thresholds of all sizes."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, ipot, sinkhorn
from fs_jax.ot.testing import case
from tests.parameters import exact, mostly_slow

SHAPE = (9, 13)


def hard_problems(count):
    """Costs of many scales, rows far above the others, weights over six decades, reg down to 1e-3 of the cost."""
    rng = np.random.default_rng(1)
    cost = rng.uniform(0, 1, (count, *SHAPE)) * 10 ** rng.uniform(-2, 2, (count, 1, 1))
    cost[::3, 4] += 10 ** rng.uniform(0, 7, (len(cost[::3]), 1))
    a, b = (10 ** rng.uniform(-6, 0, (count, n)) for n in SHAPE)
    a, b = (w / w.sum(1, keepdims=True) for w in (a, b))
    reg = 10 ** rng.uniform(-3, 0, count) * np.median(cost, (1, 2))
    threshold = 10 ** rng.uniform(-7, -1, count)
    return [np.float32(x) for x in (cost, a, b, reg, threshold)]


def errors_of(plan, a, b):
    plan, a, b = (np.float64(x) for x in (plan, a, b))
    return np.abs(plan.sum(2) - a).sum(1) + np.abs(plan.sum(1) - b).sum(1)


@exact
@pytest.mark.parametrize("solver", mostly_slow(["stabilized", "log", "kernel", "ipot"], "stabilized", "ipot"))
def test_converged_means_that_the_plan_meets_the_threshold(solver):
    def solve(cost, a, b, reg, threshold):
        if solver == "ipot":
            return ipot(cost, a, b, beta=100 * reg, threshold=threshold, num_iters=300)
        return sinkhorn(cost, a, b, reg=reg, threshold=threshold, num_iters=1000, method=solver)

    # A batch so large that XLA on a CPU vectorises its maxima, which may then ignore NaN.
    cost, a, b, reg, threshold = hard_problems(600)
    result = jax.device_get(jax.jit(jax.vmap(solve))(cost, a, b, reg, threshold))
    status, finite = np.asarray(result.status), np.asarray(result.status) != Status.NOT_FINITE
    error = errors_of(result.plan, a, b)
    # Without tolerance: sums in float64 of the plan and the weights as they are.
    assert (error[finite] <= result.marginal_error[finite]).all()
    assert (error[status == Status.CONVERGED] <= threshold[status == Status.CONVERGED]).all()
    np.testing.assert_array_equal(result.converged, status == Status.CONVERGED)
    in_range = finite & (status != Status.OUT_OF_RANGE)
    if solver != "ipot":  # which also requires that little mass moves
        assert (result.marginal_error <= threshold)[in_range & ~result.converged].sum() == 0
    # If it stalls, the error is rounding only: a few units in the last place of a mass of one.
    assert (result.marginal_error[status == Status.STALLED] < 20 * np.finfo(np.float32).eps).all()
    assert (result.num_iters[status == Status.LIMIT] == (300 if solver == "ipot" else 1000)).all()
    if solver != "kernel":
        assert finite.all()
        # Not all can converge: thresholds of 1e-7 are below rounding, and slow problems reach num_iters.
        assert result.converged.sum() > 0.4 * len(cost)


@pytest.mark.parametrize("method", mostly_slow(["stabilized", "log"], "stabilized"))
def test_a_row_of_huge_costs_does_not_lose_accuracy(method):
    rng = np.random.default_rng(1)
    cost = np.float32(rng.uniform(0, 1, (13, 13)))
    cost[3] += np.float32(1e7)  # rounded to integers; the float64 problem below has the same integers
    result = sinkhorn(cost, reg=np.float32(0.1), num_iters=300, method=method)
    exact = sinkhorn(np.float64(cost), reg=np.float64(np.float32(0.1)), num_iters=300, method="log")
    assert result.marginal_error < 1e-6  # a few units in the last place of a mass of one
    np.testing.assert_allclose(result.plan, exact.plan, atol=1e-6)


@pytest.mark.parametrize("solver", [partial(sinkhorn, reg=0.1), partial(ipot, beta=0.1)], ids=["sinkhorn", "ipot"])
def test_a_constant_in_a_row_or_a_column_does_not_lose_accuracy(solver):
    cost = np.random.default_rng(0).integers(0, 1000, (8, 9)) * 2.0**-10
    costs = np.stack([cost, cost])
    costs[0, 3] += 2.0**20
    costs[1, :, 3] += 2.0**20
    costs = np.float32(costs)  # rounded to 1/16; the float64 problem below has the same numbers
    solve = jax.jit(jax.vmap(lambda cost: solver(cost, num_iters=23).plan))
    # Rounding of exponents of ten changes entries of up to 1/8 by 6e-7 relative, over 23 steps. A solver that loses
    # digits to the constants has errors of 0.05 here.
    np.testing.assert_allclose(solve(costs), solve(np.float64(costs)), atol=1e-6)


@pytest.mark.parametrize("solver", [partial(sinkhorn, reg=0.1), partial(ipot, beta=0.1)], ids=["sinkhorn", "ipot"])
def test_a_problem_with_nan_stops_at_the_first_check(solver):
    cost = np.random.default_rng(0).uniform(0, 1, (8, 9))
    batch = jax.jit(jax.vmap(lambda cost: solver(cost, num_iters=5000, threshold=1e-3)))
    result = batch(np.stack([cost, np.full_like(cost, np.nan)]))
    assert result.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE]
    assert result.num_iters[1] == 10


@pytest.mark.parametrize("method", mostly_slow(["stabilized", "log"], "stabilized"))
def test_a_threshold_below_rounding_stops_early_as_stalled(method):
    cost = np.float32(np.random.default_rng(0).uniform(0, 1, (20, 20)))
    result = sinkhorn(cost, reg=np.float32(0.1), num_iters=10_000, threshold=1e-12, method=method)
    assert result.status == Status.STALLED
    assert result.num_iters < 1000
    assert result.marginal_error < 1e-6


def test_slow_convergence_does_not_count_as_stalled():
    # At an error of 1e-5, ten iterations reduce it by a thousandth: far less than its rounding error.
    cost = np.float32(np.random.default_rng(0).uniform(0, 1, (60, 60)))
    solve = jax.jit(lambda threshold, init: sinkhorn(cost, reg=1e-3, num_iters=20_000, threshold=threshold, init=init))
    near = solve(1.2e-5, (jnp.zeros(60, jnp.float32), jnp.zeros(60, jnp.float32)))
    if near.converged:
        assert solve(0.9 * near.marginal_error, (near.f, near.g)).status in (Status.CONVERGED, Status.LIMIT)
    tight = solve(1e-12, (near.f, near.g))
    # If it stalls: a few units in the last place of a mass of one.
    assert tight.status == Status.LIMIT or tight.marginal_error < 20 * np.finfo(np.float32).eps


def test_ipot_does_not_converge_while_mass_moves():
    # After two exact steps the marginals are right, but the plan is far from optimal: the second step moved much mass.
    cost = np.random.default_rng(0).uniform(0, 1, (20, 20))
    result = ipot(cost, beta=0.3, num_iters=2, inner_iters=50, threshold=1e-2)
    assert result.marginal_error <= 1e-2
    assert result.status == Status.LIMIT


@pytest.mark.parametrize("method", mostly_slow(["stabilized", "log"], "stabilized"))
def test_constants_in_cost_and_init_do_not_lose_accuracy(method):
    cost = np.float32(np.random.default_rng(0).integers(0, 1000, (6, 7)) * 2.0**-10)

    def solve(cost, f=0.0):
        init = (jnp.full(6, f, jnp.float32), jnp.zeros(7, jnp.float32))
        return sinkhorn(cost, reg=np.float32(0.05), num_iters=2000, threshold=1e-5, init=init, method=method)

    # 2¹³ is added without rounding; the other start differs from the start at zero by a constant.
    plain, *others = solve(cost), solve(cost + np.float32(2.0**13)), solve(cost, 1e9)
    for other in others:
        assert other.converged
        # Rounding decides at which iteration each meets the threshold of 1e-5, and their plans differ by as much.
        np.testing.assert_allclose(other.plan, plain.plan, atol=2e-5)
    np.testing.assert_allclose(others[1].reg_cost, plain.reg_cost, rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "dtype"),
    mostly_slow(
        product(("sinkhorn", "ipot"), (jnp.float16, jnp.bfloat16)), ("sinkhorn", jnp.float16), ("ipot", jnp.bfloat16)
    ),
)
def test_marginal_error_in_half_precision_is_that_of_the_returned_plan(solver, dtype):
    cost = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (20, 20)), dtype)

    def solve(threshold):
        if solver == "ipot":
            return ipot(cost, beta=0.5, num_iters=2000, threshold=threshold)
        return sinkhorn(cost, reg=0.1, num_iters=2000, threshold=threshold)

    tight, loose = solve(1e-6), solve(0.05)
    assert tight.status == Status.STALLED
    assert tight.num_iters < 2000
    assert loose.converged
    for result in (tight, loose):
        error = errors_of(np.float32(result.plan)[None], np.full((1, 20), 0.05), np.full((1, 20), 0.05))
        # float32(1/20) differs from 1/20 by 7.5e-10, for each of forty weights.
        assert error <= np.float64(result.marginal_error) + 4e-8


def test_partial_underflow_of_the_kernel_is_out_of_range():
    # The entries of exp(-C / reg) that don't underflow contain no permutation: two rows have only the same column, so
    # scalings grow without bound.
    cost = np.float32([[0, 1.2, 1.2], [0, 1.2, 1.2], [0, 0, 0]])
    kernel = sinkhorn(cost, reg=np.float32(0.01), num_iters=2000, method="kernel", threshold=1e-3)
    assert kernel.status in (Status.OUT_OF_RANGE, Status.NOT_FINITE)
    assert sinkhorn(cost, reg=np.float32(0.01), num_iters=2000, threshold=1e-3).converged
    # Underflow without mass is harmless: the plan is diagonal.
    harmless = sinkhorn(np.float32(2 * (1 - np.eye(4))), reg=np.float32(0.01), method="kernel", threshold=1e-3)
    assert harmless.converged


def test_underflow_of_the_plans_product_is_out_of_range():
    problem = case(9529)  # an entry of K is 5e-38, and 0 after its row's scaling of 0.03; its mass is 4e-4
    cost, a, b, reg = (jnp.asarray(x, jnp.float32) for x in (problem.cost, problem.a, problem.b, problem.reg))
    options = {"reg": reg, "num_iters": 1000, "threshold": 1e-3 * a.sum()}
    assert sinkhorn(cost, a, b, **options, method="kernel").status == Status.OUT_OF_RANGE
    assert sinkhorn(cost, a, b, **options).converged


@pytest.mark.usefixtures("standard_promotion")
def test_wrong_plans_of_an_underflowed_kernel_are_reported():
    rng = np.random.default_rng(0)
    cost = rng.uniform(0, 1, (300, 6, 8)) * rng.uniform(20, 160, (300, 1, 1))
    solve = jax.jit(jax.vmap(lambda c, method="kernel": sinkhorn(c, reg=1.0, num_iters=200, method=method)))
    got, exact = solve(jnp.float32(cost)), jax.vmap(lambda c: sinkhorn(c, reg=1.0, num_iters=200, method="log"))(cost)
    reported = np.isin(got.status, (Status.OUT_OF_RANGE, Status.NOT_FINITE))
    wrong = ~(np.abs(got.plan - exact.plan).max((1, 2)) < 1e-3)
    assert wrong.sum() > 10  # some of these problems underflow
    assert reported[wrong].all()


SOLVERS = {"sinkhorn": partial(sinkhorn, reg=0.1), "ipot": partial(ipot, beta=1.0)}


@pytest.mark.parametrize("solver", mostly_slow(SOLVERS, "sinkhorn"))
def test_masks_are_weights(solver):
    solver = SOLVERS[solver]
    cost = np.random.default_rng(0).uniform(0, 1, (4, 5))
    rows, columns = np.array([True, False, True, True]), np.array([True, True, False, True, False])
    got = solver(cost, rows, columns)
    expected = solver(cost, rows / 3, columns / 3)
    np.testing.assert_allclose(got.plan, expected.plan, atol=1e-15)
    traced = jax.jit(solver)(cost, rows, columns)
    np.testing.assert_allclose(traced.plan, expected.plan, atol=1e-15)
    with pytest.raises(ValueError, match="a: expected at least one positive weight, got zeros only"):
        solver(cost, np.zeros(4, bool))


@pytest.mark.parametrize("solver", mostly_slow(SOLVERS, "ipot"))
def test_empty_sets_under_jit(solver):
    solver = SOLVERS[solver]
    cost = np.random.default_rng(0).uniform(0, 1, (4, 5))
    solve = jax.jit(
        lambda a, b: jax.value_and_grad(lambda c: solver(c, a, b, threshold=1e-3, num_iters=20).primal_cost)(cost)
    )
    result = jax.jit(lambda a, b: solver(cost, a, b, threshold=1e-3, num_iters=20))
    nothing, uniform = np.zeros(4), np.full(5, 0.2)
    # If both sides have no mass, the plan of zeros is feasible; if one side has mass, no plan is.
    for b, error in ((np.zeros(5), 0), (uniform, 1)):
        value, gradient = solve(nothing, b)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
        got = result(nothing, b)
        np.testing.assert_array_equal(got.plan, 0)
        assert got.converged == (error == 0)
        np.testing.assert_allclose(got.marginal_error, error, atol=1e-12)
        assert got.status == (Status.LIMIT if error else Status.CONVERGED)
        assert got.converged or got.num_iters == 20
