"""Potentials and maps at new points, and regularisation relative to the cost's scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import barycentric_map, ipot, potential_at, relative_reg, sinkhorn, sqeuclidean_cost

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 2)), RNG.normal(size=(9, 2)) + 1
A, B = (weights / weights.sum() for weights in (RNG.uniform(0.5, 1.5, 6), RNG.uniform(0.5, 1.5, 9)))
REG = 0.3
COST = np.sum((X[:, None] - Y) ** 2, -1)


@pytest.fixture(scope="module")
def solved():
    with jax.enable_x64(True):
        return sinkhorn(COST, A, B, reg=REG, num_iters=3000, threshold=1e-12)


def test_at_the_original_points_they_equal_the_solution(solved):
    np.testing.assert_allclose(potential_at(COST, solved.g, reg=REG), solved.f - REG * np.log(A), rtol=1e-9)
    np.testing.assert_allclose(potential_at(COST.T, solved.f, reg=REG), solved.g - REG * np.log(B), rtol=1e-9)
    mapped = barycentric_map(COST, solved.g, Y, reg=REG)
    np.testing.assert_allclose(mapped, solved.plan @ Y / A[:, None], rtol=1e-9)


def test_new_points_are_mapped_as_if_they_were_in_the_problem(solved):
    # A point of negligible weight, solved together with the others, does not change the solution.
    new = np.array([[0.3, -0.2]])
    weights = np.concatenate([A * (1 - 1e-9), [1e-9]])
    cost = sqeuclidean_cost(np.concatenate([X, new]), Y)
    with_it = sinkhorn(cost, weights, B, reg=REG, num_iters=3000, threshold=1e-13)
    mapped = barycentric_map(sqeuclidean_cost(new, Y), solved.g, Y, reg=REG)
    np.testing.assert_allclose(mapped[0], with_it.plan[-1] @ Y / 1e-9, rtol=1e-6)  # the effect of its weight


def test_the_map_tends_to_the_assignment_for_small_reg():
    shifted = X + 100
    solved = ipot(sqeuclidean_cost(X, shifted), beta=1.0, num_iters=400)
    mapped = barycentric_map(sqeuclidean_cost(X, shifted), solved.g, shifted, reg=1.0 / 400)
    np.testing.assert_allclose(mapped, shifted, atol=1e-3)  # an assignment; the blur is exp(-gap / reg)


def test_points_without_mass_do_not_change_the_map():
    b = np.where(np.arange(9) < 6, 1 / 6, 0.0)
    solved = sinkhorn(COST, A, b, reg=REG, num_iters=2000, threshold=1e-12)
    far = jnp.asarray(Y).at[6:].set(1e6)
    np.testing.assert_allclose(
        barycentric_map(COST, solved.g, far, reg=REG), solved.plan[:, :6] @ Y[:6] / A[:, None], rtol=1e-9
    )


def test_derivatives_equal_finite_differences(solved):
    def total(x):
        return jnp.sum(barycentric_map(sqeuclidean_cost(x, Y), solved.g, Y, reg=REG) ** 2)

    direction, step = np.random.default_rng(1).normal(size=X.shape), 1e-4
    slope = jnp.sum(jax.grad(total)(jnp.asarray(X)) * direction)
    differences = (total(X + step * direction) - total(X - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, differences, rtol=1e-6)  # second order in the step


def test_the_scale_is_weighted_by_mass_and_has_no_gradient():
    a = np.where(np.arange(6) < 4, 0.25, 0.0)
    present, weights = np.asarray(COST)[:4], np.full((4, 1), 0.25) * B
    mean = np.sum(weights * present)
    np.testing.assert_allclose(relative_reg(0.1, COST, a, B), 0.1 * mean, rtol=1e-12)
    deviation = np.sqrt(np.sum(weights * (present - mean) ** 2))
    np.testing.assert_allclose(relative_reg(0.1, COST, a, B, to="std"), 0.1 * deviation, rtol=1e-12)
    np.testing.assert_array_equal(jax.grad(lambda cost: relative_reg(0.1, cost, a, B))(COST), 0)
    # So the plan doesn't depend on the features' scale.
    plans = [sinkhorn(c, A, B, reg=relative_reg(0.1, c)).plan for c in (COST, 1e4 * COST)]
    np.testing.assert_allclose(*plans, rtol=1e-8)


def test_equal_costs_have_no_scale_and_huge_costs_do_not_overflow():
    assert np.isnan(jax.jit(relative_reg)(0.1, jnp.zeros((2, 3))))
    huge = 1e25 * np.asarray(COST, np.float32)
    np.testing.assert_allclose(relative_reg(0.1, huge, to="std"), 1e25 * relative_reg(0.1, COST, to="std"), rtol=1e-5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: potential_at(COST, np.zeros(6), reg=REG), r"g: expected the potentials of the columns .*got shape \(6,\)"),
    (lambda: potential_at(COST, np.zeros(9), reg=0), "reg: expected a finite number above 0"),
    (lambda: barycentric_map(COST, np.zeros(9), X, reg=REG), r"y: expected one row per column of cost, \[9, d\]"),
    (lambda: relative_reg(0.1, -COST), "cost: expected a positive mean"),
    (lambda: relative_reg(0.1, np.ones((2, 3)), to="std"), "cost: expected a positive std"),
    (lambda: potential_at(COST[0], np.zeros(9), reg=REG), r"cost: expected one matrix of shape \[k, m\]"),
    (lambda: relative_reg(0.1, COST, to="median"), "to: expected one of 'mean', 'std', got 'median'"),
])  # fmt: skip
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
