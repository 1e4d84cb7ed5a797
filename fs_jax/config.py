"""Configurations: frozen dataclasses, validated where they are made, and presets by name."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from fs_jax._utils.validation import check_choice, check_number

Scope = Literal["device", "global"]
DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Wide-ResNet."""

    depth: int = 28
    """Layers, 6n + 4."""
    width: int = 10
    """Widening factor."""
    dtype: DType = "float32"
    """Precision of the convolutions; parameters and statistics stay float32 or wider. Products in float32 are as exact
    as XLA's default on the device: on NVIDIA GPUs TF32, unless `jax_default_matmul_precision` says otherwise."""

    def __post_init__(self):
        check_number("depth", self.depth, at_least=10, integer=True)
        if self.depth % 6 != 4:
            below = max(10, (self.depth - 4) // 6 * 6 + 4)
            raise ValueError(f"depth: expected 6n + 4 (10, 16, 22, 28, 34, ...); got {self.depth}. Try {below}.")
        check_number("width", self.width, at_least=1, integer=True)
        check_choice("dtype", self.dtype, get_args(DType))


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """The attack inside the training step, in L-infinity on [0, 1] images."""

    epsilon: float = 8 / 255
    """Radius."""
    step_size: float | None = None
    """Step; by default the method's own: epsilon for feature scattering, epsilon / 4 for PGD, 7 / 31 epsilon for
    TRADES."""
    num_steps: int | None = None
    """Number of steps; by default the method's own: 1 for feature scattering, 7 for PGD, 10 for TRADES."""

    def __post_init__(self):
        check_number("attack.epsilon", self.epsilon, at_least=0, at_most=1)
        if self.step_size is not None:
            check_number("attack.step_size", self.step_size, above=0, at_most=1)
        if self.num_steps is not None:
            check_number("attack.num_steps", self.num_steps, at_least=1, integer=True)


@dataclasses.dataclass(frozen=True)
class TransportConfig:
    """The optimal-transport problem between natural and scattered logits."""

    solver: str = "sinkhorn"
    """A transport of `fs_jax.training.transports.TRANSPORTS`: sinkhorn (Algorithm 1), ipot (Algorithm 2) or
    released_sinkhorn (the released code's variant of Algorithm 1); to compare with, identity or independent."""
    reg: float = 0.01
    """Entropic weight of both Sinkhorns, the paper's tau."""
    beta: float = 1.0
    """Proximal weight of IPOT."""
    num_iters: int = 50
    """Iterations of Algorithms 1 and 2 (the released variant stops by itself)."""
    scope: Scope = "global"
    """One problem over the batch of all devices, or one for each device's part of it. Of the one problem sinkhorn has a
    device's rows on that device; the others gather it, and every device solves it whole."""

    def __post_init__(self):
        check_number("transport.reg", self.reg, above=0)
        check_number("transport.beta", self.beta, above=0)
        check_number("transport.num_iters", self.num_iters, at_least=1, integer=True)
        check_choice("transport.scope", self.scope, get_args(Scope))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run's weights. Two runs of one configuration end alike."""

    dataset: str = "cifar10"
    """cifar10, cifar100, svhn_cropped, digits, or the path of an .npz file."""
    train_size: int = 50_000
    """Training images in the data set; a run sets it to what it finds."""
    data: str | None = None
    """Fingerprint of the training images and labels; a run sets it, and other data don't resume it."""
    holdout: int = 0
    """Training images that are held out to choose the best checkpoint (0: it is chosen on training images)."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    method: str = "feature_scatter"
    """A method of `fs_jax.training.methods.METHODS`: feature_scatter (the paper's), pgd, trades, noise or
    standard."""
    method_settings: tuple[tuple[str, float], ...] = ()
    """Settings that only this method has, such as beta 6.0 of trades."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    transport: TransportConfig = dataclasses.field(default_factory=TransportConfig)
    smoothing: float | None = None
    """Label smoothing, the paper's Delta: the true class has 1 - smoothing. By default the method's own: 0.5 for
    feature scattering, none for the others."""
    weight_average: float | None = None
    """Evaluate an exponential moving average of the weights, with this decay, such as 0.999; by default the weights."""
    batch_size: int = 60
    """Images per step, over all devices."""
    epochs: int = 200
    learning_rate: float = 0.1
    decay_epochs: tuple[int, ...] = (60, 90)
    """After how many epochs the learning rate is multiplied by decay_factor."""
    decay_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    """On every parameter, BatchNorm's too."""
    sync_batch_norm: bool = True
    """Normalise by the batch of all devices, or by each device's part of it."""
    parts: int = 1
    """Into how many parts a batch is split, if devices have transport problems or BatchNorms of their own; a run sets
    it to the number of its devices, and another number doesn't resume it."""
    seed: int = 0

    def __post_init__(self):
        settings = tuple((str(name), value) for name, value in dict(self.method_settings).items())
        object.__setattr__(self, "method_settings", settings)  # JSON gives lists
        for name, value in settings:
            check_number(f"method_settings: {name}", value)
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
        """Full batches in an epoch; the images left over change with the shuffle."""
        return (self.train_size - self.holdout) // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON data.

    Example:
      >>> to_dict(ModelConfig(depth=10, width=1))
      {'depth': 10, 'width': 1, 'dtype': 'float32'}
    """
    # Tuples become lists, as they would on the way through JSON, so that a stored configuration compares equal.
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """The training configuration that `to_dict` wrote.

    Raises:
      ValueError: for fields that a configuration doesn't have, with the nearest name, and where `TrainConfig` refuses.
      TypeError: for what is no mapping, and where `TrainConfig` refuses.
    """
    sections = {"model": ModelConfig, "attack": AttackConfig, "transport": TransportConfig}

    def build(cls, values, name=""):
        if not isinstance(values, Mapping):
            raise TypeError(f"{name or 'configuration'}: expected its fields by name; got {values!r:.60}.")
        fields = [field.name for field in dataclasses.fields(cls)]
        for field in values:
            check_choice(f"configuration field {f'{name}.' * bool(name)}{field}", str(field), fields)
        return cls(**values)

    if isinstance(data, Mapping):
        data = {name: build(sections[name], of, name) if name in sections else of for name, of in data.items()}
    config = build(TrainConfig, data)
    return dataclasses.replace(config, decay_epochs=tuple(config.decay_epochs))  # JSON gives lists


def differences(ours: TrainConfig, theirs: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ, by dotted name, each with both values.

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


# What the second gives, and how long it takes, is in experiments/results/cifar10_short; the third is the quickstart's.
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "cifar10_wrn28_10": (
        "The paper's network and schedule on CIFAR-10: for a GPU or a TPU.",
        TrainConfig(),
    ),
    "cifar10_wrn10_2": (
        "A network for two CPU cores on CIFAR-10, 5 epochs.",
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
    """A preset by name.

    Raises:
      ValueError: for an unknown name, with the nearest one.

    Example:
      >>> preset("cifar10_wrn28_10").model
      ModelConfig(depth=28, width=10, dtype='float32')
    """
    check_choice("preset", name, PRESETS)
    return PRESETS[name][1]
