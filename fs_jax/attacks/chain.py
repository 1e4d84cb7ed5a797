"""Run a list of attacks on any number of images; `autoattack` and `fs_jax.evaluation.evaluate` both use this.

Each attack is run by `packed`, which drops misclassified images. The result for an image depends on the key, the attack
and the image's index, not on the batch or on interruptions.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from fs_jax._utils import backend
from fs_jax._utils.images import Images, as_float, check_classes, check_images, check_labels
from fs_jax._utils.keys import IMPLEMENTATION, threefry
from fs_jax._utils.validation import check_number
from fs_jax.attacks.linf import LogitsFn, check_logits_fn
from fs_jax.attacks.network import Network
from fs_jax.attacks.packing import bound, inputs_of, packed
from fs_jax.attacks.registry import Attack
from fs_jax.attacks.stepwise import Stepwise


class Outcome(NamedTuple):
    """The result of one run of an attack on one image."""

    index: int  # type: ignore[assignment]  # hides a tuple's method `index`, which isn't needed here
    """Index of the image in the split."""
    run: int
    """Number of the random start, or of the target."""
    steps: int
    """Number of steps made."""
    misclassified_at: int
    """The step at which the image was first misclassified, 0 for the start; -1 if it wasn't."""
    margin: float
    """Lowest margin: logit of the label minus the highest other logit, above 0 for a correctly classified image."""
    distance: float
    """L-infinity norm of the perturbation with this margin, in units of [0, 1], to 6 digits."""


class Log:
    """The outcomes of each attack, in memory; `fs_jax.evaluation.Journal` also writes them to a file.

    Example:
      >>> log = Log()
      >>> log.begin("pgd-20", {"epsilon": 0.1})
      >>> log.append("pgd-20", [Outcome(7, 0, 20, -1, 0.5, 0.1)], seconds=2.0)
      >>> log.outcomes["pgd-20"][7, 0].margin, log.seconds["pgd-20"]
      (0.5, 2.0)
    """

    def __init__(self):
        self.outcomes: dict[str, dict[tuple[int, int], Outcome]] = {}
        """For each attack, the outcomes by (index of the image, run)."""
        self.seconds: dict[str, float] = {}
        """For each attack, how long it took."""

    def begin(self, attack: str, settings: Mapping[str, Any]) -> None:
        """Start an attack, or resume it."""
        self.outcomes.setdefault(attack, {})
        self.seconds.setdefault(attack, 0.0)

    def append(self, attack: str, outcomes: Iterable[Outcome], *, seconds: float) -> None:
        """Add outcomes of an attack after `begin`, and the seconds that they took."""
        self.seconds[attack] += seconds
        self.outcomes[attack].update({(outcome.index, outcome.run): outcome for outcome in outcomes})


class Stage(NamedTuple):
    """The result of one attack of the list."""

    attack: Attack
    stepwise: Stepwise
    covered: Bool[np.ndarray, "n"]
    """The images that its accuracy counts: all, or the first `num_images` of the split."""
    attacked: Bool[np.ndarray, "n"]
    """The images among these that the attacks of `after` didn't misclassify."""
    robust: Bool[np.ndarray, "n"]
    """The images among these that this attack didn't misclassify either."""
    lowest: dict[int, Outcome]
    """For each position, the outcome of the run with the lowest margin."""
    passes: tuple[int, int]
    """Number of forward and of backward passes, of single images."""


def check_chain(
    logits_fn: LogitsFn, images: Images, labels: Int[np.ndarray, "n"], attack_list: Sequence[Attack]
) -> int:
    """Check the arguments of `run_chain` without running it.

    Returns:
      The number of classes of the network.

    Raises:
      TypeError, ValueError: with the argument, what was expected, what was given, and what to do.

    Example:
      >>> check_chain(lambda x: x.reshape(len(x), -1), np.zeros((9, 2, 2, 1), np.uint8), np.zeros(9, int), [])
      4
    """
    check_images(images, uint8_too=True)
    if not len(images):
        raise ValueError("images: expected at least one; got none.")
    check_labels(labels, images)
    names = [attack.name for attack in attack_list]
    if len(set(names)) < len(names):
        raise ValueError(f"attacks: expected different names; got {', '.join(names)}. Give one of them a label.")
    for place, attack in enumerate(attack_list):
        if missing := set(attack.after) - set(names[:place]):
            raise ValueError(f"{attack.name}: expected to come after {', '.join(sorted(missing))}; got {names}.")
        if attack.images is not None and attack.images.shape != images.shape:
            raise ValueError(
                f"{attack.name}: expected adversarial images of shape {images.shape}; got {attack.images.shape}."
            )
    if attack_list and len({randomised(attack) for attack in attack_list}) > 1:
        raise ValueError(
            "attacks: expected num_draws for all of them (a randomised network) or for none; got it for "
            f"{', '.join(attack.name for attack in attack_list if randomised(attack))} only."
        )
    key = jax.random.key(0, impl=IMPLEMENTATION) if any(map(randomised, attack_list)) else None
    num_classes = check_logits_fn(logits_fn, *inputs_of(images, key))
    check_classes(labels, num_classes)
    for attack in attack_list:
        attack.steps(num_classes)
    return num_classes


def check_worst_images(worst_images: Float[np.ndarray, "k h w c"] | None, images: Images) -> None:
    """Raise an error unless this is an array that adversarial images can be written to, or None.

    Example:
      >>> check_worst_images(np.zeros((2, 8, 8, 1), np.uint8), np.zeros((9, 8, 8, 1), np.uint8))
      Traceback (most recent call last):
      TypeError: worst_images: expected a writable NumPy array of floating point; got ndarray of uint8. Make it with...
    """
    if worst_images is None:
        return
    advice = "Make it with np.zeros(images.shape, np.float32)."
    is_array = isinstance(worst_images, np.ndarray)
    if not (is_array and jnp.issubdtype(worst_images.dtype, jnp.floating) and worst_images.flags.writeable):
        got = f"{type(worst_images).__name__} of {getattr(worst_images, 'dtype', 'no type')}"
        raise TypeError(f"worst_images: expected a writable NumPy array of floating point; got {got}. {advice}")
    if worst_images.ndim != 4 or worst_images.shape[1:] != images.shape[1:] or len(worst_images) > len(images):
        raise ValueError(
            f"worst_images: expected shape {images.shape}, or fewer images; got {worst_images.shape}. {advice}"
        )


def randomised(attack: Attack) -> bool:
    """Whether an attack is for a randomised network, `logits_fn(images, keys)`.

    Example:
      >>> randomised(Attack("apgd-ce", num_draws=20)), randomised(Attack("square"))
      (True, False)
    """
    return attack.settings.get("num_draws") is not None


def run_chain(
    logits_fn: LogitsFn | Network,
    rng: Key[Array, ""],
    images: Images,
    labels: Int[np.ndarray, "n"],
    attack_list: Sequence[Attack],
    *,
    log: Log,
    first: int = 0,
    batch_size: int | None = None,
    worst_images: Float[np.ndarray, "k h w c"] | None = None,
    progress: bool = False,
) -> list[Stage]:
    """Run a list of attacks in order, each on the images that the attacks of its `after` didn't misclassify.

    Args:
      logits_fn: Network, from images to logits [N, classes]; for a randomised network, from images and a key for each.
      rng: A key. The key of each run on image i is derived from it, the attack, the index `first + i`, and the run.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      attack_list: The attacks.
      log: Log that outcomes are added to. Outcomes that it already has aren't computed again.
      first: Index of the first image in its split.
      batch_size: The largest batch; by default 32 on a CPU, else 256.
      worst_images: Array [N, H, W, C], or [k, H, W, C] for the first k images only. For each image, the adversarial
        example with the lowest margin, over all attacks of the worst case, is written to it.
      progress: Show a progress bar for each attack.

    Returns:
      The result of each attack.

    Raises:
      TypeError, ValueError: as `check_chain`; or if the log has another attack, or the same with other settings.
      FloatingPointError: if the network gives logits that aren't finite.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = np.linspace(0.45, 0.65, 5, dtype=np.float32).reshape(5, 1, 1, 1)  # class 0 is for bright images
      >>> attack_list = [Attack("clean"), Attack("pgd", 0.08, after=["clean"])]
      >>> stages = run_chain(logits_fn, jax.random.key(0), images, np.zeros(5, int), attack_list, log=Log())
      >>> [stage.robust.tolist() for stage in stages]
      [[False, False, True, True, True], [False, False, False, True, True]]
    """
    num_classes = check_chain(logits_fn, images, labels, attack_list)
    check_worst_images(worst_images, images)
    draws = any(map(randomised, attack_list))
    rng = threefry(rng)
    network = bound(logits_fn, images, rng if draws else None)
    batch_size = backend.batch_size(network.platform) if batch_size is None else batch_size
    check_number("batch_size", batch_size, at_least=1, integer=True)
    for attack in attack_list:
        log.begin(attack.name, attack.described())
    if left_out := log.outcomes.keys() - {attack.name for attack in attack_list}:
        raise ValueError(
            f"attacks: expected {', '.join(sorted(left_out))} too, which the journal has; got "
            f"{', '.join(attack.name for attack in attack_list)}. Give all of them, or write to another folder."
        )
    worst = _Worst(worst_images, len(labels))
    for attack in attack_list:
        if not attack.apart:
            worst.record_margins(
                (outcome.index - first, outcome.margin) for outcome in log.outcomes[attack.name].values()
            )

    stages: dict[str, Stage] = {}
    for attack in attack_list:
        stepwise = attack.steps(num_classes)
        covered = first + np.arange(len(labels)) < (attack.num_images or np.inf)
        attacked = np.all([covered, *(stages[name].robust | ~stages[name].covered for name in attack.after)], axis=0)
        _run(
            attack, stepwise, network, rng, images, labels, np.flatnonzero(attacked).tolist(), int(covered.sum()),
            log=log, first=first, batch_size=batch_size, worst=None if attack.apart else worst, progress=progress,
        )  # fmt: skip
        outcomes = log.outcomes[attack.name].values()
        lowest = _lowest(outcomes, first)
        robust = attacked.copy()
        for place, outcome in lowest.items():
            robust[place] = outcome.misclassified_at < 0
        stages[attack.name] = Stage(attack, stepwise, covered, attacked, robust, lowest, _passes(stepwise, outcomes))
    return list(stages.values())


def _run(
    attack, stepwise, network, rng, images, labels, attacked, among, *, log, first, batch_size, worst, progress
):  # fmt: skip
    """Make the runs of an attack that the log doesn't have yet, and add their outcomes to it."""
    done = log.outcomes[attack.name]
    keys = attack.keys(rng, first + jnp.arange(len(labels)), stepwise.num_runs)
    given = images if attack.images is None else attack.images
    with _Bar(attack, stepwise, attacked, among, done, first, progress=progress) as bar:
        for jobs in _missing(attack, stepwise, attacked, done, first):
            began = time.monotonic()
            size = _even(batch_size, len(jobs)) if not attack.any_iterate or not stepwise.num_steps else batch_size
            reports = packed(
                stepwise, network, keys, given, labels, batch_size=size, every_run=attack.specification.every_run,
                jobs=jobs,
            )  # fmt: skip
            for report in reports:
                for job in report.finished:
                    if worst is not None:
                        worst.update(job.image, job.margin, job.adversarial)
                outcomes = [_outcome(attack, job, images, first) for job in report.finished]
                now = time.monotonic()
                log.append(attack.name, outcomes, seconds=now - began)
                began = now
                bar.show(report.forward, outcomes)


def _outcome(attack, job, images, first):
    image = as_float(images[job.image])
    change, lowest, highest = (
        float(value) for value in (np.abs(job.adversarial - image).max(), job.adversarial.min(), job.adversarial.max())
    )
    # Images outside of the ball or of [0, 1] must not count. The tolerance is the rounding of the images' type; a NaN
    # is in no range.
    rounding = 4 * float(jnp.finfo(image.dtype).eps)
    radius = np.inf if attack.specification.norm is None else attack.epsilon
    if not (change <= radius + rounding and lowest >= -rounding and highest <= 1 + rounding):
        raise ValueError(
            f"{attack.name}: expected images in [0, 1] within {radius:.6g}; it gave one at {change:.6g} with values in "
            f"[{lowest:.6g}, {highest:.6g}]. Project them (see `fs_jax.attacks.project`)."
        )
    misclassified_at = job.step if job.misclassified else -1
    # 6 digits, the precision of float32.
    return Outcome(first + job.image, job.run, job.step, misclassified_at, job.margin, round(change, 6))


def _even(batch_size, count):
    """The largest divisor of `count` that is at most `batch_size` and above half of it; else `batch_size`.

    If all images end together, all batches are then full, and only one size is compiled.
    """
    return next((size for size in range(batch_size, batch_size // 2, -1) if count % size == 0), batch_size)


def _missing(attack, stepwise, attacked, done, first) -> Iterator[list[tuple[int, int]]]:
    """The jobs that are missing, for `packed`."""
    if attack.specification.every_run:
        missing = [[(i, r) for i in attacked if (first + i, r) not in done] for r in range(stepwise.num_runs)]
        # If only the last iterate counts, all images end together, so random starts are run one after another.
        yield from [[job for of_run in missing for job in of_run]] if attack.any_iterate else missing
        return
    # For each image its first missing run; `packed` adds the next runs while the image is robust.
    last = {outcome.index - first: outcome for _, outcome in sorted(done.items())}
    begin = {i: last[i].run + 1 if i in last else 0 for i in attacked}
    if jobs := [
        (i, run)
        for i, run in begin.items()
        if run < stepwise.num_runs and not (i in last and last[i].misclassified_at >= 0)
    ]:
        yield jobs


def _lowest(outcomes: Iterable[Outcome], first: int) -> dict[int, Outcome]:
    """For each position, the outcome of the run with the lowest margin."""
    lowest: dict[int, Outcome] = {}
    for outcome in outcomes:
        place = outcome.index - first
        if place not in lowest or outcome.margin < lowest[place].margin:
            lowest[place] = outcome
    return lowest


def _passes(stepwise, outcomes):
    of_start, of_step = np.array(stepwise.passes)
    forward, backward = len(outcomes) * of_start + sum(outcome.steps for outcome in outcomes) * of_step
    return int(forward), int(backward)


class _Worst:
    """For each image, the adversarial image of the lowest margin."""

    def __init__(self, images, total):
        self._images, self._margins = images, np.full(total, np.inf)

    def record_margins(self, margins):
        """Record margins of adversarial images that are already in the array, as (position, margin)."""
        for place, margin in margins:
            self._margins[place] = min(self._margins[place], margin)

    def update(self, place, margin, adversarial):
        """Write this adversarial image if its margin is lower than that of the one in the array."""
        if self._images is not None and place < len(self._images) and margin < self._margins[place]:
            self._images[place], self._margins[place] = adversarial, margin


class _Bar:
    """A progress bar: steps made, or skipped because an image is misclassified; and the accuracy so far."""

    def __init__(self, attack, stepwise, attacked, among, done, first, *, progress):
        self._side_by_side, self._stepwise, self._among = attack.specification.every_run, stepwise, among
        broken = {outcome.index for outcome in done.values() if outcome.misclassified_at >= 0}
        self._robust = {first + i for i in attacked} - broken
        finished = sum(1 if self._side_by_side else outcome.index in broken for outcome in done.values())
        total = len(attacked) * stepwise.num_runs * max(1, stepwise.num_steps)
        begun = min(total, finished * max(1, stepwise.num_steps))
        self._bar = tqdm(
            total=total, initial=begun, desc=attack.name, unit="step", unit_scale=True, disable=not progress
        )

    def show(self, forward, outcomes):
        each = max(1, self._stepwise.num_steps)
        made = forward // max(1, self._stepwise.passes[1][0])
        broken = [outcome for outcome in outcomes if outcome.misclassified_at >= 0]
        runs = 1 if self._side_by_side else self._stepwise.num_runs
        skipped = sum((runs if self._side_by_side else runs - o.run) * each - o.steps for o in broken)
        self._robust -= {outcome.index for outcome in broken}
        self._bar.update(min(made + skipped, self._bar.total - self._bar.n))
        self._bar.set_postfix(accuracy=f"{len(self._robust) / max(1, self._among):.1%}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
