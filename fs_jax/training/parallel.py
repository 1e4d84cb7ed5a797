"""Training steps over several devices, with `jax.pmap`.

`pmap` is in maintenance mode: it is now a wrapper around `jit` and `shard_map`. Only this file uses it, so only this
file has to change when it is replaced.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key, PyTree, UInt8

from fs_jax._utils import backend
from fs_jax._utils.images import as_float
from fs_jax.data import DataInfo
from fs_jax.data.augmentation import augment
from fs_jax.training.methods import Method
from fs_jax.training.methods.method import Batch, Metrics
from fs_jax.training.state import TrainState
from fs_jax.training.step import Step, make_train_step

AXIS = "devices"
"""Name of the mapped axis. A BatchNorm with this `axis_name` normalises over the images of all devices."""


def pmapped(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    method: Method,
    devices: Sequence[jax.Device] | None = None,
) -> Step:
    """Make a training step over several devices, as `make_train_step` does for one.

    Gradients, BatchNorm statistics and metrics are averaged over devices. The state's buffers are donated.

    Args:
      model: A Flax Linen module, as for `make_train_step`. Its BatchNorm normalises over each device's images, unless
        its `axis_name` is `AXIS`.
      optimizer: The optimizer.
      method: The training method.
      devices: Devices to use; by default all local devices.

    Returns:
      A function (state, batch, rng) -> (state, metrics). The state is replicated over D devices (arrays [D, ...], see
      `replicate`), the batch has arrays [D, N / D, ...], and the metrics have shape [D].

    Example:
      >>> import flax.linen as nn
      >>> import optax
      >>> from fs_jax.training import init_state
      >>> from fs_jax.training.methods import standard
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images, train=False):
      ...         return nn.Dense(10)(images.reshape(len(images), -1))
      >>> parts, devices = (Network(), optax.sgd(0.1), standard()), jax.local_devices()[:1]
      >>> batch = {"images": jnp.full((1, 4, 8, 8, 1), 0.5), "labels": jnp.arange(4)[None]}
      >>> state = replicate(init_state(*parts, jax.random.key(0), batch["images"][0]), devices)
      >>> state, metrics = pmapped(*parts, devices)(state, batch, jax.random.key(1))
      >>> int(unreplicate(state).step)
      1
    """
    devices = list(devices or jax.local_devices())
    step = make_train_step(model, optimizer, method, axis_name=axis_of(devices))
    program = Program(jax.pmap(step, AXIS, in_axes=(0, 0, None), devices=devices, donate_argnums=0))

    def mapped(state: TrainState, batch: Batch, rng: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        for name, leaf, how in (("state", state.step, "See `replicate`"), ("batch", batch["images"], "Reshape it")):
            if jnp.shape(leaf)[:1] != (len(devices),):
                raise ValueError(
                    f"{name}: expected arrays with a leading axis of {len(devices)} devices; got {jnp.shape(leaf)}. "
                    f"{how}."
                )
        return program(state, batch, rng)

    return mapped


def axis_of(devices: Sequence[jax.Device]) -> str | None:
    """The axis to average over: `AXIS`, or None for a single device.

    Example:
      >>> axis_of(jax.local_devices()[:1])
    """
    return AXIS if len(devices) > 1 else None


def pmapped_steps(step: Step, info: DataInfo, batch_size: int, devices: Sequence[jax.Device]) -> "Program":
    """Make a function that runs several training steps in one dispatch.

    The data set is on the devices. Batches are selected, cropped and flipped there.

    Args:
      step: A step of `make_train_step`, with `axis_name=AXIS` for several devices.
      info: The data set's description, for its crop padding and flip.
      batch_size: Images per step, over all devices.
      devices: The devices.

    Returns:
      A function (state, images, labels, order, rng, first, count) -> (state, sums):

      - state: replicated state;
      - images: training images, uint8 [M, H, W, C];
      - labels: training labels [M];
      - order: the epoch's order of the images, as indices [K];
      - rng: the run's key;
      - first: number of the first step, counted within the epoch;
      - count: number of steps. It is not static, so an epoch's shorter last dispatch does not recompile;
      - sums: metrics summed over the steps, replicated.
    """
    per_device = batch_size // len(devices)

    def steps(
        state: TrainState,
        images: UInt8[Array, "m h w c"],
        labels: Int[Array, "m"],
        order: Int[Array, "k"],
        rng: Key[Array, ""],
        first: Int[Array, ""],
        count: Int[Array, ""],
    ):
        noise_rng, augment_rng = jax.random.split(rng)
        positions = jax.lax.axis_index(AXIS) * per_device + jnp.arange(per_device, dtype=jnp.int32)

        def one(i, state):
            chosen = order[(first + i) * batch_size + positions]
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(augment_rng, state.step), positions)
            pixels = augment(keys, images[chosen], padding=info.crop_padding, flip=info.flip)
            return step(state, {"images": as_float(pixels), "labels": labels[chosen]}, noise_rng)

        def add(i, carry):
            state, sums = carry
            state, metrics = one(i, state)
            return state, jax.tree.map(jnp.add, sums, metrics)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, state)[1])
        return jax.lax.fori_loop(0, count, add, (state, zeros))

    in_axes = (0, None, None, None, None, None, None)
    return Program(jax.pmap(steps, AXIS, in_axes=in_axes, devices=list(devices), donate_argnums=0))


def replicate(tree: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
    """Copy every array to every device, along a new leading axis.

    Example:
      >>> replicate(jnp.ones(3), jax.local_devices()[:1]).shape
      (1, 3)
    """
    devices = list(devices or jax.local_devices())
    sharding = jax.sharding.NamedSharding(_mesh(devices), jax.sharding.PartitionSpec(AXIS))

    def copies(x):
        x = np.asarray(x)
        return jax.device_put(np.broadcast_to(x, (len(devices), *x.shape)), sharding)

    return jax.tree.map(copies, tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy of every array, as NumPy arrays on the host: the inverse of `replicate`.

    Example:
      >>> unreplicate(replicate(jnp.ones(3), jax.local_devices()[:1])).shape
      (3,)
    """
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def share(tree: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
    """Put whole arrays on every device, without a leading axis. Used for the data set and the order of an epoch.

    Example:
      >>> share(jnp.ones(3), jax.local_devices()[:1]).shape
      (3,)
    """
    devices = list(devices or jax.local_devices())
    return jax.device_put(tree, jax.sharding.NamedSharding(_mesh(devices), jax.sharding.PartitionSpec()))


class Program:
    """A pmapped function, compiled with the backend's compiler options once per set of argument shapes."""

    def __init__(self, pmapped: Any):
        self._pmapped = pmapped
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        key = (structure, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
        if key not in self._compiled:
            self._compiled[key] = self._pmapped.lower(*args).compile(
                compiler_options=backend.compiler_options(backend.platform_of(args), training=True)
            )
        return self._compiled[key](*args)


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(devices), (AXIS,))
