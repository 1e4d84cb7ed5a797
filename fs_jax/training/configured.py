"""From a configuration to what trains: network, optimizer, method, state and step."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    """What a configuration's training is made of."""

    model: WideResNet
    optimizer: optax.GradientTransformation
    method: Method


def parts(config: TrainConfig, num_classes: int, *, axis_name: str | None = None) -> Parts:
    """Network, optimizer and method of a configuration.

    Example:
      >>> from fs_jax.config import preset
      >>> parts(preset("digits"), 10).model.depth
      10
    """
    return Parts(make_model(config, num_classes, axis_name=axis_name), make_optimizer(config), make_method(config))


def make_model(config: TrainConfig, num_classes: int, *, axis_name: str | None = None) -> WideResNet:
    """The configuration's network; with `axis_name`, BatchNorm is synchronised over it where the configuration says so.

    Raises:
      ValueError: for float64 where JAX computes in 32 bits.

    Example:
      >>> from fs_jax.config import preset
      >>> make_model(preset("digits"), 10).num_classes
      10
    """
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype: expected float32 or bfloat16 unless JAX computes in 64 bits; set JAX_ENABLE_X64=1.")
    return WideResNet(
        depth=config.model.depth,
        width=config.model.width,
        num_classes=num_classes,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=axis_name if config.sync_batch_norm else None,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """SGD as PyTorch has it: weight decay on every parameter, added to the gradient before the momentum.

    m <- momentum m + (g + weight_decay p); p <- p - lr m, with lr multiplied by `decay_factor` after each of the
    configured epochs.

    Example:
      >>> from fs_jax.config import preset
      >>> state = make_optimizer(preset("digits")).init({"w": jnp.zeros(3)})
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate_schedule(config), momentum=config.momentum),
    )


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: piecewise constant, decaying at the starts of epochs.

    Example:
      >>> from fs_jax.config import TrainConfig
      >>> rate = learning_rate_schedule(TrainConfig(train_size=600, decay_epochs=(3,)))
      >>> [round(float(rate(step)), 3) for step in (0, 29, 30)]  # 10 steps an epoch
      [0.1, 0.1, 0.01]
    """
    decays = {epoch * config.steps_per_epoch: config.decay_factor for epoch in config.decay_epochs}
    constant_pieces = optax.piecewise_constant_schedule(config.learning_rate, decays)

    def schedule(step):
        with jax.numpy_dtype_promotion("standard"):  # Optax's compares the step's integer with a float
            return constant_pieces(step)

    return schedule


def make_method(config: TrainConfig) -> Method:
    """The configuration's training method, with its own defaults where the configuration says nothing.

    Raises:
      ValueError: for a method or a transport that its registry doesn't have, with the nearest name, or a setting that
        the method doesn't have.

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
            raise ValueError(f"method_settings: expected none, as {entry.name} has none of its own; got {name}.")
        check_choice(f"setting of {entry.name}", name, own)
    # What the configuration leaves open has the method's own default.
    settings = {name: value for name, value in common.items() if name in entry.settings and value is not None}
    method = entry.build(**settings, **dict(config.method_settings))
    return method if config.weight_average is None else averaged(method, decay=config.weight_average)


def create_state(config: TrainConfig, rng: Key[Array, ""], info: DataInfo | None = None) -> TrainState:
    """The configuration's state before the first step: a fresh network, no momentum, step 0.

    Args:
      config: Configuration.
      rng: Key of the initial weights.
      info: Of the loaded data set: shape of the images, number of classes. By default that of the data set that the
        configuration names.

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
    """One step of the configuration's training: `make_train_step` of its network, optimizer and method.

    Args:
      state: State before the step.
      batch: `images` [N, H, W, C] float in [0, 1], `labels` [N], and for parity tests optionally `start` [N, H, W, C],
        the attack's first iterate. On a mapped axis, N images of each device.
      rng: Key of the run: the step's noise is drawn from `fold_in(rng, state.step)`, image by image.
      config: Configuration.
      axis_name: Mapped axis over which gradients, statistics and metrics are averaged.

    Returns:
      State after the step, and metrics: `loss`, `accuracy` on the attacked images, and the method's own.

    Raises:
      TypeError, ValueError: for batches that the attacks reject.

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
    """`train_step` over devices: gradients, statistics and metrics are averaged, the state's buffers are donated.

    Args:
      config: Configuration. Its `batch_size` is that of all devices together.
      devices: Devices to use; all local ones by default.

    Returns:
      A function from a replicated state (leaves [D, ...], see `replicate`), a batch (leaves [D, N / D, ...]) and a key
      to the state after the step and metrics, leaves with the leading axis [D] again.

    Raises:
      ValueError: if the batch size isn't a multiple of the number of devices.

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


@functools.lru_cache(maxsize=4)  # a run that is resumed in the same process compiles nothing anew
def pmap_train_steps(config: TrainConfig, info: DataInfo, devices: tuple[jax.Device, ...]) -> Program:
    """Many steps of the configuration's training in one dispatch: see `parallel.pmapped_steps`."""
    axis_name = axis_of(check_devices(config, devices))
    step = make_train_step(*parts(config, info.num_classes, axis_name=axis_name), axis_name=axis_name)
    return pmapped_steps(step, info, config.batch_size, devices)


def check_devices(config: TrainConfig, devices: Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The devices, all local ones by default, if they divide the batch."""
    devices = tuple(devices or jax.local_devices())
    if config.batch_size % len(devices):
        nearest = max(1, round(config.batch_size / len(devices))) * len(devices)
        raise ValueError(
            f"batch_size: expected a multiple of the number of devices, {len(devices)}; got {config.batch_size}. "
            f"Try {nearest}, or {most_devices(config, devices)} devices."
        )
    return devices


def most_devices(config: TrainConfig, devices: Sequence[jax.Device]) -> int:
    """How many of the devices can share the batch evenly, at most.

    Example:
      >>> most_devices(TrainConfig(batch_size=60), range(8))
      6
    """
    return next(count for count in range(len(devices), 0, -1) if config.batch_size % count == 0)
