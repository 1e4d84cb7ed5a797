"""Numerically safe logarithms, sums, products and means."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _sharding

# Stands for log 0. It is so far below zero that exp underflows whatever is added to it, and so far above the lowest
# float32 that the sum of two of them and a cost is finite. Unlike -inf it never gives NaN, in values or in gradients.
MASKED = -1e30


def result_type(*types):
    """The dtype of JAX's standard promotion, even if the user has set strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*types)


def log_weights(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Log w at points with mass, `MASKED` at points without, and NaN where w is NaN."""
    present = weights != 0
    return jnp.where(present, jnp.log(jnp.where(present, weights, 1)), MASKED)


def log_sum_exp(terms: Float[Array, "n m"], axis: int, axis_name=None) -> Float[Array, " k"]:
    """Log Σ exp(terms) of finite terms along an axis, with the largest term factored out.

    With `axis_name`, the sum is over the rows of all devices.
    """
    largest = _sharding.maximum(lax.stop_gradient(terms.max(axis, keepdims=True)), axis_name)
    return jnp.log(_sharding.total(jnp.exp(terms - largest).sum(axis), axis_name)) + largest.squeeze(axis)


def product(axes, left, right):
    # The default precision on a GPU is TF32, with which the iterations stall at a marginal error of 1e-3.
    return jnp.einsum(axes, left, right, precision=lax.Precision.HIGHEST)


def largest(array, power):
    """The dtype's largest number to a power: 9e6 for 0.18 and 2e14 for 0.37, in float32."""
    return float(jnp.finfo(array.dtype).max) ** power


def within(limit, *arrays):
    """Whether all numbers are at most the limit; False if any is NaN.

    This doesn't use the maximum: in a batch on a CPU, XLA's maximum of an array of NaN can be -inf.
    """
    return jnp.all(jnp.concatenate([array.ravel() for array in arrays]) <= limit)


def inverse(weights):
    return jnp.where(weights != 0, 1 / jnp.where(weights != 0, weights, 1), 0)


def normalised(plan, axis, axis_name=None):
    # Divides by the sum itself and not by the weights: because potentials are rounded (a relative 6e-8 of an exponent
    # of hundreds), sums differ slightly from the weights, and errors of rows that don't quite sum to one would grow
    # from iteration to iteration.
    total = _sharding.total(plan.sum(axis, keepdims=True), axis_name)
    return plan / jnp.where(total == 0, 1, total)
