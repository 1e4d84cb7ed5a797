"""What a training method is: the loss that a step descends, and what it keeps from step to step."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from fs_jax._utils.validation import check_number

Variables = dict[str, PyTree]
"""`params` and `batch_stats`, as `model.apply` takes them."""
Apply = Callable[..., tuple[Float[Array, "n classes"], Variables]]
"""(variables, images, train=...) -> logits, and the variables with BatchNorm's statistics moved where it trains.
With `features=True` the network's second output, its features, is in the logits' place.
Dropout draws once for each step and device: every pass of a step has the same mask."""
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


class Context(NamedTuple):
    """What a step tells its method besides the batch."""

    keys: Key[Array, "n"]
    """One key for each image, by its position in the batch of all devices."""
    own: PyTree = ()
    """What the method keeps from step to step (see `Method.init`)."""
    axis_name: str | None = None
    """The mapped axis of the devices, None on one."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: its loss, and what it keeps from step to step.

    Example:
      >>> def loss(apply, variables, batch, context):
      ...     logits, variables = apply(variables, batch["images"], train=True)
      ...     return jnp.mean(logits[:, 0] ** 2), (variables, {})
      >>> method = Method(loss)
    """

    loss: Callable[[Apply, Variables, Batch, Context], tuple[Float[Array, ""], tuple[Variables, Metrics]]]
    """(apply, variables, batch, context) -> (loss, (variables, metrics)): what is descended, by `params`; the variables
    with the statistics that the next step has; and scalars to log. `batch` has `images` [N, H, W, C] in [0, 1] and
    `labels` [N]. Losses and metrics are means over the images, so that their means over devices are those of all."""
    init: Callable[[Variables], PyTree] = lambda variables: ()
    """What it keeps from step to step, before the first one: arrays, in any pytree. It follows from the variables
    alone, so that it is the same on all devices; what the loss computes can't be kept."""
    update: Callable[[PyTree, Variables], PyTree] = lambda own, variables: own
    """(own, variables after the step) -> own."""
    evaluated: Callable[[PyTree, Variables], Variables] = lambda own, variables: variables
    """(own, variables) -> the variables to evaluate: not the last ones, if weights are averaged."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method as the registry has it."""

    name: str
    """As configurations name it."""
    summary: str
    """In a line."""
    build: Callable[..., Method]
    """Makes it. Of its arguments, `epsilon`, `step_size`, `num_steps`, `smoothing`, `transport` and `scope` are what
    every configuration has; the others are `TrainConfig.method_settings`."""
    chosen_by: str = "robust"
    """The accuracy that the best checkpoint has the highest of: "robust" or "clean"."""

    @property
    def settings(self) -> frozenset[str]:
        """What can be set: the arguments of `build`."""
        return frozenset(inspect.signature(self.build).parameters)


def infer(
    apply: Apply, variables: Variables, *, features: bool = False
) -> Callable[[Float[Array, "n h w c"]], Float[Array, "n d"]]:
    """The network in inference mode as a function of images, for attacks: no gradient goes to its variables.

    Args:
      apply: As a step gives it to its method.
      variables: As well.
      features: Whether the function gives the network's second output, its features, and not its logits.

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
    """Share of images that are classified correctly.

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
    """Refuse settings that no method can have.

    Raises:
      TypeError, ValueError: naming the setting, what was expected and what was given.

    Example:
      >>> check_settings(smoothing=1.5)
      Traceback (most recent call last):
      ValueError: smoothing: expected a finite number of at least 0 of at most 1; got 1.5.
    """
    check_number("smoothing", smoothing, at_least=0, at_most=1)
    check_number("epsilon", epsilon, at_least=0, at_most=1)
    check_number("step_size", step_size, at_least=0, at_most=1)
    check_number("num_steps", num_steps, at_least=1, integer=True)
