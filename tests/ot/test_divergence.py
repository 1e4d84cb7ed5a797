"""The Sinkhorn divergence equals ott-jax's, is zero between equal sets, and has the gradient of its differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ott.geometry import geometry
from ott.tools import sinkhorn_divergence as ott_divergence

from fs_jax.ot import Status, sinkhorn_divergence, sqeuclidean_cost
from tests.parameters import mostly_slow

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 2)), RNG.normal(size=(9, 2)) + 1
A, B = (weights / weights.sum() for weights in (RNG.uniform(0.5, 1.5, 6), RNG.uniform(0.5, 1.5, 9)))
REG = 0.3


def costs(x, y):
    return sqeuclidean_cost(x, y), sqeuclidean_cost(x, x), sqeuclidean_cost(y, y)


def value(x, y, a=A, b=B, **options):
    return sinkhorn_divergence(
        *costs(x, y), a, b, **{"reg": REG, "num_iters": 3000, "threshold": 1e-12} | options
    ).value


@pytest.mark.usefixtures("standard_promotion")
def test_value_equals_ott_jaxs():
    geometries = [geometry.Geometry(cost_matrix=jnp.asarray(cost), epsilon=REG) for cost in costs(X, Y)]
    # Their divergence adds reg (Σa - Σb)² / 2, which is zero.
    theirs, _ = ott_divergence.sinkhorn_divergence(
        geometry.Geometry,
        *(g.cost_matrix for g in (geometries[0], geometries[1], geometries[2])),
        epsilon=REG, a=jnp.asarray(A), b=jnp.asarray(B),
        solve_kwargs={"threshold": 1e-12, "max_iterations": 5000},
    )  # fmt: skip
    # The marginal error is 1e-12, and errors of costs are of second order in it; 1e-9 is rounding in ott-jax.
    np.testing.assert_allclose(value(X, Y), theirs, rtol=1e-8)


def test_equal_sets_are_at_distance_zero_with_a_gradient_of_zero():
    at_zero, gradient = jax.value_and_grad(lambda x: value(x, x, A, A))(jnp.asarray(X))
    assert at_zero == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-16)  # rounding of sums of numbers of size 0.1
    early = jax.grad(lambda x: value(x, x, A, A, num_iters=2, threshold=None))(jnp.asarray(X))
    np.testing.assert_allclose(early, 0, atol=1e-16)
    # If only one of two equal sets is differentiated, all plans are equal, and the gradients of xy and xx cancel.
    of_one = jax.grad(lambda x: value(x, jnp.asarray(X), A, A))(jnp.asarray(X))
    np.testing.assert_allclose(of_one, 0, atol=1e-9)  # rounding of sums of numbers of size 1
    assert value(X + 0.1, X, A, A) > 1e-3


@pytest.mark.parametrize("grad", mostly_slow(["envelope", "implicit", "unroll"], "envelope"))
@pytest.mark.parametrize("of", mostly_slow(["x", "weights"], "x"))
def test_gradient_equals_finite_differences(grad, of):
    rng = np.random.default_rng(1)
    direction = {"x": rng.normal(size=X.shape), "weights": rng.normal(size=A.shape)}[of]
    if of == "weights":
        direction -= direction.mean()  # keeps the total mass

    def along(step):
        x, a = (X + step * direction, A) if of == "x" else (X, A + step * direction)
        return value(x, Y, a, B, grad=grad)

    slope = jax.grad(along)(0.0)
    step = 1e-4
    # Fourth order: the error is 1e-16 relative, plus rounding of 1e-15 over the step.
    differences = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
    np.testing.assert_allclose(slope, differences, rtol=1e-7)


@pytest.mark.slow
def test_points_without_mass_are_ignored():
    more, weights = np.concatenate([X, 1e3 * np.ones((2, 2))]), np.concatenate([A, np.zeros(2)])
    np.testing.assert_allclose(value(more, Y, weights, B), value(X, Y), rtol=1e-12)
    gradient = jax.grad(lambda x: value(x, Y, weights, B))(jnp.asarray(more))
    np.testing.assert_array_equal(gradient[6:], 0)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    sets = X + np.random.default_rng(2).normal(size=(3, 1, 2))
    together = jax.jit(jax.vmap(partial(value, y=Y)))(jnp.asarray(sets))
    np.testing.assert_allclose(together, [value(x, Y) for x in sets], rtol=1e-10)


@pytest.mark.slow
def test_status_is_the_worst_of_the_three():
    done = sinkhorn_divergence(*costs(X, Y), A, B, reg=REG, num_iters=3000, threshold=1e-10)
    assert done.converged
    assert [int(of.status) for of in done[1:]] == [Status.CONVERGED] * 3
    assert sinkhorn_divergence(*costs(X, Y), A, B, reg=REG, num_iters=2, threshold=1e-10).status == Status.LIMIT
    wrong = jax.jit(lambda reg: sinkhorn_divergence(*costs(X, Y), A, B, reg=reg, threshold=1e-3).status)(-1.0)
    assert wrong == Status.NOT_FINITE


@pytest.mark.parametrize(("shapes", "message"), [
    (((6, 9), (6, 5), (9, 9)), r"cost_xx: expected a square matrix"),
    (((9, 6), (6, 6), (9, 9)), r"cost_xy: expected shape \[n, m\] .*here \(6, 9\); got \(9, 6\)"),
])  # fmt: skip
def test_costs_of_inconsistent_shapes_raise(shapes, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_divergence(*map(np.zeros, shapes), reg=1.0)
