"""Square: random search with forward passes only; each proposal changes one square of the image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.keys import random_signs
from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged

# The square's share of the image starts at 0.8. It is halved after these queries if there are 5,000; with another
# number of queries, after the same fractions of it. (This is the schedule of the released AutoAttack. That of
# Square's paper also begins with 10, 50 and 200, but is for 10,000 queries.)
SHARE = 0.8
HALVED_AFTER, _OF = (10, 50, 200, 500, 1000, 2000, 4000), 5000


def square(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 5000,
) -> Float[Array, "n h w c"]:
    """Square attack: sets random squares of the perturbation to +-epsilon, and keeps a change if the margin decreases.

    The start is x + epsilon * s, with s a random sign for each column and channel (vertical stripes), clipped to
    [0, 1]. Each step draws a square of side round(sqrt(p h w)) at a random position, adds +-2 epsilon to it, with a
    random sign for each channel, and projects on the ball. The proposal is kept if the margin z_y - max_{i != y} z_i
    decreases, or is at most 0. p starts at 0.8 and is halved after 10, 50, 200, 500, 1000, 2000 and 4000 of 5,000
    steps. No gradients are used.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      num_steps: Queries after the start, at least 1.

    Returns:
      Images [N, H, W, C] in the ball: the misclassified iterates, or else those of the lowest margin. No gradient flows
        through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no steps.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.54)
      >>> attacked = square(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1, num_steps=100)
      >>> int(logits_fn(attacked).argmax())  # class 0 is for bright images, so the attack darkens this one
      1

    Source: Andriushchenko et al., "Square Attack", ECCV 2020, algorithms 1 and 2; settings as AutoAttack's (Croce &
    Hein, ICML 2020).
    """
    check_attack(logits_fn, images, labels, epsilon=epsilon, num_steps=num_steps)
    attack = square_steps(epsilon=epsilon, num_steps=num_steps)
    return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=False)


def square_steps(*, epsilon: Scalar = 8 / 255, num_steps: int = 5000) -> Stepwise:
    """`square` as a `Stepwise`, with one query in each step.

    Args:
      epsilon: Radius, in units of [0, 1].
      num_steps: Queries after the start.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`.

    Example:
      >>> square_steps(num_steps=1000).passes
      ((1, 0), (1, 0))
    """
    step = Partial(_step, epsilon=epsilon, num_steps=num_steps)
    return Stepwise(Partial(_start, epsilon=epsilon), step, num_steps, passes=((1, 0), (1, 0)))


class _Search(NamedTuple):
    keys: Key[Array, "n"]
    progress: Progress


def _start(logits_fn, keys, images, labels, run, *, epsilon):
    def stripes(key):
        return random_signs(jax.random.fold_in(key, 0), (1, *images.shape[2:]), images.dtype)

    first = _painted(images, jax.vmap(stripes)(keys), epsilon)
    return _Search(keys, first_judged(first, logits_fn(first), labels))


def _step(logits_fn, state, images, labels, *, epsilon, num_steps):
    progress = state.progress
    inside, signs = jax.vmap(_random_square, (0, 0, None, None))(state.keys, progress.step, num_steps, images.shape[1:])
    # Adding +-2 epsilon and projecting gives image +- epsilon for any iterate in the ball.
    proposal = jnp.where(inside, _painted(images, signs, epsilon), progress.adversarial)
    # `judged` keeps the proposal if the margin decreases, which includes the first misclassified one.
    return state._replace(progress=judged(progress, proposal, logits_fn(proposal), labels))


def _random_square(key, step, num_steps, shape):
    """A random square for this step: its mask [H, W, 1] and its sign for each channel [1, 1, C]."""
    height, width, channels = shape
    row_key, column_key, sign_key = jax.random.split(jax.random.fold_in(key, step + 1), 3)
    shares = SHARE / 2.0 ** np.arange(len(HALVED_AFTER) + 1)
    sides = np.clip(np.round(np.sqrt(shares * height * width)).astype(np.int32), 1, min(height, width))
    # floor(h num_steps / _OF) for each h of HALVED_AFTER, without the product, which overflows at 500,000 steps.
    times, rest = num_steps // _OF, num_steps % _OF
    halved_after = np.array(HALVED_AFTER, np.int32)
    side = jnp.asarray(sides)[jnp.sum(step > halved_after * times + halved_after * rest // _OF)]

    def interval(key, length):
        # The last position is included, as in the paper, so that every pixel can be changed.
        first = jax.random.randint(key, (), 0, length - side + 1, jnp.int32)  # in 64-bit mode too
        positions = jnp.arange(length, dtype=jnp.int32)
        return (positions >= first) & (positions < first + side)

    inside = interval(row_key, height)[:, None] & interval(column_key, width)[None]
    return inside[..., None], random_signs(sign_key, (1, 1, channels), jnp.float32)


def _painted(images, signs, epsilon):
    return jnp.clip(images + epsilon * signs.astype(images.dtype), 0, 1).astype(images.dtype)


def _build(*, epsilon, num_classes, num_steps):
    return square_steps(epsilon=epsilon, num_steps=num_steps)


SQUARE = Specification(
    "square",
    "AutoAttack's random search with squares, without gradients",
    _build,
    {"num_steps": count(5000)},
    constants={"p_init": SHARE, "halved_after": HALVED_AFTER},
    uses_gradients=False,
)
