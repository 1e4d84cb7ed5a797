"""grad="implicit" has the solution's derivatives of any order; second derivatives of other modes raise an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, _implicit, sinkhorn


@pytest.fixture(scope="module")
def line():
    """A line through problems, t ↦ (cost, a, b, reg), and weights for a linear functional of the plan."""
    rng = np.random.default_rng(0)
    cost, d_cost, w = rng.uniform(0, 1, (5, 6)), rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    a, b = rng.uniform(1, 2, 5), rng.uniform(1, 2, 6)
    d_a, d_b = rng.normal(size=5), rng.normal(size=6)

    def at(t):
        return cost + t * d_cost, jax.nn.softmax(np.log(a) + t * d_a), jax.nn.softmax(np.log(b) + t * d_b), 0.1 + t / 30

    return at, w


@pytest.fixture(scope="module")
def outputs(line):
    """t ↦ a scalar for each output that has a derivative."""
    at, w = line

    def numbers(t):
        cost, a, b, reg = at(t)
        result = sinkhorn(cost, a, b, reg=reg, num_iters=400, grad="implicit")
        sums = result.f[:, None] + result.g[None]  # a constant can move between the potentials
        return jnp.stack([result.primal_cost, result.reg_cost, jnp.sum(w * result.plan), jnp.sum(w * sums)])

    return numbers


@pytest.mark.parametrize(
    "which", [[3, -2, 1.5, 0.7], *(pytest.param(row, marks=pytest.mark.slow) for row in np.eye(4))]
)
def test_first_and_second_derivatives_in_both_modes(outputs, which):
    """Of a sum of all outputs, and of each output."""
    with jax.enable_x64(True):

        def value(t):
            return jnp.asarray(which) @ outputs(t)

        first = jax.jit(lambda t: jax.jvp(value, (t,), (1.0,))[1])
        seconds = [jax.jit(outer(jax.grad(value))) for outer in (jax.grad, jax.jacfwd)]
        step = 1e-4
        # Central differences: step² times a derivative two orders higher, 1e-8 times about 1e3; rounding, 1e-13 / step.
        expected = (jax.jit(value)(step) - jax.jit(value)(-step)) / (2 * step)
        np.testing.assert_allclose(first(0.0), expected, rtol=1e-4, atol=1e-4)
        expected = (first(step) - first(-step)) / (2 * step)
        for second in seconds:
            np.testing.assert_allclose(second(0.0), expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(seconds[0](0.0), seconds[1](0.0), rtol=1e-10)


@pytest.mark.slow  # compiles for a minute
def test_third_derivatives(outputs):
    with jax.enable_x64(True):
        second = jax.jit(jax.jacrev(jax.jacfwd(outputs)))
        third, step = jax.jit(jax.jacfwd(second)), 1e-4
        expected = (second(step) - second(-step)) / (2 * step)
        np.testing.assert_allclose(third(0.0), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("output", ["primal_cost", "reg_cost"])
@pytest.mark.parametrize("grad", ["envelope", "unroll"])
def test_second_derivatives_of_other_modes_raise(grad, output):
    cost = np.random.default_rng(0).uniform(0, 1, (5, 6))

    def value(cost):
        return getattr(sinkhorn(cost, reg=0.1, grad=grad), output)

    jax.eval_shape(jax.grad(value), cost)
    for hessian in (jax.hessian(value), jax.jacfwd(jax.jacfwd(value)), jax.jacrev(jax.jacrev(value))):
        with pytest.raises(
            NotImplementedError, match=f'"implicit" of .* has second.*grad="{grad}" has first derivatives only'
        ):
            jax.eval_shape(hessian, cost)


@pytest.mark.slow
def test_if_conjugate_gradients_fail_the_system_is_solved_densely(monkeypatch):
    plan = jnp.asarray(sinkhorn(np.random.default_rng(0).uniform(0, 1, (5, 6)), reg=0.1).plan)
    right = np.random.default_rng(1).normal(size=11)
    right[:5] += (right[5:].sum() - right[:5].sum()) / 5  # equal mass on both sides, as in all derivatives
    good = jax.jit(_implicit.solve_symmetric)(plan, right[:5], right[5:])
    monkeypatch.setattr(jax.scipy.sparse.linalg, "cg", lambda *args, **kwargs: (jnp.zeros(5), None))
    got = jax.jit(lambda *x: _implicit.solve_symmetric(*x))(plan, right[:5], right[5:])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), got, good)
    # If the factorisation fails as well, the result is NaN.
    monkeypatch.setattr(jax.scipy.linalg, "solve", lambda *args, **kwargs: jnp.zeros(5))
    assert np.isnan(jnp.concatenate(_implicit.solve_symmetric(plan, right[:5], right[5:]))).any()


def test_gradient_of_a_block_diagonal_plan_is_finite():
    cost = np.where(np.kron(np.eye(2), np.ones((3, 3))) > 0, np.random.default_rng(0).uniform(0, 1, (6, 6)), 1e3)
    value, gradient = jax.jit(jax.value_and_grad(lambda c: sinkhorn(c, reg=0.1, grad="implicit").primal_cost))(cost)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert sinkhorn(cost, reg=0.1, threshold=1e-9, num_iters=1000).status == Status.CONVERGED
