"""Reductions over rows that are sharded over the devices of a mapped axis; with `axis_name` None they do nothing.

A device has its own rows of the cost and of all that has a number for each row. Of what has a number for each column,
or one alone, every device has a copy. A reduction over rows begins on the device's own; these functions complete it.

Under `shard_map` copies count as varying over the axis, until the result is returned (`replicated`). Then the transpose
of a sum over devices is the sum of the copies' cotangents, followed by making copies: the same as under `pmap`, and
whether or not `shard_map` checks what varies. So one derivative rule serves all three.
"""

import jax
import jax.numpy as jnp
from jax import lax

AxisName = str | tuple[str, ...]


def num_shards(axis_name: AxisName | None) -> int:
    """Devices that the rows are spread over."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def whole(shape: tuple[int, int], axis_name: AxisName | None) -> tuple[int, int]:
    """The shape of the whole matrix, of which each device has as many rows."""
    return shape[0] * num_shards(axis_name), shape[1]


def total(tree, axis_name: AxisName | None):
    """Sums over devices."""
    return tree if axis_name is None else _copies(lax.psum(tree, axis_name), axis_name)


def part(x, axis_name: AxisName | None):
    """A device's part of a sum over devices that is x, of which each has a copy."""
    return x if axis_name is None else x / num_shards(axis_name)


def minimum(x, axis_name: AxisName | None):
    """Over devices; it has no derivative."""
    return x if axis_name is None else _copies(lax.pmin(x, axis_name), axis_name)


def maximum(x, axis_name: AxisName | None):
    """Over devices; it has no derivative."""
    return x if axis_name is None else _copies(lax.pmax(x, axis_name), axis_name)


def everywhere(condition, axis_name: AxisName | None):
    """Whether a condition holds on all devices, so that they decide alike."""
    return condition if axis_name is None else minimum(condition.astype(jnp.int32), axis_name) > 0


def somewhere(condition, axis_name: AxisName | None):
    """Whether a condition holds on any device."""
    return condition if axis_name is None else maximum(condition.astype(jnp.int32), axis_name) > 0


def agreed(tree, axis_name: AxisName | None):
    """What all devices have the same copy of, and NaN on all where they have not: of that there is no result."""
    if axis_name is None:
        return tree
    firsts = total(_of_first(lax.stop_gradient(tree), axis_name), axis_name)
    same = jax.tree.map(lambda x, first: jnp.all(x == first), tree, firsts)
    is_same = everywhere(jnp.all(jnp.stack(jax.tree.leaves(same))), axis_name)
    return jax.tree.map(lambda x: jnp.where(is_same, x, jnp.nan), tree)


def varying_zero(axis_name: AxisName | None, dtype):
    """Zero, which makes what it is added to vary over the axis."""
    return jnp.zeros_like(lax.axis_index(axis_name), dtype=dtype)


def replicated(tree, axis_name: AxisName | None):
    """The first device's copy for all: bit for bit the same, and under `shard_map` known to be."""
    if axis_name is None:
        return tree
    return lax.psum(_of_first(tree, axis_name), axis_name)


def _of_first(tree, axis_name):
    """Zeros, but on the first device."""
    is_first = lax.axis_index(axis_name) == 0
    return jax.tree.map(lambda x: jnp.where(is_first, x, 0), tree)


def _copies(tree, axis_name):
    return jax.tree.map(lambda x: lax.pcast(x, axis_name, to="varying"), tree)
