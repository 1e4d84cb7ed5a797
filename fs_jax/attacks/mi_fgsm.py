"""MI-FGSM: signed steps along an accumulated sum of normalised gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.validation import check_number
from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, project
from fs_jax.attacks.losses import cross_entropy
from fs_jax.attacks.specification import Setting, Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged


def mi_fgsm(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 10,
    decay: float = 1.0,
) -> Float[Array, "n h w c"]:
    """The momentum iterative fast gradient sign method.

    From x_0 = x and g_0 = 0, with L the cross-entropy and P the projection on the ball and on [0, 1],

      g_{k+1} = decay g_k + grad L(x_k) / ||grad L(x_k)||_1,    x_{k+1} = P(x_k + epsilon / num_steps * sign(g_{k+1})).

    The attack stops at the first misclassified iterate, which may be x.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: Not used, as nothing is random; all attacks have this argument.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      num_steps: Number of steps, at least 1.
      decay: Factor of the sum in each step, at least 0; with 0 this is the iterative method without momentum.

    Returns:
      Images [N, H, W, C] in the ball: the misclassified iterates, or else those of the lowest margin. No gradient flows
        through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius
        or decay, no steps.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.56)
      >>> attacked = mi_fgsm(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1)
      >>> float(attacked.mean().round(3))  # class 0 is for bright images; below 0.5 the other class is predicted
      0.49

    Source: Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018, algorithm 1.
    """
    check_attack(logits_fn, images, labels, epsilon=epsilon, num_steps=num_steps)
    check_number("decay", decay, at_least=0)
    attack = mi_fgsm_steps(epsilon=epsilon, num_steps=num_steps, decay=decay)
    return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=True)


def mi_fgsm_steps(*, epsilon: Scalar = 8 / 255, num_steps: int = 10, decay: float = 1.0) -> Stepwise:
    """`mi_fgsm` as a `Stepwise`, with the same arguments.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`.

    Example:
      >>> mi_fgsm_steps().num_steps
      10
    """
    step = Partial(_step, epsilon=epsilon, step_size=epsilon / num_steps, decay=decay)
    return Stepwise(Partial(_start), step, num_steps, passes=((1, 0), (2, 1)))


class _Momentum(NamedTuple):
    iterate: Float[Array, "n h w c"]
    direction: Float[Array, "n h w c"]
    """The accumulated sum of normalised gradients."""
    progress: Progress


def _start(logits_fn, keys, images, labels, run):
    return _Momentum(images, jnp.zeros_like(images), first_judged(images, logits_fn(images), labels))


def _step(logits_fn, state, images, labels, *, epsilon, step_size, decay):
    gradient = jax.grad(lambda x: jnp.sum(cross_entropy(logits_fn(x), labels)))(state.iterate)
    size = jnp.sum(jnp.abs(gradient), (1, 2, 3), keepdims=True)
    # A gradient of zero adds nothing.
    direction = (decay * state.direction + gradient / jnp.where(size == 0, 1, size)).astype(images.dtype)
    iterate = project(state.iterate + step_size * jnp.sign(direction), images, epsilon).astype(images.dtype)
    return _Momentum(iterate, direction, judged(state.progress, iterate, logits_fn(iterate), labels))


def _build(*, epsilon, num_classes, num_steps, decay):
    return mi_fgsm_steps(epsilon=epsilon, num_steps=num_steps, decay=decay)


MI_FGSM = Specification(
    "mi-fgsm",
    "signed steps of radius / steps along an accumulated sum of gradients",
    _build,
    {"num_steps": count(10), "decay": Setting(1.0, lambda name, value: check_number(name, value, at_least=0))},
    steps_in_name=True,
)
