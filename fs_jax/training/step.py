"""One training step, pure: attack the batch, then descend the loss of the attacked images."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from fs_jax import attacks, ot
from fs_jax.config import TrainConfig
from fs_jax.training.state import TrainState, learning_rate_schedule, make_model, make_optimizer

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


def train_step(
    state: TrainState, batch: Batch, rng: Key[Array, ""], *, config: TrainConfig, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One step of adversarial training.

    x' = attack(x) against the network in inference mode; then one step of SGD on the mean smoothed cross-entropy of
    x' alone, in train mode, which moves BatchNorm's running statistics too. For feature scattering the attack
    ascends the transport cost between the logits of x and x'; for PGD the cross-entropy; for standard training x' = x.

    Args:
      state: State before the step.
      batch: `images` [N, H, W, C] float in [0, 1], `labels` [N], and for parity tests optionally `start` [N, H, W, C],
        the attack's first iterate. On a mapped axis, N images of each device.
      rng: Key of the run: the step's noise is drawn from `fold_in(rng, state.step)`, image by image.
      config: Configuration.
      axis_name: Mapped axis over which gradients, statistics and metrics are averaged.

    Returns:
      State after the step, and metrics: `loss` and `accuracy` on the attacked images; for feature scattering also
      `natural_accuracy` (inference mode), `transport_cost` <T, C> and `marginal_error` (L1) of its transport; and
      `learning_rate`.

    Raises:
      TypeError, ValueError: for batches that the attacks reject.

    Example:
      >>> from fs_jax.config import preset
      >>> from fs_jax.training import create_state
      >>> config = preset("digits")
      >>> state = create_state(config, jax.random.key(0))
      >>> images, labels = jax.random.uniform(jax.random.key(2), (32, 8, 8, 1)), jnp.arange(32) % 10
      >>> step = jax.jit(functools.partial(train_step, config=config))
      >>> state, metrics = step(state, {"images": images, "labels": labels}, jax.random.key(1))
      >>> int(state.step), sorted(metrics)[:3]
      (1, ['accuracy', 'learning_rate', 'loss'])

    Source: Zhang & Wang, NeurIPS 2019, algorithm 1.
    """
    labels = batch["labels"]
    step_rng = jax.random.fold_in(rng, state.step)
    attacked, metrics = _attack(state, batch, step_rng, config, axis_name)

    def loss_fn(params):
        (logits, _), updates = make_model(config, axis_name).apply(
            {"params": params, "batch_stats": state.batch_stats}, attacked, train=True, mutable=["batch_stats"]
        )
        loss = jnp.mean(smoothed_cross_entropy(logits, labels, config.label_smoothing))
        return loss, (_accuracy(logits, labels), updates["batch_stats"])

    (loss, (accuracy, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss, "accuracy": accuracy, **metrics}
    if axis_name is not None:
        gradients, batch_stats, metrics = jax.lax.pmean((gradients, batch_stats, metrics), axis_name)
    metrics["learning_rate"] = learning_rate_schedule(config)(state.step)

    updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params)
    return TrainState(
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        step=state.step + 1,
    ), metrics


def smooth_labels(labels: Int[Array, "n"], num_classes: int, smoothing: float) -> Float[Array, "n classes"]:
    """Smoothed one-hot labels: 1 - smoothing for the true class, smoothing / (C - 1) for each other.

    The paper prints (1 - Delta) y + Delta / (C - 1), which doesn't sum to 1; this is what its code computes. (Optax's
    `smooth_labels` spreads the smoothing over all C classes instead.)

    Args:
      labels: True classes [N].
      num_classes: Number of classes C.
      smoothing: The paper's Delta, in [0, 1].

    Returns:
      Probabilities [N, C].

    Example:
      >>> smooth_labels(jnp.array([0]), 5, 0.5).tolist()
      [[0.5, 0.125, 0.125, 0.125, 0.125]]

    Source: Zhang & Wang, NeurIPS 2019, section 5.
    """
    is_true = jax.nn.one_hot(labels, num_classes, dtype=bool)
    return jnp.where(is_true, 1 - smoothing, smoothing / max(num_classes - 1, 1))


def smoothed_cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"], smoothing: float
) -> Float[Array, "n"]:
    """Cross-entropy to `smooth_labels`: -sum_c p_c log softmax(z)_c, for each image, in nats.

    Example:
      >>> smoothed_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.5).round(3).tolist()
      [1.386]
    """
    return optax.softmax_cross_entropy(logits, smooth_labels(labels, logits.shape[-1], smoothing))


def _attack(state, batch, rng, config, axis_name):
    """The images to train on, and what the attack tells about itself."""
    images, labels, start = batch["images"], batch["labels"], batch.get("start")
    if config.method == "standard":
        return images, {}

    def logits_fn(x):  # inference mode: the attack neither uses nor moves the batch's moments
        return make_model(config).apply(state.variables, x, train=False)[0]

    # Keyed by the position in the whole batch, so that the noise doesn't depend on the number of devices.
    positions = jnp.arange(len(images)) + _first_position(len(images), axis_name)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, positions)
    settings = {
        "epsilon": config.attack.epsilon,
        "step_size": config.attack_step_size,
        "num_steps": config.attack_steps,
        "start": start,
    }
    if config.method == "pgd":
        return attacks.pgd(logits_fn, keys, images, labels, **settings), {}
    everyone = axis_name if config.transport.scope == "global" else None
    scattered, natural_logits, solved = attacks.scatter(
        logits_fn,
        keys,
        images,
        cost=functools.partial(_gathered_cost, axis_name=everyone),
        transport=make_transport(config),
        **settings,
    )
    return scattered, {
        "natural_accuracy": _accuracy(natural_logits, labels),
        "transport_cost": solved.primal_cost,
        "marginal_error": solved.marginal_error,
    }


def make_transport(config: TrainConfig) -> Callable[[Array], ot.Transport]:
    """The configuration's transport: a function from a cost matrix to a `Transport`.

    Example:
      >>> from fs_jax.config import preset
      >>> make_transport(preset("digits"))(jnp.ones((2, 2))).plan.tolist()
      [[0.25, 0.25], [0.25, 0.25]]
    """
    chosen = config.transport
    if chosen.solver == "released_sinkhorn":
        return functools.partial(ot.released_sinkhorn, reg=chosen.reg)
    if chosen.solver == "ipot":
        return functools.partial(ot.ipot, beta=chosen.beta, num_iters=chosen.num_iters)
    return functools.partial(ot.sinkhorn, reg=chosen.reg, num_iters=chosen.num_iters)


def _gathered_cost(x, y, axis_name):
    """Cosine cost between the logits of all devices on `axis_name`, or of this one where that is None.

    The gathered problem is the same on every device, so its gradient to a device's own images, summed over the
    devices by the transpose of the gathering, is the whole problem's times their number: of the same sign.
    """
    if axis_name is not None:
        x, y = (jax.lax.all_gather(logits, axis_name, tiled=True) for logits in (x, y))
    return ot.cosine_cost(x, y)


def _first_position(count, axis_name):
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * count


def _accuracy(logits, labels):
    return jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
