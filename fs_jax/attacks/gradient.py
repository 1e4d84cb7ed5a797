"""White-box attacks by signed gradients: FGSM, PGD and CW as the paper reports them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fs_jax.attacks.linf import LogitsFn, check_attack, held_fixed, project, random_start
from fs_jax.attacks.losses import cross_entropy, cw_margin


def pgd(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    num_steps: int = 20,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """Projected gradient ascent with signed steps.

    x_0 = x + u with u uniform in the ball; x_{k+1} = project(x_k + step_size * sign(grad loss(x_k))), on the ball
    around x and on [0, 1].

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: Key of the random start, or one for each image (see `random_start`).
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      step_size: Step, in units of [0, 1].
      num_steps: Number of steps, at least 1.
      loss: What is ascended: a function of logits and labels, one value per image.
      start: First iterate, the sum of image and noise, in place of a random one.

    Returns:
      Attacked images [N, H, W, C]; no gradient flows through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no steps. (Values are checked where they are known, so not under jit.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.5)
      >>> attacked = pgd(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, step_size=0.05)
      >>> float(attacked.mean().round(3))  # class 0 likes bright images, so the attack darkens this one
      0.4

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    check_attack(logits_fn, images, labels, epsilon=epsilon, step_size=step_size, num_steps=num_steps, start=start)
    images = jax.lax.stop_gradient(images)
    logits_fn = held_fixed(logits_fn, images)
    first = random_start(rng, images, epsilon) if start is None else jax.lax.stop_gradient(start)

    # The sum over images leaves each image the gradient of its own loss alone; its sign is that of the mean's.
    gradient = jax.grad(lambda x: jnp.sum(loss(logits_fn(x), labels)))

    def step(_, x):
        return project(x + step_size * jnp.sign(gradient(x)), images, epsilon).astype(images.dtype)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, step, first.astype(images.dtype)))


def fgsm(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    num_steps: int = 1,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """The paper's "FGSM": one signed step of the size of the radius, from a uniform random start.

    The fast gradient sign method proper starts from the image: pass `start=images`. Arguments, result and errors are
    those of `pgd`; `step_size` is epsilon by default.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.5)
      >>> float(fgsm(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, start=images).mean().round(3))
      0.4

    Source: Goodfellow et al., ICLR 2015; with the random start, Zhang & Wang, NeurIPS 2019.
    """
    step_size = epsilon if step_size is None else step_size
    return pgd(logits_fn, rng, images, labels, epsilon=epsilon, step_size=step_size, num_steps=num_steps, start=start)


def cw(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    num_steps: int = 20,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """The paper's "CW": `pgd` on the margin loss `cw_margin` in place of the cross-entropy.

    Arguments, result and errors are those of `pgd`.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.5)
      >>> float(cw(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1).mean().round(3))
      0.4

    Source: Carlini & Wagner, 2017, as Zhang & Wang, NeurIPS 2019, run it.
    """
    return pgd(
        logits_fn,
        rng,
        images,
        labels,
        epsilon=epsilon,
        step_size=step_size,
        num_steps=num_steps,
        loss=cw_margin,
        start=start,
    )
