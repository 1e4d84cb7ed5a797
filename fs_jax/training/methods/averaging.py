"""Weight averaging: evaluate a moving average of the weights."""

import jax
import jax.numpy as jnp

from fs_jax._utils.validation import check_number
from fs_jax.training.methods.method import Method


def averaged(method: Method, *, decay: float = 0.999) -> Method:
    """Train with `method`, and evaluate an exponential moving average of the weights and BatchNorm statistics.

    After step t = 0, 1, ..., with weights w, the average is updated as

        d = min(decay, (1 + t) / (10 + t))
        w_avg <- d * w_avg + (1 - d) * w

    The smaller d of the first steps forgets the initial weights quickly.

    Args:
      method: The training method. Training uses the weights, not their average.
      decay: Decay in [0, 1). 0.999 averages over about 1,000 steps.

    Returns:
      The method with averaging. `TrainState.evaluated` returns the average.

    Raises:
      ValueError: for a decay outside [0, 1).

    Example:
      >>> from fs_jax.training.methods import standard
      >>> method = averaged(standard(), decay=0.5)
      >>> own = method.init({"params": jnp.zeros(1)})
      >>> own = method.update(own, {"params": jnp.ones(1)})
      >>> method.evaluated(own, {"params": jnp.ones(1)})["params"].tolist()
      [0.8999999761581421]

    Source: Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the exponential average
    with an increasing decay is TensorFlow's `ExponentialMovingAverage`.
    """
    check_number("decay", decay, at_least=0, below=1)

    def init(variables):
        # At least float32, as bfloat16 rounds most decays to 1. Copies, as the step donates its buffers.
        with jax.numpy_dtype_promotion("standard"):
            average = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), variables)
        return {"average": average, "steps": jnp.zeros((), jnp.int32), "method": method.init(variables)}

    def update(own, variables):
        steps = own["steps"].astype(jnp.float32)
        rate = jnp.minimum(decay, (1 + steps) / (10 + steps))

        def mixed(old, new):
            new = new.astype(old.dtype)
            return new + rate.astype(old.dtype) * (old - new)

        average = jax.tree.map(mixed, own["average"], variables)
        return {"average": average, "steps": own["steps"] + 1, "method": method.update(own["method"], variables)}

    def loss(apply, variables, batch, context):
        return method.loss(apply, variables, batch, context._replace(own=context.own["method"]))

    def evaluated(own, variables):
        average = jax.tree.map(lambda mean, x: mean.astype(x.dtype), own["average"], variables)
        return method.evaluated(own["method"], average)

    return Method(loss, init, update, evaluated)
