"""The specification of an attack: its name, its settings, and how to build it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from fs_jax._utils.validation import check_number
from fs_jax.attacks.stepwise import Stepwise


class Setting(NamedTuple):
    """A setting of an attack."""

    default: Any
    """The default value; a function of the radius if it depends on the radius."""
    check: Callable[[str, Any], None]
    """(name, value) -> None; raises an error that says argument, expected and got."""


def count(default: int | None) -> Setting:
    """A setting that is an integer of at least 1; or None, if that is the default.

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
    """A setting that is a number in [0, 1], the range of the images.

    Example:
      >>> length(lambda epsilon: epsilon / 4).default(0.1)
      0.025
    """
    return Setting(default, lambda name, value: check_number(name, value, at_least=0, at_most=1))


def flag(default: bool) -> Setting:
    """A setting that is True or False.

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
    """An attack, for the registry. A new attack is one of these and a `Stepwise`.

    Example:
      >>> from fs_jax.attacks import pgd_steps
      >>> def build(*, epsilon, num_classes, num_steps):
      ...   return pgd_steps(epsilon=epsilon, step_size=epsilon, num_steps=num_steps)
      >>> Specification("bim", "PGD whose steps are as large as the radius.", build, {"num_steps": count(10)}).name
      'bim'
    """

    name: str
    """The attack's name, in command lines and in records."""
    summary: str
    """One line that describes it, for help texts."""
    build: Callable[..., Stepwise]
    """(epsilon=, num_classes=, **settings) -> the attack as a `Stepwise`."""
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    """The settings besides the radius. Three names mean the same for all attacks: `restarts`, the number of random
    starts; `num_draws`, how many draws of a randomised network each gradient averages; `any_iterate`, whether any
    misclassified iterate counts, or only the last one."""
    norm: Literal["linf"] | None = "linf"
    """The norm of the radius; None for an attack without a radius, which is never part of a worst case. (Other norms
    would need more work: perturbations are measured in L-infinity, and a worst case is over one ball.)"""
    fixed_radius: float | None = None
    """A radius that replaces the requested one; None for an attack of any radius."""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Constants of the attack under its authors' names, for records."""
    uses_gradients: bool = True
    """Whether it computes gradients of the network."""
    judges_only: bool = False
    """Whether it only classifies the images that it is given."""
    steps_in_name: bool = False
    """Whether its name has the number of steps, as in `pgd-20`."""
    every_run: bool = False
    """Whether each image makes all its runs, even after one of them has succeeded. Then the accuracy after each random
    start alone is known too."""
    least_classes: int = 2
    """The smallest number of classes that it works with."""

    def __post_init__(self):
        if self.norm not in ("linf", None):
            raise ValueError(
                f"norm: expected 'linf' or None; got {self.norm!r}. Perturbations are measured in L-infinity, so an "
                "attack in another norm can't be in the worst case: use None, and it is reported separately."
            )
