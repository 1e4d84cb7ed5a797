import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, ipot, released_sinkhorn, sinkhorn

COST = np.ones((2, 3))
NAN, INF = np.nan, np.inf

BOTH = [(sinkhorn, {"reg": 0.1}), (ipot, {"beta": 0.1})]


@pytest.mark.parametrize(("solver", "options"), BOTH)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cost": np.ones(3)}, "cost: expected one matrix of shape [n, m], got shape (3,); for a batch, use jax.vmap"),
        ({"cost": np.ones((4, 2, 3))}, "cost: expected one matrix of shape [n, m], got shape (4, 2, 3)"),
        ({"cost": np.ones((0, 3))}, "cost: expected at least one point on each side, got shape (0, 3)"),
        ({"cost": COST * NAN}, "cost: expected finite values, got NaN or infinity"),
        ({"cost": COST * INF}, "cost: expected finite values, got NaN or infinity"),
        ({"a": np.ones(3) / 3}, "a: expected one weight per row of cost, shape (2,), got (3,)"),
        ({"b": np.ones(2) / 2}, "b: expected one weight per column of cost, shape (3,), got (2,)"),
        ({"a": np.array([1.5, -0.5])}, "a: expected finite weights of at least 0, got -0.5 at index 1"),
        ({"b": np.array([NAN, 0.5, 0.5])}, "b: expected finite weights of at least 0, got nan at index 0"),
        ({"a": np.zeros(2)}, "a: expected at least one positive weight, got zeros only"),
        ({"a": np.ones(2)}, "b: expected the total mass of a, 2, got 1; divide each by its sum"),
        ({"num_iters": 0}, "num_iters: expected at least 1, got 0"),
        ({"threshold": -1e-3}, "threshold: expected a number of at least 0, got -0.001"),
        ({"threshold": NAN}, "threshold: expected a number of at least 0, got nan"),
        ({"grad": "unrol"}, "grad: expected one of 'unroll', "),
        ({"grad": "unrol"}, "got 'unrol'; did you mean 'unroll'?"),
    ],
)
def test_invalid_values_raise(solver, options, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solver(**{"cost": COST, **options, **changed})


@pytest.mark.parametrize(("solver", "options"), BOTH)
@pytest.mark.parametrize("value", [0, -0.1, NAN, INF])
def test_invalid_regularisation_raises(solver, options, value):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0, got"):
        solver(COST, **{name: value})
    with pytest.raises(ValueError, match=rf"{name}: expected a scalar, got shape \(2,\)"):
        solver(COST, **{name: np.ones(2)})


@pytest.mark.parametrize(("solver", "options"), BOTH)
def test_invalid_types_raise(solver, options):
    with pytest.raises(TypeError, match="cost: expected real numbers, got dtype complex"):
        solver(COST + 1j, **options)
    with pytest.raises(TypeError, match="cost: expected numbers, got NoneType"):
        solver(None, **options)
    with pytest.raises(TypeError, match="cost: expected real numbers, got dtype bool"):
        solver(COST > 0, **options)
    with pytest.raises(TypeError, match=r"num_iters: expected an int .* got float"):
        solver(COST, **options, num_iters=10.0)


def test_invalid_options_of_sinkhorn_raise():
    with pytest.raises(ValueError, match=r"method: expected one of .*, got 'kernal'; did you mean 'kernel'\?"):
        sinkhorn(COST, reg=0.1, method="kernal")
    with pytest.raises(ValueError, match=r"init\[1\]: expected shape \(3,\) .*, got \(2,\)"):
        sinkhorn(COST, reg=0.1, init=(np.zeros(2), np.zeros(2)))
    with pytest.raises(ValueError, match=r"init\[0\]: expected finite potentials"):
        sinkhorn(COST, reg=0.1, init=(np.full(2, NAN), np.zeros(3)))
    with pytest.raises(TypeError, match=r"init: expected a pair"):
        sinkhorn(COST, reg=0.1, init=np.zeros(2))


def test_invalid_options_of_ipot_raise():
    with pytest.raises(ValueError, match="inner_iters: expected at least 1, got 0"):
        ipot(COST, beta=0.1, inner_iters=0)


@pytest.mark.parametrize("changed", [{"reg": -1}, {"num_iters": 0}, {"change": -1}, {"cost": COST * NAN}])
def test_invalid_options_of_released_sinkhorn_raise(changed):
    with pytest.raises(ValueError, match=f"{next(iter(changed))}: expected"):
        released_sinkhorn(**{"cost": COST, **changed})


def test_concrete_values_are_checked_inside_jit():
    good, bad = jnp.array([0.5, 0.5]), jnp.array([1.5, -0.5])
    jax.jit(lambda c: sinkhorn(c, good, reg=0.1))(COST)
    with pytest.raises(ValueError, match="a: expected finite weights"):
        jax.jit(lambda c: sinkhorn(c, bad, reg=0.1))(COST)


def test_shapes_are_checked_under_jit():
    with pytest.raises(ValueError, match="expected one weight per row"):
        jax.jit(lambda c, a: sinkhorn(c, a, reg=0.1))(COST, np.ones(3) / 3)


SOLVERS = [
    lambda cost, a, reg: sinkhorn(cost, a, reg=reg, threshold=1e-3, method="log"),
    lambda cost, a, reg: sinkhorn(cost, a, reg=reg, threshold=1e-3, method="kernel"),
    lambda cost, a, reg: ipot(cost, a, beta=reg, threshold=1e-3),
    lambda cost, a, reg: released_sinkhorn(cost, reg=reg),
]  # the last has no threshold


@pytest.mark.parametrize("solver", SOLVERS)
def test_under_jit_the_status_reports_invalid_values(solver):
    uniform = np.ones(2) / 2
    solver = jax.jit(solver)
    assert solver(COST, uniform, 0.1).status in (Status.CONVERGED, Status.LIMIT)
    for cost, reg in ((COST * NAN, 0.1), (COST, -0.1), (COST, 0.0), (COST, NAN), (COST, INF)):
        assert solver(cost, uniform, reg).status == Status.NOT_FINITE


@pytest.mark.parametrize("solver", SOLVERS[:3])
@pytest.mark.parametrize("a", [(NAN, 0.5), (1.5, -0.5)])
def test_under_jit_the_status_reports_invalid_weights(solver, a):
    assert jax.jit(solver)(COST, jnp.array(a), 0.1).status == Status.NOT_FINITE


def test_unequal_masses_never_converge_under_jit():
    result = jax.jit(lambda a: sinkhorn(COST, a, reg=0.1, threshold=1e-3))(np.array([0.5, 0.6]))
    assert result.status == Status.LIMIT
    assert result.marginal_error > 0.09


def test_names_of_other_libraries_raise_with_our_names():
    for options, answer in [
        ({"epsilon": 0.1}, r"sinkhorn: .* got epsilon, which is called reg here"),
        ({"reg": 0.1, "max_iterations": 10}, "got max_iterations, which is called num_iters here"),
        ({"reg": 0.1, "treshold": 10}, "got treshold; did you mean 'threshold'"),
    ]:
        with pytest.raises(TypeError, match=answer):
            sinkhorn(COST, **options)
    with pytest.raises(TypeError, match=r"sinkhorn: expected cost, a, b by position .* too many positional"):
        sinkhorn(np.ones(2) / 2, np.ones(3) / 3, COST, 0.1)
    with pytest.raises(TypeError, match=r"sinkhorn: .* missing a required .*'reg'"):
        sinkhorn(COST, 0.1)
    with pytest.raises(TypeError, match=r"ipot: .* got reg, which is called beta here"):
        ipot(COST, reg=0.1)
    with pytest.raises(TypeError, match=r"ipot: .* got epsilon, which is called beta here"):
        ipot(COST, epsilon=0.1)
    with pytest.raises(ValueError, match=r"method: .* got 'lse', which is called 'log' here"):
        sinkhorn(COST, reg=0.1, method="lse")
    with pytest.raises(ValueError, match=r"method: .* got 'auto', which is called 'stabilized' here"):
        sinkhorn(COST, reg=0.1, method="auto")


def test_wide_integers_do_not_wrap_around():
    with jax.enable_x64(False):
        for cost in (np.array([[0, 2**40], [2**40, 0]]), [[0, 2**40], [2**40, 0]]):
            plan = sinkhorn(cost, reg=1e11, num_iters=200).plan
            np.testing.assert_allclose(plan, sinkhorn(np.asarray(cost, float), reg=1e11, num_iters=200).plan, rtol=1e-5)
            assert plan[0, 0] > 0.49
        weights = np.array([2**32, 1])
        plan = sinkhorn([[0.0, 1.0], [1.0, 0.3]], weights, weights, reg=0.1, threshold=1e6).plan
        np.testing.assert_allclose(plan.sum(1), weights, rtol=1e-5)


def test_integers_give_float32_with_and_without_jit():
    cost = np.array([[0, 1], [1, 0]])
    for solve in (lambda c: sinkhorn(c, reg=0.1), jax.jit(lambda c: sinkhorn(c, reg=0.1))):
        assert solve(cost).plan.dtype == jnp.float32


def test_weights_that_underflow_raise():
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"a: expected weights of at least 1\.2e-38, got at most"),
    ):
        sinkhorn([[0.0, 1.0], [1.0, 0.0]], np.full(2, 1e-60), reg=0.1)
    with pytest.raises(ValueError, match=r"num_iters: expected less than 2\^31, got 3000000000"):
        sinkhorn([[0.0, 1.0], [1.0, 0.0]], reg=0.1, num_iters=3 * 10**9)
