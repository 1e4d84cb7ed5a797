import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.spatial.distance import cdist

from fs_jax.ot import cosine_cost, euclidean_cost, sqeuclidean_cost
from tests.parameters import exact

rng = np.random.default_rng(0)
X, Y = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))


def test_cosine_cost_equals_the_released_codes(golden):
    # Both divide by the norms and multiply in float64: rounding of a few units in the last place.
    np.testing.assert_allclose(cosine_cost(golden["x"], golden["y"]), golden["cost"], atol=1e-14)


@pytest.mark.parametrize(
    ("cost", "metric"), [(cosine_cost, "cosine"), (sqeuclidean_cost, "sqeuclidean"), (euclidean_cost, "euclidean")]
)
def test_costs_equal_scipys(cost, metric):
    np.testing.assert_allclose(cost(X, Y), cdist(X, Y, metric), atol=1e-14)  # rounding of O(1) numbers
    check_grads(jax.jit(cost), (X, Y), order=1, modes=["fwd", "rev"], atol=1e-6)


def test_squared_distance_is_accurate_at_an_offset():
    # In float32, |x|² at an offset of 1e3 has errors of 0.1. The centred form has errors of 1e-7 of the spread, plus
    # the rounding of x itself: 2·3·(1e3·6e-8).
    moved = sqeuclidean_cost(*(np.float32(z + 1e3) for z in (X, Y)))
    np.testing.assert_allclose(moved, cdist(X, Y, "sqeuclidean"), atol=2e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_cosine_cost_at_any_norm(scale):
    def cost(x):
        return cosine_cost(x * jnp.float32(scale), jnp.float32(Y))

    x = jnp.float32(X).at[0].set(0)
    value, gradient = jax.jit(lambda x: (cost(x), jax.grad(lambda x: cost(x).sum())(x)))(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(value[0], 1)
    np.testing.assert_array_equal(gradient[0], 0)
    expected = np.ones((4, 5)) if scale == 0 else cdist(X, Y, "cosine")
    np.testing.assert_allclose(value[1:], expected[1:], atol=1e-6)  # float32


def test_cost_of_a_point_to_itself_is_zero():
    cost, gradient = jax.jit(jax.value_and_grad(lambda x: cosine_cost(x, X).diagonal().sum()))(jnp.asarray(X))
    assert cost >= 0
    np.testing.assert_allclose(cost, 0, atol=1e-14)
    np.testing.assert_allclose(gradient, 0, atol=1e-14)


@pytest.mark.parametrize(
    ("cost", "dimension"),
    [(sqeuclidean_cost, 2), (sqeuclidean_cost, 12), pytest.param(cosine_cost, 2, marks=pytest.mark.slow)],
)
def test_second_derivatives_at_equal_points_are_those_of_the_formula(cost, dimension):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, dimension)))

    def formula(z):
        if cost is sqeuclidean_cost:
            return jnp.sum(jnp.square(z[:, None] - x[None]))
        unit_z, unit_x = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (z, x))
        return jnp.sum(1 - unit_z @ unit_x.T)

    ours, exact = (jax.hessian(f)(x) for f in (lambda z: cost(z, x).sum(), formula))
    np.testing.assert_allclose(ours, exact, atol=1e-12)  # rounding of O(1) numbers


@exact
def test_squared_distances_of_few_dimensions_do_not_depend_on_other_points():
    near = np.float32([[0.0, 1.0], [0.5, 0.25]])
    far = np.float32([[-9999.0, 9999.0], [1e6, 0.0]])
    padded = sqeuclidean_cost(np.concatenate([near, far]), np.concatenate([near, far]))
    np.testing.assert_array_equal(padded[:2, :2], sqeuclidean_cost(near, near))


def test_half_precision_is_computed_in_float32():
    assert cosine_cost(jnp.bfloat16(X), jnp.bfloat16(Y)).dtype == jnp.float32
    assert sqeuclidean_cost(jnp.float16(X), jnp.float16(Y)).dtype == jnp.float32
    assert cosine_cost(X, Y).dtype == jnp.float64


@pytest.mark.parametrize("cost", [cosine_cost, sqeuclidean_cost, euclidean_cost])
def test_invalid_points_raise(cost):
    with pytest.raises(ValueError, match=r"y: expected as many columns as x, 3, got 2"):
        cost(X, Y[:, :2])
    with pytest.raises(ValueError, match=r"x: .* \[n, d\], got shape \(3,\)"):
        cost(X[0], Y)
    with pytest.raises(TypeError, match="x: expected numbers, got str"):
        cost("points", Y)


@pytest.mark.parametrize("cost", [cosine_cost, sqeuclidean_cost, euclidean_cost])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_points_that_are_not_finite_have_no_finite_cost(cost, bad):
    x = np.array([[1.0, 2.0], [bad, 0.5]])
    result = cost(x, np.array([[0.5, 1.0], [2.0, -1.0], [1.0, 0.0]]))
    assert np.isfinite(result[0]).all()
    assert not np.isfinite(result[1]).any()


def test_euclidean_cost_has_a_finite_gradient_at_equal_points():
    for dtype in (np.float32, np.float64):
        x = X.astype(dtype)
        gradient = jax.jit(jax.grad(lambda x: euclidean_cost(x, jnp.asarray(X, x.dtype)).sum()))(x)
        assert np.isfinite(gradient).all()
        assert not np.diagonal(euclidean_cost(x, x)).any()
        tiny = euclidean_cost(x[:1], x[:1] + dtype(1e-3))
        np.testing.assert_allclose(tiny, cdist(x[:1], x[:1] + dtype(1e-3)), rtol=1e-6)
    np.testing.assert_allclose(euclidean_cost([[3e30, 0.0]], np.float32([[0, 4e30]])), 5e30, rtol=1e-6)
