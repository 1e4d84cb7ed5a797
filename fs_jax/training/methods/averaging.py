"""Weight averaging: what is evaluated is the average of the weights along the way."""

import jax
import jax.numpy as jnp
import numpy as np

from fs_jax._utils.validation import check_number
from fs_jax.training.methods.method import Method


def averaged(method: Method, *, decay: float = 0.999) -> Method:
    """The same training, evaluated at an exponential moving average of the weights and of BatchNorm's statistics.

    w_bar <- d w_bar + (1 - d) w after each step, with d = min(decay, (1 + t) / (10 + t)) after t steps before: short
    at first, when the weights are still far from where they go.

    Args:
      method: The method that trains. It sees the weights, not their average.
      decay: In [0, 1); 0.999 averages over some thousand steps.

    Raises:
      ValueError: for a decay outside of this range.

    Example:
      >>> from fs_jax.training.methods import standard
      >>> method = averaged(standard(), decay=0.5)
      >>> own = method.init({"params": jnp.zeros(1)})
      >>> own = method.update(own, {"params": jnp.ones(1)})
      >>> method.evaluated(own, {"params": jnp.ones(1)})["params"].tolist()
      [0.8999999761581421]

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, for the
    idea; the rising decay is TensorFlow's `ExponentialMovingAverage`.
    """
    check_number("decay", decay, at_least=0, at_most=np.nextafter(1, 0))

    def init(variables):
        average = jax.tree.map(jnp.array, variables)  # copies: the step donates its buffers
        return {"average": average, "steps": jnp.zeros((), jnp.int32), "method": method.init(variables)}

    def update(own, variables):
        steps = own["steps"].astype(jnp.float32)
        rate = jnp.minimum(decay, (1 + steps) / (10 + steps))
        average = jax.tree.map(lambda old, new: _mixed(old, new, rate), own["average"], variables)
        return {"average": average, "steps": own["steps"] + 1, "method": method.update(own["method"], variables)}

    def loss(apply, variables, batch, context):
        return method.loss(apply, variables, batch, context._replace(own=context.own["method"]))

    return Method(loss, init, update, evaluated=lambda own, variables: own["average"])


def _mixed(old, new, rate):
    return (new + rate.astype(new.dtype) * (old - new)).astype(new.dtype)
