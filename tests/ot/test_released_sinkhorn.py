import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, cosine_cost, released_sinkhorn
from tests.parameters import mostly_slow


def plain_potentials(cost, reg, iterations):
    """The released iterations in plain JAX, for a fixed number of them, so that autodiff gives their derivative."""
    n, m = cost.shape
    f, g = jnp.zeros(n), jnp.zeros(m)
    for _ in range(iterations):
        f = f + reg * (-jnp.log(n) - jnp.log(jnp.exp((f[:, None] + g[None] - cost) / reg).sum(1) + 1e-6))
        g = g + reg * (-jnp.log(m) - jnp.log(jnp.exp((f[:, None] + g[None] - cost) / reg).sum(0) + 1e-6))
    return f, g


@pytest.mark.parametrize("reg", mostly_slow([0.01, 0.05, 0.5], 0.05))
@pytest.mark.usefixtures("standard_promotion")
def test_parity_with_the_released_code(golden, reg):
    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(y):
        return released_sinkhorn(cosine_cost(golden["x"], y), reg=reg).primal_cost

    recorded = {name: golden[f"sinkhorn_{reg}_{name}"] for name in ("plan", "value", "grad_y", "iters", "u", "v")}
    result = released_sinkhorn(golden["cost"], reg=reg)
    value, gradient = value_and_gradient(golden["y"])
    assert result.num_iters == recorded["iters"]
    assert result.status == Status.LIMIT
    np.testing.assert_allclose(result.f, recorded["u"], atol=1e-14)  # float64 on both sides
    np.testing.assert_allclose(result.g, recorded["v"], atol=1e-14)
    # The released plan is rounded to float32: 6e-8 of its largest entry, 1/7, and of a value of at most 1.
    np.testing.assert_allclose(result.plan, recorded["plan"], atol=1e-8)
    np.testing.assert_allclose(value, recorded["value"], atol=6e-8)
    np.testing.assert_allclose(gradient, recorded["grad_y"], atol=1e-8)


def test_stops_at_num_iters(golden):
    result = released_sinkhorn(golden["cost"], reg=0.05, num_iters=1)
    assert result.num_iters == 1
    assert result.status == Status.LIMIT


@pytest.mark.parametrize(("reg", "change"), mostly_slow([(0.05, 0.1), (0.5, 1e-3), (0.05, 0.0)], (0.5, 1e-3)))
def test_gradient_equals_autodiffs(problem, reg, change):
    cost = jnp.asarray(problem[0])
    weights = iter(np.random.default_rng(1).normal(size=(4, *cost.shape)))
    w_plan, w_f, w_g = next(weights), next(weights)[:, 0], next(weights)[0]
    done = int(released_sinkhorn(cost, reg=reg, change=change, num_iters=30).num_iters)

    def ours(cost, reg):
        result = released_sinkhorn(cost, reg=reg, change=change, num_iters=30)
        return jnp.sum(w_plan * result.plan) + w_f @ result.f + w_g @ result.g

    def plain(cost, reg):
        f, g = plain_potentials(cost, reg, done)
        return jnp.sum(w_plan * jnp.exp((f[:, None] + g[None] - cost) / reg)) + w_f @ f + w_g @ g

    # The same sums in another order, in float64, over up to 30 iterations, which amplify errors little.
    expected = jax.jit(jax.grad(plain, (0, 1)))(cost, reg)
    for got, want in zip(jax.jit(jax.grad(ours, (0, 1)))(cost, reg), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_each_problem_of_a_batch_stops_on_its_own(problem):
    costs = problem[0] * np.array([0.1, 1.0, 3.0])[:, None, None]

    def value(cost):
        result = released_sinkhorn(cost, reg=0.3, change=1e-3)
        return result.primal_cost, result.num_iters

    (values, iterations), gradients = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True)))(costs)
    assert len(set(iterations.tolist())) == 3
    alone = jax.jit(jax.value_and_grad(value, has_aux=True))
    for i, cost in enumerate(costs):
        (one, done), gradient = alone(cost)
        assert iterations[i] == done
        # One program against another: rounding only.
        np.testing.assert_allclose(values[i], one, rtol=1e-13)
        np.testing.assert_allclose(gradients[i], gradient, atol=1e-13)


def test_runs_under_pmap(problem):
    result = jax.pmap(released_sinkhorn)(problem[0][None])
    np.testing.assert_allclose(result.plan[0], released_sinkhorn(problem[0]).plan, atol=1e-15)  # the same program


def test_overflow_is_reported():
    # The released iteration doesn't factor the maximum out of its sums, so it overflows for very negative costs.
    result = released_sinkhorn(np.array([[-20.0, 0.0], [0.0, -20.0]], np.float32), reg=0.01)
    assert result.status == Status.NOT_FINITE
