"""The networks to train and measure. Each is trained once, for all experiments that need it."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from experiments.paper.experiment import Experiment, Finished, Row
from experiments.paper.scales import Scale, changed
from fs_jax import __version__
from fs_jax.config import TrainConfig, to_dict
from fs_jax.training.methods import METHODS

RESULT_VERSION = 2  # of the files of workers: results and journals of other versions are not read, but measured again


@dataclasses.dataclass(frozen=True)
class Job:
    """A network: its configuration, its folder, and the experiments that measure it."""

    scale: Scale
    config: TrainConfig
    folder: pathlib.Path
    experiments: tuple[str, ...]


def experiment(name: str) -> Experiment:
    """The declaration of a table or figure, by name."""
    return importlib.import_module(f"experiments.paper.{name}").EXPERIMENT


def configurations(of: Experiment, scale: Scale, row: Row, seeds: Sequence[int]) -> list[TrainConfig]:
    """The configurations of a row's networks: one for each data set of the scale and each seed."""
    config = without_defaults(changed(scale.config, row.changes))
    found = [
        dataclasses.replace(config, dataset=dataset, seed=seed + row.add_to_seed)
        for dataset in scale.datasets
        for seed in seeds
    ]
    return found if of.pooled else found[:1]


def without_defaults(config: TrainConfig) -> TrainConfig:
    """The configuration with the method's defaults replaced by None, so that equal networks have equal configurations.

    Example:
      >>> without_defaults(TrainConfig(smoothing=0.5)) == TrainConfig()
      True
    """
    own = inspect.signature(METHODS[config.method].build).parameters
    attack = config.attack
    if "num_steps" in own and attack.num_steps == own["num_steps"].default:
        attack = dataclasses.replace(attack, num_steps=None)
    own_step = {"feature_scatter": attack.epsilon, "pgd": attack.epsilon / 4}.get(config.method)
    if attack.step_size == own_step:
        attack = dataclasses.replace(attack, step_size=None)
    smoothing = None if "smoothing" in own and config.smoothing == own["smoothing"].default else config.smoothing
    return dataclasses.replace(config, attack=attack, smoothing=smoothing)


def networks(
    name: str, scale: Scale, seeds: Sequence[int], workdir: pathlib.Path
) -> Iterator[tuple[Row, list[TrainConfig], list[pathlib.Path]]]:
    """The rows of an experiment, each with the configurations and folders of its networks."""
    for row in experiment(name).rows:
        configs = configurations(experiment(name), scale, row, seeds)
        yield row, configs, [folder_of(workdir, scale, config) for config in configs]


def folder_of(workdir: pathlib.Path, scale: Scale, config: TrainConfig) -> pathlib.Path:
    """The folder of a network. It is the same for all tables and machines, and depends on configuration and data."""
    key = digest([__version__, to_dict(portable(config)), *file_hash(config.dataset)])
    return workdir / scale.folder / f"{config.method}-{pathlib.Path(config.dataset).stem}-{key}"


def portable(config: TrainConfig) -> TrainConfig:
    """The configuration with the name of a data file instead of its path, which differs between machines.

    Example:
      >>> portable(TrainConfig(dataset="/home/me/mine.npz")).dataset
      'mine.npz'
    """
    return dataclasses.replace(config, dataset=pathlib.Path(config.dataset).name)


@functools.cache
def file_hash(dataset: str) -> list[str]:
    """The hash of a data set given as a file, since the file's name does not identify its content."""
    path = pathlib.Path(dataset)
    return [hashlib.sha256(path.read_bytes()).hexdigest()] if path.suffix == ".npz" and path.exists() else []


def jobs(
    scale: Scale, names: Iterable[str], seeds: Sequence[int], workdir: pathlib.Path, rows: Sequence[str] = ()
) -> list[Job]:
    """All networks of these experiments, or of these rows only. Those of the first experiment come first."""
    found: dict[pathlib.Path, Job] = {}
    for name in names:
        for row, configs, folders in networks(name, scale, seeds, workdir):
            if rows and row.label not in rows:
                continue
            for config, folder in zip(configs, folders, strict=True):
                before = found[folder].experiments if folder in found else ()
                found[folder] = Job(scale, config, folder, tuple(dict.fromkeys((*before, name))))
    return list(found.values())


def result_file(folder: pathlib.Path, scale: Scale, name: str) -> pathlib.Path:
    """The file with the result of a measurement of a network. Experiments with the same measurement share it."""
    settings = [RESULT_VERSION, scale.test_images, experiment(name).measurement.settings(scale)]
    return folder / f"result-{digest(settings)}.json"


def weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The file of a network that was restored from `experiments/weights` instead of trained."""
    return folder / "network.safetensors"


def is_finished(job: Job) -> bool:
    """Whether the network is measured for all of its experiments."""
    return all(result_file(job.folder, job.scale, name).exists() for name in job.experiments)


def finished_rows(name: str, scale: Scale, seeds: Sequence[int], workdir: pathlib.Path) -> list[Finished]:
    """The rows of an experiment whose networks are all measured, with their results."""
    found = []
    for row, _configs, folders in networks(name, scale, seeds, workdir):
        paths = [result_file(folder, scale, name) for folder in folders]
        if all(path.exists() for path in paths):
            found.append(Finished(row, [json.loads(path.read_text(encoding="utf-8")) for path in paths], folders))
    return found


def digest(data: Any) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
