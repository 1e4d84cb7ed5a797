"""The transport of a given plan: its cost, its derivative, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, fixed_plan, sinkhorn

COST = np.random.default_rng(0).uniform(size=(5, 5)).astype(np.float32)


def test_cost_and_derivative_are_those_of_the_plan():
    plan = np.eye(5, dtype=np.float32) / 5
    cost, gradient = jax.jit(jax.value_and_grad(lambda c: fixed_plan(c, plan).primal_cost))(COST)
    np.testing.assert_allclose(cost, np.trace(COST) / 5, rtol=1e-6)  # five numbers in float32
    np.testing.assert_array_equal(gradient, plan)


def test_the_independent_coupling_is_sinkhorns_limit_of_large_reg():
    result = fixed_plan(COST, jnp.full((5, 5), 1 / 25))
    # exp(-C / reg) is 1 up to 1e-4.
    np.testing.assert_allclose(result.plan, sinkhorn(COST, reg=1e4, num_iters=10).plan, rtol=1e-3)
    assert result.marginal_error < 1e-5
    assert result.status == Status.LIMIT


def test_invalid_plans_are_reported():
    assert fixed_plan(COST, jnp.zeros((5, 5))).marginal_error == pytest.approx(2, rel=1e-5)  # rounded up
    assert fixed_plan(COST, jnp.full((5, 5), jnp.nan)).status == Status.NOT_FINITE
    with pytest.raises(ValueError, match=r"plan: expected the shape of cost, \(5, 5\); got \(4, 5\)"):
        fixed_plan(COST, jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="cost: expected finite values"):
        fixed_plan(COST * np.nan, jnp.ones((5, 5)))


def test_the_plan_is_held_fixed_and_costs_can_have_any_type():
    assert not jax.grad(lambda plan: fixed_plan(COST, plan).primal_cost)(jnp.ones((5, 5)) / 25).any()
    plan = np.full((6, 7), 1 / 42)
    assert fixed_plan([[1] * 7] * 6, plan).primal_cost == pytest.approx(1)
    half = fixed_plan(jnp.ones((6, 7), jnp.bfloat16), plan)
    assert (half.primal_cost.dtype, half.marginal_error.dtype) == (jnp.bfloat16, jnp.float32)
    returned = np.asarray(half.plan, np.float64)
    error = np.abs(returned.sum(1) - 1 / 6).sum() + np.abs(returned.sum(0) - 1 / 7).sum()
    np.testing.assert_allclose(half.marginal_error, error, rtol=1e-3)  # float32; it is rounded up
