"""Certificates: the exact cost, from linear programming, lies between the bounds; rounded plans are feasible."""

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest

from fs_jax.ot import bounds, ipot, round_to_feasible, sinkhorn


def test_rounding_makes_a_plan_feasible_and_changes_it_little(make_problem):
    for seed in range(20):
        cost, a, b = make_problem(6, 9, seed)
        plan = sinkhorn(cost, a, b, reg=0.02, num_iters=3).plan
        rounded = np.asarray(round_to_feasible(plan, a, b))
        assert rounded.min() >= 0
        np.testing.assert_allclose(rounded.sum(1), a, rtol=1e-12)
        np.testing.assert_allclose(rounded.sum(0), b, rtol=1e-12)
        error = np.abs(np.sum(plan, 1) - a).sum() + np.abs(np.sum(plan, 0) - b).sum()
        assert np.abs(rounded - plan).sum() <= 2 * error + 1e-12  # lemma 7 of Altschuler et al.


def test_a_feasible_plan_is_not_changed(make_problem):
    _, a, b = make_problem(6, 9)
    np.testing.assert_allclose(round_to_feasible(np.outer(a, b), a, b), np.outer(a, b), rtol=1e-12)


@pytest.mark.parametrize("solve", [
    lambda cost, a, b: sinkhorn(cost, a, b, reg=0.05, num_iters=2000),
    lambda cost, a, b: sinkhorn(cost, a, b, reg=0.05, num_iters=2),
    lambda cost, a, b: ipot(cost, a, b, beta=0.5, num_iters=300),
], ids=["Sinkhorn", "stopped early", "IPOT"])  # fmt: skip
def test_the_exact_cost_lies_between_the_bounds(solve, make_problem):
    for seed in range(10):
        cost, a, b = make_problem(6, 9, seed)
        a[0], b[:2] = 0, 0
        a, b = a / a.sum(), b / b.sum()
        exact = pot.emd2(a, b, cost)
        lower, upper, plan = bounds(cost, solve(cost, a, b), a, b)
        assert lower - 1e-12 <= exact <= upper + 1e-12  # rounding of sums of numbers of size 1
        np.testing.assert_allclose(np.sum(plan * cost), upper, rtol=1e-12)


def test_bounds_meet_at_the_exact_solution(make_problem):
    cost, a, b = make_problem(6, 9)
    found = bounds(cost, ipot(cost, a, b, beta=0.5, num_iters=2000), a, b)
    assert found.upper - found.lower < 1e-3  # beta / num_iters is 2.5e-4


@pytest.mark.slow
def test_vmap_equals_a_loop(make_problem):
    costs, rows, columns = map(np.stack, zip(*(make_problem(4, 5, seed) for seed in range(3)), strict=True))

    def certified(cost, a, b):
        return bounds(cost, sinkhorn(cost, a, b, reg=0.1), a, b)

    together = jax.jit(jax.vmap(certified))(costs, rows, columns)
    for place, problem in enumerate(zip(costs, rows, columns, strict=True)):
        for one, alone in zip(together, certified(*problem), strict=True):
            np.testing.assert_allclose(one[place], alone, rtol=1e-9, atol=1e-12)


def test_a_cost_of_another_shape_raises(make_problem):
    cost, a, b = make_problem(6, 9)
    with pytest.raises(ValueError, match=r"result: expected a plan of the cost's shape, \(6, 9\), got \(9, 6\)"):
        bounds(cost, sinkhorn(cost.T, b, a, reg=0.1), a, b)


def test_different_total_masses_have_no_bounds(make_problem):
    cost, a, b = make_problem(6, 9)
    with pytest.raises(ValueError, match="b: expected the total mass of a"):
        round_to_feasible(cost, a, 2 * b)
    found = jax.jit(lambda b: bounds(cost, sinkhorn(cost, a, b, reg=0.1), a, b))(2 * b)
    assert np.isnan(found.lower)
    assert np.isnan(found.upper)


def test_weights_of_half_precision_have_bounds(make_problem):
    """Their sums differ by more than the rounding of float32."""
    cost, _, _ = make_problem(100, 60)
    a, b = (jnp.full(size, 1 / size, jnp.bfloat16) for size in cost.shape)
    found = bounds(cost, sinkhorn(cost, a, b, reg=0.1), a, b)
    assert found.lower <= found.upper + 0.01 * cost.max()  # up to 1% of the mass differs
    jitted = jax.jit(lambda a, b: bounds(cost, sinkhorn(cost, a, b, reg=0.1), a, b))(a, b)
    np.testing.assert_allclose(jitted.upper, found.upper, rtol=1e-2)


def test_a_plan_that_is_not_finite(make_problem):
    cost, a, b = make_problem(6, 9)
    result = sinkhorn(cost, a, b, reg=0.1)
    broken = result._replace(plan=result.plan * jnp.nan)
    assert np.isnan(bounds(cost, broken, a, b).upper)
    with pytest.raises(ValueError, match="plan: expected finite values"):
        round_to_feasible(broken.plan, a, b)


def test_bounds_can_be_exported(make_problem):
    cost, a, b = make_problem(6, 9)
    certified = jax.jit(lambda cost: bounds(cost, sinkhorn(cost, a, b, reg=0.1), a, b))
    restored = jax.export.deserialize(jax.export.export(certified)(jnp.asarray(cost)).serialize())
    np.testing.assert_allclose(restored.call(jnp.asarray(cost)).upper, certified(cost).upper, rtol=1e-9)
