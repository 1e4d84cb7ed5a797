"""The feature-scattering attack: perturbs a batch so that its features, as a set, move away from the natural ones."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fs_jax._utils.keys import image_keys
from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, check_finite, held_fixed, project, random_start
from fs_jax.attacks.network import on_network
from fs_jax.ot import Transport, cosine_cost, sinkhorn

CostFn = Callable[[Float[Array, "n d"], Float[Array, "m d"]], Float[Array, "n m"]]
TransportFn = Callable[[Float[Array, "n m"]], Transport]

# Algorithm 1 with the paper's weight, and 50 iterations as in the paper's experiments.
_paper_transport = functools.partial(sinkhorn, reg=0.01, num_iters=50)


class Scatter(NamedTuple):
    """The result of `scatter`: the images, and intermediate results."""

    images: Float[Array, "n h w c"]
    """Scattered images, in the ball and in [0, 1]."""
    natural_logits: Float[Array, "n classes"]
    """Logits of the natural images."""
    transport: Transport
    """The transport problem of the last step, at the iterate before it; the step increases its `primal_cost`."""


def feature_scatter(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    *,
    epsilon: Scalar = 8 / 255,
    step_size: Scalar = 8 / 255,
    num_steps: int = 1,
    cost: CostFn = cosine_cost,
    transport: TransportFn = _paper_transport,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """Scatter the features of a batch: maximise the transport cost between natural and attacked logits, without labels.

    x'_0 = x + u with u uniform in the ball; x'_{k+1} = project(x'_k + step_size * sign(grad D(x'_k))) with
    D(x') = ⟨T, C⟩, C = cost(f(x), f(x')), T the transport plan of C between uniform marginals. The natural logits f(x)
    are held constant. The gradient is taken through the cost and, if `transport` differentiates it, the plan.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: Key of the random start, or one key for each image (see `random_start`).
      images: Images [N, H, W, C] in [0, 1].
      epsilon: Radius, in units of [0, 1].
      step_size: Step size, in units of [0, 1].
      num_steps: Number of steps, at least 1; the paper trains with 1.
      cost: Function of natural logits [N, d] and attacked logits [N, d] that returns a cost matrix [N, N].
      transport: Function of a cost matrix that returns a `Transport`; by default Algorithm 1 with reg 0.01.
      start: First iterate, the sum of image and noise, in place of a random start.

    Returns:
      Scattered images [N, H, W, C]; no gradient flows through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], a negative radius, no steps.
      FloatingPointError: if gradients, and so the result, aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: x.reshape(len(x), -1)
      >>> images = jax.random.uniform(jax.random.key(0), (4, 2, 2, 1))
      >>> scattered = feature_scatter(logits_fn, jax.random.key(1), images)
      >>> bool((abs(scattered - images) <= 8 / 255 + 1e-6).all())
      True

    Source: Zhang & Wang, NeurIPS 2019, equation 5 and algorithm 1.
    """
    return scatter(
        logits_fn,
        rng,
        images,
        epsilon=epsilon,
        step_size=step_size,
        num_steps=num_steps,
        cost=cost,
        transport=transport,
        start=start,
    ).images


def scatter(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    *,
    epsilon: Scalar = 8 / 255,
    step_size: Scalar = 8 / 255,
    num_steps: int = 1,
    cost: CostFn = cosine_cost,
    transport: TransportFn = _paper_transport,
    start: Float[Array, "n h w c"] | None = None,
) -> Scatter:
    """`feature_scatter` with its intermediate results, for training loops that log them; the same arguments.

    Example:
      >>> images = jax.random.uniform(jax.random.key(0), (4, 2, 2, 1))
      >>> result = scatter(lambda x: x.reshape(len(x), -1), jax.random.key(1), images)
      >>> result.natural_logits.shape, result.transport.plan.shape
      ((4, 4), (4, 4))
    """
    check_attack(logits_fn, images, None, epsilon=epsilon, step_size=step_size, num_steps=num_steps, start=start)
    keys = image_keys(rng, len(images)) if start is None else None
    result = on_network(
        _scattered, logits_fn, images, keys, start, epsilon, step_size,
        cost=cost, transport=transport, num_steps=num_steps,
    )  # fmt: skip
    check_finite(result.images)
    return result


def _scattered(logits_fn, images, keys, start, epsilon, step_size, *, cost, transport, num_steps):
    images = jax.lax.stop_gradient(images)
    logits_fn = held_fixed(logits_fn, images)
    natural_logits = jax.lax.stop_gradient(logits_fn(images))
    first = random_start(keys, images, epsilon) if start is None else jax.lax.stop_gradient(start)

    def objective(x):
        solved = transport(cost(natural_logits, logits_fn(x)))
        return solved.primal_cost, solved

    def step(x, _):
        gradient, solved = jax.grad(objective, has_aux=True)(x)
        return project(x + step_size * jnp.sign(gradient), images, epsilon).astype(images.dtype), solved

    scattered, every = jax.lax.scan(step, first.astype(images.dtype), length=num_steps)
    solved = jax.tree.map(lambda leaf: leaf[-1], every)
    return jax.lax.stop_gradient(Scatter(scattered, natural_logits, solved))
