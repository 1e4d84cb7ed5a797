"""Evaluation under attack: every image of a split, one record per image and attack, the worst case over attacks.

All attacks go through `fs_jax.attacks.packed`: an image that has fallen costs nothing more. What happens to an image
depends on the seed, the attack and the image's index; not on the batch, nor on a stop and a going on.
"""

import dataclasses
import functools
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.tree_util import Partial
from jaxtyping import Float, Int, PyTree, UInt8
from tqdm import tqdm

from fs_jax import attacks, backend
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.local_search import local_search_steps
from fs_jax.attacks.spsa import spsa_steps
from fs_jax.attacks.stepwise import first_judged, run_keys
from fs_jax.config import check_choice, check_number
from fs_jax.journal import Journal, Record

Kind = Literal[
    "clean", "fgsm", "pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "spsa", "local-search",
    "transfer",
]  # fmt: skip

_AUTOATTACK = attacks.autoattack_settings("plus") | attacks.autoattack_settings("standard")
_STEPS = {
    "clean": 0, "fgsm": 1, "pgd": 20, "cw": 20, "spsa": 100, "local-search": 150, "transfer": 20,
    **{kind: settings["num_steps"] for kind, settings in _AUTOATTACK.items()},
}  # fmt: skip
_SIGNED = ("fgsm", "pgd", "cw", "transfer")  # steps of one size along the sign of a gradient


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack and its settings, in L-infinity on [0, 1] images.

    Example:
      >>> Attack("pgd").name, Attack("cw", num_steps=100, restarts=5).name, Attack("apgd-t").restarts
      ('pgd-20', 'cw-100x5', 9)
    """

    kind: Kind
    epsilon: float = 8 / 255
    """Radius; 0 for the clean image. The published local search keeps to none: it has radius 1, and stands apart."""
    step_size: float | None = None
    """Step of FGSM, by default epsilon, and of PGD and CW, by default epsilon / 4."""
    num_steps: int | None = None
    """Steps or rounds of each run; by default 20 for PGD and CW, and otherwise the published ones."""
    restarts: int | None = None
    """Random starts of FGSM, PGD and CW, by default one; an image counts as robust if it survives them all."""
    any_iterate: bool | None = None
    """For FGSM, PGD and CW: whether an image falls with any misclassified iterate, and leaves, or whether the last one
    decides, as in the paper's code and by default. With all others any iterate counts."""
    num_directions: int | None = None
    """Of SPSA, in each step; by default 128."""
    after: tuple[str, ...] = ()
    """Attacks before this one; images that have fallen to them are spared this one, and count as fallen."""
    num_images: int | None = None
    """How many images are attacked, the first ones; by default all."""
    apart: bool = False
    """Whether it is left out of the worst case: an attack at another radius, or at none."""
    label: str | None = None
    """Name in records and tables, if not kind, steps and starts."""
    source: str | None = None
    """For "transfer", which is PGD-20 on another network: the fingerprint of that one's weights."""

    def __post_init__(self):
        check_choice("attack", self.kind, get_args(Kind))
        check_number("epsilon", self.epsilon, at_least=0, at_most=1)
        if self.kind == "clean":
            object.__setattr__(self, "epsilon", 0.0)
        signed, free = self.kind in _SIGNED, self.kind in ("fgsm", "pgd", "cw")
        step_size = None if not signed else self.epsilon if self.kind == "fgsm" else self.epsilon / 4
        self._settle("step_size", step_size, signed)
        self._settle("num_steps", _STEPS[self.kind], self.kind in ("pgd", "cw", "spsa", "local-search"))
        self._settle("restarts", _AUTOATTACK.get(self.kind, {}).get("num_runs", 1), free)
        self._settle("any_iterate", not signed, free)
        self._settle("num_directions", 128 if self.kind == "spsa" else None, self.kind == "spsa")
        if signed:
            check_number("step_size", self.step_size, at_least=0, at_most=1)
        check_number("num_steps", self.num_steps, at_least=min(1, _STEPS[self.kind]), integer=True)
        check_number("restarts", self.restarts, at_least=1, integer=True)
        for name in ("num_directions", "num_images"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=1, integer=True)

    def _settle(self, name, default, free):
        """Give a field its default; refuse another value where the attack has no choice."""
        given = getattr(self, name)
        if given is None:
            object.__setattr__(self, name, default)
        elif given != default and not free:
            raise ValueError(f"{name}: expected {default}, as {self.kind} has it; got {given}. Leave it out.")

    @property
    def stream(self) -> str:
        """What its random numbers are named after: not the starts, so that more of them can only find more."""
        steps = f"-{self.num_steps}" if self.kind in ("pgd", "cw") else ""
        return self.kind + ("-projected" if self.kind == "local-search" and not self.apart else steps)

    @property
    def name(self) -> str:
        """Kind, steps and starts, as in `pgd-20`, `cw-100x5`, `fgsm`; or the label."""
        starts = f"x{self.restarts}" if self.restarts > 1 and self.kind in _SIGNED else ""
        return self.label or self.stream + starts

    @property
    def judged_by(self) -> str:
        """Which iterates decide, for tables."""
        return "the image" if self.kind == "clean" else "any iterate" if self.any_iterate else "last iterate"

    @property
    def every_run(self) -> bool:
        """Whether images that fall in a run make the others too, for the lowest single run."""
        return self.kind in _SIGNED

    def steps(self, num_classes: int, source: LogitsFn | None = None) -> attacks.Stepwise:
        """The attack as `fs_jax.attacks.packed` runs it, on a network of so many classes."""
        bounds = {"epsilon": self.epsilon, "num_steps": self.num_steps}
        match self.kind:
            case "clean":
                return _whole(Partial(_judge))
            case "transfer":
                return _whole(Partial(_transfer, source=source, epsilon=self.epsilon, step_size=self.step_size))
            case "fgsm" | "pgd" | "cw":
                return attacks.pgd_steps(
                    **bounds,
                    step_size=self.step_size,
                    num_runs=self.restarts,
                    loss=attacks.cw_margin if self.kind == "cw" else attacks.cross_entropy,
                    last_only=not self.any_iterate,
                )
            case "spsa":
                return spsa_steps(**bounds, num_directions=self.num_directions)
            case "local-search":
                return local_search_steps(**bounds)
            case _:
                return attacks.autoattack_steps([self.kind], epsilon=self.epsilon, num_classes=num_classes)[self.kind]


SUITES = ("paper", "autoattack", "gradient-free", "all")


def suite(
    name: str,
    *,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    gradient_free_images: int | None = 100,
    num_directions: int = 128,
) -> list[Attack]:
    """The attacks of a suite, in their order; the first is the clean image.

    - "paper": FGSM, PGD and CW as the paper reports them. With 20 and 100 steps the last iterate decides, as in the
      paper's code, so that numbers can be compared; with 500 and 1000 steps there are 5 starts and any iterate counts,
      which is stronger.
    - "autoattack": the standard version, each attack on the images that still stand; its accuracy is that after it.
    - "gradient-free": SPSA; local search, whose changes no radius bounds, and which is reported apart; and local search
      projected on the ball. (Square is AutoAttack's.) They ask the network so often that only the first images are
      attacked.
    - "all": all these.

    Args:
      name: One of `SUITES`.
      epsilon: Radius, in units of [0, 1].
      step_size: Step of PGD and CW; epsilon / 4 by default, as in the paper.
      gradient_free_images: How many images the gradient-free attacks are run on; None for all.
      num_directions: Of SPSA, in each step.

    Raises:
      ValueError: for another name, with the nearest one.

    Example:
      >>> [attack.name for attack in suite("autoattack")]
      ['clean', 'apgd-ce', 'apgd-t', 'fab-t', 'square']
    """
    check_choice("suite", name, SUITES)
    few = {"num_images": gradient_free_images, "after": ("clean",)}
    chosen = {
        "paper": [
            Attack("fgsm", epsilon),
            *(Attack(kind, epsilon, step_size, steps) for kind in ("pgd", "cw") for steps in (20, 100)),
            *(
                Attack(kind, epsilon, step_size, steps, restarts=5, any_iterate=True)
                for kind in ("pgd", "cw")
                for steps in (500, 1000)
            ),
        ],
        "autoattack": _chain(Attack(kind, epsilon) for kind in attacks.autoattack_settings("standard")),
        "gradient-free": [
            Attack("spsa", epsilon, num_directions=num_directions, **few),
            Attack("local-search", 1.0, apart=True, **few),
            Attack("local-search", epsilon, **few),
        ],
    }
    parts = list(chosen) if name == "all" else [name]
    return [Attack("clean"), *(attack for part in parts for attack in chosen[part])]


def _chain(chained):
    """Each on what those before it left standing."""
    before = ("clean",)
    for attack in chained:
        yield dataclasses.replace(attack, after=before)
        before = (*before, attack.name)


def parse_attack(text: str, *, epsilon: float = 8 / 255, step_size: float | None = None, restarts: int = 1) -> Attack:
    """The attack that a word such as `pgd-20` names.

    Args:
      text: `clean`, `fgsm`, `pgd-K` or `cw-K` with K steps; one of AutoAttack's, alone and from the clean images:
        `apgd-ce`, `apgd-dlr`, `apgd-t`, `fab`, `fab-t`, `square`; `spsa`, `local-search`, `local-search-projected`.
      epsilon: Radius, in units of [0, 1].
      step_size: Step of PGD and CW; epsilon / 4 by default.
      restarts: Random starts of FGSM, PGD and CW.

    Raises:
      ValueError: for another word, with the nearest one.

    Example:
      >>> parse_attack("cw-100").num_steps
      100
    """
    match = re.fullmatch(r"(pgd|cw)-(\d+)", text)
    if match is not None:
        return Attack(match[1], epsilon, step_size, int(match[2]), restarts)
    # With 20 for any number of steps, so that a typo meets its neighbour.
    others = ["clean", "fgsm", *attacks.autoattack_settings("standard"), "apgd-dlr", "fab", "spsa"]
    local = {"local-search": 1.0, "local-search-projected": epsilon}
    check_choice("attack", text, [*others, *local, "pgd-20", "cw-20"])
    if text in local:
        return Attack("local-search", local[text], apart=text == "local-search")
    return Attack(text, epsilon, restarts=restarts if text == "fgsm" else None)


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
      batch_size: Images at a time, at most; by default `fs_jax.backend.batch_size()`.
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


def accuracy(correct: np.ndarray) -> dict[str, float | int]:
    """Fraction of True, with its 95% Wilson interval.

    Example:
      >>> {name: round(value, 2) for name, value in accuracy(np.array([True, False])).items()}
      {'correct': 1, 'total': 2, 'accuracy': 0.5, 'low': 0.09, 'high': 0.91}
    """
    count, total = int(np.sum(correct)), len(correct)
    interval = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return {
        "correct": count,
        "total": total,
        "accuracy": count / total,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def as_logits_fn(model: Any, variables: PyTree) -> Partial:
    """A network as attacks see it: `logits_fn(images)`, in inference mode, whose variables are an argument under jit.

    Example:
      >>> from fs_jax.models import WideResNet
      >>> variables = jax.eval_shape(WideResNet(10, 1).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> jax.eval_shape(Partial(_logits(WideResNet(10, 1))), variables, jnp.zeros((3, 8, 8, 1))).shape
      (3, 10)
    """
    return Partial(_logits(model), jax.device_put(variables))  # on the device once, not with every batch


def as_float(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1]: those of uint8 divided by 255.

    Example:
      >>> as_float(np.array([0, 255], np.uint8)).tolist()
      [0.0, 1.0]
    """
    return images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images


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
        looked_at = looked_at if attack.kind in _SIGNED else [0, *looked_at]  # of these, the start isn't judged
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


@functools.lru_cache(maxsize=32)
def _logits(model):
    """The same function for the same network, so that nothing is compiled twice."""
    return lambda variables, images: model.apply(variables, images, train=False)[0]


def _whole(start):
    """An attack that is done with its start."""
    return attacks.Stepwise(start, Partial(_no_step), num_steps=0, passes=((1, 0), (0, 0)))


class _Done(NamedTuple):
    progress: attacks.Progress


def _judge(logits_fn, keys, images, labels, run):
    return _Done(first_judged(images, logits_fn(images), labels))


def _transfer(logits_fn, keys, images, labels, run, *, source, epsilon, step_size):
    keys = run_keys(keys, run)
    adversarial = attacks.pgd(source, keys, images, labels, epsilon=epsilon, step_size=step_size, num_steps=20)
    return _Done(first_judged(adversarial, logits_fn(adversarial), labels))


def _no_step(logits_fn, state, images, labels):
    return state


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
