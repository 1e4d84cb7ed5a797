"""Reductions over rows that are sharded over the devices of a mapped axis. They do nothing if `axis_name` is None.

Arrays with an entry for each row are sharded: a device has its own rows. Arrays with an entry for each column, and
scalars, are replicated: every device has a copy. A reduction over rows is first done over a device's own rows; the
functions of this module then reduce over devices.

Under `shard_map`, copies are marked as varying over the axis until the result is returned (`replicated`). The transpose
of a sum over devices then sums the copies' cotangents and gives every device a copy of the sum. This is the same under
`pmap`, and under `shard_map` with and without its check of varying axes (`check_vma`), so one derivative rule serves
all three.
"""

import jax
import jax.numpy as jnp
from jax import lax

AxisName = str | tuple[str, ...]


def num_shards(axis_name: AxisName | None) -> int:
    """Number of devices over which the rows are sharded."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def check_axis(axis_name: AxisName | None) -> None:
    """Raises a NameError or a ValueError unless the axis is mapped over devices; that of a `jax.vmap` is not."""
    if axis_name is not None:
        _copies(jnp.zeros(()), axis_name)


def global_shape(shape: tuple[int, int], axis_name: AxisName | None) -> tuple[int, int]:
    """The shape of the whole matrix, from that of a device's rows; all devices have equally many."""
    return shape[0] * num_shards(axis_name), shape[1]


def total(tree, axis_name: AxisName | None):
    """The sum over devices, of each array of a tree."""
    return tree if axis_name is None else _copies(lax.psum(tree, axis_name), axis_name)


def part(x, axis_name: AxisName | None):
    """An equal share of x for each device, so that `total` of the shares is x. All devices have a copy of x."""
    return x if axis_name is None else x / num_shards(axis_name)


def minimum(x, axis_name: AxisName | None):
    """The minimum over devices. It has no derivative."""
    return x if axis_name is None else _copies(lax.pmin(x, axis_name), axis_name)


def maximum(x, axis_name: AxisName | None):
    """The maximum over devices. It has no derivative."""
    return x if axis_name is None else _copies(lax.pmax(x, axis_name), axis_name)


def on_all_devices(condition, axis_name: AxisName | None):
    """Whether a condition holds on all devices. All devices get the same answer, and so take the same branch."""
    return condition if axis_name is None else minimum(condition.astype(jnp.int32), axis_name) > 0


def on_any_device(condition, axis_name: AxisName | None):
    """Whether a condition holds on any device. All devices get the same answer."""
    return condition if axis_name is None else maximum(condition.astype(jnp.int32), axis_name) > 0


def same_or_nan(tree, axis_name: AxisName | None):
    """The tree if all devices have the same copy of it; else NaN on all devices, since no common problem is defined."""
    if axis_name is None:
        return tree
    firsts = total(_of_first(lax.stop_gradient(tree), axis_name), axis_name)
    same = jax.tree.map(lambda x, first: jnp.all(x == first), tree, firsts)
    is_same = on_all_devices(jnp.all(jnp.stack(jax.tree.leaves(same))), axis_name)
    return jax.tree.map(lambda x: jnp.where(is_same, x, jnp.nan), tree)


def varying_zero(axis_name: AxisName | None, dtype):
    """A zero that varies over the axis. Whatever it is added to varies too."""
    return jnp.zeros_like(lax.axis_index(axis_name), dtype=dtype)


def replicated(tree, axis_name: AxisName | None):
    """The first device's copy, on all devices: bitwise equal, and known to `shard_map` as replicated."""
    if axis_name is None:
        return tree
    return lax.psum(_of_first(tree, axis_name), axis_name)


def _of_first(tree, axis_name):
    """The tree on the first device, zeros on the others."""
    is_first = lax.axis_index(axis_name) == 0
    return jax.tree.map(lambda x: jnp.where(is_first, x, 0), tree)


def _copies(tree, axis_name):
    return jax.tree.map(lambda x: lax.pcast(x, axis_name, to="varying"), tree)
