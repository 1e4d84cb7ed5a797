"""AutoAttack: attacks in order, each on the images that are still classified correctly; what is left is robust."""

import functools
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from tqdm import tqdm

from fs_jax._utils import backend
from fs_jax._utils.keys import image_keys
from fs_jax._utils.validation import check_choice
from fs_jax.attacks.apgd import MOMENTUM, RISES, apgd_steps
from fs_jax.attacks.fab import ALPHA_MAX, BACKWARD, OVERSHOOT, fab_steps
from fs_jax.attacks.linf import LogitsFn, check_attack
from fs_jax.attacks.losses import cross_entropy, logit_margin
from fs_jax.attacks.packing import as_partial, packed
from fs_jax.attacks.square import HALVED_AFTER, SHARE, square_steps
from fs_jax.attacks.stepwise import Stepwise

_APGD, _FAB, _SQUARE = {"num_steps": 100}, {"num_steps": 100}, {"num_steps": 5000}

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {
        "apgd-ce": {**_APGD, "loss": "ce", "num_runs": 1},
        "apgd-t": {**_APGD, "loss": "targeted", "num_runs": 9},
        "fab-t": {**_FAB, "targeted": True, "num_runs": 9},
        "square": _SQUARE,
    },
    "plus": {
        "apgd-ce": {**_APGD, "loss": "ce", "num_runs": 5},
        "apgd-dlr": {**_APGD, "loss": "dlr", "num_runs": 5},
        "fab": {**_FAB, "targeted": False, "num_runs": 5},
        "square": _SQUARE,
        "apgd-t": {**_APGD, "loss": "targeted", "num_runs": 9},
        "fab-t": {**_FAB, "targeted": True, "num_runs": 9},
    },
    "rand": {  # for networks that draw random numbers: each gradient is the mean of 20
        "apgd-ce": {**_APGD, "loss": "ce", "num_runs": 1, "num_draws": 20},
        "apgd-dlr": {**_APGD, "loss": "dlr", "num_runs": 1, "num_draws": 20},
    },
}
"""The authors' versions: their attacks in order, with their settings. `num_runs` counts random starts, or targets."""

CONSTANTS: dict[str, dict[str, Any]] = {
    "apgd": {"alpha": 1 - MOMENTUM, "rho": RISES},
    "fab": {"alpha_max": ALPHA_MAX, "eta": OVERSHOOT, "beta": BACKWARD},
    "square": {"p_init": SHARE, "halved_after": HALVED_AFTER},
}
"""What is the same in all versions, for the record: by family, under the authors' names."""

_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}


class AttackRecord(NamedTuple):
    """What `autoattack` found."""

    images: Float[np.ndarray, "n h w c"]
    """For each image the one that fell; where it stands, the one of the lowest margin found."""
    robust: Bool[np.ndarray, "n"]
    """Whether it survived everything."""
    stages: dict[str, float]
    """Share of images robust after each attack; first, as `clean`, before any."""
    fallen_to: list[str]
    """The attack that each image fell to: `clean` if it was misclassified as it is, empty where it stands."""
    steps: Int[np.ndarray, "n"]
    """The step of that attack at which it fell; -1 where it stands."""
    margin: Float[np.ndarray, "n"]
    """Of `images`: logit of the label less the highest other one."""
    queries: dict[str, tuple[int, int]]
    """For each attack, the (forward, backward) passes of single images that were spent."""
    settings: dict[str, Any]
    """Version, radius, and the settings of each attack."""
    warnings: list[str]
    """Why these numbers may mislead, where there is a sign of it."""


def autoattack(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    *,
    epsilon: float = 8 / 255,
    version: str | Sequence[str] = "standard",
    batch_size: int | None = None,
    progress: bool = False,
) -> AttackRecord:
    """AutoAttack in L-infinity, on any number of images.

    APGD-CE, APGD-T, FAB-T and Square in this order, each from the clean images, each on those that are still classified
    correctly. Misclassified images are dropped at once, also within an attack; the others are packed (see `packing`).

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode. Best a `jax.tree_util.Partial` (see
        `packing.packed`). For "rand", a function of images and a key for each, `logits_fn(images, keys)`.
      rng: A key, from which image i takes `fold_in(rng, i)`, or a key for each image. What happens to an image depends
        on its key, not on the batch.
      images: Images [N, H, W, C]: uint8, or floating point in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      version: "standard"; "plus", with five starts, APGD-DLR and untargeted FAB besides; "rand", for networks that draw
        random numbers; or a list of attacks. `SETTINGS` has what they are.
      batch_size: Most images at a time; by default `backend.batch_size()`.
      progress: Show a progress bar for each attack.

    Returns:
      What fell, where, to which attack, and what it cost.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        an unknown version or attack, too few classes for one.
      FloatingPointError: if the network gives logits that aren't finite.

    Warns:
      UserWarning: if the logits look like probabilities, if they differ from call to call, if gradients vanish, or if
        Square, which sees no gradient, breaks what the attacks before it left standing.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1.001 - x.mean((1, 2, 3))], -1)
      >>> images = np.linspace(0.45, 0.65, 5, dtype=np.float32).reshape(5, 1, 1, 1)  # class 0 likes bright images
      >>> record = autoattack(logits_fn, jax.random.key(0), images, np.zeros(5, int), epsilon=0.08, version=["apgd-ce"])
      >>> record.stages, record.fallen_to
      ({'clean': 0.6, 'apgd-ce': 0.4}, ['clean', 'clean', 'apgd-ce', '', ''])

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020.
    """
    images, labels, keys = np.asarray(images), np.asarray(labels), image_keys(rng, len(labels))
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    draws = version == "rand"
    num_classes = _checked_classes(logits_fn, keys if draws else None, images, labels, epsilon)
    settings = autoattack_settings(version, num_classes=num_classes)
    steps = autoattack_steps(version, epsilon=epsilon, num_classes=num_classes)

    def judge(images, rows, stage):
        """Logits, and whether the gradient vanishes, of images in the place of those of these rows."""
        drawn = _keys_of(stage, keys)[rows] if draws else None
        return _judged(logits_fn, drawn, images, labels[rows], batch_size)

    everyone = np.arange(len(labels))
    logits, flat = judge(images, everyone, "clean")
    doubts = _doubts_beforehand(logits, flat, labels, logits_fn, None if draws else images[:8])
    found, margin = images.copy(), np.array(logit_margin(logits, labels))
    robust = margin > 0
    fallen_to = ["" if stands else "clean" for stands in robust]
    at_step = np.where(robust, -1, 0)
    stages, queries = {"clean": float(robust.mean())}, {}

    for name, attack in steps.items():
        standing, spent = np.flatnonzero(robust), np.zeros(2, np.int64)
        jobs = [(image, 0) for image in standing]
        looks = packed(attack, logits_fn, _keys_of(name, keys), images, labels, batch_size=batch_size, jobs=jobs)
        with tqdm(total=len(standing), desc=name, unit="image", disable=not progress) as bar:
            for look in looks:
                spent += look.forward, look.backward
                for job in look.finished:
                    if job.margin < margin[job.image]:
                        margin[job.image], found[job.image] = job.margin, job.adversarial
                    if job.fallen:
                        robust[job.image], fallen_to[job.image], at_step[job.image] = False, name, job.step
                    bar.update(job.fallen or job.run == attack.num_runs - 1)
                bar.set_postfix(robust=f"{robust.mean():.1%}")
        fallen = standing[~robust[standing]]
        if draws and len(fallen):  # what fell to a lucky draw has to fall to another one too
            margin[fallen] = logit_margin(judge(found[fallen], fallen, name)[0], labels[fallen])
            robust[fallen] = margin[fallen] > 0
            for image in fallen[robust[fallen]]:
                fallen_to[image], at_step[image] = "", -1
        stages[name], queries[name] = float(robust.mean()), (int(spent[0]), int(spent[1]))

    doubts += _doubts_about_square(stages)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    described = {"version": version if isinstance(version, str) else list(version), "epsilon": epsilon, **settings}
    return AttackRecord(found, robust, stages, fallen_to, at_step, margin, queries, described, doubts)


def autoattack_settings(version: str | Sequence[str] = "standard", *, num_classes: int = 10) -> dict[str, dict]:
    """The attacks of a version in their order, with their settings: targets are at most the wrong classes.

    Args:
      version: A key of `SETTINGS`; or a list of attacks, with the settings of "standard", else of "plus".
      num_classes: Classes of the network.

    Raises:
      ValueError: for an unknown version or attack, none, one twice, or too few classes for one.

    Example:
      >>> autoattack_settings(["apgd-t", "square"], num_classes=4)  # doctest: +NORMALIZE_WHITESPACE
      {'apgd-t': {'num_steps': 100, 'loss': 'targeted', 'num_runs': 3, 'alpha': 0.75, 'rho': 0.75},
       'square': {'num_steps': 5000, 'p_init': 0.8, 'halved_after': (10, 50, 200, 500, 1000, 2000, 4000)}}
    """
    chosen = _chosen(version, num_classes)
    return {name: {**own, **CONSTANTS[_family(name)]} for name, own in chosen.items()}


def _chosen(version, num_classes):
    """The attacks of a version, with those of their settings that versions choose."""
    known = SETTINGS["plus"] | SETTINGS["standard"]
    if isinstance(version, str):
        check_choice("version", version, SETTINGS)
        chosen = SETTINGS[version]
    else:
        for name in version:
            check_choice("version", name, known)
        chosen = {name: known[name] for name in version}
        if not chosen or len(chosen) < len(version):
            raise ValueError(f"version: expected at least one attack, and none twice; got {list(version)}.")
    for name in chosen:
        if num_classes < _LEAST_CLASSES.get(name, 2):
            remaining = [other for other in known if num_classes >= _LEAST_CLASSES.get(other, 2)]
            raise ValueError(
                f"{name}: expected a network of at least {_LEAST_CLASSES.get(name, 2)} classes; it has {num_classes}. "
                f"Attacks that remain, to be named one by one: {', '.join(remaining)}."
            )
    targets = {"num_runs": min(9, num_classes - 1)}
    return {name: {**own, **(targets if name.endswith("-t") else {})} for name, own in chosen.items()}


def autoattack_steps(
    version: str | Sequence[str] = "standard", *, epsilon: float = 8 / 255, num_classes: int = 10
) -> dict[str, Stepwise]:
    """The attacks of a version in their order, cut in steps; for `packing.packed`.

    Arguments and errors are those of `autoattack_settings`; `epsilon` is the radius, in units of [0, 1].

    Example:
      >>> {name: attack.num_runs for name, attack in autoattack_steps().items()}
      {'apgd-ce': 1, 'apgd-t': 9, 'fab-t': 9, 'square': 1}
    """
    families = {
        "apgd": apgd_steps,
        "fab": functools.partial(fab_steps, num_classes=num_classes),
        "square": square_steps,
    }
    chosen = _chosen(version, num_classes)
    return {name: families[_family(name)](epsilon=epsilon, **own) for name, own in chosen.items()}


def _family(name):
    return name.split("-")[0]


def sanity_warnings(
    logits_fn: LogitsFn,
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    *,
    batch_size: int | None = None,
) -> list[str]:
    """What a network's answers to clean images say against any evaluation of it, in words; nothing where all is well.

    Whether the logits look like probabilities, whether gradients vanish, whether answers differ from call to call.
    Arguments and errors are those of `autoattack`, which asks this itself.

    Example:
      >>> logits_fn = lambda x: jax.nn.softmax(jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1))
      >>> [warning[:54] for warning in sanity_warnings(logits_fn, np.ones((5, 1, 1, 1), np.float32), np.zeros(5, int))]
      ['logits_fn returns what looks like probabilities, which']
    """
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    logits, flat = _judged(logits_fn, None, images, labels, batch_size)
    return _doubts_beforehand(logits, flat, labels, logits_fn, images[:8])


def _checked_classes(logits_fn, keys, images, labels, epsilon):
    """Check the arguments; the number of classes."""
    if not len(images):
        raise ValueError("images: expected at least one; got none.")
    network = logits_fn if keys is None else lambda x: logits_fn(x, keys)
    try:
        check_attack(network, images, labels, epsilon=epsilon, num_steps=1)
        return jax.eval_shape(network, images).shape[-1]
    except TypeError as error:
        if keys is None or str(error).startswith(("images", "labels")):
            raise
        raise TypeError(
            f"logits_fn: for version 'rand' expected a function of images and keys; calling it: {error}."
        ) from error


def _keys_of(stage, keys):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(stage.encode()) & 0x7FFFFFFF)


def _judged(logits_fn, keys, images, labels, batch_size):
    """Logits [N, classes], and whether the cross-entropy's gradient is zero [N]."""
    size, parts = min(batch_size or backend.batch_size(), len(labels)), []
    for begin in range(0, len(labels), size):
        real = np.arange(begin, min(begin + size, len(labels)))
        rows = np.resize(real, size)  # the last batch repeats its images up to its size
        network = as_partial(logits_fn) if keys is None else Partial(_drawn, as_partial(logits_fn), keys[rows])
        part = _program()(network, images[rows], labels[rows])
        parts.append([np.asarray(array)[: len(real)] for array in part])
    logits, flat = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).all(-1))
        raise FloatingPointError(
            f"logits_fn: expected finite logits; got others for {len(bad)} images as they are, the first at {bad[0]}."
        )
    return logits, flat


def _drawn(logits_fn, keys, images):
    return logits_fn(images, keys)


@functools.cache
def _program():
    def logits_and_flatness(logits_fn, images, labels):
        def total(x):
            logits = logits_fn(x)
            return jnp.sum(cross_entropy(logits, labels)), logits

        gradient, logits = jax.grad(total, has_aux=True)(images)
        return logits, jnp.all(gradient == 0, (1, 2, 3))

    return jax.jit(logits_and_flatness, compiler_options=backend.compiler_options())


def _doubts_beforehand(logits, flat, labels, logits_fn, images):
    """What the network's answers to clean images say against the evaluation; the authors' checks and thresholds."""
    doubts = []
    if (logits.min() > -1e-5) and (logits.max() < 1 + 1e-5) and np.all(np.abs(logits.sum(-1) - 1) < 1e-5):
        doubts.append(
            "logits_fn returns what looks like probabilities, which makes gradients vanish: return the logits, from "
            "before the softmax."
        )
    if flat.any():
        doubts.append(
            f"{flat.sum()} of {len(flat)} images have a cross-entropy gradient of exactly zero: attacks that follow "
            "gradients may find too little. Compare with Square, and look for saturated or quantised layers."
        )
    if images is not None and _differs(logits_fn, images):
        doubts.append(
            "logits_fn gives other logits when called again: for a network that draws random numbers use version "
            "'rand', and pass the keys it draws from."
        )
    return doubts


def _differs(logits_fn, images):
    """Whether two calls disagree; each is traced for itself, as a number may be drawn while tracing too."""
    calls = [jax.jit(lambda network, x: network(x))(as_partial(logits_fn), images) for _ in range(2)]
    one, other = (logits / (jnp.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10) for logits in calls)
    return bool(jnp.max(jnp.linalg.norm(one - other, axis=-1)) > 1e-4)


def _doubts_about_square(stages):
    others = [share for name, share in stages.items() if name != "square"]
    if "square" not in stages or len(others) < 2 or stages["square"] >= min(others) - 0.002:
        return []
    return [
        f"Square, which sees no gradient, broke {min(others) - stages['square']:.1%} of the images that survived the "
        "attacks by gradients: these may be masked, and robustness is likely lower still. Try more queries, or an "
        "attack made for this defence."
    ]
