"""One training step, pure: the loss of a method, its gradient, and the optimizer's update."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fs_jax._utils.images import check_images, check_labels
from fs_jax.training.methods import Method
from fs_jax.training.methods.method import Apply, Batch, Context, Metrics
from fs_jax.training.state import TrainState, check_parts

Step = Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]

_DROPOUT = 2**31 - 1  # no image has this position


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, method: Method, *, axis_name: str | None = None
) -> Step:
    """A step (state, batch, rng) -> (state, metrics) of any network, optimizer and method.

    Args:
      model: A Flax Linen module: `model.apply(variables, images, train=False)` gives logits [N, classes], or a tuple
        that begins with them. With `train=True` its BatchNorm may move `batch_stats`, and its dropout draws from the
        stream "dropout", once for each step and device. To share BatchNorm's moments over devices, give its BatchNorm
        the mapped axis's name.
      optimizer: Any of Optax.
      method: Such as `fs_jax.training.methods.feature_scatter()`, or one's own `Method`.
      axis_name: Mapped axis over which gradients, statistics and metrics are averaged.

    Returns:
      The step: a pure function, to be jitted or mapped over devices. It takes a state (see `init_state`); a batch,
      which is a dictionary of `images` [N, H, W, C] float in [0, 1], `labels` [N], and what the method takes besides;
      and the run's key, from which each step draws by its number, image by image. On a mapped axis N is each
      device's. It gives the state after the step and metrics: `loss`, and the method's.

    Raises:
      TypeError, ValueError: by the step, for images that aren't float or not in [0, 1], or labels of another shape or
        type. (Values are looked at where they are known, so not under jit.)

    Example:
      >>> from fs_jax.training import init_state
      >>> from fs_jax.training.methods import feature_scatter
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images, train=False):
      ...         return nn.Dense(10)(nn.relu(nn.Dense(32)(images.reshape(len(images), -1))))
      >>> model, optimizer, method = Network(), optax.adam(1e-3), feature_scatter(epsilon=0.1)
      >>> images, labels = jax.random.uniform(jax.random.key(0), (32, 8, 8, 1)), jnp.arange(32) % 10
      >>> state = init_state(model, optimizer, method, jax.random.key(1), images)
      >>> step = jax.jit(make_train_step(model, optimizer, method))
      >>> state, metrics = step(state, {"images": images, "labels": labels}, jax.random.key(2))
      >>> int(state.step), sorted(metrics)[:3]
      (1, ['accuracy', 'loss', 'marginal_error'])
    """
    check_parts(model, method)

    def step(state: TrainState, batch: Batch, rng: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        if not {"images", "labels"} <= set(batch):
            raise ValueError(f"batch: expected images and labels; got {', '.join(map(str, batch)) or 'nothing'}.")
        check_images(batch["images"])
        check_labels(batch["labels"], batch["images"])
        # Keyed by the position in the whole batch, so that attacks don't depend on the number of devices.
        count, rng = len(batch["images"]), jax.random.fold_in(rng, state.step)
        begin = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, begin + jnp.arange(count, dtype=jnp.int32))
        apply = _apply(model, jax.random.fold_in(jax.random.fold_in(rng, _DROPOUT), begin))
        context = Context(keys, state.own, axis_name)

        def loss_fn(params):
            return _checked(method.loss(apply, {**state.variables, "params": params}, batch, context))

        (loss, (variables, metrics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        batch_stats, metrics = variables["batch_stats"], {"loss": loss, **metrics}
        if axis_name is not None:
            gradients, batch_stats, metrics = jax.lax.pmean((gradients, batch_stats, metrics), axis_name)
        with jax.numpy_dtype_promotion("standard"):  # which Optax's own arithmetic, Adam's for one, rests on
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        own = method.update(state.own, {"params": params, "batch_stats": batch_stats})
        return TrainState(params, batch_stats, opt_state, state.step + 1, own), metrics

    return step


def _checked(result):
    """What the loss gave, if that is what a loss gives."""
    try:
        loss, (variables, metrics) = result
        named = set(variables), set(metrics)
    except (TypeError, ValueError):
        raise TypeError(f"method.loss: expected (loss, (variables, metrics)); got {type(result).__name__}.") from None
    if named[0] != {"params", "batch_stats"} or "loss" in named[1]:
        raise ValueError(
            "method.loss: expected variables of params and batch_stats, as `apply` gives them, and metrics of which "
            f"none is named loss; got {sorted(named[0])} and {sorted(named[1])}."
        )
    return loss, (variables, metrics)


def _apply(model: nn.Module, dropout: Key[Array, ""]) -> Apply:
    def apply(variables, images, *, train, features=False):
        if not train:
            outputs, moved = model.apply(variables, images, train=False), {}
        else:
            outputs, moved = model.apply(
                variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
            )
        if features and not (isinstance(outputs, tuple) and len(outputs) == 2):
            raise ValueError("model: expected one that gives (logits, features), as its features are asked for.")
        return (outputs[int(features)] if isinstance(outputs, tuple) else outputs), {**variables, **moved}

    return apply
