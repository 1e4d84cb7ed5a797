import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest
from jax.test_util import check_grads

from fs_jax.ot import Status, cosine_cost, ipot, sinkhorn
from tests.parameters import mostly_slow


def algorithm_2(cost, a, b, beta, num_iters, inner_iters=1):
    """Algorithm 2 as printed, with marginals a and b."""
    kernel, plan, sigma = jnp.exp(-cost / beta), jnp.ones_like(cost), jnp.ones_like(b)
    for _ in range(num_iters):
        q = kernel * plan
        for _ in range(inner_iters):
            delta = a / (q @ sigma)
            sigma = b / (q.T @ delta)
        plan = delta[:, None] * q * sigma[None]
    return plan


@pytest.mark.parametrize("beta", mostly_slow([0.5, 1.0], 0.5))
def test_parity_with_the_released_code(golden, beta):
    def value(y):
        result = ipot(cosine_cost(golden["x"], y), beta=beta)
        return result.primal_cost, result.plan

    (cost, plan), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(golden["y"])
    # The released IPOT multiplies plans in float32, 50 times: a few times 6e-8 of entries up to 1/7.
    np.testing.assert_allclose(plan, golden[f"ipot_{beta}_plan"], atol=5e-8)
    np.testing.assert_allclose(cost, golden[f"ipot_{beta}_value"], atol=5e-8)
    np.testing.assert_allclose(gradient, golden[f"ipot_{beta}_grad_y"], atol=5e-8)


@pytest.mark.parametrize("inner_iters", mostly_slow([1, 3], 3))
def test_equals_algorithm_2(problem, inner_iters):
    solve = jax.jit(ipot, static_argnames=("num_iters", "inner_iters"))
    for num_iters in (1, 12):
        result = solve(*problem, beta=0.5, num_iters=num_iters, inner_iters=inner_iters)
        expected = jax.jit(algorithm_2, static_argnums=(3, 4, 5))(*problem, 0.5, num_iters, inner_iters)
        np.testing.assert_allclose(result.plan, expected, atol=1e-14)  # float64, exponents up to 12 · 2 / 0.5
        potentials = (result.f[:, None] + result.g[None] - problem[0]) / (0.5 / num_iters)
        np.testing.assert_allclose(np.exp(potentials), result.plan, rtol=1e-12)


@pytest.mark.parametrize("seed", mostly_slow(range(3), 0))
def test_converges_to_the_exact_cost(make_problem, seed):
    problem = make_problem(8, 11, seed)
    exact = pot.emd2(problem[1], problem[2], problem[0])
    costs = []
    for num_iters in (30, 300, 3000):
        result = ipot(*problem, beta=0.3, num_iters=num_iters)
        costs.append(abs(float(result.primal_cost) - exact))
        # A plan of the entropic problem at beta / t costs at most beta / t · log(nm) more, plus its marginal error.
        assert costs[-1] <= 0.3 / num_iters * np.log(88) + 2 * result.marginal_error
    assert costs[2] < 1e-6
    # The potentials tend to the dual solution: their value is the cost, up to the entropic term.
    np.testing.assert_allclose(result.f @ problem[1] + result.g @ problem[2], exact, atol=1e-3)


@pytest.mark.parametrize("beta", mostly_slow([1e-3, 10.0], 10.0))
def test_thousands_of_steps_at_any_beta_stay_finite(make_problem, beta):
    problem = [jnp.float32(x) for x in make_problem(8, 11)]

    def value(cost):
        return ipot(cost, *problem[1:], beta=beta, num_iters=2000).primal_cost

    cost, gradient = jax.jit(jax.value_and_grad(value))(problem[0])
    assert np.isfinite(cost)
    assert np.isfinite(gradient).all()
    result = ipot(*problem, beta=beta, num_iters=2000)
    assert result.status == Status.LIMIT


@pytest.mark.parametrize("threshold", mostly_slow([None, 0.1], 0.1))
def test_unrolled_derivatives(problem, threshold):
    weights = np.random.default_rng(1).normal(size=problem[0].shape)

    def value(cost, a, b, beta):
        result = ipot(cost, a, b, beta=beta, num_iters=12, inner_iters=2, threshold=threshold)
        return jnp.sum(weights * result.plan) + result.primal_cost + result.reg_cost + result.f[0] + result.g[1]

    # Against finite differences in float64 with steps of 1e-5, whose error is 1e-10 times a third derivative.
    check_grads(jax.jit(value), (*problem, 0.6), order=1, modes=["fwd", "rev"], eps=1e-5, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_envelope_and_none(problem):
    def solve(cost, grad):
        return ipot(cost, *problem[1:], beta=0.5, grad=grad)

    plan = solve(problem[0], "none").plan
    gradient = jax.jit(jax.grad(lambda c: solve(c, "envelope").primal_cost))(problem[0])
    np.testing.assert_allclose(gradient, plan, atol=1e-15)  # two programs
    np.testing.assert_array_equal(jax.grad(lambda c: solve(c, "none").primal_cost)(problem[0]), 0)


@pytest.mark.slow
def test_runs_out_of_range_are_repeated_in_the_log_domain(problem, monkeypatch):
    def solve(cost):
        result = ipot(cost, *problem[1:], beta=0.3, num_iters=23, inner_iters=2)
        return result.primal_cost, result

    expected = jax.jit(jax.value_and_grad(solve, has_aux=True))(problem[0])
    monkeypatch.setattr(sys.modules["fs_jax.ot.ipot"], "largest", lambda array, power: 0.0)  # nothing is in range
    jax.clear_caches()
    repeated = jax.jit(jax.value_and_grad(solve, has_aux=True))(problem[0])
    jax.clear_caches()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-11), repeated, expected)  # the same steps


def test_threshold_stops_each_problem_of_a_batch(problem):
    costs = problem[0] * np.array([1.0, 0.3])[:, None, None]

    @jax.jit
    def solve(cost):
        return ipot(cost, beta=0.5, num_iters=500, threshold=1e-3)

    batch = jax.jit(jax.vmap(solve))(costs)
    assert batch.status.tolist() == [Status.CONVERGED] * 2
    assert batch.num_iters[0] != batch.num_iters[1]
    for i, cost in enumerate(costs):
        one = solve(cost)
        assert one.num_iters == batch.num_iters[i]
        assert one.marginal_error <= 1e-3
        np.testing.assert_allclose(batch.plan[i], one.plan, atol=1e-13)  # another program, the same sums
        stopped = ipot(cost, beta=0.5, num_iters=int(one.num_iters))
        np.testing.assert_allclose(one.plan, stopped.plan, atol=1e-15)
        assert stopped.status == Status.LIMIT


def test_zero_weights_exclude_points(make_problem):
    cost, a, b = make_problem(5, 4)
    padded = (np.pad(cost, ((0, 2), (1, 0)), constant_values=0.1), np.pad(a, (0, 2)), np.pad(b, (1, 0)))

    def value(cost, a, b):
        result = ipot(cost, a, b, beta=0.3, inner_iters=2)
        return result.primal_cost + jnp.sum(result.plan**2), result

    solve = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    ((small_value, small), small_gradients), ((large_value, large), gradients) = solve(cost, a, b), solve(*padded)
    # The same sums with added zeros: rounding.
    np.testing.assert_allclose(large.plan[:5, 1:], small.plan, atol=1e-15)
    np.testing.assert_allclose(large_value, small_value, atol=1e-14)
    np.testing.assert_allclose(gradients[0][:5, 1:], small_gradients[0], atol=1e-12)
    assert np.count_nonzero(large.plan) <= cost.size
    for leaf in jax.tree.leaves((large, gradients)):
        assert np.isfinite(leaf).all()


def test_the_plan_has_the_dtype_of_the_cost(problem):
    assert ipot(jnp.bfloat16(problem[0]), beta=0.5).plan.dtype == jnp.bfloat16
    assert ipot(problem[0], beta=0.5).plan.dtype == jnp.float64


@pytest.mark.slow
@pytest.mark.parametrize("num_iters", [2_000, 20_000])
def test_rounding_does_not_grow_with_the_number_of_steps(num_iters):
    cost = np.random.default_rng(0).uniform(0, 2, (60, 60))
    exact = pot.emd2(np.full(60, 1 / 60), np.full(60, 1 / 60), cost)
    solve = jax.jit(lambda c, **options: ipot(c, beta=0.1, num_iters=num_iters, **options), static_argnames="threshold")
    result, in_float64 = solve(jnp.float32(cost)), solve(cost)
    # Algorithm 2 as printed has 1e-7 at all steps: a few units in the last place of a mass of one.
    assert result.marginal_error < 1e-6
    np.testing.assert_allclose(result.primal_cost, exact, atol=1e-6)
    np.testing.assert_allclose(in_float64.primal_cost, exact, atol=1e-12)
    np.testing.assert_allclose(result.plan, in_float64.plan, atol=1e-6)
    assert solve(jnp.float32(cost), threshold=1e-6).converged


@pytest.mark.slow
def test_derivative_of_many_steps_stores_few_matrices(problem):
    weights = np.random.default_rng(1).normal(size=problem[0].shape)

    def value(cost, num_iters):
        return jnp.sum(weights * ipot(cost, *problem[1:], beta=1.0, num_iters=num_iters).plan)

    large = jnp.ones((60, 60))
    program = jax.jit(jax.grad(lambda c: ipot(c, beta=1.0, num_iters=500).primal_cost)).lower(large).compile()
    # Two matrices for every ten steps, and vectors.
    assert program.memory_analysis().temp_size_in_bytes < 500 * large.nbytes / 3
    # Forward mode equals reverse mode.
    np.testing.assert_allclose(
        jax.jvp(lambda c: value(c, 150), (problem[0],), (weights,))[1],
        jnp.sum(jax.grad(lambda c: value(c, 150))(problem[0]) * weights),
        rtol=1e-8,
    )


@pytest.mark.parametrize("solver", mostly_slow([ipot, sinkhorn], ipot))
def test_padding_may_be_any_finite_number(problem, solver):
    solve = partial(solver, **{"beta" if solver is ipot else "reg": 0.05})
    cost, a, b = problem

    def value(cost, a, b):
        return solve(cost, a, b, num_iters=20).primal_cost

    with_gradient = jax.jit(jax.value_and_grad(value))
    expected = with_gradient(cost, a, b)
    padded = np.pad(cost, ((0, 1), (0, 1)), constant_values=1e30)
    got_value, got = with_gradient(padded, np.pad(a, (0, 1)), np.pad(b, (0, 1)))
    np.testing.assert_allclose(got_value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(got, np.pad(expected[1], (0, 1)), atol=1e-12)
