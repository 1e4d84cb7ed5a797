"""Estimates of the running time: a few training steps and an attack are timed for each kind of network."""

import dataclasses
import json
import pathlib
import tempfile
import time
from typing import TYPE_CHECKING

from experiments.paper.jobs import Job, experiment, file_hash, result_file, weights_file
from fs_jax._utils.files import read_jsonl
from fs_jax.config import TrainConfig, to_dict

if TYPE_CHECKING:
    from fs_jax.data import Dataset

TIMED_MINUTES = 0.25  # of training, including compilation
PROCESS_SECONDS = 8  # to start a process, and load data and compiled programs
PROGRAM_SECONDS = 1.2  # to trace and load a compiled attack


def kind(config: TrainConfig) -> str:
    """Everything that the time of a step depends on. Networks of the same kind take the same time."""
    from fs_jax import data

    info = data.info(config.dataset)
    plain = dataclasses.replace(config, seed=0, dataset="", epochs=1, decay_epochs=(), learning_rate=0.1, smoothing=0.5)
    attack = dataclasses.replace(config.attack, epsilon=0.1, step_size=None)
    plain = dataclasses.replace(
        plain, attack=attack, transport=dataclasses.replace(plain.transport, reg=0.01, beta=1.0)
    )
    data_set = [config.dataset.split("_fold")[0], *file_hash(config.dataset), info.image_shape, info.num_classes]
    return json.dumps([data_set, to_dict(plain)], sort_keys=True)


def measure(config: TrainConfig, dataset: "Dataset") -> dict[str, float]:
    """Seconds of a training step, seconds of a forward and backward pass per image, and the numbers of images."""
    import jax

    from fs_jax import training
    from fs_jax.evaluation import evaluate
    from fs_jax.models import as_logits_fn

    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(rows) < 3:  # the first row includes compilation, which can take longer than TIMED_MINUTES
            run = training.train(
                config, dataset, folder, devices=jax.local_devices()[:1], monitor_images=0, progress=False,
                max_minutes=TIMED_MINUTES, steps_per_dispatch=5,
            )  # fmt: skip
            rows = [row for row in read_jsonl(pathlib.Path(folder) / "metrics.jsonl") if "images_per_second" in row]
            if run.finished:
                break
    logits_fn = as_logits_fn(training.make_model(config, dataset.info.num_classes), run.variables)
    images, labels = dataset.test_images[:64], dataset.test_labels[:64]
    seconds: dict[str, float] = {}
    for word in ("pgd-10", "pgd-60") * 3:  # the first of the three includes compilation
        began = time.perf_counter()
        evaluate(logits_fn, images, labels, [word], epsilon=config.attack.epsilon, progress=False)
        seconds[word] = min(time.perf_counter() - began, seconds.get(word, float("inf")))
    return {
        "step": config.batch_size / max(row["images_per_second"] for row in rows),
        # The difference, as both times include the start-up.
        "pass": max(1e-6, seconds["pgd-60"] - seconds["pgd-10"]) / (50 * len(labels)),
        "train_images": len(dataset.train_labels),
        "test_images": len(dataset.test_labels),
    }


def seconds_of(job: Job, cost: dict[str, float]) -> float:
    """Estimated seconds of the remaining work on a network."""
    scale = job.scale
    config = dataclasses.replace(job.config, train_size=int(cost["train_images"]))
    total = PROCESS_SECONDS + remaining_steps(job.folder, config) * cost["step"]
    images = int(min(cost["test_images"], scale.test_images or cost["test_images"]))
    measurements = {result_file(job.folder, scale, name): experiment(name).measurement for name in job.experiments}
    for path, measurement in measurements.items():
        if not path.exists():
            total += PROGRAM_SECONDS * measurement.programs(scale)
            total += measurement.passes(config, scale, images) * cost["pass"]
    return total


def remaining_steps(folder: pathlib.Path, config: TrainConfig) -> int:
    """Number of training steps that are left."""
    if weights_file(folder).exists():
        return 0
    log = folder / "run" / "metrics.jsonl"
    done = max((row["step"] for row in read_jsonl(log)), default=0) if log.exists() else 0
    return max(0, config.total_steps - done)
