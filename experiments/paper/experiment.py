"""What a table or a figure is declared as: networks, what is measured of each, and what is written of that."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.paper.scales import Scale
from fs_jax.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from fs_jax.data import Dataset

Data = dict[str, Any]
"""Plain JSON data."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to train."""

    label: str
    """As tables and figures have it."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What it changes in the scale's configuration, by dotted name; values, or functions of the configuration."""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the paper reports, in %, by attack."""
    add_to_seed: int = 0
    """What makes it another network than a row of the same changes."""


class Network(NamedTuple):
    """A trained network, as it is measured."""

    config: TrainConfig
    dataset: "Dataset"
    model: Any
    variables: Any
    images: "np.ndarray"
    """Those test images that the scale has attacked, [N, H, W, C] uint8."""
    labels: "np.ndarray"

    @property
    def logits_fn(self) -> Callable:
        from fs_jax.models import as_logits_fn

        return as_logits_fn(self.model, self.variables)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured of a network."""

    run: Callable[[Network, Scale, pathlib.Path], Data | None]
    """(network, scale, where the result will be, beside which to keep what is done so far) -> the result; None if a
    signal stopped it."""
    settings: Callable[[Scale], Any]
    """What the result depends on besides the network, as JSON: experiments of the same settings share results."""
    passes: Callable[[TrainConfig, Scale, int], float]
    """(configuration, scale, test images) -> about how many passes of an image it takes, forward and backward."""
    least_classes: Callable[[Scale], int] = lambda scale: 2
    """How many classes the data set must have."""


class Finished(NamedTuple):
    """A row, of which all networks are measured."""

    row: Row
    results: list[Data]
    """One for each data set and seed."""
    folders: list[pathlib.Path]
    """Of the networks."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or a figure."""

    name: str
    """Of its script and its files."""
    title: str
    source: str
    """Where the paper's numbers stand."""
    rows: Sequence[Row]
    """Others are compared with the first."""
    measurement: Measurement
    collect: Callable[["Experiment", Scale, Sequence[Finished]], Data | None]
    """What is kept of the results: all that text and figure show; None if these rows show nothing yet."""
    show: Callable[[Data], str]
    """The Markdown between title and caption."""
    draw: Callable[[Data, pathlib.Path], Any] | None = None
    """Draws the figure, to a .png or .svg."""
    other_files: Callable[[Data], dict[str, str]] = lambda data: {}
    """Further files, by what follows the name."""
    reading: str = ""
    """What to keep in mind when reading it."""
    pooled: bool = True
    """Over all data sets and seeds; otherwise it has the first of them alone."""


def full_step(config: TrainConfig) -> float:
    """A step as long as the radius, as feature scattering has it."""
    return config.attack.epsilon


def quarter_step(config: TrainConfig) -> float:
    """A quarter of the radius, as PGD has it."""
    return config.attack.epsilon / 4


FEATURE_SCATTERING = Row("feature scattering")
STANDARD = Row("standard", {"method": "standard"})
PGD_7 = Row("PGD-7", {"method": "pgd"})
TRADES = Row("TRADES", {"method": "trades"})


def at_equal_passes(row: Row, *, steps: int = 7) -> Row:
    """The same row, trained for so many epochs that it takes about as many passes as the paper's method.

    Forward counts 1, backward to the images 1, and backward to the weights as well 2: so a training step of k attack
    steps counts 2 k + 3, and feature scattering's 1 more, for the natural images: 6 with one step.
    """
    scattering = row.changes.get("method", "feature_scatter") == "feature_scatter"
    share = 6 / (2 * steps + 3 + scattering)

    def epochs(config: TrainConfig) -> int:
        return max(1, round(share * config.epochs))

    def decay_epochs(config: TrainConfig) -> tuple[int, ...]:
        scaled = {max(1, round(share * epoch)) for epoch in config.decay_epochs}
        return tuple(sorted(epoch for epoch in scaled if epoch < epochs(config)))

    changes = {**row.changes, "epochs": epochs, "decay_epochs": decay_epochs}
    return dataclasses.replace(row, label=f"{row.label}, equal passes", changes=changes)
