"""The record of each image: the step of each attack that misclassified it, for all networks of a table.

A table has its records beside it, in a compressed JSON file, so that every number of the table can be checked, and rows
can be added without measuring the others again. To read it: `json.load(lzma.open(path))`.
"""

import json
import lzma
import pathlib
from collections.abc import Sequence

from experiments.output import write_files
from experiments.paper.experiment import Experiment, Finished
from experiments.paper.jobs import Job, result_file, training_file
from experiments.paper.scales import Scale
from fs_jax._utils.files import replacing

ENDING = ".records.json.xz"


def save(path: pathlib.Path, of: Experiment, scale: Scale, finished: Sequence[Finished]) -> None:
    """Save the records of these rows, without margins and distances, which no table needs."""
    networks = []
    for row, results, folders in finished:
        for result, folder in zip(results, folders, strict=True):
            training = training_file(folder)
            networks.append({
                "row": row.label, "network": folder.name, "file": result_file(folder, scale, of.name).name,
                "training": json.loads(training.read_text(encoding="utf-8")) if training.exists() else None,
                "result": {
                    **result, "records": [{"misclassified_at": each["misclassified_at"]} for each in result["records"]],
                },
            })  # fmt: skip
    with replacing(path) as file:
        file.write(lzma.compress(json.dumps(networks).encode(), preset=9))


def unpack(results: pathlib.Path, needed: Sequence[Job]) -> int:
    """Write the records of these networks to the workdir, unless it has their results. Returns the number of results.

    Records of networks with another configuration, version, or attacks are not used: their names differ.
    """
    wanted = {
        (job.folder.name, path.name): job.folder
        for job in needed
        for path in (result_file(job.folder, job.scale, name) for name in job.experiments)
        if not path.exists()
    }
    count = 0
    for path in sorted(results.glob(f"*{ENDING}")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            networks = json.load(file)
        for of in networks:
            folder = wanted.pop((of["network"], of["file"]), None)
            if folder is None:
                continue
            if of["training"] is not None and not training_file(folder).exists():
                write_files(folder, {training_file(folder).name: of["training"]})
            write_files(folder, {of["file"]: of["result"]})
            count += 1
    return count
