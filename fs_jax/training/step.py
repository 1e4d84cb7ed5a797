"""A pure training step: a method's loss, its gradient, and the optimizer's update."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fs_jax._utils.images import check_images, check_labels
from fs_jax._utils.keys import threefry
from fs_jax.training.methods import Method
from fs_jax.training.methods.method import Apply, Batch, Context, Metrics
from fs_jax.training.state import TrainState, check_parts

Step = Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]

_DROPOUT = 2**31 - 1  # no image has this position


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, method: Method, *, axis_name: str | None = None
) -> Step:
    """Make a training step (state, batch, rng) -> (state, metrics) for any network, optimizer and method.

    The step is a pure function, which you can jit or map over devices. It computes the method's loss, takes its
    gradient with respect to `params`, and applies the optimizer's update.

    Args:
      model: A Flax Linen module. `model.apply(variables, images, train=False)` returns logits [N, classes], or a tuple
        whose first element is the logits. With `train=True`, BatchNorm may update `batch_stats`, and dropout draws from
        the stream "dropout", once per step and device. To synchronise BatchNorm over devices, pass `axis_name` to its
        BatchNorm layers.
      optimizer: Any Optax optimizer.
      method: A training method, such as `fs_jax.training.methods.feature_scatter()`, or your own `Method`.
      axis_name: Mapped axis over which gradients, BatchNorm statistics and metrics are averaged.

    Returns:
      The step. Its arguments and results are

      - state: a `TrainState`; see `init_state`;
      - batch: a dictionary with `images` [N, H, W, C], floating point in [0, 1], `labels` [N], and any other arrays
        that the method reads. On a mapped axis, N is the number of images per device;
      - rng: the key of the run, the same in every step. Image i of the step uses
        `fold_in(fold_in(rng, state.step), i)`;
      - metrics: `loss`, and the metrics of the method.

    Raises:
      TypeError, ValueError: when the step is called, for images that are not floating point or not in [0, 1], or labels
        of the wrong shape or type. Values are not checked inside jit.

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
        # Keys depend on the position in the whole batch, so that attacks do not depend on the number of devices.
        count, rng = len(batch["images"]), jax.random.fold_in(threefry(rng), state.step)
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
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes, for instance in Adam
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        own = method.update(state.own, {"params": params, "batch_stats": batch_stats})
        return TrainState(params, batch_stats, opt_state, state.step + 1, own), metrics

    return step


def _checked(result):
    """The result of a method's loss, after checking its structure."""
    try:
        loss, (variables, metrics) = result
        named = set(variables), set(metrics)
    except (TypeError, ValueError):
        raise TypeError(f"method.loss: expected (loss, (variables, metrics)); got {type(result).__name__}.") from None
    if named[0] != {"params", "batch_stats"} or "loss" in named[1]:
        raise ValueError(
            "method.loss: expected variables with params and batch_stats, as `apply` returns them, and no metric "
            f"named loss; got variables {sorted(named[0])} and metrics {sorted(named[1])}."
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
            raise ValueError(
                "model: expected a network that returns (logits, features), as the method uses the features."
            )
        return (outputs[int(features)] if isinstance(outputs, tuple) else outputs), {**variables, **moved}

    return apply
