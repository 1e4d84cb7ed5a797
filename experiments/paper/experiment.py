"""The declaration of a table or figure: its networks, their measurement, and the text and figure made from it."""

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
    """A row of a table: a way to train a network."""

    label: str
    """Label in tables and figures."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to the scale's configuration, by dotted name. A value can be a function of the configuration."""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Accuracies reported in the paper, in %, by attack."""
    add_to_seed: int = 0
    """Added to the seed, for a network that differs from another row with the same changes."""


class Network(NamedTuple):
    """A trained network and the test images, for a measurement."""

    config: TrainConfig
    dataset: "Dataset"
    model: Any
    variables: Any
    images: "np.ndarray"
    """The test images that the scale attacks, uint8 [N, H, W, C]."""
    labels: "np.ndarray"

    @property
    def logits_fn(self) -> Callable:
        from fs_jax.models import as_logits_fn

        return as_logits_fn(self.model, self.variables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measurement of a network."""

    run: Callable[[Network, Scale, pathlib.Path], Data | None]
    """`run(network, scale, path)` returns the result, or None if a signal stopped it. `path` is the file of the result;
    intermediate results can be saved in its folder."""
    settings: Callable[[Scale], Any]
    """`settings(scale)`: everything else that the result depends on, as JSON. Equal settings share results."""
    passes: Callable[[TrainConfig, Scale, int], float]
    """`passes(config, scale, test_images)`: estimated number of forward and backward passes, in images."""
    programs: Callable[[Scale], int] = lambda scale: 5
    """`programs(scale)`: estimated number of programs of average size to trace and load."""
    least_classes: Callable[[Scale], int] = lambda scale: 2
    """`least_classes(scale)`: smallest number of classes that the measurement needs."""
    trains: bool = False
    """Whether the measurement trains the network again, so that a restored network does not change its result."""


class Finished(NamedTuple):
    """A row whose networks are all measured."""

    row: Row
    results: list[Data]
    """One result for each data set and seed."""
    folders: list[pathlib.Path]
    """Folders of the networks."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or a figure."""

    name: str
    """Name of its script and files."""
    title: str
    source: str
    """Where the paper reports its numbers."""
    rows: Sequence[Row]
    """The rows. All are compared with the first."""
    measurement: Measurement
    collect: Callable[["Experiment", Scale, Sequence[Finished]], Data | None]
    """Extracts from the results all data of the text and figure; None if the finished rows do not suffice."""
    show: Callable[[Data], str]
    """Makes the Markdown between title and caption."""
    draw: Callable[[Data, pathlib.Path], Any] | None = None
    """Draws the figure to a .png or .svg file."""
    other_files: Callable[[Data], dict[str, str]] = lambda data: {}
    """Makes the contents of further files, by the end of the file name."""
    reading: str = ""
    """A note for readers, below the title."""
    pooled: bool = True
    """Whether results are pooled over all data sets and seeds, instead of using the first only."""


def full_step(config: TrainConfig) -> float:
    """Step size of feature scattering: the radius."""
    return config.attack.epsilon


def quarter_step(config: TrainConfig) -> float:
    """Step size of PGD: a quarter of the radius."""
    return config.attack.epsilon / 4


METHOD_PLAN = "Sinkhorn, τ = 0.01"
"""Label of the paper's transport, where transports are compared."""

FEATURE_SCATTERING = Row("feature scattering")
STANDARD = Row("standard", {"method": "standard"})
PGD_7 = Row("PGD-7", {"method": "pgd"})
TRADES = Row("TRADES", {"method": "trades"})


def at_equal_passes(row: Row, *, steps: int = 7) -> Row:
    """The same row with fewer epochs, so that training takes about as many passes as the paper's method.

    A forward pass counts 1, a backward pass to the images 1, and a backward pass to images and weights 2. So a training
    step with k attack steps counts 2 k + 3. Feature scattering needs one more, for the natural images: 6 for k = 1.
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
