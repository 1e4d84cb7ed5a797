"""Evaluation under attack: every image of a split, one record per image and attack, the worst case over attacks.

All attacks go through `fs_jax.attacks.packed`: an image that has fallen costs nothing more. What happens to an image
depends on the seed, the attack and the image's index; not on the batch, nor on a stop and a going on.
"""

import dataclasses
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8
from tqdm import tqdm

from fs_jax import attacks
from fs_jax._utils import backend
from fs_jax._utils.images import as_float
from fs_jax._utils.validation import check_number
from fs_jax.evaluation.attack import SIGNED, Attack
from fs_jax.evaluation.journal import Journal, Record
from fs_jax.evaluation.network import as_logits_fn
from fs_jax.evaluation.statistics import accuracy


class Evaluation(NamedTuple):
    """Accuracies over a split, and what happened to each image."""

    summary: dict[str, Any]
    """`attacks`: for each, its settings, `correct`, `total`, `accuracy` with its 95% interval `low` to `high`,
    `lowest_single_run`, `attacked` (images), `forward` and `backward` (the passes of one image that they took in all),
    `by_step` (pairs of a step and the accuracy after it, where any iterate decides) and `seconds`; `worst`: the
    accuracy over all attacks at once; `images`, `seed`."""
    records: list[dict[str, Any]]
    """For each image its `index` in the split, `label`, whether it is `robust` to all, and by attack the lowest
    `margin` (logit of the label less the highest other one: above 0 where the image stands), `fallen_at` (the step, 0
    for the start; -1 where it stands) and `linf`, the size of the perturbation, to 6 digits. An attack that the image
    was spared is missing."""


def evaluate(
    model: Any,
    variables: PyTree,
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    attack_list: Sequence[Attack],
    *,
    batch_size: int | None = None,
    seed: int = 0,
    journal: Journal | None = None,
    worst_images: Float[np.ndarray, "k h w c"] | None = None,
    source: tuple[Any, PyTree] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Accuracy of a network, clean and under attack, over all the images given.

    Args:
      model: Flax module whose `apply(variables, images)` gives logits and features.
      variables: Its variables.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      attack_list: Attacks to run; the worst case is over those that don't stand apart.
      batch_size: Images at a time, at most; by default `fs_jax._utils.backend.batch_size()`.
      seed: Of the random starts.
      journal: Where the records go as they come. What it holds already isn't done again.
      worst_images: Where each image's adversary of the lowest margin goes, [N, H, W, C] or, of the first k images
        only, [k, H, W, C]; it may be a file in memory.
      source: Another network and its variables, for "transfer".
      progress: Show a progress bar for each attack.

    Returns:
      Summary and records.

    Raises:
      TypeError, ValueError: if images or labels aren't as said, or there are none, or no attack, or one twice, or one
        after an attack that isn't before it, or if the journal holds another attack.
      FloatingPointError: if the network gives logits that aren't finite.

    Example:
      >>> class Brightness:
      ...   def apply(self, variables, images, train=False):
      ...     level = images.mean((1, 2, 3))
      ...     return jnp.stack([level, 1 - level], -1), None
      >>> images, labels = np.linspace(0.5, 1, 50, dtype=np.float32).reshape(50, 1, 1, 1), np.zeros(50, int)
      >>> result = evaluate(Brightness(), {}, images, labels, [Attack("pgd", 0.2)], progress=False)
      >>> result.summary["attacks"][0]["accuracy"], result.records[0]["margin"]["pgd-20"]
      (0.6, -0.4)
    """
    images, labels = np.asarray(images), np.asarray(labels)
    batch_size = backend.batch_size() if batch_size is None else batch_size
    check_number("batch_size", batch_size, at_least=1, integer=True)
    num_classes = check_evaluation(model, variables, images, labels, attack_list, source=source)
    logits_fn = as_logits_fn(model, variables)
    journal = Journal(None, {}) if journal is None else journal
    source = None if source is None else as_logits_fn(*source)
    worst = _Worst(worst_images, len(labels))
    stands: dict[str, np.ndarray] = {}
    lowest: dict[str, dict[int, Record]] = {}
    summaries: list[dict[str, Any]] = []
    if left_out := journal.records.keys() - {attack.name for attack in attack_list}:
        names = ", ".join(attack.name for attack in attack_list)
        raise ValueError(
            f"attack_list: expected {', '.join(sorted(left_out))} too, as in {journal.path}; got {names}. Give all of "
            "them, or write to another folder."
        )
    for attack in attack_list:
        journal.begin(attack.name, dataclasses.asdict(attack))
        if not attack.apart:
            worst.know(journal.records[attack.name].values())
    for attack in attack_list:
        steps = attack.steps(num_classes, source)
        before = np.all([np.ones(len(labels), bool), *(stands[name] for name in attack.after)], axis=0)
        considered = np.arange(len(labels)) < (attack.num_images or len(labels))
        attacked = np.flatnonzero(considered & before).tolist()
        _run(
            attack, steps, logits_fn, images, labels, attacked, int(considered.sum()),
            batch_size=batch_size, seed=seed, journal=journal, worst=None if attack.apart else worst, progress=progress,
        )  # fmt: skip
        runs = journal.records[attack.name]
        lowest[attack.name] = _lowest(runs.values())
        stands[attack.name] = before.copy()
        for i, record in lowest[attack.name].items():
            stands[attack.name][i] = record.fallen_at < 0
        summaries.append(
            {
                **dataclasses.asdict(attack),
                "name": attack.name,
                "judged_by": attack.judged_by,
                "attacked": len(attacked),
                **accuracy(stands[attack.name][considered]),
                **_strength(attack, steps, runs.values(), before[considered]),
                "seconds": journal.seconds[attack.name],
            }
        )
    robust = np.all([stands[attack.name] for attack in attack_list if not attack.apart], axis=0)
    records = [
        {
            "index": i,
            "label": int(labels[i]),
            "robust": bool(robust[i]),
            **{
                field: {name: getattr(of_image[i], field) for name, of_image in lowest.items() if i in of_image}
                for field in ("margin", "fallen_at", "linf")
            },
        }
        for i in range(len(labels))
    ]
    return Evaluation({"images": len(labels), "seed": seed, "attacks": summaries, "worst": accuracy(robust)}, records)


def _run(attack, steps, logits_fn, images, labels, attacked, among, *, batch_size, seed, journal, worst, progress):
    """Make the runs of an attack that the journal doesn't hold yet, and put them there."""
    done = journal.records[attack.name]
    calls = list(_calls(attack, steps, attacked, seed, done, len(labels)))
    jobs = [job for _, jobs, _ in calls for job in jobs]
    with _Bar(attack, steps, jobs, attacked, among, done, progress=progress) as bar:
        for keys, jobs, start in calls:
            began = time.monotonic()
            size = _even(batch_size, len(jobs)) if not attack.any_iterate or not steps.num_steps else batch_size
            for look in attacks.packed(
                steps, logits_fn, keys, images, labels, batch_size=size, every_run=attack.every_run, jobs=jobs
            ):
                records = []
                for job in look.finished:
                    change = np.max(np.abs(job.adversarial - as_float(images[job.image])))
                    linf = round(float(change), 6)  # what follows is float32's
                    run, fallen_at = job.run if start is None else start, job.step if job.fallen else -1
                    records.append(Record(job.image, run, job.step, fallen_at, job.margin, linf))
                    if worst is not None:
                        worst.offer(job.image, job.margin, job.adversarial)
                now = time.monotonic()
                journal.append(attack.name, records, seconds=now - began)
                began = now
                bar.show(look.forward, records)


def _even(batch_size, count):
    """A size not far below this one that divides the count: where all images end together, no other is compiled."""
    return next((size for size in range(batch_size, batch_size // 2, -1) if count % size == 0), batch_size)


def _calls(attack, steps, attacked, seed, done, total):
    """What is left to do: keys and jobs for `packed`, and the start that they are of if the jobs don't say it."""
    rng = jax.random.fold_in(jax.random.key(seed), zlib.crc32(attack.stream.encode()) & 0x7FFFFFFF)
    if not attack.any_iterate:
        # One start after another. Image i draws from fold_in(fold_in(rng, start), i): as its run, `packed` folds in i.
        for start in range(steps.num_runs):
            jobs = [(i, i) for i in attacked if (i, start) not in done]
            yield jnp.broadcast_to(jax.random.fold_in(rng, start), (total,)), jobs, start
    elif attack.every_run:
        yield rng, [(i, r) for r in range(steps.num_runs) for i in attacked if (i, r) not in done], None
    else:
        # Every image at its first run that is missing; the next ones follow if it survives that.
        last = {i: record for (i, _), record in sorted(done.items())}
        begin = {i: last[i].run + 1 if i in last else 0 for i in attacked if i not in last or last[i].fallen_at < 0}
        yield rng, [(i, run) for i, run in begin.items() if run < steps.num_runs], None


def _lowest(records: Iterable[Record]) -> dict[int, Record]:
    """By image, the run with the lowest margin."""
    lowest: dict[int, Record] = {}
    for record in records:
        if record.index not in lowest or record.margin < lowest[record.index].margin:
            lowest[record.index] = record
    return lowest


def _strength(attack, steps, records, before):
    """What the attack spent, and what it found with how much of it."""
    records = list(records)
    (start_forward, start_backward), (forward, backward) = steps.passes
    taken = sum(record.steps for record in records)
    result = {
        "forward": len(records) * start_forward + taken * forward,
        "backward": len(records) * start_backward + taken * backward,
    }
    falls = np.zeros(steps.num_runs, int)
    fell: dict[int, int] = {}
    for record in records:
        if record.fallen_at >= 0:
            falls[record.run] += 1
            # Targets come one after another, starts side by side.
            step = record.fallen_at + (0 if attack.every_run else record.run * steps.num_steps)
            fell[record.index] = min(step, fell.get(record.index, step))
    single = attack.every_run and steps.num_runs > 1
    result["lowest_single_run"] = float(before.sum() - falls.max()) / len(before) if single else None
    if attack.any_iterate and steps.num_steps:
        last = steps.num_steps * (1 if attack.every_run else steps.num_runs)
        looked_at = [*(n for n in (k * 10**e for e in range(8) for k in (1, 2, 5)) if n < last), last]
        looked_at = looked_at if attack.kind in SIGNED else [0, *looked_at]  # of these, the start isn't judged
        at = np.array(list(fell.values()))
        result["by_step"] = [[n, float(before.sum() - np.sum(at <= n)) / len(before)] for n in looked_at]
    return result


class _Worst:
    """Each image's adversary of the lowest margin."""

    def __init__(self, images, total):
        self._images, self._margins = images, np.full(total, np.inf)

    def know(self, records):
        """Of these, the images are in their places already."""
        for record in records:
            self._margins[record.index] = min(self._margins[record.index], record.margin)

    def offer(self, index, margin, adversarial):
        if self._images is not None and index < len(self._images) and margin < self._margins[index]:
            self._images[index], self._margins[index] = adversarial, margin


class _Bar:
    """Steps that are made or, by images that fall, spared; and the accuracy if no other image falls."""

    def __init__(self, attack, steps, jobs, attacked, among, done, *, progress):
        self._attack, self._steps, self._among = attack, steps, among
        self._standing = set(attacked) - {record.index for record in done.values() if record.fallen_at >= 0}
        total = sum(self._work(run) for _, run in jobs) if not attack.every_run else len(jobs) * self._work(0)
        self._bar = tqdm(total=total, desc=attack.name, unit="step", unit_scale=True, disable=not progress)

    def _work(self, run):
        """Steps of this run and those that may follow it."""
        return max(1, self._steps.num_steps) * (1 if self._attack.every_run else self._steps.num_runs - run)

    def show(self, forward, records):
        made = forward // max(1, self._steps.passes[1][0])
        fallen = [record for record in records if record.fallen_at >= 0]
        spared = sum(self._work(record.run) - record.steps for record in fallen)
        self._standing -= {record.index for record in fallen}
        self._bar.update(min(made + spared, self._bar.total - self._bar.n))
        self._bar.set_postfix(accuracy=f"{len(self._standing) / self._among:.1%}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


def check_evaluation(
    model: Any,
    variables: PyTree,
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    attack_list: Sequence[Attack],
    *,
    source: tuple[Any, PyTree] | None = None,
) -> int:
    """Refuse what `evaluate` refuses, before any work, with the same arguments and errors.

    Returns:
      The number of classes of the network.

    Example:
      >>> from fs_jax.evaluation import suite
      >>> from fs_jax.models import WideResNet
      >>> variables = jax.eval_shape(WideResNet(10, 1).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> images, labels = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 9])
      >>> check_evaluation(WideResNet(10, 1), variables, images, labels, suite("autoattack"))
      10
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images: expected shape [N, height, width, channels] with N > 0; got {images.shape}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape {images.shape[:1]}, one for each image; got {labels.shape}.")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images: expected uint8, or floating point in [0, 1]; got {images.dtype}.")
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images: expected values in [0, 1]; got [{images.min():.4g}, {images.max():.4g}].")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: expected integers; got {labels.dtype}.")
    names = [attack.name for attack in attack_list]
    if all(attack.apart for attack in attack_list) or len(set(names)) < len(names):
        raise ValueError(f"attack_list: expected at least one attack that isn't apart, and none twice; got {names}.")
    for place, attack in enumerate(attack_list):
        if missing := set(attack.after) - set(names[:place]):
            raise ValueError(f"{attack.name}: expected to come after {', '.join(sorted(missing))}; got {names}.")
        if attack.kind == "transfer" and source is None:
            raise ValueError("source: expected another network and its variables, for transfer; got None.")
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    try:
        num_classes = jax.eval_shape(model.apply, variables, one)[0].shape[-1]
    except (flax.errors.FlaxError, TypeError) as error:
        raise ValueError(
            f"images: expected of a shape that the network takes; got {images.shape[1:]}. Are they another data set's? "
            f"({type(error).__name__})"
        ) from error
    if not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}, as the network has {num_classes}; "
            f"got {labels.min()} to {labels.max()}."
        )
    if source is not None and (got := jax.eval_shape(source[0].apply, source[1], one)[0].shape[-1]) != num_classes:
        raise ValueError(f"source: expected a network of {num_classes} classes, as the other has; got {got}.")
    for attack in attack_list:
        attack.steps(num_classes)
    return num_classes
