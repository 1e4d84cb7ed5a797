"""Weights and sums as logarithms, products and means."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _sharding

# Far enough below zero that exp underflows whatever is added to it, and far enough from the end of float32 that two of
# them and a cost still have a finite sum: unlike -inf it never makes NaN, in values or in gradients.
MASKED = -1e30


def result_type(*types):
    """The type that JAX's own rules of promotion give, also where the user has made them strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*types)


def log_weights(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Log w where there is mass, `MASKED` where there is none, NaN where w is NaN."""
    present = weights != 0
    return jnp.where(present, jnp.log(jnp.where(present, weights, 1)), MASKED)


def log_sum_exp(terms: Float[Array, "n m"], axis: int, axis_name=None) -> Float[Array, " k"]:
    """Log Σ exp(terms) along an axis of finite terms, the largest taken out of the sum.

    With `axis_name` along the rows of all devices.
    """
    largest = _sharding.maximum(lax.stop_gradient(terms.max(axis, keepdims=True)), axis_name)
    return jnp.log(_sharding.total(jnp.exp(terms - largest).sum(axis), axis_name)) + largest.squeeze(axis)


def product(axes, left, right):
    # On a GPU the default precision is TF32's, in which the iterations stall at a marginal error of 1e-3.
    return jnp.einsum(axes, left, right, precision=lax.Precision.HIGHEST)


def largest(array, power):
    """The dtype's largest number to a power: 9e6 and 2e14 in float32 for 0.18 and 0.37."""
    return float(jnp.finfo(array.dtype).max) ** power


def within(limit, *arrays):
    """Whether all numbers are at most the limit, which NaN is not.

    Not by their maximum: of arrays that are NaN throughout XLA's on a CPU can be -inf, in a batch and not alone.
    """
    return jnp.all(jnp.stack([jnp.all(array <= limit) for array in arrays]))


def inverse(weights):
    return jnp.where(weights != 0, 1 / jnp.where(weights != 0, weights, 1), 0)


def normalised(plan, axis, axis_name=None):
    # By the sum itself and not by the weights, which rounded potentials meet only to 6e-8 of an exponent of hundreds:
    # errors of rows that don't quite sum to one would grow from iteration to iteration.
    total = _sharding.total(plan.sum(axis, keepdims=True), axis_name)
    return plan / jnp.where(total == 0, 1, total)
