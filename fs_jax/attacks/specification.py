"""What an attack is to all that runs attacks: its name, what may be set, and how to build it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from fs_jax._utils.validation import check_number
from fs_jax.attacks.stepwise import Stepwise


class Setting(NamedTuple):
    """Something about an attack that may be set."""

    default: Any
    """Its value where nobody sets it; a function of the radius, if it depends on that."""
    check: Callable[[str, Any], None]
    """(name, value) -> None, or an error that says argument, expected and got."""


def count(default: int | None) -> Setting:
    """A whole number, at least 1; or None where that is the default.

    Example:
      >>> count(20).check("num_steps", 0)
      Traceback (most recent call last):
      ValueError: num_steps: expected an integer of at least 1; got 0.
    """

    def check(name, value):
        if value is not None or default is not None:
            check_number(name, value, at_least=1, integer=True)

    return Setting(default, check)


def length(default: float | Callable[[float], float]) -> Setting:
    """A number in [0, 1], the range of the images.

    Example:
      >>> length(lambda epsilon: epsilon / 4).default(0.1)
      0.025
    """
    return Setting(default, lambda name, value: check_number(name, value, at_least=0, at_most=1))


def flag(default: bool) -> Setting:
    """True or False.

    Example:
      >>> flag(False).check("any_iterate", 1)
      Traceback (most recent call last):
      TypeError: any_iterate: expected True or False; got 1.
    """

    def check(name, value):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False; got {value!r}.")

    return Setting(default, check)


@dataclasses.dataclass(frozen=True)
class Specification:
    """An attack, for the registry: one of these and a `Stepwise` are all that a new attack needs.

    Example:
      >>> from fs_jax.attacks import pgd_steps
      >>> def build(*, epsilon, num_classes, num_steps):
      ...   return pgd_steps(epsilon=epsilon, step_size=epsilon, num_steps=num_steps)
      >>> Specification("bim", "PGD whose steps are as large as the radius.", build, {"num_steps": count(10)}).name
      'bim'
    """

    name: str
    """The word by which it is asked for, and under which its results are kept."""
    summary: str
    """What it is, in a line, for help texts."""
    build: Callable[..., Stepwise]
    """(epsilon=, num_classes=, **settings) -> the attack."""
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    """What may be set besides the radius. `restarts` counts its random starts, `num_draws` the draws of a randomised
    network in each of its gradients; `any_iterate` says whether a misclassified iterate counts whenever it occurs."""
    norm: Literal["linf"] | None = "linf"
    """The norm that its radius is of; None for an attack that keeps to none, and is no part of a worst case. (Other
    norms would need more: the chain measures perturbations in L-infinity, and a worst case is over one ball.)"""
    fixed_radius: float | None = None
    """The radius that it has whatever is asked for."""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is the same always, under its authors' names, for the record."""
    uses_gradients: bool = True
    """Whether it looks at gradients of the network."""
    judges_only: bool = False
    """Whether it only judges images as they are given."""
    steps_in_name: bool = False
    """Whether its number of steps belongs to its name, as in `pgd-20`."""
    every_run: bool = False
    """Whether images that one random start breaks make the others too, for the accuracy after each start alone."""
    least_classes: int = 2
    """With fewer classes it means nothing."""

    def __post_init__(self):
        if self.norm not in ("linf", None):
            raise ValueError(
                f"norm: expected 'linf' or None; got {self.norm!r}. Perturbations are measured in L-infinity, so those "
                "of another norm can't be in a worst case: give None, and they are reported apart."
            )
