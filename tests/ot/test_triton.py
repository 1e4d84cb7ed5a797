"""The kernels, interpreted on a CPU, equal the plain iterations; tests marked gpu compile them and run on a GPU.

Some tests lower programs for CUDA, which works without a GPU, and count the kernels in them.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, _dispatch, _iterations, _triton, ipot, sinkhorn
from tests.parameters import mostly_slow, needs_cuda


@pytest.fixture
def interpreted(monkeypatch):
    """Makes Sinkhorn use the kernels on this CPU, interpreted."""
    jax.clear_caches()  # programs compiled earlier don't use the kernels
    monkeypatch.setitem(_dispatch.KERNELS, "cpu", True)
    yield
    jax.clear_caches()


def draw(shape, batch, seed=0):
    """Costs of up to 1, and uneven weights, some of them zero."""
    rng = np.random.default_rng(seed)
    n, m = shape
    cost, a, b = (rng.uniform(low, high, (batch, *s)) for low, high, s in ((0, 1, (n, m)), (1, 3, (n,)), (1, 3, (m,))))
    if n > 1:
        a[:, 0] = 0
    if m > 2:
        b[0, [0, -1]] = 0
    return cost, a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)


def solve(problems, reg, dtype=jnp.float32, **options):
    """Results of a batch, and gradients of a number that depends on all of their outputs."""
    problems = [jnp.asarray(x, dtype) for x in problems]
    rng = np.random.default_rng(1)
    weights, f, g = (jnp.asarray(rng.normal(size=x.shape[1:]), dtype) for x in problems)

    def value(cost, a, b):
        result = sinkhorn(cost, a, b, reg=reg, **options)
        total = jnp.sum(weights * result.plan) + result.primal_cost + result.reg_cost
        total += jnp.sum(jnp.where(a > 0, f * result.f, 0)) + jnp.sum(jnp.where(b > 0, g * result.g, 0))
        return total, result

    return jax.jit(jax.vmap(jax.grad(value, argnums=(0, 1, 2), has_aux=True)))(*problems)


def distances(one, other):
    """Largest differences of the plans, the costs and the gradients, each relative to the largest entry."""
    (gradients, result), (other_gradients, other_result) = one, other
    pairs = [
        (result.plan, other_result.plan),
        (result.primal_cost, other_result.primal_cost),
        (result.reg_cost, other_result.reg_cost),
        *zip(gradients, other_gradients, strict=True),
    ]
    return np.array([np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max() for x, y in pairs])


SIZES = [
    ((1, 4), 0.1, 5),
    ((60, 60), 1e-4, 8),  # exponents of 1e4
    ((250, 130), 0.05, 3),  # in several tiles
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("shape", "reg", "num_iters"), mostly_slow(SIZES))
def test_results_and_gradients_are_exact_to_rounding(shape, reg, num_iters):
    problems = draw(shape, 3)
    got = solve(problems, reg, num_iters=num_iters)
    exact = solve(problems, reg, jnp.float64, num_iters=num_iters, method="log")
    assert set(got[1].status.tolist()) == {Status.LIMIT}
    assert (got[1].plan[:, 0] == 0).all() or shape[0] == 1
    # Exponents of 1 / reg have relative rounding errors of 6e-8; then come a few sums.
    np.testing.assert_array_less(distances(got, exact), 6e-8 / reg + 2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_each_problem_of_a_batch_stops_on_its_own():
    cost, a, b = draw((7, 5), 4)
    cost *= np.array([0.1, 0.5, 2.0, 20.0])[:, None, None]
    options = {"reg": 0.1, "num_iters": 60, "threshold": 1e-3}
    got, exact = solve((cost, a, b), **options), solve((cost, a, b), dtype=jnp.float64, method="log", **options)
    assert got[1].status.tolist() == [Status.CONVERGED] * 3 + [Status.LIMIT]
    assert len(set(got[1].num_iters.tolist())) == 4
    np.testing.assert_array_equal(got[1].num_iters, exact[1].num_iters)
    np.testing.assert_array_equal(got[1].status, exact[1].status)
    np.testing.assert_array_less(distances(got, exact), 6e-8 * 20 / 0.1 + 2e-6)  # costs up to 20


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_results_from_random_initial_potentials():
    # Random initial potentials, and points with almost no mass: the first sums are e^±5000, later ones 1e-25.
    cost, a, b = draw((6, 9), 2)
    a[:, 1], b[:, 1] = 1e-12, 1e-13
    init = np.random.default_rng(1).uniform(-500, 500, 6).astype(np.float32), np.zeros(9, np.float32)
    options = {"reg": 0.1, "num_iters": 30, "init": init}
    got, exact = solve((cost, a, b), **options), solve((cost, a, b), dtype=jnp.float64, method="log", **options)
    np.testing.assert_array_less(distances(got, exact), 2 * 6e-8 * 5000)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("way", mostly_slow(["grad of vmap", "vmap of vmap", "pmap"]))
def test_transformations_compose(way):
    costs = jnp.asarray(draw((6, 9), 4)[0], jnp.float32)

    def value(cost, **options):
        return sinkhorn(cost, reg=0.1, num_iters=5, **options).primal_cost

    expected = jax.vmap(jax.grad(lambda c: value(c, method="log")))(costs)
    got = {
        "grad of vmap": lambda: jax.jit(jax.grad(lambda c: jax.vmap(value)(c).sum()))(costs),
        "vmap of vmap": lambda: jax.vmap(jax.vmap(jax.grad(value)))(costs.reshape(2, 2, 6, 9)).reshape(costs.shape),
        "pmap": lambda: jax.pmap(jax.grad(value))(costs),
    }[way]()
    np.testing.assert_allclose(got, expected, atol=1e-5)  # rounding of exponents of 10, in a few sums


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_forward_mode_uses_the_plain_iterations():
    costs = jnp.asarray(draw((6, 9), 4)[0], jnp.float32)
    value = jax.vmap(lambda cost: sinkhorn(cost, reg=0.1, num_iters=5).primal_cost)
    expected = jax.grad(lambda costs: value(costs).sum())(costs)
    # Forward mode is the transpose of reverse mode.
    tangents = jnp.asarray(np.random.default_rng(2).normal(size=costs.shape), jnp.float32)
    _, forward = jax.jvp(value, (costs,), (tangents,))
    np.testing.assert_allclose(forward, jnp.sum(expected * tangents, (1, 2)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_if_the_kernel_stops_too_early_the_problem_is_solved_again(monkeypatch):
    cost, a, b = (x[0] for x in draw((7, 5), 1))

    def solve_once():
        return sinkhorn(*(jnp.float32(x) for x in (cost, a, b)), reg=0.05, num_iters=400, threshold=1e-4, grad="none")

    right = solve_once()
    # A kernel that always stops after one iteration.
    forward = _triton._forward
    monkeypatch.setattr(_triton, "_forward", lambda *args: forward(*args[:4], jnp.float32(1e30), *args[5:]))
    jax.clear_caches()
    result = solve_once()
    assert right.converged
    assert result.converged
    assert abs(result.num_iters - right.num_iters) <= 1  # rounding may decide the last


@pytest.mark.usefixtures("interpreted")
def test_kernels_stop_so_that_no_problem_is_solved_again(monkeypatch):
    # One problem that is solved again makes its whole batch wait. These thresholds are errors that the kernel reaches.
    costs = jnp.asarray(np.random.default_rng(0).uniform(size=(40, 6, 6)), jnp.float32)
    options = {"reg": 0.05, "num_iters": 1000, "grad": "none"}
    reached = jax.jit(jax.vmap(lambda cost: sinkhorn(cost, **options | {"num_iters": 8}).marginal_error))(costs)
    plain = _iterations.make_iterations

    def never(*options):
        return lambda *problem: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), plain(*options)(*problem))

    def solve_to(thresholds):
        jax.clear_caches()
        return jax.jit(jax.vmap(lambda cost, threshold: sinkhorn(cost, threshold=threshold, **options)))(
            costs, thresholds
        )

    monkeypatch.setattr(_iterations, "make_iterations", never)
    assert reached.min() > 1e-4
    result = solve_to(reached)
    assert (result.marginal_error <= reached).all()
    assert result.num_iters.max() < 1000
    monkeypatch.setattr(_triton, "rounding_floor", lambda shape, mass, dtype: jnp.zeros_like(mass))
    assert np.isnan(solve_to(reached).marginal_error).any()  # what would happen if the kernel aimed at the threshold


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_a_threshold_below_rounding_stalls_as_without_a_kernel():
    cost, a, b = (jnp.float32(x[0]) for x in draw((7, 5), 1))
    result = sinkhorn(cost, a, b, reg=0.1, num_iters=3000, threshold=1e-12, grad="none")
    assert result.status == Status.STALLED
    assert result.num_iters < 1000


def kernels_for_cuda(function, *arguments):
    """Number of Triton kernels in a program for a CUDA device."""
    device = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # the backend then asks for the kind of GPU
        kind = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
        device = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))
    with device:
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call_ffi")


@pytest.mark.parametrize(
    ("expected", "shape", "options"),
    mostly_slow(
        [
            (2, (5, 7), {}),
            (2, (256, 256), {}),
            (0, (4, 257), {}),
            (0, (5, 7), {"fused": False}),
            (0, (5, 7), {"method": "log"}),
            (0, (5, 7), {"threshold": 0.1}),  # differentiated through the plain iterations
            (1, (5, 7), {"grad": "implicit"}),
            (1, (5, 7), {"grad": "implicit", "threshold": 0.1}),
        ],
        (2, (256, 256), {}),
        (0, (4, 257), {}),
    ),
)
def test_kernels_in_the_gradient_of_a_batch_on_a_gpu(expected, shape, options):
    assert kernels_for_cuda(gradient_of_a_batch(**options), jax.ShapeDtypeStruct((3, *shape), jnp.float32)) == expected


def gradient_of_a_batch(**options):
    return jax.grad(lambda c: jax.vmap(lambda c: sinkhorn(c, reg=0.1, num_iters=9, **options).primal_cost)(c).sum())


@pytest.mark.slow
def test_no_kernels_in_float64_and_none_on_a_cpu():
    assert kernels_for_cuda(gradient_of_a_batch(), jax.ShapeDtypeStruct((3, 5, 7), jnp.float64)) == 0
    on_a_cpu = jax.jit(gradient_of_a_batch()).lower(jax.ShapeDtypeStruct((3, 5, 7), jnp.float32))
    assert "triton" not in on_a_cpu.as_text()


# On a GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (30, 20), (60, 60), (128, 128), (60, 250), (250, 130), (256, 256)])
def test_compiled_kernels_are_exact_to_rounding(shape):
    problems = draw(shape, 40)
    for reg, options in ((0.05, {"num_iters": 60}), (1e-3, {"num_iters": 20})):
        got = solve(problems, reg, **options)
        with jax.default_device(jax.devices("cpu")[0]):
            exact = solve(problems, reg, jnp.float64, method="log", **options)
        got, exact = jax.tree.map(np.asarray, (got, exact))
        # As above, and the GPU's exponentials have relative errors of 2e-7.
        np.testing.assert_array_less(distances(got, exact), 6e-8 / reg + 1e-5)


SOLVERS = {
    "kernels": lambda *p: sinkhorn(*p, reg=0.02, num_iters=2000),
    "stabilized": lambda *p: sinkhorn(*p, reg=0.02, num_iters=2000, fused=False),
    "kernel domain": lambda *p: sinkhorn(*p, reg=0.02, num_iters=2000, method="kernel"),
    "log domain": lambda *p: sinkhorn(*p, reg=0.02, num_iters=2000, method="log"),
    "ipot": lambda *p: ipot(*p, beta=0.5, num_iters=200),
}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_on_a_gpu_equal_float64_on_a_cpu(name):
    problems = draw((60, 70), 8)
    got = jax.jit(jax.vmap(SOLVERS[name]))(*(jnp.asarray(x, jnp.float32) for x in problems))
    with jax.default_device(jax.devices("cpu")[0]):
        exact = jax.jit(jax.vmap(SOLVERS[name]))(*problems)
    got, exact = jax.tree.map(np.asarray, (got, exact))
    # Rounding of exponents of 50 (for IPOT, of 400). With TF32, they would stall at 1e-3.
    assert (got.marginal_error < exact.marginal_error + 5e-5).all()
    np.testing.assert_allclose(got.primal_cost, exact.primal_cost, rtol=1e-4)
    np.testing.assert_allclose(got.plan, exact.plan, atol=1e-4 * exact.plan.max())
