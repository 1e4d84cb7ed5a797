"""Train and measure one network: `python -m experiments.paper.worker FOLDER [FILE]`. The runner starts it.

The folder contains the runner's `job.json`. After an interruption, the same command resumes. With FILE, it only times a
training step and a pass of the network, and writes the times to FILE.
"""

import json
import os
import pathlib
import signal
import threading
import time

from experiments import command_line
from experiments.output import write_files
from experiments.paper.costs import measure
from experiments.paper.experiment import Network
from experiments.paper.jobs import experiment, result_file, weights_file
from experiments.paper.scales import scale_of
from fs_jax._utils.files import locked, read_jsonl
from fs_jax.config import from_dict


def main(argv: list[str]) -> int:
    threading.Thread(target=end_with_parent, daemon=True).start()
    folder, *cost = map(pathlib.Path, argv)
    lock = locked(folder / "worker", wait=True)  # while the worker of a killed runner has not noticed that yet
    try:
        return work(folder, *cost)
    finally:
        lock.release()


def work(folder: pathlib.Path, cost: pathlib.Path | None = None) -> int:
    """Train and measure the network of a folder, or only write its times to a file."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))

    import jax

    from fs_jax import data, training
    from fs_jax._utils import backend
    from fs_jax.models import convert

    backend.enable_compilation_cache()
    scale, config = scale_of(job["scale"], job["dataset"]), from_dict(job["config"])
    dataset = data.load(config.dataset, data_dir=job["data_dir"])
    if cost is not None:
        write_files(cost.parent, {cost.name: measure(config, dataset)})
        return 0
    if weights_file(folder).exists():
        _, variables = convert.load_weights(weights_file(folder))
    else:
        run = training.train(
            config, dataset, folder / "run", devices=jax.local_devices()[:1], monitor_images=0, progress=False
        )
        if not run.finished:
            return command_line.STOPPED
        variables = run.variables
    few = slice(0, scale.test_images)
    model = training.make_model(config, dataset.info.num_classes)
    network = Network(config, dataset, model, variables, dataset.test_images[few], dataset.test_labels[few])
    for name in job["experiments"]:
        path = result_file(folder, scale, name)
        if not path.exists():
            measurement, began = experiment(name).measurement, time.monotonic()
            result = measurement.run(network, scale, path)
            if result is None:
                return command_line.STOPPED
            restored = weights_file(folder).exists()
            about = {
                "environment": backend.describe(), "seconds": round(time.monotonic() - began, 1),
                "restored": restored and not measurement.trains,
                "training_hours": 0.0 if restored else hours_of_training(folder / "run"),
            }  # fmt: skip
            write_files(folder, {path.name: {**about, **result}})
    return 0


def hours_of_training(run: pathlib.Path) -> float:
    """Hours of all training steps, from the log of a run."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "images_per_second" in row]
    batch = json.loads((run / "config.json").read_text(encoding="utf-8"))["batch_size"]
    steps = zip([{"step": 0}, *rows], rows, strict=False)
    return sum(batch * (row["step"] - before["step"]) / row["images_per_second"] for before, row in steps) / 3600


def end_with_parent() -> None:
    """Stop if the runner is killed, as the next runner starts its own workers in the same folders."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(command_line.STOPPED)  # during a measurement, which resumes from its journal


if __name__ == "__main__":
    command_line.run(main)
