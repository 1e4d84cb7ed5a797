"""How large the paper's experiments are run: what each scale changes, what it costs, and what it can decide."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from fs_jax._utils.validation import check_choice
from fs_jax.config import AttackConfig, ModelConfig, TrainConfig, preset


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of the paper's experiments."""

    name: str
    summary: str
    """What it changes, what it costs, and what it can decide."""
    config: TrainConfig
    """Of the paper's method; a row changes it."""
    datasets: tuple[str, ...]
    """One network is trained on each of them; their test images are pooled."""
    test_images: int | None
    """How many test images of each are attacked, the first ones; None for all."""
    strong_images: int | None
    """On how many of these the attacks of 500 and more steps from 5 starts are run."""
    gradient_free_images: int
    """On how many of these gradient-free attacks are run."""
    experiments: tuple[str, ...] | None = None
    """Which are run where none is named; None for all."""
    dataset: str | None = None
    """Another data set than its own, if one was asked for."""

    @property
    def folder(self) -> str:
        """Of its networks and results."""
        if self.dataset is None:
            return self.name
        stem = re.sub(r"[^\w.-]", "_", pathlib.Path(self.dataset).stem)
        return f"{self.name}-{stem}"


SCALES: dict[str, Scale] = {
    "trial": Scale(
        "trial",
        "One epoch of scikit-learn's digits, 20 test images: to try the scripts; decides nothing.",
        dataclasses.replace(preset("digits"), epochs=1, decay_epochs=()),
        ("digits",),
        20,
        2,
        2,
    ),
    "digits": Scale(
        "digits",
        "scikit-learn's 8 x 8 digits, WRN-10-1, 12 epochs, radius 0.1, in five folds, so that all 1,797 images are "
        "tested. Minutes a row on two cores; decides effects of 3 points and more.",
        preset("digits"),
        ("digits", "digits_fold1", "digits_fold2", "digits_fold3", "digits_fold4"),
        None,
        100,
        20,
    ),
    "small": Scale(
        "small",
        "CIFAR-10 at 16 x 16, WRN-10-2, 16 epochs, radius 6/255, 1,000 test images. Some 20 minutes of one core a row; "
        "decides orderings.",
        TrainConfig(
            dataset="cifar10_16x16",
            model=ModelConfig(depth=10, width=2),
            attack=AttackConfig(epsilon=6 / 255),
            epochs=16,
            decay_epochs=(11, 14),
        ),
        ("cifar10_16x16",),
        1000,
        250,
        50,
    ),
    "medium": Scale(
        "medium",
        "CIFAR-10 at 32 x 32, WRN-10-2, 20 epochs, radius 4/255, 1,000 test images, of a few rows: an hour of two cores"
        " a row. Whether 1-step scattering is better than PGD-7 under AutoAttack.",
        TrainConfig(
            model=ModelConfig(depth=10, width=2),
            attack=AttackConfig(epsilon=4 / 255),
            epochs=20,
            decay_epochs=(14, 18),
        ),
        ("cifar10",),
        1000,
        250,
        50,
        ("equal_passes", "figure1_loss_curves", "figure2_embeddings", "table1_strong_attacks"),
    ),
    "short": Scale(
        "short",
        "The paper's WRN-28-10 on CIFAR-10 in bfloat16 for 15 epochs, 1,000 test images: for a GPU or a TPU.",
        dataclasses.replace(
            preset("cifar10_wrn28_10"),
            model=ModelConfig(depth=28, width=10, dtype="bfloat16"),
            epochs=15,
            decay_epochs=(10, 13),
        ),
        ("cifar10",),
        1000,
        1000,
        100,
    ),
    "paper": Scale(
        "paper",
        "The paper's WRN-28-10 on CIFAR-10 for 200 epochs, all 10,000 test images: for a GPU or a TPU.",
        preset("cifar10_wrn28_10"),
        ("cifar10",),
        None,
        None,
        1000,
    ),
}


def scale_of(name: str, dataset: str | None = None) -> Scale:
    """A scale by name, on its own data or on another set's (`cifar100`, `svhn_cropped`, an .npz file).

    Raises:
      ValueError: for an unknown name, with the nearest one.

    Example:
      >>> scale_of("short", "svhn_cropped").folder
      'short-svhn_cropped'
    """
    check_choice("scale", name, SCALES)
    scale = SCALES[name]
    if dataset is None:
        return scale
    return dataclasses.replace(
        scale, dataset=dataset, datasets=(dataset,), config=dataclasses.replace(scale.config, dataset=dataset)
    )


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values of some fields, named as on the command line; or functions of it.

    Example:
      >>> changed(TrainConfig(), {"smoothing": 0.3, "transport.reg": 0.05}).transport.reg
      0.05
    """
    changes = {name: value(config) if callable(value) else value for name, value in changes.items()}
    own = {name: value for name, value in changes.items() if "." not in name}
    for section in {name.split(".")[0] for name in changes} - own.keys():
        fields = {name.split(".")[1]: value for name, value in changes.items() if name.startswith(f"{section}.")}
        own[section] = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **own)
