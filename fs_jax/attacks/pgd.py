"""White-box attacks with signed gradients: FGSM, PGD and CW, as the paper reports them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.keys import image_keys
from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, check_finite, held_fixed, project, random_start
from fs_jax.attacks.losses import cross_entropy, cw_margin, logit_margin
from fs_jax.attacks.network import on_network
from fs_jax.attacks.specification import Specification, count, flag, length
from fs_jax.attacks.stepwise import Progress, Stepwise, judged, unjudged, where


def pgd(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    step_size: Scalar = 2 / 255,
    num_steps: int = 20,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """Projected gradient ascent with signed steps.

    x_0 = x + u with u uniform in the ball; x_{k+1} = project(x_k + step_size * sign(grad loss(x_k))), on the ball
    around x and on [0, 1].

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: Key of the random start, or one key for each image (see `random_start`).
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      step_size: Step size, in units of [0, 1].
      num_steps: Number of steps, at least 1.
      loss: The loss to maximise: a function of logits and labels, with one value per image.
      start: First iterate, the sum of image and noise, in place of a random start.

    Returns:
      Attacked images [N, H, W, C]; no gradient flows through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no steps.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.5)
      >>> attacked = pgd(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, step_size=0.05)
      >>> float(attacked.mean().round(3))  # class 0 is for bright images, so the attack darkens this one
      0.4

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    check_attack(logits_fn, images, labels, epsilon=epsilon, step_size=step_size, num_steps=num_steps, start=start)
    keys = image_keys(rng, len(images)) if start is None else None
    attacked, marks = on_network(
        _iterated, logits_fn, images, labels, keys, start, epsilon, step_size, Partial(loss), num_steps
    )
    check_finite(attacked, marks)  # under `jit`, XLA removes what is computed for it
    return attacked


def _iterated(logits_fn, images, labels, keys, start, epsilon, step_size, loss, num_steps):
    """The last iterates; and for each image 0, or NaN if the margin of one of its iterates isn't finite."""
    images = jax.lax.stop_gradient(images)
    logits_fn = held_fixed(logits_fn, images)
    first = random_start(keys, images, epsilon) if start is None else jax.lax.stop_gradient(start)

    def step(_, carry):
        iterate, finite = carry
        direction, logits = signed_gradient(loss, logits_fn, iterate, labels)
        finite &= jnp.isfinite(logit_margin(logits, labels))
        return _moved(iterate, direction, images, epsilon, step_size), finite

    carry = first.astype(images.dtype), jnp.ones(len(images), bool)
    last, finite = jax.lax.fori_loop(0, num_steps, step, carry)
    finite &= jnp.isfinite(logit_margin(logits_fn(last), labels))
    return jax.lax.stop_gradient((last, jnp.where(finite, 0.0, jnp.nan)))


def fgsm(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    step_size: Scalar | None = None,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """The paper's "FGSM": one signed step of the size of the radius, from a uniform random start.

    The original fast gradient sign method starts from the image: pass `start=images` for that. Arguments, result and
    errors are as in `pgd`; `step_size` is epsilon by default.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.5)
      >>> float(fgsm(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, start=images).mean().round(3))
      0.4

    Source: Goodfellow et al., ICLR 2015; with the random start, Zhang & Wang, NeurIPS 2019.
    """
    step_size = epsilon if step_size is None else step_size
    return pgd(logits_fn, rng, images, labels, epsilon=epsilon, step_size=step_size, num_steps=1, start=start)


def cw(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    step_size: Scalar = 2 / 255,
    num_steps: int = 20,
    start: Float[Array, "n h w c"] | None = None,
) -> Float[Array, "n h w c"]:
    """The paper's "CW": `pgd` with the margin loss `cw_margin` in place of the cross-entropy.

    Arguments, result and errors are as in `pgd`.

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


def pgd_steps(
    *,
    epsilon: Scalar = 8 / 255,
    step_size: Scalar = 2 / 255,
    num_steps: int = 20,
    num_runs: int = 1,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    last_only: bool = False,
) -> Stepwise:
    """`pgd` as a `Stepwise`; with `loss=cw_margin`, `cw`. Each run has its own random start.

    Args:
      epsilon: Radius, in units of [0, 1].
      step_size: Step size, in units of [0, 1].
      num_steps: Steps of each run.
      num_runs: Number of random starts.
      loss: The loss to maximise: a function of logits and labels, with one value per image.
      last_only: Judge the last iterate alone, as the paper's code does: no image counts as misclassified before its
        last step. By default the attack stops at the first misclassified iterate of an image. (The start isn't judged,
        as it may be outside [0, 1].)

    Returns:
      The attack, for `stepwise.run` and `packing.packed`.

    Example:
      >>> pgd_steps(num_steps=100, num_runs=5).num_runs
      5
    """
    bound = {"epsilon": epsilon, "step_size": step_size, "loss": Partial(loss)}
    if last_only:
        step = Partial(_step_to_the_last, num_steps=num_steps, **bound)
        return Stepwise(Partial(_unjudged_start, epsilon=epsilon), step, num_steps, num_runs, ((1, 0), (1, 1)))
    start = Partial(_start, epsilon=epsilon, loss=Partial(loss))
    return Stepwise(start, Partial(_step, **bound), num_steps, num_runs)


class _Ascent(NamedTuple):
    iterate: Float[Array, "n h w c"]
    direction: Float[Array, "n h w c"] | None
    """Sign of the loss's gradient at the iterate; a NaN here makes the next iterate NaN too."""
    progress: Progress


def _start(logits_fn, keys, images, labels, run, *, epsilon, loss):
    first = random_start(keys, images, epsilon)
    return _Ascent(first, signed_gradient(loss, logits_fn, first, labels)[0], unjudged(images))


def _step(logits_fn, state, images, labels, *, epsilon, step_size, loss):
    iterate = _moved(state.iterate, state.direction, images, epsilon, step_size)
    direction, logits = signed_gradient(loss, logits_fn, iterate, labels)
    return _Ascent(iterate, direction, judged(state.progress, iterate, logits, labels))


def _unjudged_start(logits_fn, keys, images, labels, run, *, epsilon):
    return _Ascent(random_start(keys, images, epsilon), None, unjudged(images))


def _step_to_the_last(logits_fn, state, images, labels, *, epsilon, step_size, loss, num_steps):
    direction, _ = signed_gradient(loss, logits_fn, state.iterate, labels)
    iterate = _moved(state.iterate, direction, images, epsilon, step_size)
    not_judged = state.progress._replace(step=state.progress.step + 1)
    last = not_judged.step == num_steps

    def at_the_end():
        return where(last, judged(state.progress, iterate, logits_fn(iterate), labels), not_judged)

    return _Ascent(iterate, None, jax.lax.cond(last.any(), at_the_end, lambda: not_judged))


def _moved(iterate, direction, images, epsilon, step_size):
    return project(iterate + step_size * direction, images, epsilon).astype(images.dtype)


def signed_gradient(loss, logits_fn, iterates, labels):
    """Signs of the gradient of each image's loss, and the logits of the same pass."""

    # The gradient of the sum is each image's own gradient; its sign is the same as that of the mean.
    def total(x):
        logits = logits_fn(x)
        return jnp.sum(loss(logits, labels)), logits

    gradient, logits = jax.grad(total, has_aux=True)(iterates)
    return jnp.sign(gradient), logits


def _build(loss):
    def build(*, epsilon, num_classes, step_size, restarts, any_iterate, num_steps=1):
        return pgd_steps(
            epsilon=epsilon, step_size=step_size, num_steps=num_steps, num_runs=restarts, loss=loss,
            last_only=not any_iterate,
        )  # fmt: skip

    return build


_SHARED = {"restarts": count(1), "any_iterate": flag(False)}
_ITERATED = {"step_size": length(lambda epsilon: epsilon / 4), "num_steps": count(20), **_SHARED}

FGSM = Specification(
    "fgsm",
    "one signed step as large as the radius, from a random start",
    _build(cross_entropy),
    {"step_size": length(lambda epsilon: epsilon), **_SHARED},
    every_run=True,
)
PGD = Specification(
    "pgd",
    "projected gradient descent on the cross-entropy",
    _build(cross_entropy),
    _ITERATED,
    steps_in_name=True,
    every_run=True,
)
CW = Specification(
    "cw", "PGD on the paper's margin loss", _build(cw_margin), _ITERATED, steps_in_name=True, every_run=True
)
