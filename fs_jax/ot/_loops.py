"""Loops in runs, and work that is seldom needed.

Such work stands in a loop that runs once or never where a `cond` might be expected: under `vmap` a `cond` costs both of
its branches, such a loop nothing when no problem of the batch needs it.
"""

import jax
import jax.numpy as jnp
from jax import lax

RUN = 10  # iterations between two looks at what they have come to


def lengths(num_iters, threshold):
    """Of the runs. The last may be shorter; with a threshold there is one more, since one may end before its time."""
    if threshold is None:
        return jnp.minimum(RUN, num_iters - jnp.arange(0, num_iters, RUN))
    return jnp.full(-(-num_iters // RUN) + 1, RUN)


def once_if(condition, function, carry):
    """`function(carry)` if the condition holds, else `carry`: a loop that runs once or never.

    The function should start from what it is given, and give all of it back changed: XLA takes for invariant what a
    loop leaves as it is, and moves all that follows from it out of the loop, where it would always be done.
    """
    loop = (condition, carry)
    return lax.while_loop(lambda loop: loop[0], lambda loop: (jnp.zeros_like(loop[0]), function(loop[1])), loop)[1]


def value_if(condition, function, default, *inputs):
    """`function(*inputs)` if the condition holds, else the default; as `once_if`, computed only where it is needed.

    The loop leaves zeros in the inputs' places, so that they are changed.
    """
    zeros = jax.tree.map(jnp.zeros_like, inputs)
    return once_if(condition, lambda carry: (function(*carry[1]), zeros), (default, inputs))[0]
