"""The training state and what it is made of: network and optimizer of a configuration."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from fs_jax import data
from fs_jax.config import TrainConfig
from fs_jax.models import WideResNet


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes."""

    params: PyTree
    """Parameters of the network."""
    batch_stats: PyTree
    """BatchNorm's running statistics."""
    opt_state: PyTree
    """The optimizer's momentum and step count."""
    step: Int[Array, ""]
    """Number of steps taken."""

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(config: TrainConfig, rng: Key[Array, ""]) -> TrainState:
    """The state before the first step: a fresh network, no momentum, step 0.

    Args:
      config: Configuration; its data set gives the images' shape and the number of classes.
      rng: Key of the initial weights.

    Returns:
      The state.

    Raises:
      ValueError: for an unknown data set.

    Example:
      >>> from fs_jax.config import preset
      >>> state = create_state(preset("digits"), jax.random.key(0))
      >>> int(state.step), state.params["conv1"]["kernel"].shape
      (0, (3, 3, 1, 16))
    """
    images = jnp.zeros((1, *data.info(config.dataset).image_shape))
    variables = _init(make_model(config), rng, images)
    params = variables["params"]
    return TrainState(
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=make_optimizer(config).init(params),
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="model")  # compiled once for each network
def _init(model, rng, images):
    return model.init(rng, images)


def make_model(config: TrainConfig, axis_name: str | None = None) -> WideResNet:
    """The configuration's network; with `axis_name`, BatchNorm is synchronised over it where the configuration says so.

    Example:
      >>> from fs_jax.config import preset
      >>> make_model(preset("digits")).num_classes
      10
    """
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype: expected float32 or bfloat16 unless JAX computes in 64 bits; set JAX_ENABLE_X64=1.")
    return WideResNet(
        depth=config.model.depth,
        width=config.model.width,
        num_classes=data.info(config.dataset).num_classes,
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
    boundaries = jnp.array([epoch * config.steps_per_epoch for epoch in config.decay_epochs], jnp.int32)

    def rate(step):
        decays = jnp.sum(step >= boundaries)
        return config.learning_rate * jnp.asarray(config.decay_factor, jnp.float32) ** decays

    return rate
