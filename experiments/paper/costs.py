"""How long networks take, before they are run: a few steps of each kind of training are timed, and an attack."""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from experiments.paper.jobs import Job, evaluation_file, sweep
from experiments.paper.scales import SCALES
from fs_jax.config import TrainConfig, to_dict

TIMED_MINUTES = 0.25  # of training, with compilation
PROCESS_SECONDS = 8  # to start a process, load data, and load programs that are compiled already
ATTACK_SECONDS = 1.5  # to start an attack, of that
STANDING = 0.6  # of the images, under attacks that drop those that are misclassified


def kind(config: TrainConfig) -> str:
    """What the time of a step depends on: networks of one kind take the same time."""
    plain = dataclasses.replace(config, seed=0, dataset="", epochs=1, decay_epochs=(), learning_rate=0.1, smoothing=0.5)
    plain = dataclasses.replace(plain, transport=dataclasses.replace(plain.transport, reg=0.01, beta=1.0))
    return json.dumps(to_dict(plain), sort_keys=True)


def measure(config: TrainConfig, data_dir: str | None) -> dict[str, float]:
    """Seconds of a training step, and of a forward and backward pass of one image under attack; and the test images."""
    import jax

    from fs_jax import data, training
    from fs_jax._utils.files import read_jsonl
    from fs_jax.evaluation import evaluate
    from fs_jax.models import as_logits_fn

    dataset = data.load(config.dataset, data_dir=data_dir)
    with tempfile.TemporaryDirectory() as folder:
        run = training.train(
            config, dataset, folder, devices=jax.local_devices()[:1], monitor_images=0, progress=False,
            max_minutes=TIMED_MINUTES, steps_per_dispatch=5,
        )  # fmt: skip
        rows = [row for row in read_jsonl(pathlib.Path(folder) / "metrics.jsonl") if "images_per_second" in row]
    logits_fn = as_logits_fn(training.make_model(config, dataset.info.num_classes), run.variables)
    images, labels = dataset.test_images[:32], dataset.test_labels[:32]
    for _ in range(2):  # the first time is the compiler's
        began = time.perf_counter()
        evaluate(logits_fn, images, labels, ["pgd-20"], epsilon=config.attack.epsilon, progress=False)
        seconds = time.perf_counter() - began
    return {
        "step": config.batch_size / rows[-1]["images_per_second"],
        "pass": seconds / (20 * len(labels)),
        "test_images": len(dataset.test_labels),
    }


def seconds_of(job: Job, cost: dict[str, float]) -> float:
    """What is left to do of this network takes about so long."""
    scale = SCALES[job.scale]
    trained = (job.folder / "run" / "checkpoints").exists()
    total = PROCESS_SECONDS + (0 if trained else job.config.total_steps * cost["step"])
    images = int(min(cost["test_images"], scale.test_images or cost["test_images"]))
    attacks: dict[pathlib.Path, Sequence[Any]] = {
        evaluation_file(job.folder, scale, name): sweep(name).attacks(scale) for name in job.sweeps
    }
    for path, chosen in attacks.items():
        if not path.exists():
            total += sum(ATTACK_SECONDS + passes(attack, images) * cost["pass"] for attack in chosen)
    return total


def passes(attack, images: int) -> float:
    """Passes forward and backward that an attack makes, of one image each; a pass forward alone counts 0.4."""
    images = min(images, attack.num_images or images)
    steps, settings = attack.settings.get("num_steps", 1), attack.settings
    runs = settings.get("restarts", 1) * settings.get("targets", 1)
    standing = 1.0 if not attack.any_iterate else STANDING
    if attack.specification.name == "clean":
        return 0.4 * images
    if attack.specification.name == "spsa":
        return 0.4 * images * standing * steps * 2 * settings["num_directions"]
    if attack.specification.name == "square" or attack.specification.name.startswith("local-search"):
        return 0.4 * images * standing * steps * runs
    return images * standing * steps * runs
