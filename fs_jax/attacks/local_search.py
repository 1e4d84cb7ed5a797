"""Local search: in each round, changes the few pixels that the network depends on most, by a large amount."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, project
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged

# LocSearchAdv's p, r, d and t; it starts with 10% of the pixels, but at most 128.
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
    """LocSearchAdv: greedy search over single pixels, with forward passes only. As published, it has no radius.

    Pixels have values v = x - 1/2 in [-1/2, 1/2]. The first candidates are a random 10% of the pixels, at most 128. A
    round sets each candidate alone, in all channels, to 10 sign(v), and computes the probability of the true class. The
    5 candidates that lower it most are changed to 1.5 v, cyclically: minus 1 if that is above 1/2, plus 1 if it is
    below -1/2. The candidates of the next round are all pixels within 5 rows and 5 columns of these 5.

    Changes may be as large as 1, so a success says nothing about a radius: don't compare it with attacks that have one.
    With `epsilon` below 1, each round ends with a projection on the ball of this radius. This variant is ours. It is
    weaker, but can be compared with other attacks at the same radius.

    The network must be finite outside of [0, 1] too: pixels are pushed to -9.5 and 10.5. (A network with a square root
    or a logarithm of its input isn't; put `jnp.clip(x, 0, 1)` inside `logits_fn`.)

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode. In its inputs, one pixel may be outside
        [0, 1], by up to 9.5.
      rng: Key of the first candidates: a key, of which image i uses `fold_in(rng, i)`; or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius of the projected variant, in units of [0, 1]; with 1, the range of the images, there is no bound.
      num_steps: Number of rounds, at least 1.
      chunk_size: Candidates evaluated at a time for each image: memory is that of N chunk_size images.

    Returns:
      Images [N, H, W, C] in [0, 1]: the misclassified iterates, or else those of the lowest margin. No gradient flows
        through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no rounds.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

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
    """`local_search` as a `Stepwise` whose steps are rounds, with the same arguments and errors.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`. Its `passes` are an upper bound for a round.

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
    unknown = jnp.any(jnp.isnan(probability), (1, 2), keepdims=True)  # a NaN would never be the lowest
    changed = jax.vmap(_lowest)(probability)
    grown = _GROWTH * (state.iterate - 0.5)
    cyclic = grown - jnp.where(grown > 0.5, 1, 0) + jnp.where(grown < -0.5, 1, 0) + 0.5
    moved = jnp.where(changed[..., None], cyclic, state.iterate)
    iterate = project(moved, images, epsilon).astype(images.dtype)
    iterate = jnp.where(unknown[..., None], jnp.nan, iterate)  # so that no image is called robust because of it
    progress = judged(state.progress, iterate, logits_fn(iterate), labels)
    return _Search(iterate, jax.vmap(_neighbourhood)(changed), progress)


def _probability_when_pushed(logits_fn, images, candidates, labels, chunk):
    """The true class's probability if one pixel is pushed, for each candidate pixel [N, H, W]; infinity for others."""
    count, height, width, channels = images.shape
    size, pixels = len(chunk), height * width
    # The positions of the candidates, padded with positions past the end.
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
    """Mask of the lowest finite scores [H, W]."""
    values, positions = jax.lax.top_k(-scores.ravel(), min(_CHANGED, scores.size))
    chosen = jnp.zeros(scores.size, bool).at[positions].set(jnp.isfinite(values))
    return chosen.reshape(scores.shape)


def _neighbourhood(mask):
    """Mask of all pixels within `_HALF_SIDE` rows and columns of the mask's [H, W]."""
    side = 2 * _HALF_SIDE + 1
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, (side, side), (1, 1), "SAME")


def _build(*, epsilon, num_classes, num_steps):
    return local_search_steps(epsilon=epsilon, num_steps=num_steps)


LOCAL_SEARCH = Specification(
    "local-search",
    "greedy search over single pixels, without gradients and without a radius",
    _build,
    {"num_steps": count(150)},
    norm=None,
    fixed_radius=1.0,
    uses_gradients=False,
)
LOCAL_SEARCH_PROJECTED = Specification(
    "local-search-projected",
    "local search with a projection on the ball after each round",
    _build,
    {"num_steps": count(150)},
    uses_gradients=False,
)
