"""Solvers under `jax_debug_nans`, which raises if a program returns NaN, and through `jax.export`, serialised."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.ot import ipot, released_sinkhorn, sinkhorn, unbalanced_sinkhorn
from tests.parameters import mostly_slow

SOLVERS = {
    "unroll": partial(sinkhorn, reg=0.01, num_iters=30),
    "unroll, sharp": partial(sinkhorn, reg=1e-4, num_iters=30),  # K underflows, and the log domain is needed
    "unroll, log": partial(sinkhorn, reg=0.01, num_iters=30, method="log"),
    "threshold": partial(sinkhorn, reg=0.05, num_iters=200, threshold=1e-3),
    "implicit": partial(sinkhorn, reg=0.1, num_iters=300, grad="implicit", reg_start=1.0),
    "envelope": partial(sinkhorn, reg=0.05, num_iters=30, grad="envelope", history=True),
    "ipot": partial(ipot, beta=0.5, num_iters=30),
    "unbalanced": partial(unbalanced_sinkhorn, reg=0.05, rho=1.0, num_iters=100, threshold=1e-4),
    "semi-relaxed": partial(unbalanced_sinkhorn, reg=0.01, rho=(jnp.inf, 1.0), num_iters=100, grad="envelope"),
    "released": lambda cost, a, b: released_sinkhorn(cost, reg=0.05),
}


@pytest.fixture
def masked_problem(make_problem):
    """In float32, with points that have no mass."""
    cost, a, b = make_problem(6, 9)
    a[2], b[:2] = 0, 0
    return tuple(jnp.asarray(x, jnp.float32) for x in (cost, a / a.sum(), b / b.sum()))


@pytest.mark.parametrize("name", mostly_slow(SOLVERS, "unroll, sharp"))
def test_debug_nans_finds_none_in_values_and_gradients(masked_problem, name):
    def value(*problem):
        result = SOLVERS[name](*problem)
        return result.primal_cost + result.reg_cost

    with jax.debug_nans(True):
        value, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(*masked_problem)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_debug_nans_finds_a_nan_in_the_problem(masked_problem):
    cost, a, b = masked_problem
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.block_until_ready(jax.jit(SOLVERS["unroll"])(cost.at[0, 0].set(jnp.nan), a, b))


@pytest.mark.parametrize("name", mostly_slow(SOLVERS, "envelope"))
def test_a_batch_of_any_size_can_be_exported_and_restored(masked_problem, name):
    def value(*problem):
        result = SOLVERS[name](*problem)
        return result.primal_cost + result.reg_cost, result

    program = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True)))
    (size,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in masked_problem]
    exported = jax.export.export(program)(*shapes)
    restored = jax.export.deserialize(exported.serialize())
    batch = [jnp.stack([x, x]) for x in masked_problem]
    got, expected = jax.tree.leaves(restored.call(*batch)), jax.tree.leaves(program(*batch))
    for x, y in zip(got, expected, strict=True):
        # The same operations, but fused differently for an unknown size: float32, over up to 300 iterations.
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)
