"""Training configurations: frozen dataclasses that validate their fields, and presets by name."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from fs_jax._utils.validation import check_choice, check_number

Scope = Literal["device", "global"]
DType = Literal["float32", "bfloat16", "float64"]

_INTERNAL = {"internal": True}  # fields that training sets; they are not options of the command line


def _plain(value: Any) -> Any:
    """A number of NumPy as a number of Python, which JSON has; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _make_plain(config: Any) -> None:
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, _plain(getattr(config, field.name)))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Configuration of the Wide-ResNet."""

    depth: int = 28
    """Number of layers, 6n + 4: 10, 16, 22, 28, ..."""
    width: int = 10
    """Widening factor."""
    dtype: DType = "float32"
    """Precision of the convolutions; products of float32 are TF32 on NVIDIA GPUs by default. Parameters and BatchNorm
    statistics are at least float32."""

    def __post_init__(self):
        _make_plain(self)
        check_number("depth", self.depth, at_least=10, integer=True)
        if self.depth % 6 != 4:
            below = max(10, (self.depth - 4) // 6 * 6 + 4)
            raise ValueError(f"depth: expected 6n + 4 (10, 16, 22, 28, 34, ...); got {self.depth}. Try {below}.")
        check_number("width", self.width, at_least=1, integer=True)
        check_choice("dtype", self.dtype, get_args(DType))


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Configuration of the attack in the training step, in the L-infinity norm, on images in [0, 1]."""

    epsilon: float = 8 / 255
    """Radius of the attack, such as 8/255."""
    step_size: float | None = None
    """Size of an attack step. Default: epsilon for feature_scatter, epsilon / 4 for pgd, 7/31 epsilon for trades."""
    num_steps: int | None = None
    """Number of attack steps. Default: 1 for feature_scatter, 7 for pgd, 10 for trades."""

    def __post_init__(self):
        _make_plain(self)
        check_number("attack.epsilon", self.epsilon, at_least=0, at_most=1)
        if self.step_size is not None:
            check_number("attack.step_size", self.step_size, above=0, at_most=1)
        if self.num_steps is not None:
            check_number("attack.num_steps", self.num_steps, at_least=1, integer=True)


@dataclasses.dataclass(frozen=True)
class TransportConfig:
    """Configuration of the optimal-transport problem between natural and scattered logits."""

    solver: str = "sinkhorn"
    """sinkhorn (Algorithm 1), ipot (Algorithm 2), released_sinkhorn, or the baselines identity and independent."""
    reg: float = 0.01
    """Entropic weight of sinkhorn and released_sinkhorn, the paper's tau."""
    beta: float = 1.0
    """Proximal weight of ipot."""
    num_iters: int = 50
    """Iterations of sinkhorn and ipot. (released_sinkhorn has a stopping criterion of its own.)"""
    scope: Scope = "global"
    """global: one problem over the images of all devices; device: one problem per device."""

    def __post_init__(self):
        _make_plain(self)
        check_number("transport.reg", self.reg, above=0)
        check_number("transport.beta", self.beta, above=0)
        check_number("transport.num_iters", self.num_iters, at_least=1, integer=True)
        check_choice("transport.scope", self.scope, get_args(Scope))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run. Equal configurations give equal weights, on one machine with equal versions."""

    dataset: str = "cifar10"
    """cifar10, cifar100, svhn_cropped, digits, another name in fs_jax.data.DATASETS, or the path of an .npz file."""
    train_size: int = dataclasses.field(default=50_000, metadata=_INTERNAL)
    """Number of training images. Training overwrites it with that of the data set. Set it yourself for `train_step` and
    `make_optimizer`, whose learning rate decays after `decay_epochs`."""
    data: str | None = dataclasses.field(default=None, metadata=_INTERNAL)
    """Fingerprint of the training data and their augmentation. Training sets it, so that a run cannot be resumed with
    others."""
    holdout: int = 0
    """Training images held out to select the best checkpoint; with 0, it is selected on training images."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    method: str = "feature_scatter"
    """Training method: feature_scatter (the paper's), pgd, trades, noise or standard."""
    method_settings: tuple[tuple[str, float], ...] = ()
    """Settings of this method only, by name, such as beta 6.0 for trades."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    transport: TransportConfig = dataclasses.field(default_factory=TransportConfig)
    smoothing: float | None = None
    """Label smoothing, the paper's Delta. Default: 0.5 for feature_scatter, 0 for the other methods."""
    weight_average: float | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated; such as 0.999."""
    batch_size: int = 60
    """Images per training step, over all devices."""
    epochs: int = 200
    """Number of epochs."""
    learning_rate: float = 0.1
    """Initial learning rate."""
    decay_epochs: tuple[int, ...] = (60, 90)
    """Epochs after which the learning rate is multiplied by decay_factor."""
    decay_factor: float = 0.1
    """Factor of the learning rate at decay_epochs."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 2e-4
    """Weight decay of all parameters, including those of BatchNorm."""
    sync_batch_norm: bool = True
    """BatchNorm normalises over the images of all devices, instead of those of each device."""
    parts: int = dataclasses.field(default=1, metadata=_INTERNAL)
    """Number of devices, if each has a transport problem or BatchNorm of its own; otherwise 1. Training sets it."""
    seed: int = 0
    """Seed of the initial weights, batches, crops and noise."""

    def __post_init__(self):
        _make_plain(self)
        try:
            settings = tuple((str(name), value) for name, value in dict(self.method_settings).items())
        except (TypeError, ValueError):
            raise TypeError(
                f"method_settings: expected pairs of a name and a number, such as (('beta', 6.0),); got "
                f"{self.method_settings!r}."
            ) from None
        for name, value in settings:
            check_number(f"method_settings: {name}", value)
        if not isinstance(self.decay_epochs, Iterable):
            raise TypeError(f"decay_epochs: expected a tuple of epochs, such as (60, 90); got {self.decay_epochs!r}.")
        # Tuples, where JSON has lists; and Python's numbers.
        object.__setattr__(self, "method_settings", tuple((name, _plain(value)) for name, value in settings))
        object.__setattr__(self, "decay_epochs", tuple(map(_plain, self.decay_epochs)))
        for name, kind in (("model", ModelConfig), ("attack", AttackConfig), ("transport", TransportConfig)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: expected a {kind.__name__}; got {getattr(self, name)!r}.")
        if self.weight_average is not None:
            check_number("weight_average", self.weight_average, at_least=0, below=1)
        check_number("train_size", self.train_size, at_least=1, integer=True)
        check_number("holdout", self.holdout, at_least=0, integer=True)
        if self.smoothing is not None:
            check_number("smoothing", self.smoothing, at_least=0, at_most=1)
        check_number("batch_size", self.batch_size, at_least=1, integer=True)
        check_number("parts", self.parts, at_least=1, integer=True)
        check_number("epochs", self.epochs, at_least=1, integer=True)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("decay_factor", self.decay_factor, above=0, at_most=1)
        check_number("momentum", self.momentum, at_least=0, at_most=1)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("seed", self.seed, at_least=0, at_most=2**32 - 1, integer=True)
        for epoch in self.decay_epochs:
            check_number("decay_epochs", epoch, at_least=1, integer=True)
        if list(self.decay_epochs) != sorted(set(self.decay_epochs)):
            raise ValueError(f"decay_epochs: expected increasing epochs; got {tuple(self.decay_epochs)}.")

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch. The remaining images, new ones in each shuffle, are dropped."""
        return (self.train_size - self.holdout) // self.batch_size

    @property
    def total_steps(self) -> int:
        """Number of training steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to JSON data.

    Example:
      >>> to_dict(ModelConfig(depth=10, width=1))
      {'depth': 10, 'width': 1, 'dtype': 'float32'}
    """
    # Through JSON, so that tuples become lists and a stored configuration compares equal.
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """Make a training configuration from the output of `to_dict`.

    Raises:
      ValueError: for an unknown field (the message suggests the nearest name) or an invalid value.
      TypeError: for data that are not a mapping, or a value of the wrong type.
    """
    sections = {"model": ModelConfig, "attack": AttackConfig, "transport": TransportConfig}

    def build(cls, values, name=""):
        if not isinstance(values, Mapping):
            raise TypeError(f"{name or 'configuration'}: expected a mapping of fields; got {values!r:.60}.")
        fields = [field.name for field in dataclasses.fields(cls)]
        for field in values:
            check_choice(f"configuration field {f'{name}.' * bool(name)}{field}", str(field), fields)
        return cls(**values)

    if isinstance(data, Mapping):
        data = {name: build(sections[name], of, name) if name in sections else of for name, of in data.items()}
    return build(TrainConfig, data)


def differences(ours: TrainConfig, theirs: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ: both values, by dotted name.

    Example:
      >>> differences(TrainConfig(), TrainConfig(model=ModelConfig(depth=10)))
      {'model.depth': (28, 10)}
    """

    def flat(data, prefix=""):
        for name, value in data.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    first, second = dict(flat(to_dict(ours))), dict(flat(to_dict(theirs)))
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


# The results of the second were measured in experiments/results/cifar10_short, those of the third in quickstart.
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "cifar10_wrn28_10": (
        "The paper's network and schedule on CIFAR-10, for a GPU or TPU.",
        TrainConfig(),
    ),
    "cifar10_wrn10_2": (
        "A small network on CIFAR-10, 5 epochs: about 20 minutes on two CPU cores.",
        TrainConfig(model=ModelConfig(depth=10, width=2), epochs=5, decay_epochs=(3, 4)),
    ),
    "digits": (
        "scikit-learn's 8 x 8 digits: a minute on two CPU cores.",
        TrainConfig(
            dataset="digits",
            train_size=1437,
            model=ModelConfig(depth=10, width=1),
            attack=AttackConfig(epsilon=0.1),
            epochs=12,
            decay_epochs=(8, 10),
        ),
    ),
}


def preset(name: str) -> TrainConfig:
    """Look up a preset by name.

    Raises:
      ValueError: for an unknown name; the message suggests the nearest one.

    Example:
      >>> preset("cifar10_wrn28_10").model
      ModelConfig(depth=28, width=10, dtype='float32')
    """
    check_choice("preset", name, PRESETS)
    return PRESETS[name][1]
