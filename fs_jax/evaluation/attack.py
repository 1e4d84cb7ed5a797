"""Attacks as data: what to run, with which settings; and the words that name them."""

import dataclasses
import re
from typing import Literal, NamedTuple, get_args

from jax.tree_util import Partial

from fs_jax import attacks
from fs_jax._utils.validation import check_choice, check_number
from fs_jax.attacks.linf import LogitsFn
from fs_jax.attacks.local_search import local_search_steps
from fs_jax.attacks.spsa import spsa_steps
from fs_jax.attacks.stepwise import first_judged, run_keys

Kind = Literal[
    "clean", "fgsm", "pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "spsa", "local-search",
    "transfer",
]  # fmt: skip


_AUTOATTACK = attacks.autoattack_settings("plus") | attacks.autoattack_settings("standard")
_STEPS = {
    "clean": 0, "fgsm": 1, "pgd": 20, "cw": 20, "spsa": 100, "local-search": 150, "transfer": 20,
    **{kind: settings["num_steps"] for kind, settings in _AUTOATTACK.items()},
}  # fmt: skip


SIGNED = ("fgsm", "pgd", "cw", "transfer")  # steps of one size along the sign of a gradient


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
        signed, free = self.kind in SIGNED, self.kind in ("fgsm", "pgd", "cw")
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
        starts = f"x{self.restarts}" if self.restarts > 1 and self.kind in SIGNED else ""
        return self.label or self.stream + starts

    @property
    def judged_by(self) -> str:
        """Which iterates decide, for tables."""
        return "the image" if self.kind == "clean" else "any iterate" if self.any_iterate else "last iterate"

    @property
    def every_run(self) -> bool:
        """Whether images that fall in a run make the others too, for the lowest single run."""
        return self.kind in SIGNED

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
