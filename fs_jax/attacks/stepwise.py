"""Attacks split into a start and equal steps. Images are independent, so a batch can have images at different steps.

Such an attack is a `Stepwise`. `run` runs it on one batch, as one program; `fs_jax.attacks.packing` runs it on any
number of images, and replaces finished images in the batch by new ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fs_jax._utils.keys import image_keys, run_keys
from fs_jax.attacks.linf import LogitsFn, check_finite, held_fixed
from fs_jax.attacks.losses import logit_margin
from fs_jax.attacks.network import on_network


class Progress(NamedTuple):
    """The progress of each image in a batch; the state of every attack has it in its field `progress`."""

    adversarial: Float[Array, "n h w c"]
    """The iterate in the ball with the lowest margin so far."""
    margin: Float[Array, "n"]
    """The margin z_y - max_{i != y} z_i of `adversarial`, float32; above 0 if it is classified correctly."""
    step: Int[Array, "n"]
    """Number of steps made, for each image."""
    misclassified_at: Int[Array, "n"]
    """The step at which an iterate was first misclassified, 0 for the start; -1 if none was so far."""


class Stepwise(NamedTuple):
    """An attack, split into a start and equal steps that treat each image of the batch independently.

    `start` and `step` are functions, or `jax.tree_util.Partial`s of module-level functions. What a Partial binds is
    an argument of the compiled program, so that another radius or number of steps needs no compilation. It must be
    numbers and arrays, or Partials again (a loss, for example: `Partial(cross_entropy)`).
    """

    start: Callable[..., PyTree]
    """(logits_fn, keys [N], images, labels, run [N] int32) -> state: a NamedTuple with a field `progress`, in which
    every array has N as its first axis. Draw all random numbers from the keys: one for each image and run."""
    step: Callable[..., PyTree]
    """(logits_fn, state, images, labels) -> state, with `progress.step` one higher (see `judged`). Schedules depend on
    `progress.step` of each image. The caller restores the state of images that are finished."""
    num_steps: int
    """Steps of one run."""
    num_runs: int = 1
    """Runs of each image, 0, 1, ...: a run is one random start, or one target."""
    passes: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    """(forward, backward) passes of one image: for a run without its steps (usually its start), and for one step."""
    breadth: int = 1
    """How many variants of an image go through the network at a time."""
    draws: bool = False
    """Whether the attack is for a randomised network, `logits_fn(images, keys)`, which takes a key for each image."""


def unjudged(images: Float[Array, "n h w c"]) -> Progress:
    """The progress at the start, if the first iterate isn't judged: margins are infinite.

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
    """The progress at the start, judged by the logits of the first iterates, which are in the ball.

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
    """The progress after one more step, given its iterates, which are in the ball, and their logits.

    NaN logits count as misclassified and stay in the margin, so that no image is called robust because of them.

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
    """True for images that are neither misclassified nor at their last step.

    Example:
      >>> correct = first_judged(jnp.zeros((1, 2, 2, 1)), jnp.array([[3.0, 2.0]]), jnp.array([0]))
      >>> unfinished(correct, 5).tolist(), unfinished(correct, 0).tolist()
      ([True], [False])
    """
    return (progress.misclassified_at < 0) & (progress.step < num_steps)


def where(mask: Bool[Array, "n"], new: PyTree, old: PyTree) -> PyTree:
    """`new` for images whose mask is True and `old` for the others, in every leaf.

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
    """Make all runs of an attack on one batch, as one program, which may be jitted.

    Misclassified images don't change any more, and the loops end when all images are misclassified.

    Args:
      attack: The attack.
      logits_fn: Network, from images to logits [N, classes].
      keys: One key per image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].

    Returns:
      For each image, the progress of the run in which it was misclassified, else of the run with its lowest margin.

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
    """The adversarial images that `run` finds, compiled once for each network; no gradient flows through them.

    Args:
      attack: The attack.
      logits_fn: Network, from images to logits [N, classes].
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      uses_gradients: Whether the attack differentiates the network. If so, it must call it with images of this
        shape only.

    Returns:
      Images [N, H, W, C].

    Raises:
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> from fs_jax.attacks import pgd_steps
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images, labels = jnp.full((1, 4, 4, 1), 0.51), jnp.array([0])
      >>> attacked = adversaries(pgd_steps(), logits_fn, jax.random.key(0), images, labels, uses_gradients=True)
      >>> int(logits_fn(attacked).argmax())
      1
    """
    keys, labels = image_keys(rng, len(images)), jnp.asarray(labels).astype(jnp.int32)
    found, margin = on_network(
        _adversaries, logits_fn, images, labels, keys, *attack[:4], uses_gradients=uses_gradients
    )
    check_finite(found, margin)
    return found


def _adversaries(logits_fn, images, labels, keys, *attack, uses_gradients):
    images = jax.lax.stop_gradient(images)
    fixed = held_fixed(logits_fn, images) if uses_gradients else lambda x: jax.lax.stop_gradient(logits_fn(x))
    progress = run(Stepwise(*attack), fixed, keys, images, labels)
    return jax.lax.stop_gradient((progress.adversarial, progress.margin))
