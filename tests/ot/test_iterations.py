"""The range of the kernel domain, and the memory of the derivative."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import Status, _batching, _iterations, _loops, sinkhorn, unbalanced_sinkhorn
from tests.parameters import mostly_slow

rng = np.random.default_rng(0)
LINE = np.linspace(0, 1, 20)[:, None] - np.linspace(0.3, 1.3, 30)[None, :]
COSTS = {
    "uniform": rng.uniform(0, 1, (20, 30)),
    "line": LINE**2,  # converges slowly: scalings keep growing for many iterations
    "unwanted": np.where(np.arange(30) == 3, 0.0, 1.0) * rng.uniform(0.5, 1, (20, 30)) + np.eye(20, 30),
}


def solve(cost, method, reg, **options):
    result = sinkhorn(cost, reg=reg, method=method, **options)
    return result.primal_cost, result


@partial(jax.jit, static_argnames=("method", "reg", "num_iters", "threshold"))
def gradient(cost, method, reg, **options):
    return jax.value_and_grad(lambda c: solve(c, method, reg, **options), has_aux=True)(cost)


@pytest.mark.parametrize("reg", mostly_slow([0.05, 1e-3, 1e-4]))
@pytest.mark.usefixtures("standard_promotion")
def test_float32_is_as_accurate_as_the_log_domain(reg):
    costs = jnp.float32(np.stack(list(COSTS.values())))

    def solutions(costs, method):
        return jax.vmap(lambda cost: gradient(cost, method, reg, num_iters=25))(costs)

    (_, exact), exact_gradient = solutions(costs.astype(jnp.float64), "log")
    errors = {}
    for method in ("stabilized", "log"):
        (_, result), got = solutions(costs, method)
        assert set(result.status.tolist()) == {Status.LIMIT}
        errors[method] = [
            np.abs(result.primal_cost - exact.primal_cost),
            np.abs(result.plan - exact.plan).max((1, 2)),
            np.abs(got - exact_gradient).max((1, 2)) / np.abs(exact_gradient).max((1, 2)),
        ]
    # Exponents of 1 / reg have relative rounding errors of 6e-8. They change the plan, and its cost of at most 1, by as
    # much, and gradients, which sum over 25 iterations, by more. How much more depends on the problem; the error of the
    # log domain shows it. By chance, either may be a few times more accurate.
    rounding = np.array([[1], [1], [10]]) * 6e-8 / reg + 1e-6
    np.testing.assert_array_less(errors["stabilized"], 4 * np.array(errors["log"]) + rounding)


@pytest.fixture
def narrow(monkeypatch):
    """No scaling is in range, so each run is repeated in the log domain, also in the backward pass."""
    jax.clear_caches()  # the limits are constants of compiled programs
    monkeypatch.setattr(_iterations, "largest", lambda array, power: 0.0)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("narrow")
@pytest.mark.slow
@pytest.mark.parametrize("threshold", [None, 1e-2])
def test_out_of_range_runs_are_repeated(threshold):
    costs = np.stack([COSTS["uniform"], COSTS["line"]])
    options = {"reg": 0.05, "num_iters": 23, "threshold": threshold}
    (values, results), gradients = jax.jit(jax.vmap(lambda c: gradient(c, "stabilized", **options)))(costs)
    for i, cost in enumerate(costs):
        (value, result), expected = gradient(cost, "log", **options)
        # The same iterations, restarted from the same potentials.
        np.testing.assert_allclose(values[i], value, rtol=1e-13)
        np.testing.assert_allclose(results.plan[i], result.plan, atol=1e-14)
        np.testing.assert_allclose(gradients[i], expected, atol=1e-12)
        assert results.num_iters[i] == result.num_iters


@pytest.mark.slow
def test_in_range_runs_are_not_repeated(monkeypatch):
    monkeypatch.setattr(_iterations, "log_sum_exp", lambda terms, axis, *_: jnp.full(terms.shape[1 - axis], jnp.nan))
    jax.clear_caches()
    (_, result), got = gradient(COSTS["uniform"], "stabilized", 0.05, num_iters=25)
    jax.clear_caches()
    assert result.status == Status.LIMIT
    assert np.isfinite(got).all()


@pytest.mark.slow
def test_gradient_where_a_scaling_starts_below_the_smallest_number():
    # The first row starts 100 exponents below the second, and the run is repeated in the log domain.
    cost, a, b = np.float32([[0, 1], [-1, -1]]), np.float32([0.99, 0.01]), np.float32([0.5, 0.5])

    def value(cost, method):
        return sinkhorn(cost, a, b, reg=0.01, num_iters=10, method=method).primal_cost

    gradients = [jax.grad(value)(jnp.asarray(cost), method) for method in ("stabilized", "log")]
    np.testing.assert_allclose(*gradients, atol=1e-4)  # exponents of 100 are rounded at 6e-6


@pytest.mark.slow
def test_starts_far_from_the_solution():
    # Random potentials: some rows have almost no mass at first, with exponents of 1e4.
    cost, init = COSTS["uniform"], (rng.uniform(-500, 500, 20), np.zeros(30))
    results = [sinkhorn(cost, reg=0.05, num_iters=30, init=init, method=m) for m in ("stabilized", "log")]
    np.testing.assert_allclose(results[0].plan, results[1].plan, atol=1e-10)  # exponents of 1e4 lose four digits


@pytest.mark.slow
def test_batches_larger_than_the_cache_are_split_into_chunks(monkeypatch):
    costs = np.random.default_rng(1).uniform(0, 1, (7, 5, 8))
    regs = np.linspace(0.05, 0.2, 7)

    def solve(cost, reg):
        return sinkhorn(cost, reg=reg, num_iters=25, method="kernel").primal_cost

    program = jax.vmap(jax.value_and_grad(solve))
    whole = jax.jit(program)(costs, regs)
    monkeypatch.setattr(_batching, "CACHE", 3 * 5 * 8 * 8)  # holds three matrices: chunks of 3, 3 and 1
    jax.clear_caches()
    chunked = jax.jit(program).lower(costs, regs)
    jax.clear_caches()
    assert "tensor<3x5x8xf64>" in chunked.as_text()
    # The same sums, in another program.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-13), chunked.compile()(costs, regs), whole)
    assert [_batching._chunk(size, 5 * 8 * 8) for size in (1, 2, 6, 7, 100)] == [1, 2, 3, 3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", mostly_slow(["stabilized", "log"], "stabilized"))
def test_memory_of_the_gradient_grows_by_vectors_only(method):
    n, m = 48, 64

    def memory(num_iters):
        program = jax.jit(jax.grad(lambda c: solve(c, method, 0.1, num_iters=num_iters)[0]))
        return program.lower(jnp.zeros((n, m))).compile().memory_analysis().temp_size_in_bytes

    per_iteration = (memory(410) - memory(10)) / 400
    # φ and γ of each iteration, and a few copies of them; one matrix would be 48 · 64.
    assert per_iteration <= 8 * 6 * (n + m)


def test_second_derivatives_raise():
    with pytest.raises(NotImplementedError, match=r'grad="implicit" of .* has second'):
        jax.hessian(lambda c: solve(c, "stabilized", 0.1)[0])(COSTS["uniform"])


@pytest.mark.parametrize("ends", [[0], [1], [7], [3, 12, 5], [99, 2]])
def test_runs_end_when_all_problems_of_a_batch_are_done(ends):
    calls = []

    def runs(end):
        def is_done(carry):
            return carry[0] >= jnp.minimum(end, 10)  # of at most 10 runs

        def step(carry, length):
            k, total = carry
            jax.debug.callback(lambda _: calls.append(1), total)
            return (jnp.where(is_done(carry), k, k + 1), jnp.where(is_done(carry), total, total + length)), None

        return _loops.scan_until(is_done, step, (jnp.int32(0), jnp.int32(0)), 3, 10)

    k, total = jax.jit(jax.vmap(runs))(jnp.asarray(ends, jnp.int32))
    jax.effects_barrier()
    assert k.tolist() == [min(end, 10) for end in ends]
    assert total.tolist() == [3 * min(end, 10) for end in ends]
    blocks = -(-min(max(ends), 10) // _loops.BLOCK)
    assert len(calls) == blocks * _loops.BLOCK * len(ends)


@pytest.mark.parametrize("num_iters", mostly_slow([1, 9, 10, 11, 39, 40, 41], 41))
@pytest.mark.parametrize("solver", [sinkhorn, partial(unbalanced_sinkhorn, rho=1.0)], ids=["sinkhorn", "unbalanced"])
def test_no_threshold_and_one_that_is_not_met_end_after_the_same_iterations(solver, num_iters):
    run = jax.jit(lambda cost, threshold: solver(cost, reg=0.02, num_iters=num_iters, threshold=threshold, grad="none"))
    with jax.enable_x64(True):  # where no error of the line is 0 after 41 iterations
        cost = jnp.asarray(COSTS["line"])
        without, result = run(cost, None), run(cost, 1e-15)
    assert result.status == Status.LIMIT
    assert result.num_iters == without.num_iters == num_iters
    np.testing.assert_allclose(result.plan, without.plan, rtol=1e-12)
