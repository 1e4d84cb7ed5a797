"""Trains one network and evaluates it, in a process of its own: `python -m experiments.paper.worker FOLDER`.

The folder has `job.json`, which the runner writes. Interrupted or killed, the same command resumes. With a second word,
a file, it measures what a step and a pass of this network cost, and writes that there.
"""

import json
import pathlib
import sys
import time

from experiments import command_line
from experiments.output import write_files
from experiments.paper.costs import measure
from experiments.paper.jobs import evaluation_file, sweep
from experiments.paper.scales import SCALES
from fs_jax.config import from_dict


def main(argv: list[str]) -> int:
    folder = pathlib.Path(argv[0])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))

    import jax

    from fs_jax import data, training
    from fs_jax._utils import backend
    from fs_jax.evaluation import evaluate
    from fs_jax.models import as_logits_fn

    backend.enable_compilation_cache()
    if argv[1:]:
        write_files(
            pathlib.Path(argv[1]).parent,
            {pathlib.Path(argv[1]).name: measure(from_dict(job["config"]), job["data_dir"])},
        )
        return 0
    scale, config = SCALES[job["scale"]], from_dict(job["config"])
    dataset = data.load(config.dataset, data_dir=job["data_dir"])
    began = time.monotonic()
    run = training.train(
        config, dataset, folder / "run", devices=jax.local_devices()[:1], monitor_images=0, progress=False
    )
    if not run.finished:
        return command_line.STOPPED
    trained = time.monotonic() - began
    logits_fn = as_logits_fn(training.make_model(config, dataset.info.num_classes), run.variables)
    images, labels = (array[: scale.test_images] for array in (dataset.test_images, dataset.test_labels))
    for name in job["sweeps"]:
        path = evaluation_file(folder, scale, name)
        if path.exists():
            continue
        result = evaluate(
            logits_fn, images, labels, sweep(name).attacks(scale), seed=config.seed,
            journal=path.with_suffix(".jsonl"), about={"config": job["config"]}, progress=False,
        )  # fmt: skip
        seconds = {"training_seconds": trained} if trained > 1 else {}  # not where it was there already
        write_files(folder, {path.name: {**result.summary, **seconds, "records": result.records}})
    return 0


if __name__ == "__main__":
    try:
        command_line.run(main)
    except KeyboardInterrupt:
        sys.exit(command_line.STOPPED)
