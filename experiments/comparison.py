"""Train several networks on one data set, evaluate them under the same attacks, and write tables and figures."""

import math
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.output import made_on, write_files
from fs_jax import report, training
from fs_jax._utils import backend
from fs_jax._utils.files import local_path, read_jsonl
from fs_jax.config import TrainConfig, to_dict
from fs_jax.data import Dataset
from fs_jax.evaluation import Attack, as_float, evaluate
from fs_jax.models import as_logits_fn


def compare(
    runs: Mapping[str, tuple[str, TrainConfig]],
    dataset: Dataset,
    attacks: Sequence[Attack],
    workdir: pathlib.Path,
    results: pathlib.Path,
    *,
    title: str,
    attacked_images: int | None = None,
    max_minutes: float | None = None,
    progress: bool = True,
) -> str | None:
    """Train and evaluate; write `table.md`, `NAME.json`, `training.png`, `accuracy.png` and `attacks.png`.

    Args:
      runs: The networks: folder in `workdir` -> (name in the table, configuration).
      dataset: The data set of all networks.
      attacks: The first must be clean; it is run on all test images. The examples show the last attack but one.
      workdir: Folder of the training runs. Existing runs are resumed.
      results: Folder for the table and the figures.
      title: Title of the figure of accuracies.
      attacked_images: Number of test images for the attacks; by default all.
      max_minutes: Stop training cleanly after this many minutes in total.
      progress: Show progress bars.

    Returns:
      The table and its caption; None if training was stopped. The same call resumes it.
    """
    workdir, results = local_path("workdir", workdir), local_path("results", results)
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    evaluations, metrics = {}, {}
    for folder, (name, config) in runs.items():
        remaining = None if max_minutes is None else max(0.0, (deadline - time.monotonic()) / 60)
        # One device: with several, the transport and BatchNorm of each would use a smaller batch than the paper's.
        device = jax.local_devices()[:1]
        run = training.train(
            config, dataset, workdir / folder, devices=device, max_minutes=remaining, progress=progress
        )
        if run.stopped or not run.finished:
            return None
        logits_fn = as_logits_fn(training.make_model(config, dataset.info.num_classes), run.variables)
        few = slice(0, attacked_images)
        clean = evaluate(logits_fn, dataset.test_images, dataset.test_labels, attacks[:1], progress=progress)
        attacked = evaluate(logits_fn, dataset.test_images[few], dataset.test_labels[few], attacks, progress=progress)
        summary = dict(attacked.summary)
        summary["attacks"] = [*clean.summary["attacks"], *attacked.summary["attacks"][1:]]
        rows = read_jsonl(workdir / folder / "metrics.jsonl")
        evaluations[name] = {
            **summary, "config": to_dict(config), "environment": backend.describe(),
            "training_seconds": sum(
                config.batch_size * (row["step"] - before["step"]) / row["images_per_second"]
                for before, row in zip([{"step": 0}, *rows], rows, strict=False) if "images_per_second" in row
            ),
        }  # fmt: skip
        metrics[name] = rows
        records = [{**record, "network": name} for record in attacked.records]
        write_files(results, {f"{folder}.json": {**evaluations[name], "records": records}})

    caption = f"{report.caption(evaluations)}. On {made_on(attacked.summary['environments'][-1])}."
    table = f"{report.accuracy_table(evaluations)}\n\n{caption}\n"
    write_files(results, {"table.md": table})
    report.training_curves(metrics, results / "training.png")
    report.accuracy_bars(evaluations, results / "accuracy.png", title=title)
    # A batch of the same size as above, so that nothing is compiled again; the first 8 images are shown.
    whole, first, shown = (
        slice(0, min(backend.batch_size(backend.platform_of([])), len(records))),
        slice(0, 8),
        attacks[-2],
    )
    images, labels = dataset.test_images[whole], dataset.test_labels[whole]
    adversaries = np.empty(images[first].shape, np.float32)
    evaluate(logits_fn, images, labels, [shown], worst_images=adversaries, progress=False)
    draw_examples(
        logits_fn, images[first], adversaries, labels[first], dataset.info.class_names, results / "attacks.png",
        epsilon=shown.epsilon, title=shown.name,
    )  # fmt: skip
    return table


def draw_examples(logits_fn, images, adversaries, labels, class_names, path, *, epsilon, title) -> None:
    """Draw images, the perturbations of an attack, and the network's predictions before and after."""
    images, predict = as_float(images), jax.jit(logits_fn)
    before, after = (np.asarray(predict(jnp.asarray(shown))) for shown in (images, adversaries))
    report.attack_examples(
        images, adversaries, labels, before, after, path,
        class_names=class_names, epsilon=epsilon, title=f"{title}, radius {report.radius(epsilon)}",
    )  # fmt: skip
