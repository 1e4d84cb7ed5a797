"""Run lengths, and conditional work under `vmap`.

Work that is rarely needed is a loop of at most one iteration, rather than a `cond`. Under `vmap` a `cond` executes both
of its branches; the loop costs nothing if no problem of the batch needs the work.
"""

import jax
import jax.numpy as jnp
from jax import lax

RUN = 10  # iterations in a run, between two checks
BLOCK = 4  # runs between two tests whether all problems of a batch are done


def lengths(num_iters, threshold):
    """Lengths of the runs; the last may be shorter. With a threshold there is one more, since a run may stop early."""
    if threshold is None:
        return jnp.minimum(RUN, num_iters - jnp.arange(0, num_iters, RUN))
    return jnp.full(-(-num_iters // RUN) + 1, min(RUN, num_iters))


def scan_until(is_done, step, carry, length, count):
    """The last carry of a scan of `step(carry, length)` over `count` runs, which ends when `is_done(carry)`.

    A step has no effect once the carry is done, as it must be after `count` runs. Under `vmap`, the loop ends when all
    problems of the batch are done. (A scan would skip the other runs one by one. That takes longer than the iterations
    of small problems, above all on a GPU, where the host waits for the condition of each loop.)

    The end is tested after every `BLOCK` runs, since with `vmap` each test selects the whole carry, matrices included.
    """

    def is_needed(loop):
        return (loop[0] < count) & ~is_done(loop[1])

    def block(loop):
        return loop[0] + BLOCK, lax.scan(step, loop[1], jnp.full(BLOCK, length))[0]

    return lax.while_loop(is_needed, block, (0, carry))[1]


def once_if(condition, function, carry):
    """`function(carry)` if the condition holds, else `carry`, as a loop of at most one iteration.

    The function should compute from its argument, and change every part of it. XLA treats a part that a loop leaves
    unchanged as loop-invariant, and hoists what is computed from it out of the loop, where it is always executed.
    """
    loop = (condition, carry)
    return lax.while_loop(lambda loop: loop[0], lambda loop: (jnp.zeros_like(loop[0]), function(loop[1])), loop)[1]


def value_if(condition, function, default, *inputs):
    """`function(*inputs)` if the condition holds, else the default; computed only if needed, as by `once_if`.

    The loop replaces the inputs by zeros, so that every part of its carry changes.
    """
    zeros = jax.tree.map(jnp.zeros_like, inputs)
    return once_if(condition, lambda carry: (function(*carry[1]), zeros), (default, inputs))[0]


def row(array, i):
    """`array[i]` for i in range. Indexing would also handle negative i, which takes time in each iteration."""
    return lax.dynamic_index_in_dim(array, i, keepdims=False, allow_negative_indices=False)


def with_row(array, i, new):
    """`array.at[i].set(new)` for i in range; `at` would also handle negative i, and i out of range."""
    return lax.dynamic_update_index_in_dim(array, new, i, 0, allow_negative_indices=False)
