"""The definition of a training method: its loss, and the state that it keeps between steps."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from fs_jax._utils.validation import check_number

Variables = dict[str, PyTree]
"""A dictionary with `params` and `batch_stats`, as `model.apply` takes it."""
Apply = Callable[..., tuple[Float[Array, "n classes"], Variables]]
"""The network: `apply(variables, images, train=...)` returns the logits [N, classes] and the variables, with updated
BatchNorm statistics if train=True. With `features=True` it returns the network's second output, its features, instead
of the logits. All passes of a step on a device have the same dropout mask."""
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


class Context(NamedTuple):
    """What a training step passes to its method, in addition to the network and the batch."""

    keys: Key[Array, "n"]
    """One key per image. It depends on the image's position in the whole batch, over all devices."""
    own: PyTree = ()
    """The method's own state (see `Method.init`)."""
    axis_name: str | None = None
    """The mapped axis of the devices; None on a single device."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: its loss, and the state that it keeps between steps.

    Only `loss` is required. The other three functions are for methods with a state of their own.

    Example:
      >>> def loss(apply, variables, batch, context):
      ...     logits, variables = apply(variables, batch["images"], train=True)
      ...     return jnp.mean(logits[:, 0] ** 2), (variables, {})
      >>> method = Method(loss)
    """

    loss: Callable[[Apply, Variables, Batch, Context], tuple[Float[Array, ""], tuple[Variables, Metrics]]]
    """`loss(apply, variables, batch, context)` returns `(loss, (variables, metrics))`: the scalar to minimise with
    respect to `params`, the variables with the BatchNorm statistics for the next step, and scalars to log. `batch` has
    `images` [N, H, W, C] in [0, 1] and `labels` [N]. The loss and the metrics must be means over the images, so that
    they can be averaged over devices."""
    init: Callable[[Variables], PyTree] = lambda variables: ()
    """`init(variables)` returns the method's own state before the first step: any pytree of arrays. It can depend on
    the variables only, so that all devices have the same. Results of the loss cannot be part of it."""
    update: Callable[[PyTree, Variables], PyTree] = lambda own, variables: own
    """`update(own, variables)` returns the method's own state after a step, given the new variables."""
    evaluated: Callable[[PyTree, Variables], Variables] = lambda own, variables: variables
    """`evaluated(own, variables)` returns the variables to evaluate, such as an average of the weights."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method in the registry."""

    name: str
    """The name in configurations."""
    summary: str
    """One line, for help texts."""
    build: Callable[..., Method]
    """Function that makes the method. Its arguments `epsilon`, `step_size`, `num_steps`, `smoothing`, `transport` and
    `scope` come from the fields of the configuration, all others from `TrainConfig.method_settings`."""
    chosen_by: str = "robust"
    """The monitored accuracy that selects the best checkpoint: "robust" or "clean"."""

    @property
    def settings(self) -> frozenset[str]:
        """The names of the settings: the arguments of `build`."""
        return frozenset(inspect.signature(self.build).parameters)


def infer(
    apply: Apply, variables: Variables, *, features: bool = False
) -> Callable[[Float[Array, "n h w c"]], Float[Array, "n d"]]:
    """The network in inference mode as a function of images, for attacks. Its variables have no gradient.

    Args:
      apply: The network, as passed to `Method.loss`.
      variables: The variables, as passed to `Method.loss`.
      features: Return the network's second output, its features, instead of its logits.

    Returns:
      A function from images [N, H, W, C] to logits or features [N, D].

    Example:
      >>> apply = lambda variables, images, train: (images.sum((1, 2)) * variables["params"], variables)
      >>> infer(apply, {"params": 2.0})(jnp.ones((1, 2, 2, 3))).tolist()
      [[8.0, 8.0, 8.0]]
    """
    variables = jax.lax.stop_gradient(variables)
    if features:
        return lambda images: apply(variables, images, train=False, features=True)[0]
    return lambda images: apply(variables, images, train=False)[0]


def accuracy(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, ""]:
    """Fraction of correctly classified images.

    Example:
      >>> float(accuracy(jnp.eye(4), jnp.array([0, 1, 2, 2])))
      0.75
    """
    return jnp.mean(jnp.argmax(logits, -1).astype(labels.dtype) == labels, dtype=jnp.float32)


def check_settings(
    *,
    smoothing: float,
    epsilon: float = 0.0,
    step_size: float = 0.0,
    num_steps: int = 1,
) -> None:
    """Check the settings that methods have in common.

    Raises:
      TypeError, ValueError: for a setting outside its range.

    Example:
      >>> check_settings(smoothing=1.5)
      Traceback (most recent call last):
      ValueError: smoothing: expected a finite number of at least 0 of at most 1; got 1.5.
    """
    check_number("smoothing", smoothing, at_least=0, at_most=1)
    check_number("epsilon", epsilon, at_least=0, at_most=1)
    check_number("step_size", step_size, at_least=0, at_most=1)
    check_number("num_steps", num_steps, at_least=1, integer=True)
