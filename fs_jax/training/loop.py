"""The training run: wiring of data, step, checkpoints, logs and monitoring. Stops cleanly, resumes by itself."""

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

from fs_jax._utils.files import local_path, locked, read_jsonl, write_text
from fs_jax._utils.fingerprints import fingerprint
from fs_jax._utils.validation import check_number
from fs_jax.attacks.chain import Log, run_chain
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.config import TrainConfig, from_dict, to_dict
from fs_jax.data import Dataset
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
    """What `train` gives back."""

    state: TrainState
    """The state on the host, unreplicated."""
    finished: bool
    """Whether the last epoch is done; otherwise the same call goes on."""
    stopped: bool
    """Whether a signal or the time limit asked for a stop, be it with the last step."""
    variables: dict[str, Any]
    """What to evaluate: the network's variables, or their average where the configuration averages them."""


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
    """Train, or resume training, until the configuration's last epoch.

    A run that is stopped (SIGTERM, SIGINT, `max_minutes`) or killed, and called again, ends in the same weights as one
    left alone: batches, crops and noise are drawn from the seed, the epoch and the step.

    Any number of devices can resume a run; another number gives other sums, so the same weights to rounding only. With
    `transport.scope="device"` or without `sync_batch_norm` it would be another method, and is refused.

    In `workdir`: `config.json`, `metrics.jsonl` and `tensorboard/` (a row per dispatch, and one per epoch with the
    accuracies on the monitored images), `checkpoints/` and `best/`. The monitored images are held-out ones, or
    training images where none are held out, drawn by the seed; never test images. Best is the highest accuracy under
    PGD-10 (for standard training, the highest clean accuracy).

    Args:
      config: Configuration. Its `train_size` and `data` are set to the data set's, its `parts` to what devices do.
      dataset: The data set, on the host.
      workdir: A new folder, or the one of this run.
      devices: Devices to use; by default as many local ones as share the batch evenly.
      max_minutes: Stop cleanly after so many minutes, counted from the call.
      checkpoint_minutes: Minutes between checkpoints; there is one at the end of each epoch and of the run as well.
      steps_per_dispatch: Steps that run on the devices without the host, and make one row of the log. By default as
        many as take ten seconds, by measurement, and 25 at most: a stop waits for them.
      monitor_images: How many images are monitored, at most; 0 for none.
      on_epoch: Is called before the first epoch and after each, before its checkpoint, with the number of epochs done
        and the variables to evaluate, on the host. A run that is killed calls it again for the epoch that it repeats.
      progress: Show a progress bar.

    Returns:
      The last state, and whether the run is finished.

    Raises:
      ValueError: if the workdir holds something else or a run of another configuration, or the batch doesn't fit the
        devices or the data.
      BlockingIOError: if another process is training in the workdir.
      FloatingPointError: if the loss isn't finite; the last good checkpoint is kept.
      PermissionError, NotADirectoryError: if the workdir can't be written to.

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
        raise ValueError(f"jax.process_count(): expected 1; got {jax.process_count()}. Train on one host.")
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
    init_rng, order_rng, steps_rng = jax.random.split(jax.random.key(config.seed), 3)
    learning_rate, method = learning_rate_schedule(config), make_method(config)

    workdir = open_workdir(workdir, config)
    with _lock(workdir), Checkpoints(workdir, config) as checkpoints, _stop_signals() as stop:
        state = checkpoints.restore_latest()
        state = create_state(config, init_rng, dataset.info) if state is None else state
        step = int(state.step)
        if progress and step:
            print(f"Going on from step {step} of {config.total_steps}.", file=sys.stderr)
        kept, monitored = _split(config, monitor_images)
        images, labels = share((dataset.train_images[kept], dataset.train_labels[kept]), devices)
        state, ordered, stopping = replicate(state, devices), None, False
        monitor, pace = (dataset.train_images[monitored], dataset.train_labels[monitored]), _Pace(steps_per_dispatch)
        if on_epoch is not None and step == 0:
            on_epoch(0, unreplicate(state).evaluated(method))
        with _Log(workdir, step) as log, _progress_bar(config, step, progress) as bar, _say_what_is_kept(checkpoints):
            keeper = _Keeper(config, checkpoints, log, monitor)
            while step < config.total_steps and not stopping:
                epoch, first = divmod(step, config.steps_per_epoch)
                if epoch != ordered:
                    order, ordered = share(_epoch_order(order_rng, epoch, len(labels)), devices), epoch
                count = min(pace.steps, config.steps_per_epoch - first)

                began = time.monotonic()
                state, sums = steps(state, images, labels, order, steps_rng, jnp.int32(first), jnp.int32(count))
                metrics = _means(unreplicate(sums), step, count)
                seconds = time.monotonic() - began
                pace.took(count, seconds)
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
                    keeper.monitor(unreplicate(state))
                    if on_epoch is not None:
                        on_epoch(epoch + 1, unreplicate(state).evaluated(method))
                # After the best one: a run that is killed in between comes back to before both.
                if ends_epoch or stopping or keeper.seconds() >= 60 * checkpoint_minutes:
                    keeper.save(unreplicate(state))
        state = unreplicate(state)
        return Run(state, step >= config.total_steps, stopping, state.evaluated(method))


def open_workdir(workdir: str | os.PathLike, config: TrainConfig) -> pathlib.Path:
    """The folder of a run: a new one with the configuration in it, or the one that has this configuration.

    Raises:
      ValueError: if the folder holds files but no run, or a run of another configuration, or isn't a local one.
      PermissionError, NotADirectoryError, FileExistsError: if it can't be made or written to.
    """
    workdir = local_path("workdir", workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"workdir: expected a folder that can be made; got {workdir}: {error.strerror}.") from None
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir: expected a folder that can be written to; got {workdir}. Choose another.")
    if (workdir / CONFIG_FILE).exists():
        check_same_config(config, read_config(workdir), str(workdir / CONFIG_FILE))
    elif found := sorted(path.name for path in workdir.iterdir()):
        raise ValueError(
            f"workdir: expected a new folder or the folder of a run; got {workdir}, which holds no {CONFIG_FILE} but "
            f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}. Choose another; nothing was changed."
        )
    else:
        write_text(workdir / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")
    return workdir


def read_config(workdir: str | os.PathLike) -> TrainConfig:
    """The configuration of the run in `workdir`.

    Raises:
      FileNotFoundError: if there is no run in it.
    """
    path = local_path("workdir", workdir) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"workdir: expected the folder of a run, with {CONFIG_FILE}; got {workdir}. "
            "Make one with fs_jax.training.train, or in a clone: python -m experiments.train PRESET --workdir DIR"
        )
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"workdir: expected the folder of a run; {path} is no configuration of one: {error} Choose another."
        ) from None


def _fit_to_data(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    found = fingerprint([dataset.train_images, dataset.train_labels])
    config = dataclasses.replace(config, train_size=len(dataset.train_labels), data=found)
    check_number("holdout", config.holdout, at_least=0, at_most=config.train_size - 1, integer=True)
    if config.steps_per_epoch < 1:
        raise ValueError(
            f"batch_size: expected at most the {config.train_size - config.holdout} training images; "
            f"got {config.batch_size}."
        )
    return config


def _usable(config: TrainConfig, devices: Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The devices that were asked for; else the local ones, but for those that are too many for the batch."""
    if devices:
        return tuple(devices)
    local = jax.local_devices()
    return tuple(local[: most_devices(config, local)])


def _splits(config: TrainConfig) -> bool:
    """Whether devices solve transport problems, or normalise, by themselves."""
    own_transport = config.transport.scope == "device" and "scope" in METHODS[config.method].settings
    return own_transport or not config.sync_batch_norm


def _notes(config: TrainConfig, devices: int, *, chosen: bool) -> list[str]:
    """Where the number of devices changes what is trained, or, if nobody chose it, wastes some."""
    notes, per_device = [], config.batch_size // devices
    if not chosen and devices < jax.local_device_count():
        notes.append(
            f"{devices} of {jax.local_device_count()} devices are used: more can't share the batch_size of "
            f"{config.batch_size} images, over all devices, evenly. Set a multiple of their number to use all."
        )
    if devices > 1 and config.transport.scope == "device" and "scope" in METHODS[config.method].settings:
        notes.append(
            f"transport.scope='device': each of {devices} devices solves a transport problem of its {per_device} "
            f"images. That is another method than one problem of all {config.batch_size}, for which set "
            "transport.scope='global'."
        )
    if devices > 1 and not config.sync_batch_norm:
        notes.append(
            f"sync_batch_norm=False: BatchNorm normalises by each device's {per_device} images. That is another method "
            f"than by all {config.batch_size}, for which set sync_batch_norm=True."
        )
    return notes


def _try(config: TrainConfig, dataset: Dataset) -> None:
    """Trace a step of one image, so that what can't work fails before anything is written."""
    batch = {"images": jnp.zeros((1, *dataset.info.image_shape)), "labels": jnp.zeros(1, jnp.int32)}
    rng = jax.random.key(config.seed)
    jax.eval_shape(lambda: train_step(create_state(config, rng, dataset.info), batch, rng, config=config))


class _Pace:
    """How many steps a dispatch has: as many as were asked for, or as take some ten seconds."""

    def __init__(self, steps: int | None):
        self.steps = steps or 1
        self._fixed, self._compiled = steps is not None, False

    def took(self, count: int, seconds: float) -> None:
        if self._compiled and not self._fixed:  # the first dispatch compiles, which says nothing of the next
            self.steps = min(25, max(1, int(10 * count / max(seconds, 1e-3))))
        self._compiled = True


def _means(sums: dict[str, Any], step: int, count: int) -> dict[str, float]:
    """Of the metrics' sums over the steps of a dispatch."""
    metrics = {name: float(total) / count for name, total in sums.items()}
    if wrong := [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"Not finite between steps {step} and {step + count}: {', '.join(wrong)}.")
    return metrics


class _Keeper:
    """Monitors the network at the end of each epoch, and keeps checkpoints: the latest, and the best."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints, log: "_Log", monitor: tuple):
        self._config, self._checkpoints, self._log, self._monitor = config, checkpoints, log, monitor
        self._best, self._saved_at = checkpoints.best_scores(), time.monotonic()
        self._decisive = f"monitor_{METHODS[config.method].chosen_by}"

    def monitor(self, state: TrainState) -> None:
        """Accuracies on the monitored images; the state is kept if they are the best so far."""
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
        """Since the last checkpoint."""
        return time.monotonic() - self._saved_at


@contextlib.contextmanager
def _not_finite_at(step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:  # the loss was finite, the weights after it aren't
        raise FloatingPointError(f"Not finite at step {step}: {error}") from None


@contextlib.contextmanager
def _say_what_is_kept(checkpoints: Checkpoints) -> Iterator[None]:
    """Where training stops as something isn't finite, say what there is and what to do."""
    try:
        yield
    except FloatingPointError as error:
        steps = checkpoints.steps()
        kept = f"The last good checkpoint is of step {steps[-1]}." if steps else "There is no checkpoint yet."
        raise FloatingPointError(
            f"{error} The run stops. {kept} Try a lower learning rate, a larger transport.reg, or float32, in a new "
            "workdir."
        ) from None


def _split(config: TrainConfig, monitor_images: int) -> tuple[np.ndarray | slice, np.ndarray]:
    """Indices of the images to train on and of the monitored ones."""
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
    """Accuracies on the monitored images: clean, and under PGD-10 of the training radius."""
    images, labels = monitor
    model = make_model(config, state.params["fc"]["bias"].shape[0])
    logits_fn = as_logits_fn(model, state.evaluated(make_method(config)))
    attacks = [Attack("clean"), parse_attack("pgd-10", config.attack.epsilon)]
    stages = run_chain(logits_fn, jax.random.key(config.seed), images, labels, attacks, log=Log())
    clean, robust = (float(stage.robust.mean()) for stage in stages)
    return {"monitor_clean": clean, "monitor_robust": robust}


class _Log:
    """`metrics.jsonl` and TensorBoard; rows after the resumed step, of a run that was killed, are taken back."""

    def __init__(self, workdir: pathlib.Path, step: int):
        from tensorboardX import SummaryWriter

        path = workdir / METRICS_FILE
        if path.exists():
            rows = read_jsonl(path)  # without the line that a kill cut short
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
    """A list that SIGTERM and SIGINT append to, so that the loop ends after the dispatch that is running."""
    received: list[int] = []
    handled = (signal.SIGTERM, signal.SIGINT)
    try:
        previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in handled}
    except ValueError:  # not in the main thread: the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
    """Two runs in one folder would write over each other: the second is refused."""
    try:
        lock = locked(workdir / "run")
    except BlockingIOError:
        raise BlockingIOError(
            f"workdir: expected a folder that no run is using; another process is training in {workdir}. "
            "Wait for it, or choose another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
