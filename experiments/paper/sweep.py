"""What a table is declared as: rows that change the configuration, attacks, and the paper's numbers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.paper.scales import Scale
from fs_jax.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a way to train."""

    label: str
    """As the table has it."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What it changes in the scale's configuration, by dotted name."""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the paper reports, in %, by attack."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A table: rows, all under the same attacks."""

    name: str
    """Of its files."""
    title: str
    source: str
    """Where the paper's numbers stand."""
    rows: Sequence[Row]
    """The others are compared with the first."""
    attacks: Callable[[Scale], Sequence[Any]]
    """From the scale to `fs_jax.attacks.Attack`s; the first is clean."""
    reading: str = ""
    """What to keep in mind when reading it."""


SIX = ("clean", "fgsm", "pgd-20", "pgd-100", "cw-20", "cw-100")


def of_six(*accuracies: float) -> dict[str, float]:
    """The paper's numbers of a row of its tables 2 to 4, by attack."""
    return dict(zip(SIX, accuracies, strict=True))


def full_step(config: TrainConfig) -> float:
    """A step as long as the radius, as feature scattering has it."""
    return config.attack.epsilon


def six_attacks(scale: Scale):
    """The attacks of the paper's tables 2 to 4, judged as it judges them."""
    from fs_jax.attacks import parse_attack

    return [parse_attack(word, scale.config.attack.epsilon) for word in SIX]


def and_autoattack(scale: Scale):
    """The six, and AutoAttack's standard version."""
    from fs_jax.evaluation import suite

    return [*six_attacks(scale), *suite("autoattack", epsilon=scale.config.attack.epsilon)[1:]]
