"""Under every JAX transformation, a solver returns the same as a Python loop over single problems."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fs_jax.ot import ipot, released_sinkhorn, sinkhorn, unbalanced_sinkhorn
from tests.parameters import mostly_slow

entropic = partial(sinkhorn, reg=0.2, num_iters=12)
SOLVERS = {
    "stabilized": entropic,
    "kernel": partial(entropic, method="kernel"),
    "log": partial(entropic, method="log"),
    "stabilized, threshold": partial(entropic, threshold=1e-2),
    "log, threshold": partial(entropic, threshold=1e-2, method="log"),
    "implicit": partial(entropic, grad="implicit", num_iters=100),
    "implicit, threshold": partial(entropic, grad="implicit", num_iters=100, threshold=1e-9),
    "envelope": partial(entropic, grad="envelope"),
    "none": partial(entropic, grad="none"),
    "ipot": partial(ipot, beta=0.5, num_iters=12),
    "ipot, threshold": partial(ipot, beta=0.5, num_iters=12, threshold=1e-2),
    "unbalanced": partial(unbalanced_sinkhorn, reg=0.2, rho=(0.5, jnp.inf), num_iters=100, threshold=1e-9),
    "unbalanced, envelope": partial(unbalanced_sinkhorn, reg=0.2, rho=1.0, num_iters=12, grad="envelope"),
    "released": lambda cost, a, b: released_sinkhorn(cost, reg=0.2),
}


def value(solver, cost, a, b):
    result = solver(cost, a, b)
    return result.primal_cost + result.reg_cost, result


def with_gradients(solver):
    return jax.value_and_grad(partial(value, solver), argnums=(0, 1), has_aux=True)


@pytest.fixture(scope="module")
def batch():
    """Four costs with the same weights."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        a, b = rng.uniform(1, 2, 3), rng.uniform(1, 2, 4)
        return tuple(jnp.asarray(x) for x in (rng.uniform(0, 1, (4, 3, 4)), a / a.sum(), b / b.sum()))


def assert_close(got, expected):
    # The same sums in another program, over a dozen iterations: rounding of 1e-16 each in float64, 6e-8 in float32.
    def close(x, y):
        tolerance = 1e-5 if y.dtype == np.float32 else 1e-10
        np.testing.assert_allclose(x, y, rtol=10 * tolerance, atol=tolerance)

    jax.tree.map(close, got, expected)


@pytest.mark.parametrize("name", mostly_slow(SOLVERS, "implicit, threshold", "released"))
def test_shard_map_with_replicated_weights(batch, name):
    check_shard_map(batch, name)


@pytest.mark.parametrize("name", mostly_slow(["none", "stabilized"]))
def test_shard_map_in_float32(batch, name):
    # The GPU kernels are traced too, but not compiled here.
    check_shard_map(batch, name, np.float32)


def check_shard_map(batch, name, dtype=np.float64):
    costs, a, b = (x.astype(dtype) for x in batch)
    solve = with_gradients(SOLVERS[name])
    (values, results), (d_costs, d_as) = jax.jit(jax.vmap(solve, in_axes=(0, None, None)))(costs, a, b)

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=((P("d"), P("d")), (P("d"), P())))
    def on_each_device(costs, a, b):
        (value, result), (d_cost, d_a) = solve(costs[0], a, b)
        # The gradient of a replicated argument is replicated too: the sum over devices.
        return jax.tree.map(lambda x: x[None], (value, result)), (d_cost[None], d_a)

    (got_values, got_results), (got_d_costs, got_d_a) = on_each_device(costs, a, b)
    assert_close((got_values, got_results, got_d_costs), (values, results, d_costs))
    assert_close(got_d_a, d_as.sum(0))


WAYS = ("vmap", "pmap", "sharded", "scan", "checkpoint", "grad of vmap")


@pytest.mark.parametrize(
    ("way", "name"),
    mostly_slow(
        itertools.product(WAYS, SOLVERS),
        ("scan", "none"),
    ),
)  # fmt: skip
def test_other_transformations(batch, way, name):
    costs, a, b = batch
    solve = with_gradients(SOLVERS[name])
    alone = jax.jit(solve)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[alone(cost, a, b) for cost in costs])
    on_all = jax.vmap(solve, in_axes=(0, None, None))
    if way == "vmap":
        got = jax.jit(on_all)(*batch)
    elif way == "pmap":
        got = jax.pmap(solve, in_axes=(0, None, None))(*batch)
    elif way == "sharded":
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
        got = jax.jit(on_all)(jax.device_put(costs, NamedSharding(mesh, P("d"))), a, b)
    elif way == "scan":
        got = jax.lax.scan(lambda _, cost: (None, solve(cost, a, b)), None, costs)[1]
    elif way == "checkpoint":
        saved = jax.value_and_grad(jax.checkpoint(partial(value, SOLVERS[name])), argnums=(0, 1), has_aux=True)
        got, expected = jax.jit(saved)(costs[0], a, b), jax.tree.map(lambda x: x[0], expected)
    else:
        got = jax.jit(jax.grad(lambda costs: jax.vmap(lambda c: value(SOLVERS[name], c, a, b)[0])(costs).sum()))(costs)
        expected = expected[1][0]
    assert_close(got, expected)


@pytest.mark.parametrize("name", mostly_slow(SOLVERS, "implicit", "ipot"))
def test_a_batch_can_be_differentiated(batch, name):
    def total(*arguments):
        return jax.vmap(lambda *x: value(SOLVERS[name], *x)[0], in_axes=(0, None, None))(*arguments).sum()

    shapes = jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), *batch)
    assert [x.shape for x in shapes] == [x.shape for x in batch]


@pytest.mark.slow
@pytest.mark.parametrize("batched", ["cost", "a, reg", "b", "cost, a, b, reg"])
def test_vmap_over_any_subset_of_arguments(batch, batched):
    costs, a, b = batch
    arguments = (costs, jnp.stack([a, a[::-1]] * 2), jnp.stack([b] * 4), jnp.array([0.1, 0.2, 0.3, 0.4]))
    batched = [name in batched.split(", ") for name in ("cost", "a", "b", "reg")]
    arguments = [x if is_batched else x[0] for x, is_batched in zip(arguments, batched, strict=True)]
    axes = tuple(0 if is_batched else None for is_batched in batched)
    got = SOLVE_MANY(axes)(*arguments)
    for i in range(4):
        one = [x[i] if is_batched else x for x, is_batched in zip(arguments, batched, strict=True)]
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), SOLVE_ONE(*one))


def gradient(cost, a, b, reg):
    return jax.grad(lambda *x: sinkhorn(*x[:3], reg=x[3], num_iters=12).primal_cost, (0, 3))(cost, a, b, reg)


SOLVE_ONE = jax.jit(gradient)


def SOLVE_MANY(axes):
    return jax.jit(jax.vmap(gradient, in_axes=axes))


NAMES = ("cost", "a", "b", "reg", "init")


def total_of(arguments, options):
    def total(changed):
        cost, a, b, reg, f = (changed.get(name, arguments[name]) for name in NAMES)
        result = sinkhorn(cost, a, b, reg=reg, init=(f, jnp.zeros(4)), num_iters=20, **options)
        return result.primal_cost + 2 * result.reg_cost

    return total


@pytest.fixture(scope="module")
def arguments(batch):
    with jax.enable_x64(True):
        values = (batch[0][0], *batch[1:], jnp.asarray(0.3), jnp.array([0.1, -0.2, 0.0]))
        return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize(
    ("method", "grad"),
    mostly_slow(
        itertools.product(("stabilized", "kernel", "log"), ("unroll", "implicit", "envelope", "none")),
        ("stabilized", "unroll"), ("log", "implicit"), ("kernel", "envelope"), ("stabilized", "none"),
    ),
)  # fmt: skip
def test_any_subset_of_arguments_can_be_differentiated(arguments, method, grad):
    total = total_of(arguments, {"method": method, "grad": grad, "threshold": 1e-3})
    for size in (1, 2, 5):
        for names in list(itertools.combinations(NAMES, size))[:: 3 if size == 2 else 1]:
            some = {name: arguments[name] for name in names}
            assert jax.eval_shape(jax.grad(total), some).keys() == set(names)
        jax.eval_shape(lambda x: jax.jvp(total, (x,), (x,)), some)


@pytest.mark.parametrize("grad", mostly_slow(["unroll", "implicit"]))
def test_derivatives_of_each_argument_equal_those_of_all_together(arguments, grad):
    total = total_of(arguments, {"grad": grad})

    @jax.jit
    def gradients(arguments):
        alone = {name: jax.grad(total)({name: arguments[name]})[name] for name in NAMES}
        forward = jax.jvp(total, (arguments,), (jax.tree.map(jnp.ones_like, arguments),))[1]
        return alone, jax.grad(total)(arguments), forward

    alone, every, forward = gradients(arguments)
    assert_close(alone, every)
    assert_close(forward, sum(x.sum() for x in every.values()))
