"""Reuse what was computed before, here or on another machine: results of networks, and trained networks.

A table has the record of each image beside it, in a compressed JSON file: for each network, the step of each attack
that misclassified the image. From it, every number of the table can be computed again, and rows can be added without
measuring the others again. To read it: `json.load(lzma.open(path))`.
"""

import dataclasses
import json
import lzma
import pathlib
from collections.abc import Iterable, Sequence

from experiments import weights
from experiments.output import write_files
from experiments.paper.experiment import Data, Experiment, Finished
from experiments.paper.jobs import (
    Job,
    digest,
    experiment,
    networks,
    result_file,
    weights_file,
    without_defaults,
)
from experiments.paper.scales import Scale
from fs_jax._utils.files import replacing
from fs_jax.config import TrainConfig, from_dict, to_dict

SUFFIX = ".records.json.xz"


def save_records(path: pathlib.Path, of: Experiment, scale: Scale, finished: Sequence[Finished]) -> None:
    """Save the results of these rows' networks, without margins and distances, which no table needs."""
    saved: list[Data] = [
        {
            "row": row.label, "network": folder.name, "file": result_file(folder, scale, of.name).name,
            "result": {
                **result, "records": [{"misclassified_at": each["misclassified_at"]} for each in result["records"]],
            },
        }
        for row, results, folders in finished
        for result, folder in zip(results, folders, strict=True)
    ]  # fmt: skip
    with replacing(path) as file:
        file.write(lzma.compress(json.dumps(saved).encode(), preset=9))


def take_results(results: pathlib.Path, first: Iterable[str], needed: Sequence[Job]) -> int:
    """Write results from records to the workdir, unless it has them. Returns their number.

    Results of another configuration, version or attack are not used: the names of their networks and files differ.

    Args:
      results: Folder of the results.
      first: Names of the tables whose own records take precedence over those of other tables.
      needed: The networks.
    """
    wanted = {
        (job.folder.name, path.name): path
        for job in needed
        for path in (result_file(job.folder, job.scale, name) for name in job.experiments)
        if not path.exists()
    }
    own = [results / f"{name}{SUFFIX}" for name in first]
    paths = dict.fromkeys([*(path for path in own if path.exists()), *sorted(results.glob(f"*{SUFFIX}"))])
    taken = 0
    for records in paths:
        try:
            with lzma.open(records, "rt", encoding="utf-8") as file:
                saved = {(of["network"], of["file"]): of["result"] for of in json.load(file)}
            if any(not {"attacks", "records", "environment"} <= result.keys() for result in saved.values()):
                raise KeyError("attacks, records, environment")
        except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"results: expected records of networks in {records}, which cannot be read ({error!r}). Restore or "
                "remove the file."
            ) from None
        for name in wanted.keys() & saved.keys():
            path = wanted.pop(name)
            write_files(path.parent, {path.name: saved[name]})
            taken += 1
    return taken


def restore_networks(
    missing: Sequence[Job], data_dir: pathlib.Path | None, folder: pathlib.Path = weights.FOLDER
) -> list[str]:
    """Restore the stored networks among these, unless their training has begun. Returns a message for each.

    A network is used only if it was trained with the same configuration on the same data.
    """
    from fs_jax import data
    from fs_jax.training.loop import training_fingerprint

    stored = {config_hash(from_dict(of["config"])): (name, of) for name, of in weights.manifest(folder).items()}
    messages = []
    for job in missing:
        path = weights_file(job.folder)
        if config_hash(job.config) not in stored or path.exists():
            continue
        name, of = stored[config_hash(job.config)]
        if (job.folder / "run").exists():
            messages.append(f"{name}: not restored, as its training has begun in {job.folder}.")
        elif of["config"]["data"] != training_fingerprint(data.load(job.config.dataset, data_dir=data_dir)):
            messages.append(f"{name}: not restored, as it was trained on other data.")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            weights.restore(name, path, folder)
            messages.append(f"{name}: restored.")
    return messages


def config_hash(config: TrainConfig) -> str:
    """A hash of a configuration, without what training adds to it: the number of training images and their hash."""
    new = TrainConfig()
    return digest(to_dict(dataclasses.replace(without_defaults(config), train_size=new.train_size, data=new.data)))


def restored_rows(name: str, scale: Scale, seeds: Sequence[int], workdir: pathlib.Path) -> list[str]:
    """The rows of an experiment with results, or results to come, of restored networks."""

    def is_restored(folder: pathlib.Path) -> bool:
        path = result_file(folder, scale, name)
        if not path.exists():
            return weights_file(folder).exists() and not experiment(name).measurement.trains
        result: Data = json.loads(path.read_text(encoding="utf-8"))
        return result["restored"]

    return [
        row.label for row, _configs, folders in networks(name, scale, seeds, workdir) if any(map(is_restored, folders))
    ]
