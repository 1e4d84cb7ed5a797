"""SPSA: gradient descent on the margin, with gradients estimated by differences along random directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.images import known
from fs_jax._utils.keys import random_signs
from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, project, random_start
from fs_jax.attacks.losses import logit_margin
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged

_DECAY, _DECAY_OF_SQUARES, _TINY = 0.9, 0.999, 1e-8  # Adam's


def spsa(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 100,
    num_directions: int = 128,
    delta: float = 0.01,
    learning_rate: Scalar = 0.01,
    chunk_size: int = 8,
) -> Float[Array, "n h w c"]:
    """Simultaneous perturbation stochastic approximation: no gradients are used, only many forward passes.

    From a random start in the ball, each step decreases the margin m(x) = z_y - max_{i != y} z_i with Adam, and
    projects on the ball and on [0, 1]. `estimated_gradient` estimates the gradient, along new directions in each step.
    The strong attack of the paper has 8192 directions and 100 steps: 1.6 million forward passes for each image.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode. Its inputs may be outside [0, 1] by up to
        `delta`.
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      num_steps: Number of steps, at least 1.
      num_directions: Directions in each step, at least 1; each takes two forward passes.
      delta: Distance along a direction at which the margin is evaluated, in units of [0, 1].
      learning_rate: Adam's learning rate, in units of [0, 1].
      chunk_size: Directions evaluated at a time for each image: memory is that of 2 N chunk_size images.

    Returns:
      Images [N, H, W, C] in the ball: the misclassified iterates, or else those of the lowest margin. No gradient flows
        through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no steps, no directions, or a `delta`, `learning_rate` or `chunk_size` that isn't above 0.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.56)
      >>> attacked = spsa(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1)
      >>> int(logits_fn(attacked).argmax())  # class 0 is for bright images, so the attack darkens this one
      1

    Source: Uesato et al., "Adversarial risk and the dangers of evaluating against weak attacks", ICML 2018.
    """
    check_attack(logits_fn, images, labels, epsilon=epsilon, num_steps=num_steps)
    attack = spsa_steps(
        epsilon=epsilon,
        num_steps=num_steps,
        num_directions=num_directions,
        delta=delta,
        learning_rate=learning_rate,
        chunk_size=chunk_size,
    )
    return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=False)


def spsa_steps(
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 100,
    num_directions: int = 128,
    delta: float = 0.01,
    learning_rate: Scalar = 0.01,
    chunk_size: int = 8,
) -> Stepwise:
    """`spsa` as a `Stepwise`, with the same arguments and errors.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`.

    Example:
      >>> spsa_steps(num_directions=8192).passes
      ((1, 0), (16385, 0))
    """
    positive = {
        "num_directions": num_directions,
        "delta": delta,
        "learning_rate": learning_rate,
        "chunk_size": chunk_size,
    }
    for name, value in positive.items():
        if (number := known(value)) is not None and not number > 0:
            raise ValueError(f"{name}: expected a number above 0; got {value}.")
    chunk = np.arange(min(chunk_size, num_directions))
    estimate = Partial(estimated_gradient, num_directions=num_directions, delta=delta, chunk=chunk)
    step = Partial(_step, epsilon=epsilon, learning_rate=learning_rate, estimate=estimate)
    passes = (1, 0), (2 * num_directions + 1, 0)
    return Stepwise(Partial(_start, epsilon=epsilon), step, num_steps, passes=passes, breadth=2 * len(chunk))


def estimated_gradient(
    logits_fn: LogitsFn,
    keys: Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    num_directions: int | Array,
    delta: Scalar,
    chunk: Int[Array, "k"],
) -> Float[Array, "n h w c"]:
    """Estimate the gradient of each image's margin by differences along directions of random signs.

    The mean over directions v, uniform in {-1, 1}^d, of (m(x + delta v) - m(x - delta v)) / (2 delta) * v. For a linear
    m with gradient g, the expectation of the estimate is g. With K directions, the variance of its entry j is
    (||g||^2 - g_j^2) / K.

    Args:
      logits_fn: Network, from images to logits.
      keys: One key per image; direction k of an image uses `fold_in(key, k)`, so that chunks don't matter.
      images: Images [N, H, W, C].
      labels: True classes [N].
      num_directions: Number of directions K.
      delta: Distance along a direction, in units of [0, 1].
      chunk: `arange(k)`, where k directions of each image are evaluated at a time.

    Returns:
      Estimates [N, H, W, C].

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0, 0, 0] * 3, jnp.zeros(len(x))], -1)
      >>> keys, images = jax.random.split(jax.random.key(0), 1), jnp.full((1, 1, 1, 1), 0.5)
      >>> settings = {"num_directions": 4, "delta": 0.01, "chunk": jnp.arange(2)}
      >>> float(estimated_gradient(logits_fn, keys, images, jnp.array([0]), **settings).round(2).squeeze())
      3.0

    Source: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
    IEEE Transactions on Automatic Control, 1992.
    """
    count, shape, size = len(images), images.shape[1:], len(chunk)
    repeated = jnp.repeat(labels, 2 * size)

    def direction(key, number):
        return random_signs(jax.random.fold_in(key, number), shape, images.dtype)

    def add(turn, total):
        numbers = turn * size + chunk
        directions = jax.vmap(jax.vmap(direction, (None, 0)), (0, None))(keys, numbers)
        both = jnp.stack([directions, -directions], 2)
        moved = images[:, None, None] + delta * both
        margins = logit_margin(logits_fn(moved.reshape(-1, *shape)), repeated).reshape(count, size, 2)
        slopes = jnp.where(numbers < num_directions, margins[..., 0] - margins[..., 1], 0) / (2 * delta)
        return total + jnp.einsum("nk,nkhwc->nhwc", slopes, directions).astype(images.dtype)

    turns = (num_directions + size - 1) // size
    return jax.lax.fori_loop(0, turns, add, jnp.zeros_like(images)) / num_directions


class _Descent(NamedTuple):
    keys: Key[Array, "n"]
    iterate: Float[Array, "n h w c"]
    mean: Float[Array, "n h w c"]
    """Adam's running mean of the gradients."""
    mean_square: Float[Array, "n h w c"]
    progress: Progress


def _start(logits_fn, keys, images, labels, run, *, epsilon):
    first = project(random_start(keys, images, epsilon), images, epsilon).astype(images.dtype)
    nothing = jnp.zeros_like(images)
    return _Descent(keys, first, nothing, nothing, first_judged(first, logits_fn(first), labels))


def _step(logits_fn, state, images, labels, *, epsilon, learning_rate, estimate):
    step = state.progress.step + 1
    gradient = estimate(logits_fn, jax.vmap(jax.random.fold_in)(state.keys, step), state.iterate, labels)
    mean = _DECAY * state.mean + (1 - _DECAY) * gradient
    mean_square = _DECAY_OF_SQUARES * state.mean_square + (1 - _DECAY_OF_SQUARES) * gradient**2
    # Adam's correction of the running means, which start at 0, for the step of each image.
    unbiased, unbiased_square = (
        value
        / (1 - decay ** step.astype(np.promote_types(value.dtype, np.float32))).astype(value.dtype)[:, None, None, None]
        for value, decay in ((mean, _DECAY), (mean_square, _DECAY_OF_SQUARES))
    )
    tiny = max(_TINY, float(jnp.finfo(mean.dtype).tiny))  # in float16, 1e-8 is 0
    moved = state.iterate - learning_rate * unbiased / (jnp.sqrt(unbiased_square) + tiny)
    iterate = project(moved, images, epsilon).astype(images.dtype)
    return _Descent(state.keys, iterate, mean, mean_square, judged(state.progress, iterate, logits_fn(iterate), labels))


def _build(*, epsilon, num_classes, num_steps, num_directions):
    return spsa_steps(epsilon=epsilon, num_steps=num_steps, num_directions=num_directions)


SPSA = Specification(
    "spsa",
    "descent with gradients estimated along random directions, without gradients of the network",
    _build,
    {"num_steps": count(100), "num_directions": count(128)},
    uses_gradients=False,
)
