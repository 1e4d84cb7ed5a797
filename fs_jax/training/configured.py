"""Builds the network, optimizer, method, state and training step that a configuration describes."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from fs_jax import data
from fs_jax._utils.validation import check_choice
from fs_jax.config import TrainConfig
from fs_jax.data import DataInfo
from fs_jax.models import WideResNet
from fs_jax.training.methods import METHODS, Method, averaged
from fs_jax.training.methods.method import Batch, Metrics
from fs_jax.training.parallel import Program, axis_of, pmapped, pmapped_steps
from fs_jax.training.state import TrainState, init_state
from fs_jax.training.step import Step, make_train_step
from fs_jax.training.transports import make_transport


class Parts(NamedTuple):
    """The network, optimizer and method of a configuration."""

    model: WideResNet
    optimizer: optax.GradientTransformation
    method: Method


def parts(config: TrainConfig, num_classes: int, *, axis_name: str | None = None) -> Parts:
    """Build the network, optimizer and method of a configuration.

    Example:
      >>> from fs_jax.config import preset
      >>> parts(preset("digits"), 10).model.depth
      10
    """
    return Parts(make_model(config, num_classes, axis_name=axis_name), make_optimizer(config), make_method(config))


def make_model(config: TrainConfig, num_classes: int, *, axis_name: str | None = None) -> WideResNet:
    """Build the configuration's network.

    Args:
      config: Configuration.
      num_classes: Number of logits.
      axis_name: Mapped axis over which BatchNorm is synchronised, if the configuration has `sync_batch_norm`.

    Raises:
      ValueError: for float64 without 64-bit mode in JAX.

    Example:
      >>> from fs_jax.config import preset
      >>> make_model(preset("digits"), 10).num_classes
      10
    """
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError(
            "dtype: expected float32 or bfloat16, as JAX is not in 64-bit mode; got float64. Set JAX_ENABLE_X64=1."
        )
    return WideResNet(
        depth=config.model.depth,
        width=config.model.width,
        num_classes=num_classes,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=axis_name if config.sync_batch_norm else None,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """SGD with momentum and weight decay, as in PyTorch.

    For a parameter p with gradient g,

        m <- momentum * m + (g + weight_decay * p)
        p <- p - lr * m

    Weight decay covers every parameter. lr is multiplied by `decay_factor` after each of `decay_epochs`.

    Example:
      >>> from fs_jax.config import preset
      >>> state = make_optimizer(preset("digits")).init({"w": jnp.zeros(3)})
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate_schedule(config), momentum=config.momentum),
    )


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Piecewise constant learning rate, as a function of the step.

    The rate is multiplied by `decay_factor` after each of `decay_epochs`.

    Example:
      >>> from fs_jax.config import TrainConfig
      >>> rate = learning_rate_schedule(TrainConfig(train_size=600, decay_epochs=(3,)))
      >>> [round(float(rate(step)), 3) for step in (0, 29, 30)]  # 10 steps an epoch
      [0.1, 0.1, 0.01]
    """
    decays = {epoch * config.steps_per_epoch: config.decay_factor for epoch in config.decay_epochs}
    constant_pieces = optax.piecewise_constant_schedule(config.learning_rate, decays)

    # The step's dtype is the rate's. With JAX's default, float32 weights would have another rate in 64-bit mode.
    # (float32 has integers up to 16 million.)
    dtype = np.promote_types(np.float32, jnp.dtype(config.model.dtype))
    return lambda step: constant_pieces(jnp.asarray(step, dtype))


def make_method(config: TrainConfig) -> Method:
    """Build the configuration's training method. Fields that are None take the method's own default.

    Raises:
      ValueError: for an unknown method, transport or setting; the message suggests the nearest name.

    Example:
      >>> from fs_jax.config import preset
      >>> method = make_method(preset("digits"))
    """
    check_choice("method", config.method, METHODS)
    entry = METHODS[config.method]
    common = dict(
        epsilon=config.attack.epsilon,
        step_size=config.attack.step_size,
        num_steps=config.attack.num_steps,
        smoothing=config.smoothing,
        transport=make_transport(config.transport),
        scope=config.transport.scope,
    )
    own = sorted(entry.settings - common.keys())
    for name, _ in config.method_settings:
        if not own:
            raise ValueError(
                f"method_settings: expected none, as {entry.name} has no settings of its own; got {name}. Remove it."
            )
        check_choice(f"setting of {entry.name}", name, own)
    settings = {name: value for name, value in common.items() if name in entry.settings and value is not None}
    method = entry.build(**settings, **dict(config.method_settings))
    return method if config.weight_average is None else averaged(method, decay=config.weight_average)


def create_state(config: TrainConfig, rng: Key[Array, ""], info: DataInfo | None = None) -> TrainState:
    """The initial training state of a configuration: random weights, zero momentum, step 0.

    Args:
      config: Configuration.
      rng: Key of the initial weights.
      info: The data set's description, for the image shape and the number of classes. By default it is looked up by
        `config.dataset`.

    Raises:
      ValueError: for an unknown data set.

    Example:
      >>> from fs_jax.config import preset
      >>> state = create_state(preset("digits"), jax.random.key(0))
      >>> int(state.step), state.params["conv1"]["kernel"].shape
      (0, (3, 3, 1, 16))
    """
    info = data.info(config.dataset) if info is None else info
    images = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.result_type(float))
    return init_state(*parts(config, info.num_classes), rng, images)


def train_step(
    state: TrainState, batch: Batch, rng: Key[Array, ""], *, config: TrainConfig, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One training step of a configuration: `make_train_step` with its network, optimizer and method.

    Args:
      state: State before the step.
      batch: `images` [N, H, W, C], floating point in [0, 1]; `labels` [N]; and optionally `start` [N, H, W, C], the
        attack's first iterate. On a mapped axis, N is the number of images per device.
      rng: Key of the run. Image i of the step uses `fold_in(fold_in(rng, state.step), i)`.
      config: Configuration.
      axis_name: Mapped axis over which gradients, statistics and metrics are averaged.

    Returns:
      State after the step, and metrics: `loss`, `accuracy` on the attacked images, and those of the method.

    Raises:
      TypeError, ValueError: for images outside [0, 1] (checked outside jit only), or arrays of the wrong type or
        shape.

    Example:
      >>> from fs_jax.config import ModelConfig
      >>> config = TrainConfig(dataset="digits", model=ModelConfig(10, 1), method="standard")
      >>> state = create_state(config, jax.random.key(0))
      >>> images, labels = jax.random.uniform(jax.random.key(2), (32, 8, 8, 1)), jnp.arange(32) % 10
      >>> step = jax.jit(functools.partial(train_step, config=config))
      >>> state, metrics = step(state, {"images": images, "labels": labels}, jax.random.key(1))
      >>> int(state.step), sorted(metrics)[:3]
      (1, ['accuracy', 'loss'])

    Source: Zhang & Wang, NeurIPS 2019, algorithm 1.
    """
    num_classes = state.params["fc"]["bias"].shape[0]
    return make_train_step(*parts(config, num_classes, axis_name=axis_name), axis_name=axis_name)(state, batch, rng)


def pmap_train_step(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Step:
    """`train_step` over several devices, with `jax.pmap`.

    Gradients, BatchNorm statistics and metrics are averaged over devices. The state's buffers are donated.

    Args:
      config: Configuration. Its `batch_size` counts the images on all devices.
      devices: Devices to use; by default all local devices.

    Returns:
      A function (state, batch, rng) -> (state, metrics). The state is replicated over D devices (arrays [D, ...], see
      `replicate`), the batch has arrays [D, N / D, ...], and the metrics have shape [D].

    Raises:
      ValueError: if the batch size is not a multiple of the number of devices.

    Example:
      >>> from fs_jax.config import ModelConfig
      >>> from fs_jax.training import replicate, unreplicate
      >>> config = TrainConfig(dataset="digits", model=ModelConfig(10, 1), method="standard", batch_size=4)
      >>> devices = jax.local_devices()[:1]
      >>> state = replicate(create_state(config, jax.random.key(0)), devices)
      >>> batch = {"images": jnp.full((1, 4, 8, 8, 1), 0.5), "labels": jnp.arange(4)[None]}
      >>> state, metrics = pmap_train_step(config, devices)(state, batch, jax.random.key(1))
      >>> int(unreplicate(state).step)
      1
    """
    devices = check_devices(config, devices)
    num_classes = data.info(config.dataset).num_classes
    return pmapped(*parts(config, num_classes, axis_name=axis_of(devices)), devices)


@functools.lru_cache(maxsize=4)  # resuming in the same process does not recompile
def pmap_train_steps(config: TrainConfig, info: DataInfo, devices: tuple[jax.Device, ...]) -> Program:
    """Several training steps of a configuration in one dispatch; see `parallel.pmapped_steps`."""
    axis_name = axis_of(check_devices(config, devices))
    step = make_train_step(*parts(config, info.num_classes, axis_name=axis_name), axis_name=axis_name)
    return pmapped_steps(step, info, config.batch_size, devices)


def check_devices(config: TrainConfig, devices: Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The devices, by default all local ones. Raises a ValueError if they do not divide the batch evenly."""
    devices = tuple(devices or jax.local_devices())
    if config.batch_size % len(devices):
        nearest = max(1, round(config.batch_size / len(devices))) * len(devices)
        raise ValueError(
            f"batch_size: expected a multiple of the number of devices, {len(devices)}; got {config.batch_size}. "
            f"Try {nearest}, or {most_devices(config, devices)} devices."
        )
    return devices


def most_devices(config: TrainConfig, devices: Sequence[jax.Device]) -> int:
    """The largest number of these devices that divides the batch evenly.

    Example:
      >>> most_devices(TrainConfig(batch_size=60), range(8))
      6
    """
    return next(count for count in range(len(devices), 0, -1) if config.batch_size % count == 0)
