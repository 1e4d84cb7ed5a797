"""A network as attacks see it."""

import functools
from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import PyTree


def as_logits_fn(model: Any, variables: PyTree) -> Partial:
    """A network as attacks see it: `logits_fn(images)`, in inference mode, whose variables are an argument under jit.

    Example:
      >>> import jax.numpy as jnp
      >>> from fs_jax.models import WideResNet
      >>> variables = jax.eval_shape(WideResNet(10, 1).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> jax.eval_shape(Partial(_logits(WideResNet(10, 1))), variables, jnp.zeros((3, 8, 8, 1))).shape
      (3, 10)
    """
    return Partial(_logits(model), jax.device_put(variables))  # on the device once, not with every batch


@functools.lru_cache(maxsize=32)
def _logits(model):
    """The same function for the same network, so that nothing is compiled twice."""
    return lambda variables, images: model.apply(variables, images, train=False)[0]
