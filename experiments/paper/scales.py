"""The scales of the paper's experiments: data set, network, length of training and number of test images."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from fs_jax._utils.validation import check_choice
from fs_jax.config import AttackConfig, ModelConfig, TrainConfig, preset

EXPERIMENTS = (
    "main_table", "table1_strong_attacks", "gradient_free", "table2_label_smoothing", "table3_sinkhorn_tau",
    "table4_ipot_beta", "figure1_loss_curves", "figure2_embeddings", "mechanism", "matching", "autoattack_gap",
    "equal_passes", "transfer", "ablation", "trade_off",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """A scale of the paper's experiments."""

    name: str
    """Name on the command line."""
    summary: str
    """Settings, time, and which effects can be detected."""
    config: TrainConfig
    """Configuration of the paper's method, which a row changes."""
    datasets: tuple[str, ...]
    """Data sets. One network is trained on each, and the test images of all are pooled."""
    test_images: int | None
    """Number of attacked test images of each data set, the first ones; None for all."""
    strong_images: int | None
    """Number of these images for attacks with 500 or more steps and 5 restarts; None for all."""
    gradient_free_images: int
    """Number of these images for gradient-free attacks."""
    experiments: tuple[str, ...] = EXPERIMENTS
    """Experiments that run by default."""
    dataset: str | None = None
    """The data set that replaces the scale's own, if any."""

    @property
    def folder(self) -> str:
        """Name of the folders of its networks and results."""
        if self.dataset is None:
            return self.name
        stem = re.sub(r"[^\w.-]", "_", pathlib.Path(self.dataset).stem)
        return f"{self.name}-{stem}"


SCALES: dict[str, Scale] = {
    "trial": Scale(
        "trial",
        "scikit-learn's digits, 1 epoch, 20 test images. A few minutes; only for trying the scripts.",
        dataclasses.replace(preset("digits"), epochs=1, decay_epochs=()),
        ("digits",),
        20,
        2,
        2,
    ),
    "digits": Scale(
        "digits",
        "scikit-learn's 8 x 8 digits, WRN-10-1, 12 epochs, radius 0.1, five folds, so that all 1,797 images are "
        "tested. 2 to 15 minutes of a CPU core per row; detects effects of about 4 points.",
        preset("digits"),
        ("digits", "digits_fold1", "digits_fold2", "digits_fold3", "digits_fold4"),
        None,
        100,
        20,
        # The clean accuracies of all methods are nearly equal on digits, as the ablation shows.
        tuple(name for name in EXPERIMENTS if name != "trade_off"),
    ),
    "small": Scale(
        "small",
        "CIFAR-10 at 16 x 16, WRN-10-2, 16 epochs, radius 6/255, 1,000 test images. 15 to 65 minutes of a CPU core per "
        "row; shows large differences between methods.",
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
        "CIFAR-10 at 32 x 32, WRN-10-2, 20 epochs, radius 4/255, 1,000 test images, a few experiments. An hour per row "
        "on two CPU cores; shows whether 1-step scattering is more robust than PGD-7 at equal passes.",
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
        "The paper's WRN-28-10 on CIFAR-10, in bfloat16, 10 epochs, 500 test images. For a GPU or TPU: about 5 minutes "
        "per row on an H200.",
        dataclasses.replace(
            preset("cifar10_wrn28_10"),
            model=ModelConfig(depth=28, width=10, dtype="bfloat16"),
            epochs=10,
            decay_epochs=(7, 9),
        ),
        ("cifar10",),
        500,
        500,
        50,
    ),
    "paper": Scale(
        "paper",
        "The paper's WRN-28-10 on CIFAR-10, 200 epochs, all 10,000 test images. Needs a GPU or TPU.",
        preset("cifar10_wrn28_10"),
        ("cifar10",),
        None,
        None,
        1000,
    ),
}


def scale_of(name: str, dataset: str | None = None) -> Scale:
    """A scale by name, optionally with another data set (`cifar100`, `svhn_cropped`, an .npz file).

    Raises:
      ValueError: for an unknown name; the message suggests the nearest one.

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
    """Change some fields of a configuration, by dotted name. A value can be a function of the configuration.

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
