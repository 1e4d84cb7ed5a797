"""Evaluation under attack: every image of a split, one record per image, the worst case over attacks."""

import dataclasses
import functools
import re
import time
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float, Int, PyTree, UInt8
from tqdm import tqdm

from fs_jax import attacks, backend
from fs_jax.config import check_choice, check_number

Kind = Literal["clean", "fgsm", "pgd", "cw"]


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack and its settings, in L-infinity on [0, 1] images.

    Example:
      >>> Attack("pgd", num_steps=20).name, Attack("cw", num_steps=100, restarts=5).name
      ('pgd-20', 'cw-100x5')
    """

    kind: Kind
    epsilon: float = 8 / 255
    """Radius."""
    step_size: float | None = None
    """Step; by default epsilon for FGSM and epsilon / 4 for PGD and CW."""
    num_steps: int = 1
    restarts: int = 1
    """Random starts; an image counts as robust if it survives them all."""

    def __post_init__(self):
        check_choice("attack", self.kind, get_args(Kind))
        check_number("epsilon", self.epsilon, at_least=0, at_most=1)
        check_number("num_steps", self.num_steps, at_least=1, integer=True)
        check_number("restarts", self.restarts, at_least=1, integer=True)
        if self.step_size is None:
            own = self.epsilon if self.kind == "fgsm" else self.epsilon / 4
            object.__setattr__(self, "step_size", own)
        check_number("step_size", self.step_size, at_least=0, at_most=1)

    @property
    def name(self) -> str:
        """Kind, steps and starts: `pgd-20`, `cw-100x5`, `fgsm`, `clean`."""
        steps = f"-{self.num_steps}" if self.kind in ("pgd", "cw") else ""
        return self.kind + steps + (f"x{self.restarts}" if self.restarts > 1 else "")

    def __call__(self, logits_fn, rng, images, labels):
        """Attacked images."""
        if self.kind == "clean":
            return images
        attack = {"fgsm": attacks.fgsm, "pgd": attacks.pgd, "cw": attacks.cw}[self.kind]
        return attack(
            logits_fn, rng, images, labels, epsilon=self.epsilon, step_size=self.step_size, num_steps=self.num_steps
        )


def parse_attack(text: str, *, epsilon: float = 8 / 255, step_size: float | None = None, restarts: int = 1) -> Attack:
    """The attack that a word such as `pgd-20` names.

    Args:
      text: `clean`, `fgsm`, `pgd-K` or `cw-K` with K steps.
      epsilon: Radius, in units of [0, 1].
      step_size: Step of PGD and CW; epsilon / 4 by default.
      restarts: Random starts of each attack.

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
    check_choice("attack", text, ["clean", "fgsm", "pgd-20", "cw-20"])
    return Attack("clean") if text == "clean" else Attack("fgsm", epsilon, None, 1, restarts)


class Evaluation(NamedTuple):
    """Accuracies over a split, and what happened to each image."""

    summary: dict[str, Any]
    """`attacks`: for each, its settings, `correct`, `total`, `accuracy` with its 95% interval `low` to `high`,
    `lowest_single_run` and `seconds`; `worst`: the same over all attacks at once; `images`."""
    records: list[dict[str, Any]]
    """For each image its `index` in the split, `label`, and by attack the lowest `margin` (logit of the label less the
    highest other one: above 0 where the image stands) and the `prediction` there; `robust`: whether it survived all."""


def evaluate(
    model: Any,
    variables: PyTree,
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    attack_list: Sequence[Attack],
    *,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Accuracy of a network, clean and under attack, over all the images given.

    Batches are of one size; the last one is filled up and the filling masked. The noise of an image depends on the
    seed, the attack and the image's index, not on the batch.

    Args:
      model: Flax module whose `apply(variables, images)` gives logits and features.
      variables: Its variables.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      attack_list: Attacks to run; the worst case is over these.
      batch_size: Images at a time.
      seed: Of the random starts.
      progress: Show a progress bar for each attack.

    Returns:
      Summary and records.

    Raises:
      TypeError, ValueError: if images or labels aren't as said, or there are none, or no attack, or one twice.
      FloatingPointError: if the network gives logits that aren't finite.

    Example:
      >>> from fs_jax import data
      >>> from fs_jax.models import WideResNet
      >>> digits, model = data.load("digits"), WideResNet(10, 1)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> result = evaluate(model, variables, digits.test_images[:10], digits.test_labels[:10], [Attack("clean")],
      ...                   batch_size=8, progress=False)
      >>> result.summary["attacks"][0]["total"], len(result.records)
      (10, 10)
    """
    images, labels = np.asarray(images), np.asarray(labels)
    names = [attack.name for attack in attack_list]
    _check_inputs(images, labels, names, batch_size)
    _check_classes(model, variables, images, labels)
    variables = jax.device_put(variables)  # once, not with every batch
    total = len(labels)
    summaries: list[dict[str, Any]] = []
    margins, predictions = {}, {}
    for attack in attack_list:
        began = time.monotonic()
        # [restarts, N] each
        run_margins, run_predictions = _run(attack, model, variables, images, labels, batch_size, seed, progress)
        worst = np.argmin(run_margins, axis=0), np.arange(total)
        margins[attack.name], predictions[attack.name] = run_margins[worst], run_predictions[worst]
        summaries.append(
            {
                **dataclasses.asdict(attack),
                "name": attack.name,
                **accuracy(margins[attack.name] > 0),
                "lowest_single_run": float((run_margins > 0).mean(1).min()),
                "seconds": time.monotonic() - began,
            }
        )
    robust = np.all([margin > 0 for margin in margins.values()], axis=0)
    records = [
        {
            "index": i,
            "label": int(labels[i]),
            "robust": bool(robust[i]),
            "margin": {name: float(margins[name][i]) for name in names},
            "prediction": {name: int(predictions[name][i]) for name in names},
        }
        for i in range(total)
    ]
    return Evaluation({"images": total, "seed": seed, "attacks": summaries, "worst": accuracy(robust)}, records)


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


def attack_batch(
    model: Any,
    variables: PyTree,
    attack: Attack,
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    indices: Int[np.ndarray, "n"],
    *,
    seed: int = 0,
    restart: int = 0,
) -> tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "n classes"]]:
    """Attack one batch as `evaluate` does: the images with these indices in the split, from this start.

    Returns:
      Attacked images [N, H, W, C] in [0, 1], and the network's logits of them [N, classes].

    Example:
      >>> from fs_jax import data
      >>> from fs_jax.models import WideResNet
      >>> digits, model = data.load("digits"), WideResNet(10, 1)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> few = digits.test_images[:4], digits.test_labels[:4], np.arange(4)
      >>> attacked, logits = attack_batch(model, variables, Attack("fgsm"), *few)
      >>> attacked.shape, logits.shape
      ((4, 8, 8, 1), (4, 10))
    """
    # The first start of five is the one start of one: more restarts can only find more.
    name = dataclasses.replace(attack, restarts=1).name
    rng = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    attacked, logits = _program(model, attack)(variables, images, labels, indices, jax.random.fold_in(rng, restart))
    return np.asarray(attacked), np.asarray(logits)


def _run(attack, model, variables, images, labels, batch_size, seed, progress):
    """Margins and predictions, [restarts, N] each."""
    total = len(labels)
    margins = np.zeros((attack.restarts, total), np.float32)
    predictions = np.zeros((attack.restarts, total), np.int32)
    with tqdm(total=attack.restarts * total, desc=attack.name, unit="image", disable=not progress) as bar:
        for restart in range(attack.restarts):
            for begin in range(0, total, batch_size):
                real = np.arange(begin, min(begin + batch_size, total))
                filled = np.resize(real, batch_size)  # the last batch repeats its images up to its size
                _, logits = attack_batch(
                    model, variables, attack, images[filled], labels[filled], filled, seed=seed, restart=restart
                )
                margins[restart, real] = _margins(logits, labels[filled])[: len(real)]
                predictions[restart, real] = np.argmax(logits, -1)[: len(real)]
                bar.update(len(real))
                bar.set_postfix(accuracy=f"{np.mean(margins[restart, : real[-1] + 1] > 0):.1%}")
    if not np.isfinite(margins).all():
        raise FloatingPointError(
            f"model: expected finite logits; {np.sum(~np.isfinite(margins))} images have none, under {attack.name}."
        )
    return margins, predictions


def _margins(logits, labels):
    """Logit of the label less the highest other one."""
    is_true = np.arange(logits.shape[-1]) == labels[:, None]
    return logits[is_true] - np.max(np.where(is_true, -np.inf, logits), -1)


@functools.lru_cache(maxsize=32)
def _program(model, attack):
    """Attack and classify one batch, compiled once for each network and attack."""

    @functools.partial(jax.jit, compiler_options=backend.compiler_options())
    def run(variables, images, labels, indices, rng):
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 255

        def logits_fn(x):
            return model.apply(variables, x, train=False)[0]

        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        attacked = attack(logits_fn, keys, images, labels)
        return attacked, logits_fn(attacked)

    return run


def _check_inputs(images, labels, names, batch_size):
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
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attack_list: expected at least one attack, and none twice; got {names}.")
    check_number("batch_size", batch_size, at_least=1, integer=True)


def _check_classes(model, variables, images, labels):
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    num_classes = jax.eval_shape(model.apply, variables, one)[0].shape[-1]
    if not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}, as the network has {num_classes}; "
            f"got {labels.min()} to {labels.max()}."
        )
