"""Relaxed marginals: plans equal POT's and ott-jax's, the gap is a bound, derivatives equal finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.sinkhorn import Sinkhorn

from fs_jax.ot import Status, sinkhorn, unbalanced_sinkhorn
from tests.parameters import mostly_slow

RHOS = [(1.0, 1.0), (0.3, 20.0), (1e4, 1e4), (np.inf, 0.5), (2.0, np.inf)]


@pytest.fixture(scope="module")
def unequal():
    """A cost [6, 9] and weights of different mass."""
    rng = np.random.default_rng(0)
    return rng.uniform(0, 2, (6, 9)), rng.uniform(0.5, 1.5, 6), rng.uniform(0.2, 0.6, 9)


@partial(jax.jit, static_argnames=("num_iters", "grad"))
def solve(cost, a, b, reg=0.1, rho=1.0, *, num_iters=2000, threshold=1e-12, grad="implicit", init=None):
    return unbalanced_sinkhorn(
        cost, a, b, reg=reg, rho=rho, num_iters=num_iters, threshold=threshold, grad=grad, init=init
    )


def kl(x, y):
    return np.sum(np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / np.where(y > 0, y, 1)), 0) - x + y)


def primal(plan, cost, a, b, reg, rho):
    """The objective in NumPy, without terms of infinite ρ."""
    plan, prices = np.asarray(plan, np.float64), np.broadcast_to(rho, 2)
    marginals = zip(prices, (plan.sum(1), plan.sum(0)), (a, b), strict=True)
    penalty = sum(price * kl(x, w) for price, x, w in marginals if np.isfinite(price))
    return np.sum(plan * cost) + reg * kl(plan, np.outer(a, b)) + penalty


@pytest.mark.parametrize("rho", mostly_slow([0.05, 1.0, 30.0], 1.0))
def test_plan_equals_pots(unequal, rho):
    theirs = pot.unbalanced.sinkhorn_unbalanced(
        unequal[1], unequal[2], unequal[0], 0.1, rho, reg_type="kl", numItermax=20000, stopThr=1e-15
    )
    result = solve(*unequal, rho=rho, threshold=1e-16)
    # With a gap of 1e-16, the plan's error is at most sqrt(2 gap mass / reg), here 1e-7.
    np.testing.assert_allclose(result.plan, theirs, atol=1e-7)


@pytest.mark.usefixtures("standard_promotion")
def test_plan_equals_ott_jaxs(unequal):
    cost, a, b = unequal
    # Their entropic term is KL(T | 1 1ᵀ); with the logarithms of the weights in the cost, it is KL(T | a bᵀ).
    shifted = jnp.asarray(cost - 0.1 * (np.log(a)[:, None] + np.log(b)[None, :]))
    tau = 1.0 / (1.0 + 0.1)
    theirs = Sinkhorn(threshold=1e-10, max_iterations=5000)(
        LinearProblem(Geometry(cost_matrix=shifted, epsilon=0.1), a=jnp.asarray(a), b=jnp.asarray(b),
                      tau_a=tau, tau_b=tau)
    )  # fmt: skip
    # Their threshold is a relative change of a potential: about 1e-8 of the plan here.
    np.testing.assert_allclose(solve(*unequal, threshold=1e-16).plan, theirs.matrix, atol=1e-7)


@pytest.mark.parametrize("rho", mostly_slow([(rho,) for rho in RHOS], ((1e4, 1e4),), ((np.inf, 0.5),)))
@pytest.mark.parametrize("num_iters", mostly_slow([10, 30], 10))
def test_reg_cost_is_the_minimum_up_to_the_gap(unequal, rho, num_iters):
    early = solve(*unequal, 0.02, rho, num_iters=num_iters, threshold=None)
    solved = solve(*unequal, 0.02, rho, num_iters=20000, threshold=1e-10)
    assert solved.status == Status.CONVERGED
    assert abs(early.reg_cost - solved.reg_cost) <= early.gap + solved.gap
    assert 0.02 * kl(np.asarray(solved.plan), np.asarray(early.plan)) <= early.gap + solved.gap


def test_gap_is_the_difference_of_the_objectives_for_small_rho(unequal):
    result = solve(*unequal, num_iters=10, threshold=None)
    gap = primal(result.plan, *unequal, 0.1, 1.0) - result.reg_cost
    assert gap > 1e-6
    # Rounded up by 1e-5, and by the rounding error of marginals of this size: 1e-15 over gaps of 1e-3.
    assert gap <= result.gap <= 1.001 * gap


def random_problems():
    """Two families, 60 each: all scales; and small reg, with one marginal cheap, the other hard, and uneven weights."""
    rng = np.random.default_rng(0)
    for number in range(120):
        if number % 2:
            scale, masses = 10 ** rng.uniform(-3, 5), 10 ** rng.uniform(-2, 2, 2)
            cost = scale * (rng.uniform(size=(5, 7)) + rng.choice([0, 1e3]) * rng.uniform(size=(5, 1)))
            a, b = (
                rng.uniform(0.1, 1, n) * (rng.uniform(size=n) > 0.2) * m for n, m in zip((5, 7), masses, strict=True)
            )
            a[0], b[0] = masses
            reg, rho = scale * 10 ** rng.uniform(-3, 1), scale * 10 ** rng.uniform(-3, 6, 2)
        else:
            scale, cost = 1.0, rng.uniform(size=(5, 7)) * np.where(rng.uniform(size=(5, 7)) < 0.3, 0.1, 1)
            a, b = 10 ** rng.uniform(-4, 0, 5), 10 ** rng.uniform(-4, 0, 7)
            reg = 10 ** rng.uniform(-3.3, -2)
            rho = rng.permutation([rng.choice([np.inf, 1e5, 1.0]), reg * 10 ** rng.uniform(-0.7, 0.3)])
        yield cost, a, b, reg, rho, scale * min(a.sum(), b.sum()) * 1e-2


@pytest.mark.parametrize(
    ("dtype", "num_iters"),
    mostly_slow([(np.float32, 1), (np.float32, 1000), (np.float64, 1000)], (np.float32, 1)),
)
def test_converged_is_never_wrong(dtype, num_iters):
    """The gap bounds the distance to the optimum, which is computed in float64."""
    batch = [np.asarray(np.stack(x), dtype) for x in zip(*random_problems(), strict=True)]

    @partial(jax.jit, static_argnums=0)
    def many(num_iters, *batch):
        def one(cost, a, b, reg, rho, threshold):
            options = {"reg": reg, "rho": (rho[0], rho[1]), "num_iters": num_iters, "threshold": threshold}
            return unbalanced_sinkhorn(cost, a, b, **options, grad="none")

        return jax.vmap(one)(*batch)

    got = jax.tree.map(np.asarray, many(num_iters, *batch))
    *problems, thresholds = (jnp.asarray(x, jnp.float64) for x in batch)
    exact = jax.tree.map(np.asarray, many(1000, *problems, 1e-6 * thresholds))
    # Some thresholds are below the rounding of float32, others are not met in so few iterations.
    assert np.mean(got.status == Status.CONVERGED) > (0.6 if num_iters > 1 else 0.1)
    assert not np.any(got.status == Status.NOT_FINITE)
    difference = np.abs(exact.reg_cost - got.reg_cost.astype(np.float64))
    assert np.all(difference <= got.gap + exact.gap)
    assert not np.any((difference > np.asarray(thresholds) + exact.gap) & (got.status == Status.CONVERGED))


@pytest.mark.slow
def test_target_marginal_that_underflows_counts():
    """In float32 a exp(-F reg / rho) is zero here, while the plan has mass."""
    cost = np.array([[0.0, 1.0], [1.0, 1.0]], np.float32)
    for scale in (0.2, 0.3, 1.0):
        early = solve(scale * cost, np.float32([0.9, 0.1]), np.ones(2, np.float32), 0.002, (np.inf, 0.002), num_iters=1)
        exact = solve(scale * cost.astype(float), np.array([0.9, 0.1]), np.ones(2), 0.002, (np.inf, 0.002))
        assert float(early.reg_cost) + float(early.gap) >= exact.reg_cost * (1 - 1e-6)  # float32's rounding


@pytest.mark.parametrize("rho", mostly_slow([np.inf, 100.0, 1.0], 100.0))
def test_start_far_from_the_solution_costs_no_digits(unequal, rho):
    cost, a = unequal[0].astype(np.float32), np.full(6, 1 / 6, np.float32)
    b = np.full(9, 1 / 9, np.float32)
    expected = solve(cost, a, b, rho=rho, threshold=1e-4).reg_cost
    for start in (np.full(6, 1e8), np.full(6, -1e8), np.where(np.arange(6) == 2, 1e6, 0)):
        result = solve(cost, a, b, rho=rho, threshold=1e-4, init=(start.astype(np.float32), np.zeros(9, np.float32)))
        assert result.converged
        np.testing.assert_allclose(result.reg_cost, expected, atol=2e-4)  # two gaps


def test_masses_that_differ_have_no_plan_between_hard_marginals(problem):
    cost, a, b = problem
    almost = solve(cost, a, b * (1 + 5e-4), rho=np.inf, threshold=1e-4)
    assert almost.gap == np.inf
    assert not almost.converged


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [None, 1e-10])
def test_infinite_rho_equals_sinkhorn(problem, threshold):
    ours = solve(*problem, rho=np.inf, threshold=threshold)
    balanced = sinkhorn(*problem, reg=0.1, num_iters=2000, threshold=1e-10)
    np.testing.assert_allclose(ours.plan, balanced.plan, atol=1e-8)  # the marginal error of either
    np.testing.assert_allclose(ours.reg_cost, balanced.reg_cost, rtol=1e-9)
    near = solve(*problem, rho=1e9, threshold=threshold)
    np.testing.assert_allclose(near.plan, balanced.plan, atol=1e-8)

    def cost_of(solver, cost, a):
        return solver(cost, a / a.sum(), problem[2]).primal_cost

    gradients = jax.grad(partial(cost_of, partial(solve, rho=np.inf)), (0, 1))(*problem[:2])
    expected = jax.grad(
        partial(cost_of, partial(sinkhorn, reg=0.1, num_iters=2000, threshold=1e-10, grad="implicit")), (0, 1)
    )(*problem[:2])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-7), gradients, expected)


def test_convergence_does_not_slow_down_as_rho_grows(problem):
    cost, a, b = problem
    balanced = solve(cost, a, b, 0.05, np.inf, threshold=1e-9).num_iters
    for rho in (10.0, 1e3, 1e5):
        result = solve(cost, a, 2 * b, 0.05, rho, threshold=1e-9)
        assert result.converged
        assert result.num_iters <= 2 * balanced


@pytest.mark.slow
def test_semi_relaxed_transport_meets_one_marginal(unequal):
    cost, a, b = unequal
    result = solve(cost, a, b, rho=(np.inf, 1.0))
    np.testing.assert_allclose(result.plan.sum(1), a, rtol=1e-6)  # the square root of the gap of 1e-12
    assert abs(result.plan.sum(0) - b).sum() > 1
    turned = solve(cost.T, b, a, rho=(1.0, np.inf))
    np.testing.assert_allclose(turned.plan.T, result.plan, atol=1e-6)


@pytest.mark.slow
def test_points_without_mass_are_excluded(unequal):
    cost, a, b = unequal
    padded = np.full((8, 10), 1e6), np.zeros(8), np.zeros(10)
    padded[0][:6, :9], padded[1][:6], padded[2][:9] = cost, a, b
    alone, result = solve(cost, a, b), solve(*padded)
    np.testing.assert_allclose(result.plan[:6, :9], alone.plan, rtol=1e-10)  # the same sums with added zeros
    assert np.all(np.delete(result.plan, range(6), 0) == 0)
    for name in ("reg_cost", "gap", "f"):
        got, expected = getattr(result, name), getattr(alone, name)
        np.testing.assert_allclose(got[:6] if name == "f" else got, expected, rtol=1e-9, atol=1e-15)
    gradient = jax.grad(lambda c: solve(c, *padded[1:]).primal_cost)(padded[0])
    assert np.all(gradient[6:] == 0)
    assert np.all(np.isfinite(gradient))


def arguments_of(unequal):
    cost, a, b = unequal
    return {"cost": jnp.asarray(cost), "a": a, "b": b, "reg": 0.1, "rho": (jnp.asarray(0.7), jnp.asarray(4.0))}


@pytest.mark.parametrize("grad", mostly_slow(["implicit", "envelope"], "implicit"))
def test_derivatives_equal_finite_differences(unequal, grad):
    """With respect to every argument, along random directions, by central differences."""

    def value(arguments):
        result = solve(**arguments, grad=grad, threshold=None)
        weights = jnp.cos(jnp.arange(54)).reshape(6, 9)  # a function of the plan other than the costs
        return result.reg_cost + (jnp.sum(weights * result.plan) + result.f[2] if grad == "implicit" else 0)

    arguments = arguments_of(unequal)
    gradient = jax.jit(jax.grad(value))(arguments)
    rng = np.random.default_rng(1)
    for name in arguments:
        direction = jax.tree.map(jnp.zeros_like, arguments)
        direction[name] = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), arguments[name])

        before, after = (value(jax.tree.map(lambda x, d, h=h: x + h * d, arguments, direction)) for h in (-1e-4, 1e-4))
        expected = (after - before) / 2e-4
        pairs = zip(jax.tree.leaves(gradient[name]), jax.tree.leaves(direction[name]), strict=True)
        got = sum(np.sum(np.asarray(slope) * step) for slope, step in pairs)
        # Differences have errors of h² = 1e-8 times a third derivative of size reg^-2 = 100.
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_second_derivatives_equal_differences_of_the_gradient(unequal):
    arguments = arguments_of(unequal)

    def value(t):
        changed = {"cost": arguments["cost"] + t * jnp.cos(arguments["cost"]), "rho": (0.7 + t, 4.0 - t)}
        result = solve(**arguments | changed, threshold=None)
        return jnp.sum(jnp.sin(7 * result.plan))

    first = jax.jit(jax.grad(value))
    expected = (first(1e-3) - first(-1e-3)) / 2e-3  # the gradient's own error is some 1e-8
    for outer in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(jax.jit(outer(jax.grad(value)))(0.0), expected, rtol=1e-4)  # of the order of step²


@pytest.mark.slow
def test_gradient_at_infinite_rho_is_zero(problem):
    gradient = jax.grad(lambda rho: solve(*problem, rho=rho).reg_cost)(jnp.inf)
    assert gradient == 0


def test_second_derivatives_of_envelope_raise(unequal):
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(jax.grad(lambda rho: solve(*unequal, rho=rho, grad="envelope").reg_cost))(1.0)


@pytest.mark.slow
def test_each_problem_of_a_batch_stops_by_its_own_gap(unequal):
    rhos = jnp.array([0.1, 1.0, 100.0, 1e5])
    batch = jax.vmap(lambda rho: solve(*unequal, 0.02, rho, threshold=1e-9))(rhos)
    for i, rho in enumerate(rhos):
        alone = solve(*unequal, 0.02, rho, threshold=1e-9)
        assert batch.num_iters[i] == alone.num_iters
        np.testing.assert_allclose(batch.plan[i], alone.plan, rtol=1e-7)  # the same sums in another program
    assert np.all(batch.converged)
    assert len(set(batch.num_iters.tolist())) > 1


def test_init_from_a_similar_problem_saves_iterations(unequal):
    cost, a, b = unequal
    first = solve(cost, a, b, 0.02, 5.0, threshold=1e-8)
    cold = solve(cost + 1e-4, a, b, 0.02, 5.0, threshold=1e-8)
    warm = solve(cost + 1e-4, a, b, 0.02, 5.0, threshold=1e-8, init=(first.f, first.g))
    assert warm.num_iters < cold.num_iters


def test_status_says_why_the_solver_stopped(unequal):
    few = solve(*unequal, 0.002, num_iters=5)
    assert (few.status, few.num_iters) == (Status.LIMIT, 5)
    single = [x.astype(np.float32) for x in unequal]
    assert solve(*single, 0.1, 1.0, threshold=1e-12).status == Status.STALLED
    nothing = np.where(np.arange(6) == 2, np.nan, unequal[1])
    assert solve(unequal[0], nothing, unequal[2]).status == Status.NOT_FINITE
    assert solve(*unequal, rho=-1.0).status == Status.NOT_FINITE  # under jit, where it can't be checked
    unequal_masses = solve(*unequal, rho=np.inf)  # no plan has both marginals
    assert not unequal_masses.converged
    assert unequal_masses.gap == np.inf


@pytest.mark.parametrize("grad", ["implicit", "envelope"])
def test_gradients_are_finite_if_one_side_has_no_mass(unequal, grad):
    """In float32, where potentials of 1e30 overflow in products. No mass is moved, and the objective is ρ|a|."""
    cost, a, _ = (jnp.asarray(x, jnp.float32) for x in unequal)

    def value(a, b, rho):
        return solve(cost, a, b, rho=rho, num_iters=100, threshold=None, grad=grad).reg_cost

    value, (by_a, by_b, by_rho) = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(
        a, jnp.zeros(9, jnp.float32), jnp.float32(0.7)
    )
    np.testing.assert_allclose((value, by_rho), (0.7 * a.sum(), a.sum()), rtol=1e-6)
    np.testing.assert_allclose(by_a, 0.7, rtol=1e-6)
    assert np.isfinite(by_b).all()


def test_rho_has_the_precision_of_the_problem(unequal):
    results = [solve(*unequal, rho=rho) for rho in (0.1, np.float64(0.1))]
    assert results[0].reg_cost == results[1].reg_cost


@pytest.mark.parametrize("dtype", mostly_slow([jnp.float16, jnp.bfloat16], jnp.bfloat16))
def test_the_gap_includes_the_rounding_of_the_result(unequal, dtype):
    half = [jnp.asarray(x, dtype) for x in unequal]
    result, exact = solve(*half, threshold=1e-4), solve(*(x.astype(jnp.float64) for x in half))
    assert abs(float(result.reg_cost) - exact.reg_cost) <= float(result.gap) + float(exact.gap)
    assert result.status == Status.STALLED  # no iterations can make the rounded objective better


@pytest.mark.parametrize("dtype", mostly_slow([jnp.float16, jnp.bfloat16]))
def test_half_precision_is_computed_in_float32(unequal, dtype):
    half = [jnp.asarray(x, dtype) for x in unequal]
    result = solve(*half, threshold=0.1)  # above the rounding of the objective, about 8
    assert result.plan.dtype == dtype
    assert result.converged
    expected = solve(*(x.astype(jnp.float32) for x in half), threshold=0.1)
    np.testing.assert_allclose(result.plan, expected.plan.astype(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0.0}, "rho: expected a number above 0, got 0.0"),
        ({"rho": (1.0, -2.0)}, r"rho\[1\]: expected a number above 0, got -2.0"),
        ({"rho": (1.0, 2.0, 3.0)}, r"rho: expected a number, or a pair \(rows, columns\) of numbers; got 3 numbers"),
        ({"rho": "1"}, "rho: expected numbers, got str"),
        ({"rho": np.ones(2)}, r"rho: expected a number, or a pair \(rows, columns\) of numbers; got an array of shape"),
        ({"rho": np.inf}, "b: expected the total mass of a"),
        ({"grad": "unroll"}, "grad: expected one of 'implicit', 'envelope', 'none', got 'unroll'"),
        ({"tau_a": 0.9}, r"tau_a, which is called rho \(tau is rho / \(rho \+ reg\)\) here"),
        ({"reg_m": 0.9}, "reg_m, which is called rho here"),
    ],
)
def test_invalid_arguments_raise(unequal, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        unbalanced_sinkhorn(*unequal, **{"reg": 0.1, "rho": 1.0} | change)
