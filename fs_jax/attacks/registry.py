"""The registry of attacks, and `Attack`: an attack with its settings, as evaluations take it."""

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
"""The attacks by name."""


@dataclasses.dataclass(frozen=True, init=False)
class Attack:
    """An attack with its settings, for `evaluate` and `autoattack`.

    Args:
      kind: A name in `REGISTRY`, or your own `Specification`.
      epsilon: Radius, in units of [0, 1]. An attack with a fixed radius (0 for the clean images) ignores it.
      after: Names of earlier attacks. Images that they misclassified are skipped, and count as misclassified.
      num_images: Attack only this many images, the first ones of the split; by default all.
      apart: Exclude the attack from the worst case and report it separately, for example because it has another radius.
        Attacks without a radius are always excluded.
      label: Name in records and tables; by default the kind with its steps and restarts.
      images: Adversarial images made elsewhere, [N, H, W, C] in [0, 1], used in place of the images (see `transfer`).
      settings: Settings of the attack, as its `Specification` lists them; the others keep their defaults.

    Raises:
      TypeError, ValueError: for an unknown attack or setting, with the nearest name, or a value out of range.

    Example:
      >>> Attack("pgd").name, Attack("cw", num_steps=100, restarts=5).name, Attack("apgd-t").settings["targets"]
      ('pgd-20', 'cw-100x5', 9)
    """

    specification: Specification
    epsilon: float
    settings: Mapping[str, Any]
    """All settings, with the values in use."""
    given: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    """The settings that the caller gave. `replace` computes the defaults of the others again, as they may depend on the
    radius."""
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
        """The kind with its steps and restarts, as in `pgd-20`, `cw-100x5`, `fgsm`; or the label."""
        restarts = self.settings.get("restarts", 1)
        starts = f"x{restarts}" if restarts > 1 and self.specification.every_run else ""
        return self.label or self._stream + starts

    @property
    def any_iterate(self) -> bool:
        """Whether any misclassified iterate counts, or only the last iterate."""
        return self.settings.get("any_iterate", True)

    @property
    def judged_by(self) -> str:
        """Which iterates decide whether an image is misclassified, for tables."""
        if self.specification.judges_only:
            return "the image"
        return "any iterate" if self.any_iterate else "last iterate"

    def steps(self, num_classes: int) -> Stepwise:
        """The attack as a `Stepwise`, for a network with this number of classes.

        Raises:
          ValueError: if the attack needs more classes.
        """
        least = self.specification.least_classes
        if num_classes < least:
            remaining = [name for name, other in REGISTRY.items() if num_classes >= other.least_classes]
            raise ValueError(
                f"{self.name}: expected a network of at least {least} classes; it has {num_classes}. "
                f"Attacks that work, in autoattack(version=[...]) and evaluate: {', '.join(remaining)}."
            )
        return self.specification.build(epsilon=self.epsilon, num_classes=num_classes, **self.settings)

    def keys(self, rng: Key[Array, ""], indices: Int[np.ndarray | Array, "n"], num_runs: int) -> Key[Array, "n runs"]:
        """The key of each image in each run. It depends on the image's index alone, not on batches or other attacks.

        The first runs are the same for any number of runs, so more restarts find at least as much.
        """
        rng = jax.random.fold_in(rng, zlib.crc32(self._stream.encode()) & 0x7FFFFFFF)
        fold, runs = jax.vmap(jax.random.fold_in, (None, 0)), jnp.arange(num_runs)
        if not self.any_iterate:  # Run r equals the plain function, such as `pgd`, with the key fold_in(rng, r).
            return jax.vmap(fold, (0, None), 1)(fold(rng, runs), indices)
        return jax.vmap(fold, (0, None))(fold(rng, indices), runs)

    def described(self) -> dict[str, Any]:
        """The attack as plain data, for records."""
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
        """Settings and constants under the authors' names, with the number of runs that the network's classes allow."""
        settings = {name: value for name, value in self.settings.items() if value is not None}
        runs: dict[str, int] = {name: stepwise.num_runs for name in ("restarts", "targets") if name in settings}
        return {**settings, **runs, **self.specification.constants}

    def replace(self, **changes: Any) -> "Attack":
        """A copy with these arguments changed.

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
        """The name that keys of random numbers are derived from."""
        steps = f"-{self.settings['num_steps']}" if self.specification.steps_in_name else ""
        return self.specification.name + steps


def parse_attack(text: str, epsilon: float = 8 / 255, **settings: Any) -> Attack:
    """The attack with this name: `cw-100x5` is the kind "cw" with 100 steps and 5 restarts.

    Args:
      text: A name in `REGISTRY`, followed by steps and restarts for attacks that have them in their names.
      epsilon: Radius, in units of [0, 1].
      settings: More settings; those that the attack doesn't have are ignored. (AutoAttack's attacks ignore `restarts`
        too.)

    Raises:
      ValueError: for an unknown name, with the nearest known one.

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
        # Listed with 20 steps, so that the nearest name to a typo such as pdg-20 is found.
        names = [name + ("-20" if other.steps_in_name else "") for name, other in REGISTRY.items()]
        check_choice("attack", text, names)
    specification = cast(Specification, specification)  # check_choice has refused None
    free = {name: value for name, value in settings.items() if name in specification.settings}
    if not specification.every_run:  # AutoAttack's attacks keep their default number of restarts
        free.pop("restarts", None)
    return Attack(specification, epsilon, **{**free, **named})
