"""Local search: a few pixels at a time are changed by much, those first of which the network depends most."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, project
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged

# LocSearchAdv's p, r, d, t, and the most pixels it starts with: of 10% of them, 128.
_PUSH = 10
_GROWTH = 1.5
_HALF_SIDE = 5
_CHANGED = 5
_SHARE, _MOST = 0.1, 128


def local_search(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 1.0,
    num_steps: int = 150,
    chunk_size: int = 32,
) -> Float[Array, "n h w c"]:
    """LocSearchAdv: greedy search over single pixels, with forward passes alone. Not bounded by a radius, as published.

    In values v = x - 1/2, in [-1/2, 1/2]. The candidates are at first a random 10% of the pixels, at most 128. A round
    pushes each candidate by itself, in all its channels, to 10 sign(v), and notes the true class's probability. The 5
    candidates that lower it most get 1.5 v, cyclically: less 1 above 1/2, and 1 more below -1/2. All pixels within 5
    rows and 5 columns of those 5 are the next round's candidates.

    What it changes it changes by up to 1, so its successes say nothing about a radius: the attack doesn't belong in one
    table with bounded ones. With `epsilon` below 1 each round ends with the projection on that ball: a variant of ours,
    which is comparable, and weaker.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode. Its inputs may leave [0, 1] in one
        pixel, by up to 9.5.
      rng: A key, from which image i takes `fold_in(rng, i)`, or a key for each image: for the first candidates.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius of the projected variant, in units of [0, 1]; 1, the range of the images, bounds nothing.
      num_steps: Rounds, at least 1.
      chunk_size: Candidates of each image at a time: memory is that of N chunk_size images.

    Returns:
      Images [N, H, W, C] in [0, 1]: misclassified, else of the lowest margin met. No gradient flows through.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no rounds. (Values are checked where they are known, so not under jit.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.56)
      >>> attacked = local_search(logits_fn, jax.random.key(0), images, jnp.array([0]))
      >>> int(logits_fn(attacked).argmax()), float(abs(attacked - images).max().round(2))
      (1, 0.53)

    Source: Narodytska & Kasiviswanathan, "Simple black-box adversarial attacks on deep neural networks", CVPR workshops
    2017, algorithm LocSearchAdv.
    """
    check_attack(logits_fn, images, labels, epsilon=epsilon, num_steps=num_steps)
    attack = local_search_steps(epsilon=epsilon, num_steps=num_steps, chunk_size=chunk_size)
    return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=False)


def local_search_steps(*, epsilon: Scalar = 1.0, num_steps: int = 150, chunk_size: int = 32) -> Stepwise:
    """`local_search` in rounds, with the same arguments and errors.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`. Its passes are the most that a round can take.

    Example:
      >>> local_search_steps().passes  # 5 neighbourhoods of 11 by 11 candidates, and the round's result
      ((1, 0), (606, 0))
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1; got {chunk_size}.")
    step = Partial(_step, epsilon=epsilon, chunk=np.arange(chunk_size))
    passes = (1, 0), (_CHANGED * (2 * _HALF_SIDE + 1) ** 2 + 1, 0)
    return Stepwise(Partial(_start), step, num_steps, passes=passes, breadth=chunk_size)


class _Search(NamedTuple):
    iterate: Float[Array, "n h w c"]
    candidates: Bool[Array, "n h w"]
    progress: Progress


def _start(logits_fn, keys, images, labels, run):
    _, height, width, _ = images.shape
    count = max(1, min(int(_SHARE * height * width), _MOST))

    def some_pixels(key):
        return jax.random.permutation(key, height * width).reshape(height, width) < count

    candidates = jax.vmap(some_pixels)(keys)
    return _Search(images, candidates, first_judged(images, logits_fn(images), labels))


def _step(logits_fn, state, images, labels, *, epsilon, chunk):
    probability = _probability_when_pushed(logits_fn, state.iterate, state.candidates, labels, chunk)
    changed = jax.vmap(_lowest)(probability)
    grown = _GROWTH * (state.iterate - 0.5)
    cyclic = grown - jnp.where(grown > 0.5, 1, 0) + jnp.where(grown < -0.5, 1, 0) + 0.5
    moved = jnp.where(changed[..., None], cyclic, state.iterate)
    iterate = project(moved, images, epsilon).astype(images.dtype)
    progress = judged(state.progress, iterate, logits_fn(iterate), labels)
    return _Search(iterate, jax.vmap(_neighbourhood)(changed), progress)


def _probability_when_pushed(logits_fn, images, candidates, labels, chunk):
    """The true class's probability with one pixel pushed, for every candidate pixel [N, H, W]; elsewhere infinity."""
    count, height, width, channels = images.shape
    size, pixels = len(chunk), height * width
    # The candidates' positions, in front; then positions past the end.
    order = jax.vmap(lambda mask: jnp.nonzero(mask, size=pixels, fill_value=pixels)[0])(
        candidates.reshape(count, pixels)
    )
    order = jnp.pad(order, ((0, 0), (0, -pixels % size)), constant_values=pixels)
    pushed = _PUSH * jnp.sign(images - 0.5) + 0.5

    def score(turn, scores):
        positions = jax.lax.dynamic_slice_in_dim(order, turn * size, size, axis=1)
        here = (jnp.arange(pixels)[None, None] == positions[..., None]).reshape(count, size, height, width, 1)
        variants = jnp.where(here, pushed[:, None], images[:, None]).reshape(-1, height, width, channels)
        probabilities = jax.nn.softmax(logits_fn(variants).astype(jnp.float32)).reshape(count, size, -1)
        of_true = jnp.take_along_axis(probabilities, labels[:, None, None], -1)[..., 0]
        return jax.vmap(lambda row, p, value: row.at[p].set(value, mode="drop"))(scores, positions, of_true)

    turns = (jnp.max(jnp.sum(candidates, (1, 2))) + size - 1) // size
    unknown = jnp.full((count, pixels), jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, turns, score, unknown).reshape(count, height, width)


def _lowest(scores):
    """Where the lowest of the finite scores [H, W] are."""
    values, positions = jax.lax.top_k(-scores.ravel(), min(_CHANGED, scores.size))
    chosen = jnp.zeros(scores.size, bool).at[positions].set(jnp.isfinite(values))
    return chosen.reshape(scores.shape)


def _neighbourhood(mask):
    """All pixels within the half side of one in the mask [H, W]."""
    side = 2 * _HALF_SIDE + 1
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, (side, side), (1, 1), "SAME")


def _build(*, epsilon, num_classes, num_steps):
    return local_search_steps(epsilon=epsilon, num_steps=num_steps)


LOCAL_SEARCH = Specification(
    "local-search",
    "greedy search over single pixels, without gradients; no radius bounds it",
    _build,
    {"num_steps": count(150)},
    norm=None,
    fixed_radius=1.0,
    uses_gradients=False,
)
LOCAL_SEARCH_PROJECTED = Specification(
    "local-search-projected",
    "the same, projected on the ball after each round",
    _build,
    {"num_steps": count(150)},
    uses_gradients=False,
)
