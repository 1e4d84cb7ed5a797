"""What has to be run for some tables: networks, each trained once whatever tables need it, and their evaluations."""

import dataclasses
import hashlib
import importlib
import inspect
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.paper.scales import SCALES, Scale, changed
from experiments.paper.sweep import Row, Sweep
from fs_jax import __version__
from fs_jax.config import TrainConfig, to_dict
from fs_jax.training.methods import METHODS

SWEEPS = (
    "main_table", "table1_strong_attacks", "gradient_free", "table2_label_smoothing", "table3_sinkhorn_tau",
    "table4_ipot_beta", "matching", "ablation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A network: its configuration, its folder, and the tables that it is evaluated for."""

    scale: str
    config: TrainConfig
    folder: pathlib.Path
    sweeps: tuple[str, ...]


def sweep(name: str) -> Sweep:
    """The declaration of a table."""
    return importlib.import_module(f"experiments.paper.{name}").SWEEP


def configurations(scale: Scale, row: Row, seeds: Sequence[int]) -> list[TrainConfig]:
    """Of a row's networks: one for each of the scale's data sets and each seed."""
    config = without_defaults(changed(scale.config, row.changes))
    return [dataclasses.replace(config, dataset=dataset, seed=seed) for dataset in scale.datasets for seed in seeds]


def without_defaults(config: TrainConfig) -> TrainConfig:
    """The same configuration, in which what the method has by itself is left to it: so rows that agree are one.

    Example:
      >>> without_defaults(TrainConfig(smoothing=0.5)) == TrainConfig()
      True
    """
    own = inspect.signature(METHODS[config.method].build).parameters
    attack = config.attack
    if "num_steps" in own and attack.num_steps == own["num_steps"].default:
        attack = dataclasses.replace(attack, num_steps=None)
    if config.method == "feature_scatter" and attack.step_size == attack.epsilon:
        attack = dataclasses.replace(attack, step_size=None)
    smoothing = None if "smoothing" in own and config.smoothing == own["smoothing"].default else config.smoothing
    return dataclasses.replace(config, attack=attack, smoothing=smoothing)


def folder_of(workdir: pathlib.Path, scale: str, config: TrainConfig) -> pathlib.Path:
    """Where a network is: the same configuration, of whatever table, has one folder; another version another one."""
    return workdir / scale / f"{config.method}-{config.dataset}-{digest([__version__, to_dict(config)])}"


def jobs(scale: str, sweeps: Iterable[str], seeds: Sequence[int], workdir: pathlib.Path) -> list[Job]:
    """All networks of these tables, those of the first table first."""
    found: dict[pathlib.Path, Job] = {}
    for name in sweeps:
        for row in sweep(name).rows:
            for config in configurations(SCALES[scale], row, seeds):
                folder = folder_of(workdir, scale, config)
                before = found[folder].sweeps if folder in found else ()
                found[folder] = Job(scale, config, folder, tuple(dict.fromkeys((*before, name))))
    return list(found.values())


def evaluation_file(folder: pathlib.Path, scale: Scale, name: str) -> pathlib.Path:
    """The result of a table's attacks on a network: tables with the same attacks have one."""
    attacks = [
        [attack.name, attack.epsilon, dict(attack.settings), attack.after, attack.num_images]
        for attack in sweep(name).attacks(scale)
    ]
    return folder / f"evaluation-{digest([scale.test_images, attacks])}.json"


def finished(job: Job) -> bool:
    """Whether all that this network is for has been evaluated."""
    return all(evaluation_file(job.folder, SCALES[job.scale], name).exists() for name in job.sweeps)


def digest(data: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
