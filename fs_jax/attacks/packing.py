"""Batch compaction: run a stepwise attack on any number of images, and compute nothing for those that are finished.

The host keeps a queue of jobs, (image, run), and a batch of slots on the device. A compiled program advances all slots
together. When an image is finished its slot becomes free, and a compiled program starts the next job there. When fewer
jobs remain than there are slots, the batch shrinks to one of a few fixed sizes; each size is compiled once, when it is
first used. The result for an image depends on its key and its run, not on the other images in the batch.
"""

import collections
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from fs_jax._utils import backend
from fs_jax._utils.images import as_float, check_classes, check_images, check_labels
from fs_jax._utils.keys import image_keys, run_keys, threefry
from fs_jax.attacks.linf import LogitsFn, check_logits_fn
from fs_jax.attacks.losses import logit_margin
from fs_jax.attacks.network import Network, bind
from fs_jax.attacks.stepwise import Stepwise, unfinished, where

_SHRINKS = 3
"""The batch may halve this many times; free slots are refilled in groups of the smallest size."""

_CONFIRMATION = 2**31 - 1
"""Folded into a run's key for its last draw; no step has this number."""

_SECONDS = 2
"""Target time, in seconds, between two returns to the host. They come sooner if slots can be refilled or the batch can
shrink."""


class Finished(NamedTuple):
    """The result of one job: one run of the attack on one image."""

    image: int
    """Position among the images given."""
    run: int
    misclassified: bool
    step: int
    """The step at which the image was misclassified, 0 for the start; otherwise the number of steps of the run. (With a
    randomised network, an image is judged at the end of the run.)"""
    margin: float
    """Lowest z_y - max_{i != y} z_i found; above 0 if the image is still classified correctly. For a randomised
    network, the iterate with the lowest mean margin is evaluated once more with a new key; this is its margin."""
    adversarial: Float[np.ndarray, "h w c"]
    """The image in the ball with this margin."""


class PackedReport(NamedTuple):
    """A progress report of `packed`."""

    finished: list[Finished]
    """Jobs that finished since the last report; there may be none."""
    running: int
    """Jobs in the batch now."""
    waiting: int
    """Jobs in the queue now. (Unless `every_run`, an image that is robust to a run is queued for the next run.)"""
    forward: int
    """Forward passes of single images since the last report, including those of empty slots."""
    backward: int
    """Backward passes, counted in the same way."""


def packed(
    attack: Stepwise,
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"] | Key[Array, "n runs"],
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    *,
    batch_size: int | None = None,
    every_run: bool = False,
    jobs: Sequence[tuple[int, int]] | None = None,
) -> Iterator[PackedReport]:
    """Run a stepwise attack on any number of images; yields results as they come, every few seconds or sooner.

    Misclassified images are dropped at once and the rest compacted, without recompiling. Memory is bounded by the batch
    size: only the images of the batch are on the device. Jobs finish in no particular order.

    Args:
      attack: The attack, such as `pgd_steps(...)` or `apgd_steps(...)`.
      logits_fn: Network: any function from images to logits [N, classes]. A second call with this function, or with the
        same function of other weights, compiles nothing.
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image, of which run r uses
        `fold_in(key, r)`; or one key for each image and run.
      images: Images [N, H, W, C] on the host: uint8, or floating point in [0, 1].
      labels: True classes [N].
      batch_size: The largest number of images in one pass through the network; by default 32 on a CPU, else 256. An
        attack that evaluates several variants of each image (see `Stepwise.breadth`) has fewer images in its batch.
      every_run: Make all runs of each image. By default the runs of an image end with the first that succeeds.
      jobs: Jobs to do, as (image, run); by default all. Without `every_run`, give the first run of each image that is
        still to be made; its later runs follow. To resume, pass the missing jobs and the same `rng`.

    Yields:
      A `PackedReport`: jobs that finished, numbers of jobs that are running and waiting, and passes computed.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, or a network whose
        output isn't logits [N, classes].
      FloatingPointError: if the network gives logits that aren't finite.

    Example:
      >>> from fs_jax.attacks import pgd_steps
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = np.linspace(0.4, 0.8, 5, dtype=np.float32).reshape(5, 1, 1, 1)  # class 0 is for bright images
      >>> reports = list(packed(pgd_steps(), logits_fn, jax.random.key(0), images, np.zeros(5, int), batch_size=2))
      >>> {done.image: done.misclassified for report in reports for done in report.finished}
      {0: True, 1: True, 2: False, 3: False, 4: False}
    """
    images, labels = np.asarray(images), np.asarray(labels)
    keys = _keys_of_runs(rng, len(labels), attack.num_runs)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1; got {batch_size}.")
    if not isinstance(logits_fn, Network):
        check_images(images, uint8_too=True)
        check_labels(labels, images)
        check_classes(labels, check_logits_fn(logits_fn, *inputs_of(images, keys if attack.draws else None)))
    network = bound(logits_fn, images, keys if attack.draws else None, size=batch_size)
    if batch_size is None:
        batch_size = backend.batch_size(network.platform)
    batch_size = max(1, batch_size // attack.breadth)
    if jobs is None:
        jobs = [(i, r) for r in range(attack.num_runs if every_run else 1) for i in range(len(labels))]
    waiting = collections.deque((int(image), int(run)) for image, run in jobs)
    yield from _reports(attack, _Batch(attack, network, keys, images, labels), waiting, batch_size, every_run)


def bound(
    logits_fn: LogitsFn | Network,
    images: np.ndarray | Array,
    keys: Key[Array, "..."] | None = None,
    *,
    size: int | None = None,
) -> Network:
    """Make a function a `Network`, traced with `size` images like these, and with keys if given.

    A `Network` is returned unchanged.

    Example:
      >>> bound(lambda x: x.sum((1, 2)), np.zeros((9, 2, 2, 3), np.uint8)).platform in ("cpu", "gpu", "tpu")
      True
    """
    if isinstance(logits_fn, Network):
        return logits_fn
    network = bind(logits_fn, *inputs_of(images, keys, size=size or 2))
    if network is None:
        raise TypeError(
            "logits_fn: expected a function that captures concrete arrays; it captures traced ones. Call this outside "
            "of jax.jit and other transformations."
        )
    return network


def inputs_of(
    images: np.ndarray | Array, keys: Key[Array, "..."] | None = None, *, size: int = 2
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of a network's inputs: `size` images like these, and keys if given.

    Example:
      >>> inputs_of(np.zeros((9, 2, 2, 3), np.uint8))
      [ShapeDtypeStruct(shape=(2, 2, 2, 3), dtype=float32)]
    """
    dtype = jnp.float32 if images.dtype == np.uint8 else images.dtype
    inputs = [jax.ShapeDtypeStruct((size, *images.shape[1:]), dtype)]
    return inputs if keys is None else [*inputs, jax.ShapeDtypeStruct((size,), keys.dtype)]


def _keys_of_runs(rng, count, num_runs):
    """A key for each image and run [N, runs]."""
    if isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.ndim == 2:
        if rng.shape != (count, num_runs):
            raise ValueError(
                f"rng: expected keys of shape {(count, num_runs)}, one per image and run; got {rng.shape}."
            )
        return threefry(rng)
    keys = image_keys(rng, count)
    return jax.vmap(lambda run: run_keys(keys, jnp.full(count, run)), out_axes=1)(jnp.arange(num_runs))


def _reports(attack, batch, waiting, batch_size, every_run):
    sizes = sorted({max(1, batch_size >> halvings) for halvings in range(_SHRINKS + 1)})
    smallest = sizes[0]
    limit = 4  # most images are misclassified within few steps
    while waiting or batch.running:
        size = _best_size(sizes, batch.running, len(waiting))
        if not batch.running:
            batch.begin([waiting.popleft() for _ in range(min(size, len(waiting)))], size)
        elif size < len(batch.jobs):
            batch.shrink(size)
        while waiting and batch.free >= min(smallest, len(waiting)):
            batch.fill([waiting.popleft() for _ in range(min(smallest, len(waiting)))], smallest)
        # Return to the host as soon as slots can be refilled, or the remaining jobs fit into the next smaller size.
        smaller = max((s for s in sizes if s < size), default=0)
        until_idle = min(smallest, len(waiting)) if waiting else size - smaller
        began = time.monotonic()
        finished = batch.advance(limit, until_idle)
        seconds = time.monotonic() - began
        limit = min(2 * limit, attack.num_steps) if seconds < _SECONDS else max(limit // 2, 1)
        if not every_run:
            waiting += [(d.image, d.run + 1) for d in finished if not d.misclassified and d.run + 1 < attack.num_runs]
        yield PackedReport(finished, batch.running, len(waiting), *batch.take_passes())


def _best_size(sizes: list[int], running: int, waiting: int) -> int:
    """The largest size that can be filled, but at least as large as the number of running jobs."""
    filled = max((size for size in sizes if size <= running + waiting), default=sizes[0])
    holding = min(size for size in sizes if size >= running)
    return max(filled, holding)


class _Batch:
    """The slots on the device, and on the host the job of each slot."""

    def __init__(self, attack, network, keys, images, labels):
        self.jobs: list[tuple[int, int] | None] = []
        self._attack, self._keys, self._images, self._labels = attack, keys, images, labels
        self._network = network
        self._start, self._step = map(as_partial, (attack.start, attack.step))
        self._slots = None
        self._passes = np.zeros(2, np.int64)

    @property
    def running(self) -> int:
        return len(self.jobs) - self.free

    @property
    def free(self) -> int:
        return self.jobs.count(None)

    def begin(self, jobs, size):
        """Start a batch of this size with these jobs."""
        self._slots = self._started(jobs, size)
        self.jobs = jobs + [None] * (size - len(jobs))

    def shrink(self, size):
        """Move the running jobs to a smaller batch."""
        order = sorted(range(len(self.jobs)), key=lambda slot: self.jobs[slot] is None)[:size]
        self._slots = _take(self._slots, np.array(order))
        self.jobs = [self.jobs[slot] for slot in order]

    def fill(self, jobs, size):
        """Start these jobs as a separate batch of this size, and copy them into free slots."""
        started = self._started(jobs, size)
        free = [slot for slot, job in enumerate(self.jobs) if job is None][: len(jobs)]
        nowhere = [len(self.jobs)] * (size - len(jobs))
        self._slots = _put(self._slots, np.array(free + nowhere), started)
        for slot, job in zip(free, jobs, strict=True):
            self.jobs[slot] = job

    def advance(self, limit, until_idle) -> list[Finished]:
        """Make at most `limit` steps, until `until_idle` slots are idle; frees the slots of jobs that finished."""
        busy = np.array([job is not None for job in self.jobs])
        self._slots, steps = self._network.compiled(_advance, donate=True)(
            self._slots, self._step, busy, self._attack.num_steps, limit, until_idle
        )
        progress = self._slots.state.progress
        steps, step, misclassified_at, margin = jax.device_get(
            (steps, progress.step, progress.misclassified_at, progress.margin)
        )
        self._passes += int(steps) * len(busy) * np.array(self._attack.passes[1])
        ended = np.flatnonzero(busy & ((misclassified_at >= 0) | (step >= self._attack.num_steps)))
        if steps and np.any(busy & (misclassified_at < 0) & (step == 0)):
            raise ValueError(
                "attack.step: expected progress.step to be one higher after it; it stayed 0. See `judged`."
            )
        if not len(ended):
            return []
        if self._attack.draws and self._attack.num_steps:
            margin = np.where(np.isfinite(margin), self._drawn_again(progress.adversarial), margin)
            misclassified_at = np.where(margin > 0, -1, step)
        finished, adversarial = [], np.asarray(progress.adversarial)
        for slot in ended:
            image, run = cast(tuple[int, int], self.jobs[slot])  # no free slot has ended
            if not np.isfinite(margin[slot]):
                raise FloatingPointError(
                    f"logits_fn: expected finite logits and gradients; got others for image {image} under attack, "
                    f"after {step[slot]} steps. Look for overflow in the network, or use float32."
                )
            adversary = adversarial[slot].copy()  # a view would hold the batch's memory
            job = Finished(
                image, run, bool(misclassified_at[slot] >= 0), int(step[slot]), float(margin[slot]), adversary
            )
            finished.append(job)
            self.jobs[slot] = None
        return finished

    def _drawn_again(self, adversarial):
        """Margins under one more draw of a randomised network, which the attack hasn't used."""
        image, run = np.array([job or (0, 0) for job in self.jobs]).T
        labels = self._labels[image].astype(np.int32)
        margins = self._network.compiled(_drawn_margins)(self._keys[image, run], adversarial, labels)
        return np.asarray(margins)

    def take_passes(self) -> tuple[int, int]:
        """Forward and backward passes since the last call."""
        spent, self._passes = self._passes, np.zeros(2, np.int64)
        return int(spent[0]), int(spent[1])

    def _started(self, jobs, size):
        image, run = np.resize(np.array(jobs), (size, 2)).T  # padded with repetitions
        self._passes += size * np.array(self._attack.passes[0])
        return self._network.compiled(_start)(
            self._start,
            self._keys[image, run],
            self._images[image],
            self._labels[image].astype(np.int32),
            run.astype(np.int32),
        )


class _Slots(NamedTuple):
    state: PyTree
    images: Float[Array, "n h w c"]
    labels: Int[Array, "n"]


def _start(network, attack_start, keys, images, labels, run):
    images = as_float(images)
    return _Slots(attack_start(network, keys, images, labels, run), images, labels)


def _drawn_margins(network, keys, images, labels):
    again = jax.vmap(jax.random.fold_in, (0, None))(keys, _CONFIRMATION)
    return logit_margin(network(images, again), labels).astype(jnp.float32)


def _advance(network, slots, attack_step, busy, num_steps, limit, until_idle):
    _, images, labels = slots

    def active(state):
        return busy & unfinished(state.progress, num_steps)

    def more(carry):
        state, count = carry
        return (count < limit) & (jnp.sum(~active(state)) < until_idle)

    def step(carry):
        state, count = carry
        return where(active(state), attack_step(network, state, images, labels), state), count + 1

    state, count = jax.lax.while_loop(more, step, (slots.state, jnp.int32(0)))
    return _Slots(state, images, labels), count


@jax.jit
def _take(slots, order):
    return jax.tree.map(lambda leaf: leaf[order], slots)


@functools.partial(jax.jit, donate_argnums=0)
def _put(slots, where_to, started):
    return jax.tree.map(lambda leaf, new: leaf.at[where_to].set(new, mode="drop"), slots, started)


def as_partial(function: Callable) -> Partial:
    """The function as a `Partial`, a pytree that a compiled program can take as an argument.

    Example:
      >>> jax.jit(lambda f, x: f(x))(as_partial(jnp.sin), 0.0).item()
      0.0
    """
    return function if isinstance(function, Partial) else Partial(function)
