"""The training loop: data, step, checkpoints, logs and monitoring. Stops cleanly and resumes automatically."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from fs_jax._utils.files import local_path, read_jsonl, write_text
from fs_jax._utils.fingerprints import fingerprint
from fs_jax._utils.keys import IMPLEMENTATION
from fs_jax._utils.validation import check_number
from fs_jax.attacks.chain import Log, run_chain
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.config import TrainConfig, from_dict, to_dict
from fs_jax.data import DATASETS, Dataset
from fs_jax.data.types import check_split
from fs_jax.models import as_logits_fn
from fs_jax.training.checkpoint import Checkpoints, check_same_config
from fs_jax.training.configured import (
    create_state,
    learning_rate_schedule,
    make_method,
    make_model,
    most_devices,
    pmap_train_steps,
    train_step,
)
from fs_jax.training.methods import METHODS
from fs_jax.training.parallel import replicate, share, unreplicate
from fs_jax.training.state import TrainState

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"


class Run(NamedTuple):
    """The result of `train`."""

    state: TrainState
    """The final state, unreplicated, on the host."""
    finished: bool
    """Whether all epochs are done. If not, the same call resumes training."""
    stopped: bool
    """Whether a signal or the time limit requested a stop. (Both this and `finished` can be True.)"""
    variables: dict[str, Any]
    """The variables to evaluate: the network's, or their moving average if the configuration has a `weight_average`."""


def train(
    config: TrainConfig,
    dataset: Dataset,
    workdir: str | os.PathLike,
    *,
    devices: Sequence[jax.Device] | None = None,
    max_minutes: float | None = None,
    checkpoint_minutes: float = 5.0,
    steps_per_dispatch: int | None = None,
    monitor_images: int = 512,
    on_epoch: Callable[[int, dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> Run:
    """Train a configured network, or resume its training.

    If training is stopped (SIGTERM, SIGINT, `max_minutes`) or killed, the same call resumes it. The final weights are
    those of an uninterrupted run, because batches, crops and noise depend only on the seed, the epoch and the step.

    You can resume with a different number of devices. The weights then agree to rounding, as sums are taken in another
    order. With `transport.scope="device"` or without `sync_batch_norm` the number of devices is part of the method, and
    a different number raises an error.

    The folder `workdir` contains

    - `config.json`: the configuration;
    - `metrics.jsonl` and `tensorboard/`: one row per dispatch, and one per epoch with the monitored accuracies;
    - `checkpoints/`: the latest checkpoints;
    - `best/`: the checkpoint with the highest monitored accuracy under PGD-10 (for standard training, the highest clean
      accuracy).

    Accuracies are monitored on held-out images (`config.holdout`) or, without them, on training images. Test images are
    never used.

    Args:
      config: Configuration. `dataset`, `train_size`, `data` and `parts` are overwritten with those of the data set and
        devices.
      dataset: The data set, on the host: from `fs_jax.data.load`, or made by hand.
      workdir: A new folder, or the folder of the run to resume.
      devices: Devices to use; by default the largest number of local devices that divides the batch evenly.
      max_minutes: Stop cleanly after this many minutes, counted from the call.
      checkpoint_minutes: Minutes between checkpoints. Checkpoints are also saved after each epoch and on a stop.
      steps_per_dispatch: Training steps per dispatch, which run on the devices without the host. By default as many as
        take ten seconds, at most 25. A stop waits for the current dispatch.
      monitor_images: Largest number of monitored images; 0 for no monitoring.
      on_epoch: Called as `on_epoch(epochs_done, variables)` before the first epoch and after each epoch. `variables`
        are those to evaluate, on the host. It is called before the epoch's state is saved in `checkpoints/`, so after a
        kill it may be called again for the same epoch.
      progress: Show a progress bar.

    Returns:
      A `Run`: the final state, whether training is finished, and the variables to evaluate.

    Raises:
      ValueError: if the workdir contains other files or a run with another configuration, if the training images or
        labels are invalid, or if the batch size does not fit the devices or the data.
      BlockingIOError: if another process is training in the workdir.
      FloatingPointError: if the loss is not finite. The last good checkpoint is kept.
      PermissionError, NotADirectoryError: if the workdir is not writable.

    Example:
      >>> import tempfile
      >>> from fs_jax import data
      >>> from fs_jax.config import AttackConfig, ModelConfig, TrainConfig
      >>> config = TrainConfig(
      ...     dataset="digits", model=ModelConfig(10, 1), method="standard", batch_size=256, epochs=1, decay_epochs=())
      >>> run = train(config, data.load("digits"), tempfile.mkdtemp(), monitor_images=0, progress=False)
      >>> int(run.state.step), run.finished
      (5, True)
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"jax.process_count(): expected 1; got {jax.process_count()}. Training supports a single host."
        )
    check_number("max_minutes", 0 if max_minutes is None else max_minutes, at_least=0)
    check_number("checkpoint_minutes", checkpoint_minutes, at_least=0)
    if steps_per_dispatch is not None:
        check_number("steps_per_dispatch", steps_per_dispatch, at_least=1, integer=True)
    check_number("monitor_images", monitor_images, at_least=0, integer=True)
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    config, chosen = _fit_to_data(config, dataset), devices is not None
    devices = _usable(config, devices)
    for note in _notes(config, len(devices), chosen=chosen):
        warnings.warn(note, stacklevel=2)
    config = dataclasses.replace(config, parts=len(devices) if _splits(config) else 1)
    _try(config, dataset)
    steps = pmap_train_steps(config, dataset.info, devices)
    key = jax.random.key(config.seed, impl=IMPLEMENTATION)
    init_rng, order_rng, steps_rng = jax.random.split(key, 3)
    learning_rate, method = learning_rate_schedule(config), make_method(config)

    workdir = open_workdir(workdir, config)
    with Checkpoints(workdir, config) as checkpoints, _stop_signals() as stop:
        state = checkpoints.restore_latest()
        state = create_state(config, init_rng, dataset.info) if state is None else state
        step = int(state.step)
        if progress and step:
            print(f"Resuming from step {step} of {config.total_steps}.", file=sys.stderr)
        trained, monitored = _split(config, monitor_images)
        images, labels = share((dataset.train_images[trained], dataset.train_labels[trained].astype(np.int32)), devices)
        state, ordered, stopping = replicate(state, devices), None, False
        monitor, pace = (dataset.train_images[monitored], dataset.train_labels[monitored]), _Pace(steps_per_dispatch)
        if on_epoch is not None and step == 0:
            on_epoch(0, unreplicate(state).evaluated(method))
        with _Log(workdir, step) as log, _progress_bar(config, step, progress) as bar, _explain_non_finite(checkpoints):
            saver = _Saver(config, checkpoints, log, monitor)
            while step < config.total_steps and not stopping:
                epoch, first = divmod(step, config.steps_per_epoch)
                if epoch != ordered:
                    order, ordered = share(_epoch_order(order_rng, epoch, len(labels)), devices), epoch
                count = min(pace.steps, config.steps_per_epoch - first)

                began = time.monotonic()
                state, sums = steps(state, images, labels, order, steps_rng, jnp.int32(first), jnp.int32(count))
                metrics = _means(unreplicate(sums), step, count)
                seconds = time.monotonic() - began
                pace.record(count, seconds)
                rates = {
                    "learning_rate": float(learning_rate(step)),
                    "images_per_second": count * config.batch_size / seconds,
                }
                step += count
                log.write(step, {"epoch": step / config.steps_per_epoch, **metrics, **rates})
                bar.update(count)
                bar.set_postfix(epoch=step // config.steps_per_epoch, loss=f"{metrics['loss']:.3f}")

                stopping = bool(stop) or time.monotonic() >= deadline
                ends_epoch = step % config.steps_per_epoch == 0
                if ends_epoch:
                    saver.monitor(unreplicate(state))
                    if on_epoch is not None:
                        on_epoch(epoch + 1, unreplicate(state).evaluated(method))
                # The best checkpoint is already saved. After a kill in between, the last steps are repeated.
                if ends_epoch or stopping or saver.seconds() >= 60 * checkpoint_minutes:
                    saver.save(unreplicate(state))
        state = unreplicate(state)
        return Run(state, step >= config.total_steps, stopping, state.evaluated(method))


def open_workdir(workdir: str | os.PathLike, config: TrainConfig) -> pathlib.Path:
    """Create the folder of a run and write its configuration, or check that an existing folder has this configuration.

    Raises:
      ValueError: if the folder contains files but no run, has a run with another configuration, or is not local.
      PermissionError, NotADirectoryError, FileExistsError: if the folder cannot be created or is not writable.
    """
    workdir = local_path("workdir", workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"workdir: expected a folder that can be created; got {workdir}: {error.strerror}.") from None
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir: expected a writable folder; got {workdir}. Choose another.")
    if (workdir / CONFIG_FILE).exists():
        check_same_config(config, read_config(workdir), str(workdir / CONFIG_FILE))
    elif found := sorted(path.name for path in workdir.iterdir()):
        raise ValueError(
            f"workdir: expected a new folder or the folder of a run; got {workdir}, which contains "
            f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''} but no {CONFIG_FILE}. Choose another folder; "
            "nothing was changed."
        )
    else:
        write_text(workdir / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")
    return workdir


def read_config(workdir: str | os.PathLike) -> TrainConfig:
    """Read the configuration of the run in `workdir`.

    Raises:
      FileNotFoundError: if `workdir` is not the folder of a run.
      ValueError: if its configuration is not readable.
    """
    path = local_path("workdir", workdir) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"workdir: expected the folder of a run, with {CONFIG_FILE}; got {workdir}. Train with "
            "fs_jax.training.train or, in a clone, python -m experiments.train PRESET --workdir DIR"
        )
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"workdir: expected the folder of a run; got an invalid configuration in {path}: {error} Choose another."
        ) from None


def _fit_to_data(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The configuration with the fields that the data set determines."""
    info = dataset.info
    check_split(info, dataset.train_images, dataset.train_labels, "dataset: train")
    config = dataclasses.replace(
        config, dataset=info.name, train_size=len(dataset.train_labels), data=training_fingerprint(dataset)
    )
    check_number("holdout", config.holdout, at_least=0, at_most=config.train_size - 1, integer=True)
    if config.steps_per_epoch < 1:
        raise ValueError(
            f"batch_size: expected at most {config.train_size - config.holdout}, the number of training images; "
            f"got {config.batch_size}."
        )
    return config


def training_fingerprint(dataset: Dataset) -> str:
    """A fingerprint of everything in a data set that training depends on.

    These are the training images and labels, and the augmentation and the number of classes. The latter are constants
    of the code for a data set of `fs_jax.data.DATASETS`, and then not part of the fingerprint.
    """
    info = dataset.info
    registered = info.name in DATASETS and info == DATASETS[info.name].info
    augmentation = [] if registered else [info.flip, info.crop_padding, info.num_classes]
    return fingerprint([dataset.train_images, dataset.train_labels.astype(np.int32), *augmentation])


def _usable(config: TrainConfig, devices: Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The given devices or, by default, the largest number of local ones that divides the batch evenly."""
    if devices:
        return tuple(devices)
    local = jax.local_devices()
    return tuple(local[: most_devices(config, local)])


def _splits(config: TrainConfig) -> bool:
    """Whether each device has a transport problem or BatchNorm statistics of its own."""
    own_transport = config.transport.scope == "device" and "scope" in METHODS[config.method].settings
    return own_transport or not config.sync_batch_norm


def _notes(config: TrainConfig, devices: int, *, chosen: bool) -> list[str]:
    """Warnings: decays after the end, devices that change the method, or devices that are not used by default."""
    notes, per_device = [], config.batch_size // devices
    if late := [epoch for epoch in config.decay_epochs if epoch >= config.epochs]:
        notes.append(
            f"decay_epochs: expected epochs before the end of training, after {config.epochs} epochs; got "
            f"{', '.join(map(str, late))}, where the learning rate does not decay. Set earlier ones, or none."
        )
    if not chosen and devices < jax.local_device_count():
        notes.append(
            f"Only {devices} of {jax.local_device_count()} devices are used, as more cannot share the batch_size of "
            f"{config.batch_size} images evenly. To use all, set batch_size to a multiple of "
            f"{jax.local_device_count()}."
        )
    if devices > 1 and config.transport.scope == "device" and "scope" in METHODS[config.method].settings:
        notes.append(
            f"transport.scope='device': each of {devices} devices solves a transport problem of its {per_device} "
            f"images. This is a different method from one problem of all {config.batch_size} images; for that, set "
            "transport.scope='global'."
        )
    if devices > 1 and not config.sync_batch_norm:
        notes.append(
            f"sync_batch_norm=False: BatchNorm normalises over the {per_device} images of each device. This is a "
            f"different method from normalising over all {config.batch_size} images; for that, set "
            "sync_batch_norm=True."
        )
    return notes


def _try(config: TrainConfig, dataset: Dataset) -> None:
    """Trace a training step with one image, so that errors are raised before anything is written."""
    batch = {"images": jnp.zeros((1, *dataset.info.image_shape)), "labels": jnp.zeros(1, jnp.int32)}
    rng = jax.random.key(config.seed, impl=IMPLEMENTATION)
    jax.eval_shape(lambda: train_step(create_state(config, rng, dataset.info), batch, rng, config=config))


class _Pace:
    """The number of steps per dispatch: the requested one, or as many as take about ten seconds."""

    def __init__(self, steps: int | None):
        self.steps = steps or 1
        self._fixed, self._compiled = steps is not None, False

    def record(self, count: int, seconds: float) -> None:
        if self._compiled and not self._fixed:  # the first dispatch includes compilation
            self.steps = min(25, max(1, int(10 * count / max(seconds, 1e-3))))
        self._compiled = True


def _means(sums: dict[str, Any], step: int, count: int) -> dict[str, float]:
    """Mean metrics of a dispatch, from their sums over its steps. Raises a FloatingPointError if one is not finite."""
    metrics = {name: float(total) / count for name, total in sums.items()}
    if wrong := [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"Not finite between steps {step} and {step + count}: {', '.join(wrong)}.")
    return metrics


class _Saver:
    """Monitors accuracies after each epoch, and saves the latest and the best checkpoints."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints, log: "_Log", monitor: tuple):
        self._config, self._checkpoints, self._log, self._monitor = config, checkpoints, log, monitor
        self._best, self._saved_at = checkpoints.best_scores(), time.monotonic()
        self._decisive = f"monitor_{METHODS[config.method].chosen_by}"

    def monitor(self, state: TrainState) -> None:
        """Log the accuracies on the monitored images, and save the state if it is the best so far."""
        if not len(self._monitor[1]):
            return
        step = int(state.step)
        with _not_finite_at(step):
            scores = _monitor(self._config, state, self._monitor)
            self._log.write(step, {"epoch": step / self._config.steps_per_epoch, **scores})
            if scores[self._decisive] > self._best.get(self._decisive, -1):
                self._best = scores
                self._checkpoints.save_best(state, scores)

    def save(self, state: TrainState) -> None:
        with _not_finite_at(int(state.step)):
            self._checkpoints.save(state)
        self._saved_at = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self._saved_at


@contextlib.contextmanager
def _not_finite_at(step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:  # the loss was finite, but the weights after the step are not
        raise FloatingPointError(f"Not finite at step {step}: {error}") from None


@contextlib.contextmanager
def _explain_non_finite(checkpoints: Checkpoints) -> Iterator[None]:
    """Add the last good checkpoint and advice to a FloatingPointError."""
    try:
        yield
    except FloatingPointError as error:
        steps = checkpoints.steps()
        last = f"The last good checkpoint is at step {steps[-1]}." if steps else "No checkpoint was saved yet."
        raise FloatingPointError(
            f"{error} Training stopped. {last} Try a lower learning rate, a larger transport.reg, or float32, in a new "
            "workdir."
        ) from None


def _split(config: TrainConfig, monitor_images: int) -> tuple[np.ndarray | slice, np.ndarray]:
    """Indices of the training images and of the monitored images."""
    shuffled = np.random.default_rng(config.seed).permutation(config.train_size)  # an .npz may be sorted by class
    if not config.holdout:
        return slice(None), shuffled[:monitor_images]
    return np.sort(shuffled[config.holdout :]), shuffled[: config.holdout][:monitor_images]


@jax.jit
def _permutation(rng: Key[Array, ""], count: Int[Array, "k"]) -> Int[Array, "k"]:
    return jax.random.permutation(rng, count)


def _epoch_order(rng: Key[Array, ""], epoch: int, count: int) -> Int[Array, "k"]:
    return _permutation(jax.random.fold_in(rng, epoch), jnp.arange(count, dtype=jnp.int32))


def _monitor(config: TrainConfig, state: TrainState, monitor: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Clean accuracy, and accuracy under PGD-10 at the training radius, on the monitored images."""
    images, labels = monitor
    model = make_model(config, state.params["fc"]["bias"].shape[0])
    logits_fn = as_logits_fn(model, state.evaluated(make_method(config)))
    attacks = [Attack("clean"), parse_attack("pgd-10", config.attack.epsilon)]
    stages = run_chain(logits_fn, jax.random.key(config.seed), images, labels, attacks, log=Log())
    clean, robust = (float(stage.robust.mean()) for stage in stages)
    return {"monitor_clean": clean, "monitor_robust": robust}


class _Log:
    """Writes `metrics.jsonl` and TensorBoard. On resuming, rows after the resumed step are removed."""

    def __init__(self, workdir: pathlib.Path, step: int):
        from tensorboardX import SummaryWriter

        path = workdir / METRICS_FILE
        if path.exists():
            rows = read_jsonl(path)  # without an incomplete last line, which a kill can leave
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()
        self._writer.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _progress_bar(config: TrainConfig, step: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=config.total_steps,
        initial=step,
        unit="step",
        desc=f"{config.dataset} {config.method}",
        disable=not show,
        mininterval=1.0,
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT append, so that the loop stops after the current dispatch."""
    received: list[int] = []
    handled = (signal.SIGTERM, signal.SIGINT)
    try:
        previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in handled}
    except ValueError:  # not in the main thread, where signals cannot be handled
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
