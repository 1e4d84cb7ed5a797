"""The training state."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from fs_jax._utils.images import check_images
from fs_jax._utils.keys import threefry
from fs_jax.training.methods import Method


@flax.struct.dataclass
class TrainState:
    """Everything that a training step updates."""

    params: PyTree
    """Parameters of the network."""
    batch_stats: PyTree
    """BatchNorm's running statistics; empty for a network without BatchNorm."""
    opt_state: PyTree
    """State of the optimizer."""
    step: Int[Array, ""]
    """Number of steps taken."""
    own: PyTree = ()
    """State of the method, such as an average of the weights."""

    @property
    def variables(self) -> dict[str, Any]:
        """The network's variables, as `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def evaluated(self, method: Method) -> dict[str, Any]:
        """The variables to evaluate: `variables`, or their average if the method averages the weights."""
        return method.evaluated(self.own, self.variables)


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    method: Method,
    rng: Key[Array, ""],
    images: Float[Array, "n h w c"] | jax.ShapeDtypeStruct,
) -> TrainState:
    """The initial training state: random weights, step 0.

    Args:
      model: A Flax Linen module, as for `make_train_step`.
      optimizer: The optimizer.
      method: The training method.
      rng: Key of the initial weights.
      images: Example images, for their shape [N, H, W, C] and dtype. Values must be in [0, 1].

    Returns:
      The training state.

    Raises:
      ValueError: if the module has collections other than `params` and `batch_stats`, or for images outside [0, 1].
      TypeError: for images that are not floating point.

    Example:
      >>> from fs_jax.models import WideResNet
      >>> from fs_jax.training.methods import standard
      >>> images = jnp.zeros((1, 8, 8, 1))
      >>> state = init_state(WideResNet(10, 1), optax.sgd(0.1), standard(), jax.random.key(0), images)
      >>> int(state.step), state.params["conv1"]["kernel"].shape
      (0, (3, 3, 1, 16))
    """
    check_parts(model, method)
    if not isinstance(images, jax.ShapeDtypeStruct):
        check_images(images)
    variables = _init(model, threefry(rng), jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype))
    if other := set(variables) - {"params", "batch_stats"}:
        raise ValueError(
            f"model: expected only the collections params and batch_stats; got also {', '.join(sorted(other))}."
        )
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        **variables,
        opt_state=optimizer.init(variables["params"]),
        step=jnp.zeros((), jnp.int32),
        own=method.init(variables),
    )


def check_parts(model: nn.Module, method: Method) -> None:
    """Check that `model` is a Linen module and `method` a `Method`.

    Raises:
      TypeError: otherwise.

    Example:
      >>> from fs_jax.training.methods import standard
      >>> check_parts(nn.Dense(3), standard)
      Traceback (most recent call last):
      TypeError: method: expected a Method, such as standard(); got the function standard. Call it, with its settings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Flax Linen module; got {type(model).__name__}.")
    if not isinstance(method, Method):
        got = f"the function {method.__name__}. Call it, with its settings" if callable(method) else repr(method)
        raise TypeError(f"method: expected a Method, such as standard(); got {got}.")


def _init(model, rng, like):
    try:
        hash(model)
    except TypeError:  # a module with a list or a dictionary as an attribute
        return jax.jit(lambda rng: _initial(model, rng, like))(rng)
    return _compiled_once(model, rng, like)


def _initial(model, rng, like):
    return model.init(rng, jnp.zeros(like.shape, like.dtype))


_compiled_once = jax.jit(_initial, static_argnames=("model", "like"))  # for each network
