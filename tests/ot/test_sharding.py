"""Rows sharded over devices: values, gradients and statuses are those of the whole problem on one device."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fs_jax.ot import Status, Transport, cosine_cost, sinkhorn
from tests.parameters import mostly_slow

AXIS = "d"
RESULT = Transport(P(AXIS), P(), P(), P(AXIS), P(), P(), P(), P())  # plan and f are each device's own rows
CASES = {
    "unroll": {"num_iters": 50},
    "unroll, sharp": {"num_iters": 40, "reg": 1e-4},  # absorbs scalings, and needs the log domain
    "unroll, log": {"num_iters": 15, "method": "log"},
    "unroll, kernel": {"num_iters": 15, "method": "kernel", "reg": 0.2},
    "unroll, threshold": {"num_iters": 500, "threshold": 1e-3, "reg": 0.05},
    "implicit": {"num_iters": 500, "grad": "implicit", "reg": 0.1},
    "implicit, threshold": {"num_iters": 2000, "grad": "implicit", "reg": 0.05, "threshold": 1e-10},
    "envelope": {"num_iters": 50, "grad": "envelope"},
    "none": {"num_iters": 30, "grad": "none", "threshold": 1e-3},
}
WAYS = ("pmap", "shard_map", "shard_map, unchecked")


def over_devices(function, way, devices, in_specs, out_specs):
    """`function` on several devices, as a function of whole arrays; specs say which to split along their first axis."""
    if way != "pmap":
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (AXIS,))
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=way == "shard_map")
        )
    mapped = jax.pmap(
        function, AXIS, in_axes=tuple(None if s == P() else 0 for s in in_specs), devices=jax.devices()[:devices]
    )

    def joined(x, spec):
        if spec == P():  # copies, bitwise equal
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
            return x[0]
        return x.reshape(-1, *x.shape[2:])

    def on_whole_arrays(*arrays):
        split = (
            x if s == P() else x.reshape(devices, -1, *np.shape(x)[1:]) for x, s in zip(arrays, in_specs, strict=True)
        )
        return jax.tree.map(joined, mapped(*split), out_specs)

    return on_whole_arrays


@pytest.fixture(scope="module")
def points():
    """Features of both sets, weights with some zeros, a factor of reg; and linear functionals of plan, f and g."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(10, 3))
    a, b = rng.uniform(1, 2, 8), rng.uniform(1, 2, 10)
    a[:2], a[5], b[1] = 0, 0, 0  # the first of four devices has no row with mass
    functionals = rng.normal(size=(8, 10)), rng.normal(size=8), rng.normal(size=10)
    return (x, y, a / a.sum(), b / b.sum(), np.float64(1)), functionals


def value(options, arguments, functionals, axis_name=None):
    """A number for this device's rows, one for the whole problem, and the result."""
    x, y, a, b, factor = arguments
    options = {"reg": 0.01, **options}
    result = sinkhorn(cosine_cost(x, y), a, b, **{**options, "reg": options["reg"] * factor}, axis_name=axis_name)
    of_plan, of_f, of_g = functionals
    of_rows = jnp.sum(of_plan * result.plan) + jnp.sum(jnp.where(a > 0, of_f * result.f, 0))
    of_all = result.primal_cost + 2 * result.reg_cost + jnp.sum(jnp.where(b > 0, of_g * result.g, 0))
    return of_rows, of_all, result


@pytest.mark.parametrize(
    ("name", "way", "devices"),
    mostly_slow(
        itertools.product(CASES, WAYS, (2, 4)),
        ("implicit", "shard_map", 4),
    ),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_whole_problem(points, name, way, devices):
    arguments, functionals = points
    options = CASES[name]

    def on_one(*arguments):
        of_rows, of_all, result = value(options, arguments, functionals)
        return of_rows + of_all, result

    specs = (P(AXIS), P(), P(AXIS), P(), P())

    def on_each(*inputs):
        *arguments, of_plan, of_f, of_g = inputs

        def objective(*arguments):
            of_rows, of_all, result = value(options, arguments, (of_plan, of_f, of_g), AXIS)
            if way == "shard_map":
                return jax.lax.psum(of_rows, AXIS) + of_all, result
            return of_rows + of_all / devices, result  # JAX differentiates the sum of this over the devices

        (_, result), gradients = jax.value_and_grad(objective, argnums=range(5), has_aux=True)(*arguments)
        if way != "shard_map":  # shard_map sums the gradients of replicated arguments itself
            gradients = [x if s == P(AXIS) else jax.lax.psum(x, AXIS) for x, s in zip(gradients, specs, strict=True)]
        return result, tuple(gradients)

    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(on_one, argnums=range(5), has_aux=True))(*arguments)
    in_specs = (*specs, P(AXIS), P(AXIS), P())
    result, gradients = over_devices(on_each, way, devices, in_specs, (RESULT, specs))(*arguments, *functionals)
    assert (result.status, result.num_iters) == (expected.status, expected.num_iters)
    # The same sums in another order, with errors of 1e-16. Those of gradients and of potentials / reg add up over the
    # iterations.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13), result, expected)
    for got, of_whole in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, of_whole, atol=1e-11 * max(1, np.abs(of_whole).max()))


@pytest.mark.parametrize("way", mostly_slow(WAYS, "pmap"))
def test_gradient_of_sharded_rows_equals_that_of_gathered_rows(points, way):
    (x, y, *_), _ = points

    def gathered(x):
        return sinkhorn(cosine_cost(jax.lax.all_gather(x, AXIS, tiled=True), y), reg=0.01, num_iters=50).primal_cost

    def sharded(x):
        return sinkhorn(cosine_cost(x, y), reg=0.01, num_iters=50, axis_name=AXIS).primal_cost

    def gradients(x):
        return jax.grad(gathered)(x), jax.grad(sharded)(x)

    of_gathered, of_sharded = over_devices(gradients, way, 4, (P(AXIS),), (P(AXIS), P(AXIS)))(x)
    # JAX differentiates the sum of the values of all devices. With its check, `shard_map` knows that the sharded cost
    # is the same on all devices and counts it once; the gathered cost counts four times. Rounding: 50 iterations with
    # cost / reg in the hundreds amplify float64's 1e-16 about a thousandfold.
    np.testing.assert_allclose(of_sharded * (4 if way == "shard_map" else 1), of_gathered, rtol=1e-9, atol=1e-12)


def sharded(way="pmap", **options):
    """(cost, a, b, reg, threshold) -> the result, on four devices."""

    def solve(cost, a, b, reg, threshold):
        return sinkhorn(cost, a, b, reg=reg, threshold=threshold, axis_name=AXIS, **options)

    return over_devices(solve, way, 4, (P(AXIS), P(AXIS), P(), P(), P()), RESULT)


@pytest.fixture(scope="module")
def solve32():
    return sharded(num_iters=1000, grad="none")


@pytest.fixture
def problem32(make_problem):
    return [np.float32(x) for x in make_problem(8, 10)]


def test_status_in_float32_is_true_of_the_plan(solve32, problem32):
    met, beyond = (solve32(*problem32, np.float32(0.1), np.float32(threshold)) for threshold in (1e-4, 1e-12))
    assert met.status == Status.CONVERGED
    assert met.marginal_error <= 1e-4
    assert beyond.status == Status.STALLED
    _, a, b = problem32
    error = np.abs(met.plan.sum(1) - a).sum() + np.abs(met.plan.sum(0) - b).sum()
    assert error <= met.marginal_error


@pytest.mark.parametrize("where", [(0, 3), (7, 0)])
def test_a_nan_on_one_device_gives_all_devices_its_status(solve32, problem32, where):
    cost, a, b = problem32
    cost[where] = np.nan
    assert solve32(cost, a, b, np.float32(0.1), np.float32(1e-4)).status == Status.NOT_FINITE


@pytest.mark.parametrize("differs", ["b", "reg", "threshold"])
def test_copies_that_differ_between_devices_are_reported(problem32, differs):
    cost, a, b = problem32

    def solve(cost, a, b):
        one = 1 + 1e-6 * (jax.lax.axis_index(AXIS) == 2).astype(jnp.float32)
        factors = {name: one if name == differs else 1 for name in ("b", "reg", "threshold")}
        arguments = {"reg": 0.1 * factors["reg"], "threshold": 1e-4 * factors["threshold"]}
        return sinkhorn(cost, a, b * factors["b"], **arguments, num_iters=20, grad="none", axis_name=AXIS)

    result = over_devices(solve, "pmap", 4, (P(AXIS), P(AXIS), P()), RESULT)(cost, a, b)
    assert result.status == Status.NOT_FINITE


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_defaults_masks_and_init_are_those_of_the_whole_problem(make_problem, way):
    cost, _, b = make_problem(8, 10)
    mask = np.arange(8) % 3 > 0
    init = np.linspace(0, 1, 8), np.zeros(10)

    def solve(cost, mask, f, axis_name=None):
        uniform = sinkhorn(cost, reg=0.1, num_iters=20, axis_name=axis_name)
        masked = sinkhorn(cost, mask, b, reg=0.1, num_iters=20, axis_name=axis_name)
        return uniform, masked, sinkhorn(cost, reg=0.1, num_iters=3, init=(f, init[1]), axis_name=axis_name)

    expected = solve(cost, mask, init[0])
    on_each = partial(solve, axis_name=AXIS)
    results = over_devices(on_each, way, 4, (P(AXIS),) * 3, (RESULT,) * 3)(cost, mask, init[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), results, expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_vmap_and_forward_mode_on_each_device(make_problem, way):
    costs = np.stack([make_problem(8, 10, seed)[0] for seed in range(3)], 1)  # [8, 3, 10]
    tangents = np.stack([make_problem(8, 10, seed)[0] for seed in range(3, 6)], 1)

    def solve(costs, tangents, axis_name=None):
        def one(cost):
            result = sinkhorn(cost, reg=0.1, threshold=1e-3, axis_name=axis_name)
            return result.primal_cost, result.num_iters

        primals, moved = jax.jvp(lambda costs: jax.vmap(one, in_axes=1)(costs)[0], (costs,), (tangents,))
        return primals, moved, jax.vmap(one, in_axes=1)(costs)[1]

    on_each = over_devices(partial(solve, axis_name=AXIS), way, 4, (P(AXIS), P(AXIS)), (P(), P(), P()))
    expected = solve(costs, tangents)
    assert len(set(expected[2].tolist())) > 1  # each stops on its own
    # Sums in another order; derivatives add up such errors over the iterations.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11), on_each(costs, tangents), expected)


@pytest.mark.slow
def test_rows_over_several_axes_and_problems_over_another(make_problem):
    costs = np.stack([make_problem(4, 10, seed)[0] for seed in range(2)])
    devices = np.array(jax.devices())
    several = jax.sharding.Mesh(devices.reshape(2, 2), ("p", "q"))

    def solve(axis_name, cost):
        return sinkhorn(cost, reg=0.1, threshold=1e-3, axis_name=axis_name)

    expected = [solve(None, cost) for cost in costs]
    specs = jax.tree.map(lambda s: P(("p", "q")) if s == P(AXIS) else s, RESULT)
    got = jax.shard_map(partial(solve, ("p", "q")), mesh=several, in_specs=P(("p", "q")), out_specs=specs)(costs[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), got, expected[0])

    @partial(jax.shard_map, mesh=several, in_specs=P("p", "q"), out_specs=(P("p"), P("p", "q"), P("p")))
    def each(costs):
        result = solve("q", costs[0])
        return result.primal_cost[None], result.plan[None], result.num_iters[None]

    assert expected[0].num_iters != expected[1].num_iters  # so they can't share their sums over devices
    for of_all, of_each in zip(
        each(costs), zip(*[(r.primal_cost, r.plan, r.num_iters) for r in expected], strict=True), strict=True
    ):
        np.testing.assert_allclose(of_all, of_each, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_second_derivatives_of_implicit(points):
    (x, y, *_), _ = points
    direction = np.random.default_rng(1).normal(size=x.shape)

    def cost(axis_name, x):
        return sinkhorn(cosine_cost(x, y), reg=0.1, num_iters=300, grad="implicit", axis_name=axis_name).primal_cost

    expected = jax.jvp(jax.grad(partial(cost, None)), (x,), (direction,))[1]

    def on_each(x, direction):
        return jax.jvp(jax.grad(partial(cost, AXIS)), (x,), (direction,))[1]

    for way in WAYS:
        got = over_devices(on_each, way, 4, (P(AXIS), P(AXIS)), P(AXIS))(x, direction)
        # Second derivatives solve a linear system twice, by conjugate gradients that stop at 8 eps of its condition.
        np.testing.assert_allclose(got / (1 if way == "shard_map" else 4), expected, rtol=1e-8, atol=1e-10)


def largest_array(jaxpr):
    """Size of the largest array in a program, including its inner programs."""
    inner = [p for e in jaxpr.eqns for leaf in jax.tree.leaves(list(e.params.values())) for p in programs(leaf)]
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    return max([*sizes, *map(largest_array, inner)], default=0)


def programs(leaf):
    jaxpr = getattr(leaf, "jaxpr", leaf)
    return [jaxpr] if hasattr(jaxpr, "eqns") else []


@pytest.mark.parametrize("name", ["unroll", "unroll, threshold", "implicit", "envelope"])
def test_no_device_holds_the_whole_matrix(name):
    size = 256

    def gradient(x, y, axis_name=None):
        def cost(x):
            options = {"reg": 0.01, **CASES[name], "num_iters": 50}
            return sinkhorn(cosine_cost(x, y), **options, axis_name=axis_name).primal_cost

        return jax.grad(cost)(x)

    whole = jax.make_jaxpr(gradient)(np.ones((size, 2)), np.ones((size, 2)))
    assert largest_array(whole.jaxpr) >= size * size
    on_each = jax.pmap(partial(gradient, axis_name=AXIS), AXIS, in_axes=(0, None))
    part = jax.make_jaxpr(on_each)(np.ones((4, size // 4, 2)), np.ones((size, 2)))
    (mapped,) = (
        p for e in part.jaxpr.eqns for leaf in jax.tree.leaves(list(e.params.values())) for p in programs(leaf)
    )
    # The largest array is a device's rows, raveled into one vector with the potentials by the derivative rules. (The
    # vectors of 60 iterations are smaller.)
    assert largest_array(mapped) <= size * size // 4 + 4 * size


@pytest.mark.parametrize("name", ["d", 3])
def test_an_axis_that_is_not_mapped_raises(name):
    with pytest.raises(ValueError, match=f"axis_name: expected the name of an axis mapped by .*, got {name!r}"):
        sinkhorn(np.ones((2, 2)), reg=0.1, axis_name=name)


def test_the_axis_of_a_vmap_raises():
    with pytest.raises(ValueError, match="axis_name: expected the name of an axis mapped by an enclosing"):
        jax.vmap(lambda cost: sinkhorn(cost, reg=0.1, axis_name="d").plan, axis_name="d")(np.ones((2, 3, 3)))
