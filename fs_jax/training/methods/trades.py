"""TRADES: cross-entropy on natural images, plus the KL divergence that attacks cause."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fs_jax._utils.validation import check_number
from fs_jax.attacks.linf import LogitsFn, held_fixed, project
from fs_jax.training.losses import smoothed_cross_entropy
from fs_jax.training.methods.method import Entry, Method, accuracy, check_settings, infer


def trades(
    *,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    num_steps: int = 10,
    smoothing: float = 0.0,
    beta: float = 6.0,
) -> Method:
    """TRADES adversarial training.

    For natural images x, attacked images x' and labels y, the loss is

        CE(f(x), y) + beta * KL(f(x) || f(x'))

    The attack maximises the divergence, with the network in inference mode and standard normal noise n:

        x'_0 = x + 0.001 n
        x'_{k+1} = project(x'_k + step_size * sign(grad KL(f(x) || f(x'_k))))

    The gradient of the loss goes through both f(x) and f(x'), in training mode.

    BatchNorm follows the published code: f(x) and f(x') are separate batches with separate moments. As that code
    computes f(x) twice, the running statistics are updated with the moments of x, of x', and of x again.

    Args:
      epsilon: Radius, in units of [0, 1].
      step_size: Size of an attack step, in units of [0, 1]; by default 7/31 of epsilon, as the authors' 0.007 for an
        epsilon of 0.031.
      num_steps: Number of attack steps.
      smoothing: Label smoothing of the cross-entropy: the true class has 1 - smoothing.
      beta: Weight of the KL divergence, the authors' 1 / lambda.

    Returns:
      The method. Its metrics are `accuracy` on the attacked images, `natural_accuracy` (in training mode), and
      `divergence`, the mean KL divergence in nats.

    Example:
      >>> method = trades(epsilon=0.031, beta=1.0)

    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019, algorithm 1,
    and their code's `trades_loss`.
    """
    step_size = 7 / 31 * epsilon if step_size is None else step_size
    check_settings(smoothing=smoothing, epsilon=epsilon, step_size=step_size, num_steps=num_steps)
    check_number("beta", beta, at_least=0)

    def loss(apply, variables, batch, context):
        images, labels = batch["images"], batch["labels"]
        start = _start(context.keys, images) if batch.get("start") is None else batch["start"]
        attacked = _ascend_divergence(infer(apply, variables), images, start, epsilon, step_size, num_steps)
        natural, variables = apply(variables, images, train=True)
        logits, variables = apply(variables, attacked, train=True)
        # For the statistics only. XLA removes the repeated computation if it is the same, as with nn.BatchNorm. (That
        # of WideResNet computes moments around the running mean, which has changed: one more forward pass.)
        _, variables = apply(variables, images, train=True)
        divergence = jnp.mean(_divergence(natural, logits))
        value = jnp.mean(smoothed_cross_entropy(natural, labels, smoothing)) + beta * divergence
        metrics = {
            "accuracy": accuracy(logits, labels),
            "natural_accuracy": accuracy(natural, labels),
            "divergence": divergence,
        }
        return value, (variables, metrics)

    return Method(loss)


def _start(keys: Key[Array, "n"], images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
    return images + 0.001 * noise


def _ascend_divergence(
    logits_fn: LogitsFn, images: Float[Array, "n h w c"], start: Float[Array, "n h w c"], epsilon, step_size, num_steps
) -> Float[Array, "n h w c"]:
    logits_fn = held_fixed(logits_fn, images)
    natural = jax.lax.stop_gradient(logits_fn(images))

    def step(_, x):
        gradient = jax.grad(lambda x: jnp.sum(_divergence(natural, logits_fn(x))))(x)
        return project(x + step_size * jnp.sign(gradient), images, epsilon).astype(images.dtype)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, step, start.astype(images.dtype)))


def _divergence(natural, logits):
    """KL divergence between the softmax of `natural` and of `logits`, in nats, for each image."""
    log_p, log_q = jax.nn.log_softmax(natural), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


TRADES = Entry(
    "trades",
    "TRADES (Zhang et al. 2019): cross-entropy plus beta times the divergence under attack; 10 steps by default",
    trades,
)
