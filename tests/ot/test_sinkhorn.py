from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation
from ott.solvers.linear import sinkhorn as ott_sinkhorn
from scipy.optimize import linear_sum_assignment

from fs_jax.ot import Status, _iterations, sinkhorn, sqeuclidean_cost
from tests.parameters import mostly_slow

METHODS = ("kernel", "log", "stabilized")


def ott(cost, a, b, reg, iterations, implicit=False):
    """ott-jax's result after exactly this many iterations.

    It uses an unreachable threshold: with min_iterations = max_iterations, the backward pass of ott-jax 0.6 goes
    through the wrong iterations, and its gradient is not that of its value.
    """
    solver = ott_sinkhorn.Sinkhorn(
        min_iterations=0,
        max_iterations=iterations,
        inner_iterations=1,
        threshold=-1.0,
        implicit_diff=implicit_differentiation.ImplicitDiff() if implicit else None,
    )
    return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=reg), a, b))


def functionals(result, seed=0):
    """A number that depends on all outputs with a derivative: the plan, both costs, both potentials."""
    rng = np.random.default_rng(seed)
    n, m = result.plan.shape
    f, g = rng.normal(size=n), rng.normal(size=m)
    # A constant can move between f and g: only sums that don't depend on it can be compared between solvers.
    f, g = f - (f.sum() - g.sum()) / n, g
    plan = jnp.sum(rng.normal(size=(n, m)) * result.plan)
    return plan + result.primal_cost + 2 * result.reg_cost + f @ result.f + g @ result.g


@pytest.mark.parametrize("method", mostly_slow(METHODS, "stabilized"))
@pytest.mark.usefixtures("standard_promotion")
def test_every_iteration_equals_ott_jaxs(problem, method):
    cost, a, b = problem
    theirs = ott_sinkhorn.Sinkhorn(inner_iterations=1, max_iterations=20)
    prob = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=jnp.asarray(cost), epsilon=0.1), a, b)
    step = jax.jit(lambda state, i: theirs.one_iteration(prob, state, i, compute_error=False))
    state = theirs.init_state(prob, (jnp.zeros_like(a), jnp.zeros_like(b)))
    options = _iterations.Options(20, method, False, "float64")
    iterations = jax.jit(_iterations.make_iterations(options, True))
    _, runs, _ = iterations(jnp.asarray(-cost / 0.1), a, b, jnp.zeros_like(a), None)
    u, v = (x if method == "log" else jnp.log(x) for x in (runs.u[:, 1:], runs.v))
    phi, gamma = (runs.f[:, None] + u).reshape(20, -1), (runs.g[:, None] + v).reshape(20, -1)
    solve = jax.jit(sinkhorn, static_argnames=("num_iters", "method"))
    for i in range(20):
        state = step(state, i)
        # Float64, and exponents of at most 2 / 0.1: rounding is amplified at most 20 times.
        np.testing.assert_allclose(0.1 * phi[i], state.fu, atol=1e-13)
        np.testing.assert_allclose(0.1 * gamma[i], state.gv, atol=1e-13)
        if i + 1 in (1, 11, 20):
            ours = solve(cost, a, b, reg=0.1, num_iters=i + 1, method=method)
            np.testing.assert_allclose(ours.plan, np.exp((state.fu[:, None] + state.gv - cost) / 0.1), atol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
def test_costs_equal_ott_jaxs(problem):
    ours = sinkhorn(*problem, reg=0.1, num_iters=3)
    theirs = jax.jit(lambda *p: ott(*p, 0.1, 3))(*problem)
    np.testing.assert_allclose(ours.primal_cost, theirs.primal_cost, rtol=1e-13)  # the same sums
    np.testing.assert_allclose(ours.reg_cost, theirs.reg_ot_cost, rtol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_plan_is_that_of_the_potentials(problem, method):
    cost, a, b = problem
    result = sinkhorn(cost, a, b, reg=0.2, num_iters=200, method=method)
    np.testing.assert_allclose(result.plan, np.exp((result.f[:, None] + result.g[None] - cost) / 0.2), rtol=1e-13)
    # 200 iterations at reg = 0.2 contract the error below rounding.
    np.testing.assert_allclose(result.plan.sum(1), a, atol=1e-14)
    np.testing.assert_allclose(result.plan.sum(0), b, atol=1e-14)
    assert result.marginal_error < 1e-14
    entropic = result.primal_cost + 0.2 * np.sum(result.plan * np.log(result.plan / np.outer(a, b)))
    np.testing.assert_allclose(result.reg_cost, entropic, rtol=1e-13)


def test_small_reg_gives_the_assignment(make_problem):
    cost = make_problem(8, 8, seed=3)[0]
    exact = cost[linear_sum_assignment(cost)].mean()
    result = sinkhorn(cost, reg=1e-3, num_iters=3000, method="log")
    # The marginal error is about 1e-6, and an entropic plan costs at most reg·log n more than the optimum.
    np.testing.assert_allclose(result.primal_cost, exact, atol=1e-3 * np.log(8))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", [None, 1e-3])
def test_vmap_equals_a_loop(make_problem, method, threshold):
    problems = [make_problem(5, 4, seed=i) for i in range(4)]
    scales = np.array([0.1, 0.5, 1.0, 2.0])  # so that they need different numbers of iterations

    def solve(cost, a, b):
        return sinkhorn(cost, a, b, reg=0.1, num_iters=200, threshold=threshold, method=method)

    batch = tuple(
        map(np.stack, zip(*[(s * c, a, b) for s, (c, a, b) in zip(scales, problems, strict=True)], strict=True))
    )
    results = jax.jit(jax.vmap(solve))(*batch)
    gradients = jax.jit(jax.vmap(jax.grad(lambda *p: functionals(solve(*p)), argnums=(0, 1, 2))))(*batch)
    gradient = jax.jit(jax.grad(lambda *p: functionals(solve(*p)), argnums=(0, 1, 2)))
    one_by_one = [tuple(side[i] for side in batch) for i in range(4)]
    loop = [(solve(*one), gradient(*one)) for one in one_by_one]
    loop_results, loop_gradients = jax.tree.map(lambda *x: np.stack(x), *loop)
    # Two programs for the same sums: rounding, amplified 20 times by the exponents and by the sums of 200 iterations.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12), results, loop_results)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9), gradients, loop_gradients)
    if threshold is not None:
        assert len(set(results.num_iters.tolist())) == 4
        assert set(results.status.tolist()) == {Status.CONVERGED}


@pytest.mark.parametrize("method", mostly_slow(METHODS, "stabilized"))
def test_threshold_stops_at_the_first_iteration_that_meets_it(problem, method):
    result = jax.jit(lambda *p: sinkhorn(*p, reg=0.2, threshold=1e-4, method=method))(*problem)
    assert result.status == Status.CONVERGED
    assert result.marginal_error <= 1e-4
    exact = sinkhorn(*problem, reg=0.2, num_iters=int(result.num_iters), method=method)
    np.testing.assert_allclose(result.plan, exact.plan, atol=1e-15)  # the same iterations
    assert exact.status == Status.LIMIT
    assert sinkhorn(*problem, reg=0.2, num_iters=int(result.num_iters) - 1, method=method).marginal_error > 1e-4


def test_threshold_that_is_not_met(problem):
    result = sinkhorn(*problem, reg=0.01, num_iters=5, threshold=1e-9)
    assert result.status == Status.LIMIT
    assert result.num_iters == 5


@pytest.mark.slow
@pytest.mark.parametrize(("method", "threshold"), list(product(METHODS, (None, 0.05))))
def test_unrolled_derivatives(problem, method, threshold):
    def value(cost, a, b, reg):
        return functionals(sinkhorn(cost, a, b, reg=reg, num_iters=6, threshold=threshold, method=method))

    # Against finite differences in float64; check_grads's own tolerance there is 1e-5 (second order: 1e-3).
    check_grads(jax.jit(value), (*problem, 0.3), order=1, modes=["fwd", "rev"], eps=1e-5, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("method", "num_iters"), [
    ("stabilized", 3), *mostly_slow(product(METHODS, (1, 9, 10, 12)))
])  # fmt: skip
def test_a_threshold_that_is_not_met_changes_no_derivative(problem, method, num_iters):
    """Runs of fewer than ten iterations too: the last iteration was once left out of the derivative."""

    @partial(jax.jit, static_argnums=0)
    def derivatives(threshold):
        def value(cost):
            result = sinkhorn(cost, *problem[1:], reg=0.05, num_iters=num_iters, threshold=threshold, method=method)
            return functionals(result)

        direction = np.random.default_rng(1).normal(size=problem[0].shape)
        return jax.grad(value)(problem[0]), jax.jvp(value, (problem[0],), (direction,))[1]

    for with_threshold, without in zip(derivatives(1e-30), derivatives(None), strict=True):
        np.testing.assert_allclose(with_threshold, without, rtol=1e-9, atol=1e-12)  # two programs in float64


@pytest.mark.usefixtures("standard_promotion")
def test_unrolled_gradient_equals_autodiff_of_ott_jax(problem):
    def theirs(cost):
        return ott(cost, *problem[1:], 0.1, 10).primal_cost

    ours = jax.jit(jax.grad(lambda cost: sinkhorn(cost, *problem[1:], reg=0.1, num_iters=10).primal_cost))(problem[0])
    np.testing.assert_allclose(ours, jax.jit(jax.grad(theirs))(problem[0]), atol=1e-13)  # float64, ten iterations


@pytest.mark.slow
def test_implicit_derivatives(problem):
    def value(cost, a, b, reg, grad="implicit"):
        # A fixed point exists only for equal masses, so the weights are normalised here.
        result = sinkhorn(cost, a / a.sum(), b / b.sum(), reg=reg, num_iters=300, grad=grad)
        return functionals(result)

    arguments = (*problem, 0.2)
    check_grads(jax.jit(value), arguments, order=1, modes=["fwd", "rev"], eps=1e-5, atol=1e-6, rtol=1e-6)
    # 300 iterations converge up to rounding. Both derivatives are then the same number.
    unrolled = jax.jit(jax.grad(lambda *x: value(*x, grad="unroll"), (0, 1, 2, 3)))(*arguments)
    implicit = jax.jit(jax.grad(value, (0, 1, 2, 3)))(*arguments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), implicit, unrolled)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_implicit_gradient_equals_ott_jaxs(problem):
    theirs = jax.grad(lambda cost: ott(cost, *problem[1:], 0.2, 300, implicit=True).primal_cost)(problem[0])
    ours = jax.grad(lambda cost: sinkhorn(cost, *problem[1:], reg=0.2, num_iters=300, grad="implicit").primal_cost)
    np.testing.assert_allclose(ours(problem[0]), theirs, atol=1e-6)  # the tolerance of its conjugate gradients


@pytest.mark.slow
def test_implicit_gradient_of_a_batch(problem):
    def value(cost):
        return sinkhorn(cost, reg=0.3, num_iters=200, grad="implicit").primal_cost

    costs = np.stack([problem[0], problem[0][::-1]])
    batch = jax.jit(jax.vmap(jax.grad(value)))(costs)
    gradient_of_one = jax.jit(jax.grad(value))
    for cost, gradient in zip(costs, batch, strict=True):
        np.testing.assert_allclose(gradient_of_one(cost), gradient, atol=1e-12)


def test_envelope_and_none(problem):
    def solve(cost, a, b, reg, grad):
        return sinkhorn(cost, a / a.sum(), b / b.sum(), reg=reg, num_iters=400, grad=grad)

    def gradients(value, grad):
        return jax.jit(jax.grad(lambda *x: value(solve(*x, grad)), (0, 1, 2, 3)))(*problem, 0.2)

    plan = solve(*problem, 0.2, "none").plan
    gradient = gradients(lambda result: result.primal_cost, "envelope")
    np.testing.assert_allclose(gradient[0], plan, atol=1e-15)  # two programs
    for other in gradient[1:]:
        np.testing.assert_array_equal(other, 0)
    # Danskin's theorem: at the fixed point, the derivative of the regularised cost is that at fixed potentials.
    exact, envelope = (gradients(lambda result: result.reg_cost, grad) for grad in ("unroll", "envelope"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), envelope, exact)
    nothing = gradients(functionals, "none")
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), nothing)
    fixed = gradients(lambda result: jnp.sum(result.plan**2), "envelope")
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), fixed)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "grad"), list(product(METHODS, ("unroll", "implicit"))))
def test_zero_weights_exclude_points(make_problem, method, grad):
    cost, a, b = make_problem(5, 4)
    kept = np.ix_([0, 1, 3, 5, 6], [1, 2, 3, 4])  # of a larger problem with arbitrary other costs
    large = np.full((7, 5), 1.7)
    large[kept] = cost
    large_a, large_b = np.zeros(7), np.zeros(5)
    large_a[kept[0].ravel()], large_b[kept[1].ravel()] = a, b

    def value(cost, a, b):
        result = sinkhorn(cost, a, b, reg=0.1, num_iters=50, method=method, grad=grad)
        return result.primal_cost + result.reg_cost + jnp.sum(result.plan**2), result

    solve = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    (small_value, small), small_gradients = solve(cost, a, b)
    (large_value, result), gradients = solve(large, large_a, large_b)
    # The same sums with added zeros: rounding, and the linear solver's tolerance for "implicit".
    np.testing.assert_allclose(result.plan[kept], small.plan, atol=1e-15)
    np.testing.assert_allclose(result.plan.sum(), 1, atol=1e-14)
    np.testing.assert_allclose(large_value, small_value, atol=1e-14)
    np.testing.assert_allclose(gradients[0][kept], small_gradients[0], atol=1e-10)
    np.testing.assert_allclose(gradients[1][kept[0].ravel()], small_gradients[1], atol=1e-10)
    for leaf in jax.tree.leaves((result, gradients)):
        assert np.isfinite(leaf).all()
    assert np.count_nonzero(result.plan) == cost.size
    assert np.count_nonzero(gradients[0]) == cost.size


@pytest.mark.parametrize("threshold", [None, 1e-6])
def test_history_is_the_error_of_the_plan_at_each_check(make_problem, threshold):
    problems = [make_problem(6, 9, seed) for seed in range(2)]
    costs, a, b = (np.stack(x) for x in zip(*problems, strict=True))

    def solve(num_iters, threshold=None, history=False):
        options = {"reg": 0.05, "num_iters": num_iters, "threshold": threshold, "history": history}
        return jax.jit(jax.vmap(lambda *x: sinkhorn(*x, **options)))(costs, a, b)

    result = solve(45, threshold, history=True)
    assert solve(45, threshold).errors is None
    for run in (0, 4):
        errors, iterations = result.errors[:, run], min(10 * (run + 1), 45)
        # The same iterations in another program; the error includes its rounding, about 1e-15 of a mass of one.
        alone = solve(iterations).marginal_error
        was_done = result.num_iters >= iterations
        np.testing.assert_allclose(errors[was_done], alone[was_done], rtol=1e-6, atol=1e-14)
    assert np.isnan(result.errors).any() == (threshold is not None)


@pytest.mark.slow
def test_decreasing_reg_needs_fewer_iterations():
    """For sets of points with even weights. With uneven weights or small thresholds it may need more."""
    points = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 60, 2)))
    costs = jax.vmap(sqeuclidean_cost)(*points)

    @partial(jax.jit, static_argnames="reg_start")
    @partial(jax.vmap, in_axes=(0, None))
    def solve(cost, reg_start=None):
        return sinkhorn(cost, reg=0.004, num_iters=20000, threshold=1e-3, reg_start=reg_start)

    plain, faster = solve(costs, None), solve(costs, 4.0)
    assert plain.converged.all()
    assert faster.converged.all()
    assert np.all(2 * faster.num_iters < plain.num_iters)
    # A start that is not larger than reg changes nothing.
    assert np.array_equal(solve(costs, 0.004).num_iters, plain.num_iters)


@pytest.mark.parametrize("grad", mostly_slow(["unroll", "implicit", "envelope"], "implicit"))
def test_decreasing_reg_has_the_same_solution_and_gradient(make_problem, grad):
    cost, a, b = make_problem(6, 9)
    a = np.where(np.arange(6) == 3, 0, a)
    a /= a.sum()

    @partial(jax.jit, static_argnames="reg_start")
    @partial(jax.value_and_grad, has_aux=True)
    def solve(cost, reg_start=None):
        result = sinkhorn(cost, a, b, reg=0.05, num_iters=5000, threshold=1e-12, grad=grad, reg_start=reg_start)
        return result.reg_cost + (result.f[5] - result.f[4] if grad != "envelope" else 0), result

    (_, plain), gradient = solve(cost)
    (_, decreasing), got = solve(cost, reg_start=1.0)
    assert decreasing.converged
    # Marginal errors of 1e-12, over the smallest eigenvalue of the solution's equations, about 1e-4.
    np.testing.assert_allclose(decreasing.plan, plain.plan, atol=1e-8)
    np.testing.assert_allclose(got, gradient, atol=1e-6)


@pytest.mark.parametrize("start", [-1.0, np.nan, np.inf])
def test_invalid_reg_start_under_jit_is_not_finite(problem, start):
    assert jax.jit(lambda r: sinkhorn(*problem, reg=0.1, reg_start=r).status)(start) == Status.NOT_FINITE


@pytest.mark.slow
def test_decreasing_reg_in_a_batch_of_different_regs(make_problem):
    cost, a, b = make_problem(6, 9)
    regs = jnp.array([1.0, 0.3, 0.01])

    def solve(reg):
        return sinkhorn(cost, a, b, reg=reg, num_iters=1000, threshold=1e-6, reg_start=0.5)

    batch = jax.vmap(solve)(regs)
    for i, reg in enumerate(regs):
        alone = solve(reg)
        assert batch.num_iters[i] == alone.num_iters
        np.testing.assert_allclose(batch.plan[i], alone.plan, rtol=1e-9)  # the same sums in another program


@pytest.mark.parametrize("method", mostly_slow(METHODS, "stabilized"))
def test_init_resumes_the_iterations(problem, method):
    first = sinkhorn(*problem, reg=0.1, num_iters=7, method=method)
    rest = sinkhorn(*problem, reg=0.1, num_iters=5, method=method, init=(first.f, first.g))
    whole = sinkhorn(*problem, reg=0.1, num_iters=12, method=method)
    np.testing.assert_allclose(rest.plan, whole.plan, atol=1e-15)


def test_kernel_underflow_is_reported_and_log_converges():
    cost = np.float32([[0, 2], [2, 1.9]])  # exp(-1.9 / 0.01) is zero in float32: Algorithm 1 divides by it
    kernel = jax.jit(lambda c: sinkhorn(c, reg=0.01, method="kernel", threshold=1e-3))(cost + np.float32(1))
    assert kernel.status == Status.NOT_FINITE
    log = sinkhorn(cost + 1, reg=0.01, threshold=1e-3)
    assert log.status == Status.CONVERGED
    np.testing.assert_allclose(log.plan, np.eye(2) / 2, atol=1e-3)


@pytest.mark.parametrize(
    "dtype", mostly_slow([jnp.float16, jnp.bfloat16, jnp.float32, jnp.int32], jnp.float16, jnp.int32)
)
def test_narrow_dtypes_are_computed_in_float32_and_returned_in_their_dtype(problem, dtype):
    cost = jnp.asarray(problem[0], dtype)
    result = sinkhorn(cost, reg=0.1)
    floating = jnp.dtype(dtype if dtype != jnp.int32 else jnp.float32)
    assert {x.dtype for x in (result.plan, result.primal_cost, result.reg_cost, result.f, result.g)} == {floating}
    assert result.marginal_error.dtype == jnp.float32
    exact = sinkhorn(jnp.asarray(cost, jnp.float64), reg=0.1)
    # Exponents of 2 / 0.1 have errors of 20 · 6e-8, and so have potentials; then the plan is rounded once.
    np.testing.assert_allclose(
        np.float64(result.plan), exact.plan, atol=1e-6, rtol=float(jnp.finfo(floating).eps) / 2 + 1e-6
    )


@pytest.mark.parametrize("dtype", mostly_slow([jnp.float16, jnp.bfloat16], jnp.float16))
def test_half_precision_is_carried_through_a_scan(problem, dtype):
    a = jnp.zeros(6, dtype).at[2].set(1)  # points without mass, whose potential float16 cannot hold

    def step(potentials, _):
        result = sinkhorn(jnp.asarray(problem[0], dtype), a, reg=0.1, num_iters=3, init=potentials)
        return (result.f, result.g), result.primal_cost

    start = (jnp.zeros(6, dtype), jnp.zeros(9, dtype))
    (f, g), costs = jax.lax.scan(step, start, length=3)
    assert f.dtype == g.dtype == costs.dtype == dtype
    assert np.isfinite(np.float32(f)).all()
    # Row 2 has all of the mass and is moved to all columns evenly: its mean cost, rounded to the dtype.
    np.testing.assert_allclose(np.float32(costs), problem[0][2].mean(), rtol=1e-2)


def test_one_point_on_each_side():
    result = sinkhorn([[3.0]], reg=0.1, threshold=1e-6)
    np.testing.assert_allclose(result.plan, [[1.0]], rtol=1e-14)
    assert result.status == Status.CONVERGED
