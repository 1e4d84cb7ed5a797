"""Weights and sums as logarithms."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Far enough below zero that exp underflows whatever is added to it, and far enough from the end of float32 that two of
# them and a cost still have a finite sum: unlike -inf it never makes NaN, in values or in gradients.
MASKED = -1e30


def log_weights(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Log w where there is mass, `MASKED` where there is none, NaN where w is NaN."""
    present = weights != 0
    return jnp.where(present, jnp.log(jnp.where(present, weights, 1)), MASKED)


def log_sum_exp(terms: Float[Array, "n m"], axis: int) -> Float[Array, " k"]:
    """Log Σ exp(terms) along an axis of finite terms, the largest taken out of the sum."""
    largest = lax.stop_gradient(terms.max(axis, keepdims=True))
    return jnp.log(jnp.exp(terms - largest).sum(axis)) + largest.squeeze(axis)
