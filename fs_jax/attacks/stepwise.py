"""Attacks as one start and many equal steps, each image for itself: so images at different steps can share a batch.

A long attack is a `Stepwise`. `run` carries it through on one batch, as one program; `fs_jax.attacks.packing` feeds it
any number of images, and puts another image in the place of each that is done.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fs_jax._utils.keys import image_keys, run_keys
from fs_jax.attacks.linf import LogitsFn, held_fixed
from fs_jax.attacks.losses import logit_margin
from fs_jax.attacks.network import on_network


class Progress(NamedTuple):
    """How far each image of a batch is; every attack's state holds one as its field `progress`."""

    adversarial: Float[Array, "n h w c"]
    """Of the iterates in the ball, that of the lowest margin so far: the misclassified one, once there is one."""
    margin: Float[Array, "n"]
    """Its z_y - max_{i != y} z_i, float32; above 0 for an image that is classified correctly."""
    step: Int[Array, "n"]
    """Steps done, each image its own."""
    misclassified_at: Int[Array, "n"]
    """The step at which an iterate was first misclassified, 0 being the start; -1 while none was."""


class Stepwise(NamedTuple):
    """An attack, cut in equal steps that look at no other image of the batch.

    `start` and `step` are functions, or `jax.tree_util.Partial`s of module-level functions. What a Partial binds is
    an argument of the compiled program, so that another radius or number of steps compiles nothing anew; it must be
    numbers and arrays, or Partials again (a loss, say: `Partial(cross_entropy)`).
    """

    start: Callable[..., PyTree]
    """(logits_fn, keys [N], images, labels, run [N] int32) -> state: a NamedTuple with a field `progress`, N leading in
    every leaf. The keys are those of the image in this run, and all that it draws comes from them."""
    step: Callable[..., PyTree]
    """(logits_fn, state, images, labels) -> state, with `progress.step` one higher (see `judged`). Schedules follow
    that step, image by image. The caller puts back the old state of images that are done."""
    num_steps: int
    """Steps of one run."""
    num_runs: int = 1
    """Random starts, or targets: runs 0, 1, ... of every image."""
    passes: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    """(forward, backward) passes of one image: those of a run that belong to no step, and those of a step."""
    breadth: int = 1
    """How many variants of one image go through the network at a time."""
    draws: bool = False
    """Whether it is for a randomised network, `logits_fn(images, keys)`, and gives that a key for each image."""


def unjudged(images: Float[Array, "n h w c"]) -> Progress:
    """The progress of images that have done no step, and of which no iterate has been judged yet: margins infinite.

    Example:
      >>> unjudged(jnp.zeros((1, 2, 2, 1))).misclassified_at.tolist()
      [-1]
    """
    count = len(images)
    margin = jnp.full(count, jnp.inf, jnp.float32)
    return Progress(images, margin, jnp.zeros(count, jnp.int32), jnp.full(count, -1, jnp.int32))


def first_judged(
    iterates: Float[Array, "n h w c"], logits: Float[Array, "n classes"], labels: Int[Array, "n"]
) -> Progress:
    """The progress of images that have done no step, judged by the logits of their first iterates, in the ball.

    Example:
      >>> first_judged(jnp.zeros((1, 2, 2, 1)), jnp.array([[1.0, 2.0]]), jnp.array([0])).misclassified_at.tolist()
      [0]
    """
    margin = logit_margin(logits, labels).astype(jnp.float32)
    misclassified_at = jnp.where(margin > 0, -1, 0).astype(jnp.int32)
    return Progress(iterates, margin, jnp.zeros(len(labels), jnp.int32), misclassified_at)


def judged(
    progress: Progress, iterates: Float[Array, "n h w c"], logits: Float[Array, "n classes"], labels: Int[Array, "n"]
) -> Progress:
    """The progress after one more step, which led to these iterates in the ball with these logits.

    Logits that aren't numbers count as misclassified and stay in the margin: no image passes for robust by them.

    Example:
      >>> before = first_judged(jnp.zeros((1, 2, 2, 1)), jnp.array([[3.0, 2.0]]), jnp.array([0]))
      >>> after = judged(before, jnp.ones((1, 2, 2, 1)), jnp.array([[1.0, 2.0]]), jnp.array([0]))
      >>> after.margin.tolist(), after.misclassified_at.tolist()
      ([-1.0], [1])
    """
    margin, step = logit_margin(logits, labels).astype(jnp.float32), progress.step + 1
    lower = ~(margin >= progress.margin)
    return Progress(
        adversarial=where(lower, iterates, progress.adversarial),
        margin=jnp.where(lower, margin, progress.margin),
        step=step,
        misclassified_at=jnp.where((progress.misclassified_at < 0) & ~(margin > 0), step, progress.misclassified_at),
    )


def unfinished(progress: Progress, num_steps: int | Array) -> Bool[Array, "n"]:
    """Which images are neither misclassified nor done with all their steps.

    Example:
      >>> correct = first_judged(jnp.zeros((1, 2, 2, 1)), jnp.array([[3.0, 2.0]]), jnp.array([0]))
      >>> unfinished(correct, 5).tolist(), unfinished(correct, 0).tolist()
      ([True], [False])
    """
    return (progress.misclassified_at < 0) & (progress.step < num_steps)


def where(mask: Bool[Array, "n"], new: PyTree, old: PyTree) -> PyTree:
    """Image by image, `new` where the mask is True and `old` elsewhere, in every leaf.

    Example:
      >>> where(jnp.array([True, False]), jnp.ones((2, 1)), jnp.zeros((2, 1))).tolist()
      [[1.0], [0.0]]
    """
    return jax.tree.map(lambda n, o: jnp.where(mask.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def run(
    attack: Stepwise,
    logits_fn: LogitsFn,
    keys: Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
) -> Progress:
    """All the runs of an attack on one batch, as one program: no host is asked in between, so it may be jitted.

    A misclassified image stays as it is, and the loops end when all images are misclassified.

    Args:
      attack: The attack.
      logits_fn: Network, from images to logits [N, classes].
      keys: One key per image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].

    Returns:
      Progress over all runs: of the run that broke an image, else of that with its lowest margin.

    Example:
      >>> from fs_jax.attacks import pgd_steps
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> keys, images = jax.random.split(jax.random.key(0), 1), jnp.full((1, 4, 4, 1), 0.51)
      >>> int(run(pgd_steps(num_runs=3), logits_fn, keys, images, jnp.array([0])).misclassified_at[0])
      2
    """

    def one_run(carry):
        number, best = carry
        open_before = best.misclassified_at < 0
        runs = jnp.full(len(labels), number, jnp.int32)

        def active(state):
            return open_before & unfinished(state.progress, attack.num_steps)

        def step(state):
            return where(active(state), attack.step(logits_fn, state, images, labels), state)

        state = attack.start(logits_fn, run_keys(keys, runs), images, labels, runs)
        progress = jax.lax.while_loop(lambda state: active(state).any(), step, state).progress
        better = open_before & ((progress.misclassified_at >= 0) | (progress.margin < best.margin))
        return number + 1, where(better, progress, best)

    def more(carry):
        number, best = carry
        return (number < attack.num_runs) & (best.misclassified_at < 0).any()

    return jax.lax.while_loop(more, one_run, (jnp.int32(0), unjudged(images)))[1]


def adversaries(
    attack: Stepwise,
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    uses_gradients: bool,
) -> Float[Array, "n h w c"]:
    """The images that `run` ends with, compiled once for each network; no gradient flows through them.

    Args:
      attack: The attack.
      logits_fn: Network, from images to logits [N, classes].
      rng: A key, from which image i takes `fold_in(rng, i)`; or a key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      uses_gradients: Whether the attack differentiates the network, which it then asks of images of this shape only.

    Returns:
      Images [N, H, W, C].

    Example:
      >>> from fs_jax.attacks import pgd_steps
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images, labels = jnp.full((1, 4, 4, 1), 0.51), jnp.array([0])
      >>> attacked = adversaries(pgd_steps(), logits_fn, jax.random.key(0), images, labels, uses_gradients=True)
      >>> int(logits_fn(attacked).argmax())
      1
    """
    keys = image_keys(rng, len(images))
    return on_network(_adversaries, logits_fn, images, labels, keys, *attack[:4], uses_gradients=uses_gradients)


def _adversaries(logits_fn, images, labels, keys, *attack, uses_gradients):
    images = jax.lax.stop_gradient(images)
    fixed = held_fixed(logits_fn, images) if uses_gradients else lambda x: jax.lax.stop_gradient(logits_fn(x))
    return jax.lax.stop_gradient(run(Stepwise(*attack), fixed, keys, images, labels).adversarial)
