"""All attacks by name, and an attack with its settings, as evaluations take it."""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from fs_jax._utils.fingerprints import fingerprint
from fs_jax._utils.validation import check_choice, check_number
from fs_jax.attacks.apgd import APGD_CE, APGD_DLR, APGD_T
from fs_jax.attacks.clean import CLEAN
from fs_jax.attacks.fab import FAB, FAB_T
from fs_jax.attacks.local_search import LOCAL_SEARCH, LOCAL_SEARCH_PROJECTED
from fs_jax.attacks.mi_fgsm import MI_FGSM
from fs_jax.attacks.pgd import CW, FGSM, PGD
from fs_jax.attacks.specification import Specification
from fs_jax.attacks.spsa import SPSA
from fs_jax.attacks.square import SQUARE
from fs_jax.attacks.stepwise import Stepwise

REGISTRY: dict[str, Specification] = {
    specification.name: specification
    for specification in (
        CLEAN,
        FGSM,
        PGD,
        CW,
        MI_FGSM,
        APGD_CE,
        APGD_DLR,
        APGD_T,
        FAB,
        FAB_T,
        SQUARE,
        SPSA,
        LOCAL_SEARCH,
        LOCAL_SEARCH_PROJECTED,
    )
}
"""The attacks that can be asked for by name."""


@dataclasses.dataclass(frozen=True, init=False)
class Attack:
    """An attack and its settings, on [0, 1] images.

    Args:
      kind: A name in `REGISTRY`, or a `Specification` of one's own.
      epsilon: Radius, in units of [0, 1]. An attack that has its own (0 for the clean image) keeps it.
      after: Names of attacks before this one: images that they broke are skipped, and count as broken.
      num_images: How many images are attacked, the first ones of the split; by default all.
      apart: Whether it is left out of the worst case, as an attack at another radius. One that keeps to none always is.
      label: Name in records and tables, if not kind, steps and starts.
      images: Adversaries made elsewhere, [N, H, W, C] in [0, 1], in the place of the images (see `transfer`).
      settings: What the specification lets be set; the rest has its defaults.

    Raises:
      TypeError, ValueError: for an unknown attack or setting, with the nearest name, or a value out of range.

    Example:
      >>> Attack("pgd").name, Attack("cw", num_steps=100, restarts=5).name, Attack("apgd-t").settings["targets"]
      ('pgd-20', 'cw-100x5', 9)
    """

    specification: Specification
    epsilon: float
    settings: Mapping[str, Any]
    """All that can be set, with the values in use."""
    given: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    """Those that were set; the others follow the radius where it changes."""
    after: tuple[str, ...]
    num_images: int | None
    apart: bool
    label: str | None
    images: np.ndarray | None = dataclasses.field(compare=False, repr=False)

    def __init__(
        self,
        kind: str | Specification,
        epsilon: float = 8 / 255,
        *,
        after: Sequence[str] = (),
        num_images: int | None = None,
        apart: bool = False,
        label: str | None = None,
        images: np.ndarray | None = None,
        **settings: Any,
    ):
        if isinstance(kind, str):
            check_choice("attack", kind, REGISTRY)
            kind = REGISTRY[kind]
        check_number("epsilon", epsilon, at_least=0, at_most=1)
        epsilon = float(epsilon) if kind.fixed_radius is None else kind.fixed_radius
        if num_images is not None:
            check_number("num_images", num_images, at_least=1, integer=True)
        for name in settings:
            check_choice(f"setting of {kind.name}", name, kind.settings)
        chosen = {}
        for name, setting in kind.settings.items():
            default = setting.default(epsilon) if callable(setting.default) else setting.default
            chosen[name] = default if settings.get(name) is None else settings[name]
            setting.check(name, chosen[name])
        given = {name: value for name, value in settings.items() if value is not None}
        for name, value in {
            "given": given, "specification": kind, "epsilon": epsilon, "settings": chosen, "after": tuple(after),
            "num_images": num_images, "apart": apart or kind.norm is None, "label": label, "images": images,
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """Kind, steps and starts, as in `pgd-20`, `cw-100x5`, `fgsm`; or the label."""
        restarts = self.settings.get("restarts", 1)
        starts = f"x{restarts}" if restarts > 1 and self.specification.every_run else ""
        return self.label or self._stream + starts

    @property
    def any_iterate(self) -> bool:
        """Whether a misclassified iterate counts whenever it occurs, or the last one alone."""
        return self.settings.get("any_iterate", True)

    @property
    def judged_by(self) -> str:
        """Which iterates decide, for tables."""
        if self.specification.judges_only:
            return "the image"
        return "any iterate" if self.any_iterate else "last iterate"

    def steps(self, num_classes: int) -> Stepwise:
        """The attack as `fs_jax.attacks.packed` runs it, on a network of so many classes.

        Raises:
          ValueError: if these are too few.
        """
        least = self.specification.least_classes
        if num_classes < least:
            remaining = [name for name, other in REGISTRY.items() if num_classes >= other.least_classes]
            raise ValueError(
                f"{self.name}: expected a network of at least {least} classes; it has {num_classes}. "
                f"Attacks that remain, as for autoattack(version=[...]) and evaluate: {', '.join(remaining)}."
            )
        return self.specification.build(epsilon=self.epsilon, num_classes=num_classes, **self.settings)

    def keys(self, rng: Key[Array, ""], indices: Int[np.ndarray | Array, "n"], num_runs: int) -> Key[Array, "n runs"]:
        """What the images of these indices draw from in each run: whatever the batch, and whatever is run besides.

        More starts begin with those of fewer, so they can only find more.
        """
        rng = jax.random.fold_in(rng, zlib.crc32(self._stream.encode()) & 0x7FFFFFFF)
        fold, runs = jax.vmap(jax.random.fold_in, (None, 0)), jnp.arange(num_runs)
        if not self.any_iterate:  # Run r is the plain function, such as `pgd`, with the key fold_in(rng, r).
            return jax.vmap(fold, (0, None), 1)(fold(rng, runs), indices)
        return jax.vmap(fold, (0, None))(fold(rng, indices), runs)

    def described(self) -> dict[str, Any]:
        """All of it as plain data, for records."""
        return {
            "kind": self.specification.name,
            "norm": self.specification.norm,
            "epsilon": self.epsilon,
            "settings": dict(self.settings),
            "after": list(self.after),
            "num_images": self.num_images,
            "apart": self.apart,
            **({} if self.images is None else {"images": fingerprint(self.images)}),
        }

    def published(self, stepwise: Stepwise) -> dict[str, Any]:
        """Its settings and constants under its authors' names, with the runs that the network's classes allow."""
        settings = {name: value for name, value in self.settings.items() if value is not None}
        runs: dict[str, int] = {name: stepwise.num_runs for name in ("restarts", "targets") if name in settings}
        return {**settings, **runs, **self.specification.constants}

    def replace(self, **changes: Any) -> "Attack":
        """The same attack but for these arguments.

        Example:
          >>> Attack("pgd").replace(num_steps=50).name
          'pgd-50'
        """
        fields = {name: getattr(self, name) for name in ("epsilon", "after", "num_images", "apart", "label", "images")}
        return Attack(**{"kind": self.specification, **fields, **self.given, **changes})

    def __hash__(self):
        return hash((self.name, self.epsilon))

    @property
    def _stream(self):
        """What its random numbers are named after."""
        steps = f"-{self.settings['num_steps']}" if self.specification.steps_in_name else ""
        return self.specification.name + steps


def parse_attack(text: str, epsilon: float = 8 / 255, **settings: Any) -> Attack:
    """The attack that a word such as `pgd-20` or `cw-100x5` names: kind, steps, random starts.

    Args:
      text: A name in `REGISTRY`, with steps and starts where the attack has them in its name.
      epsilon: Radius, in units of [0, 1].
      settings: Settings besides, for attacks that have them. (AutoAttack's keep their number of restarts.)

    Raises:
      ValueError: for another word, with the nearest one.

    Example:
      >>> parse_attack("cw-100").settings["num_steps"], parse_attack("fgsm", restarts=3).name
      (100, 'fgsmx3')
    """
    match = re.fullmatch(r"(?P<kind>.+?)(-(?P<num_steps>\d+))?(x(?P<restarts>\d+))?", text)
    specification = REGISTRY.get(match["kind"] if match else "")
    named = {name: int(match[name]) for name in ("num_steps", "restarts") if match and match[name]}
    fits = specification is not None and named.keys() <= {
        *(["num_steps"] if specification.steps_in_name else []), *(["restarts"] if specification.every_run else [])
    }  # fmt: skip
    if not fits:
        # With 20 for any number of steps, so that a typo meets its neighbour.
        words = [name + ("-20" if other.steps_in_name else "") for name, other in REGISTRY.items()]
        check_choice("attack", text, words)
    specification = cast(Specification, specification)  # None is refused by now
    free = {name: value for name, value in settings.items() if name in specification.settings}
    if not specification.every_run:  # AutoAttack's attacks have their own number of starts
        free.pop("restarts", None)
    return Attack(specification, epsilon, **{**free, **named})
