"""Runs the networks of some experiments, as many at a time as there are processors for, and writes what they show.

Each network has a folder and a process of its own. What is finished is skipped; what was interrupted or killed
resumes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import tyro

from experiments import command_line
from experiments.output import write_files
from experiments.paper import costs, writing
from experiments.paper.experiment import Experiment
from experiments.paper.jobs import EXPERIMENTS, Job, digest, experiment, is_finished, jobs, result_file
from experiments.paper.scales import SCALES, Scale, scale_of
from fs_jax._utils.files import local_path, read_jsonl
from fs_jax._utils.validation import check_choice, check_number
from fs_jax.config import to_dict


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run the paper's experiments at a scale, and write their tables and figures."""

    scale: str = "digits"
    """trial, digits, small, medium, short or paper: see --list."""
    seeds: tuple[int, ...] = (0,)
    """Each row is trained once with each."""
    dataset: str | None = None
    """Another data set than the scale's: cifar10, cifar100, svhn_cropped, digits, or the path of an .npz file."""
    rows: tuple[str, ...] = ()
    """Train and measure these alone, by the label that a table gives them; by default all."""
    workdir: pathlib.Path = pathlib.Path("runs/paper")
    """Folder of the networks: a new one, or the one to resume."""
    results: pathlib.Path = pathlib.Path("experiments/results/paper")
    """Folder of the tables; each scale has a folder of its own in it."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    workers: int | None = None
    """Networks at a time; by default one for each accelerator, or for each processor."""
    max_minutes: float | None = None
    """Stop cleanly after so many minutes, with exit status 75; the same command resumes."""
    list: bool = False
    """List scales, tables and rows, with what is there and what is missing, and run nothing."""


def main(chosen: Experiment) -> None:
    """The command line of one table or figure."""
    command_line.run(lambda argv: run([chosen.name], argv))


def run(names: Sequence[str] | None, argv: list[str]) -> int | None:
    """Run these experiments, or all of the scale, with the command line's words."""
    arguments = tyro.cli(Arguments, args=argv)
    scale = scale_of(arguments.scale, arguments.dataset)
    if not arguments.seeds:
        raise ValueError("seeds: expected one or more; got none.")
    for seed in arguments.seeds:
        check_number("seeds", seed, at_least=0, at_most=2**32 - 2, integer=True)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"seeds: expected each once; got {', '.join(map(str, arguments.seeds))}.")
    names = names or scale.experiments or EXPERIMENTS
    labels = dict.fromkeys(row.label for name in names for row in experiment(name).rows)
    for row in arguments.rows:
        check_choice("rows", row, labels)
    workdir = local_path("workdir", arguments.workdir)
    results = local_path("results", arguments.results) / scale.folder
    needed = jobs(scale, names, arguments.seeds, workdir, arguments.rows)
    missing = [job for job in needed if not is_finished(job)]
    if arguments.list:
        print(listing(scale, names, needed, missing))
        return None
    for name in names:
        writing.check_results(experiment(name), scale, arguments.seeds, results)
    stopped = bool(missing) and execute(missing, arguments)
    written = []
    for name in names:
        path = writing.write(experiment(name), scale, arguments.seeds, workdir, results)
        if path is not None:
            written.append(path)
            print(f"\n{path.read_text(encoding='utf-8')}")
    print(f"Written: {', '.join(map(str, written)) or 'nothing, as no row is complete'}.")
    if stopped:
        print("Stopped. The same command resumes.")
        return command_line.STOPPED
    return None


def listing(scale: Scale, names: Sequence[str], needed: list[Job], missing: list[Job]) -> str:
    """Scales and experiments, and of those chosen what is missing, row by row."""
    lines = ["Scales:", *(f"  {name:8} {about.summary}" for name, about in SCALES.items())]
    lines += ["Experiments:"]
    lines += [f"  {name:24} {experiment(name).title}, {len(experiment(name).rows)} rows" for name in EXPERIMENTS]
    lines += [
        f"At scale {scale.folder}, of {', '.join(names)}, {len(needed)} networks, {len(missing)} to train or measure:"
    ]
    lines += [f"  {name}: {job.folder}" for job in missing for name in job.experiments[:1]]
    return "\n".join(lines)


def execute(missing: list[Job], arguments: Arguments) -> bool:
    """Run these jobs; whether they were stopped before their end."""
    from tqdm import tqdm

    from fs_jax import data

    places = processors(arguments.workers)
    data.load(missing[0].config.dataset, data_dir=arguments.data_dir)  # what is wrong with it is said here, once
    for job in missing:
        spec: dict[str, Any] = {
            "scale": job.scale.name,
            "dataset": job.scale.dataset,
            "config": to_dict(job.config),
            "experiments": job.experiments,
        }
        spec["data_dir"] = None if arguments.data_dir is None else str(arguments.data_dir)
        write_files(job.folder, {"job.json": spec})
    estimated = estimate(missing, places, workdir=local_path("workdir", arguments.workdir))
    print(f"{len(missing)} networks, {len(places)} at a time: about {words(estimated)}.", flush=True)
    began = time.monotonic()
    deadline = float("inf") if arguments.max_minutes is None else time.monotonic() + 60 * arguments.max_minutes
    waiting = list(missing)
    running: dict[str, tuple[Job, subprocess.Popen]] = {}
    failed: list[pathlib.Path] = []
    with tqdm(total=len(missing), unit="network") as bar, contextlib.ExitStack() as stack:
        stack.callback(end, running)
        while waiting or running:
            for place in [place for place in places if place not in running]:
                if waiting and time.monotonic() < deadline:
                    running[place] = (waiting[0], start(waiting.pop(0), place))
            for place, (job, process) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[place]
                if status not in (0, command_line.STOPPED):
                    failed.append(job.folder)
            done = len(missing) - len(waiting) - len(running) - len(failed)
            so_far = round(done + sum(share_done(job) for job, _ in running.values()), 2)
            if so_far != bar.n:  # tqdm itself would wait for steps as large as the largest so far
                bar.n = so_far
                bar.refresh()
            if time.monotonic() > deadline:
                break
            time.sleep(1)
    if failed:
        raise ChildProcessError(failure(failed))
    stopped = not all(is_finished(job) for job in missing)
    if not stopped:
        print(f"It took {words(time.monotonic() - began)}; estimated were {words(estimated)}.")
    return stopped


def failure(failed: list[pathlib.Path]) -> str:
    """What to say of networks that failed."""
    log = (failed[0] / "log").read_text(encoding="utf-8", errors="replace")
    advice = "What is finished is kept; the same command tries the others again."
    if "RESOURCE_EXHAUSTED" in log or "Out of memory" in log:
        advice = f"Out of memory: run fewer networks at a time (--workers 1), or a smaller scale. {advice}"
    return f"{len(failed)} networks failed; the end of {failed[0] / 'log'} is:\n{log[-2000:]}\n{advice}"


def estimate(missing: list[Job], places: list[str], workdir: pathlib.Path) -> float:
    """Seconds that these jobs will take: a network of each kind is timed, once and for all."""
    from tqdm import tqdm

    kinds = {costs.kind(job.config): job for job in missing}
    files = {name: workdir / "costs" / f"{digest([name, places])}.json" for name in kinds}
    unknown = [name for name in kinds if not files[name].exists()]
    for begin in tqdm(range(0, len(unknown), len(places)), "Timing each kind of training", disable=not unknown):
        batch = list(zip(unknown[begin : begin + len(places)], places, strict=False))
        processes = [start(kinds[name], place, str(files[name].resolve())) for name, place in batch]
        for (name, _), process in zip(batch, processes, strict=True):
            if process.wait():
                raise ChildProcessError(f"timing failed; its log is {kinds[name].folder / 'log'}.")
    cost = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    each = [costs.seconds_of(job, cost[costs.kind(job.config)]) for job in missing]
    return max(sum(each) / len(places), max(each))


def words(seconds: float) -> str:
    """A time for people."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def processors(count: int | None = None) -> list[str]:
    """Places to run at: an accelerator, or a processor, each."""
    if count is not None:
        check_number("workers", count, at_least=1, integer=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator's memory is the workers'
    import jax

    accelerators = [device.id for device in jax.local_devices() if device.platform != "cpu"]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    kind, there = ("gpu", accelerators) if accelerators else ("cpu", cores)
    return [f"{kind}{there[i % len(there)]}.{i}" for i in range(count or len(there))]


def start(job: Job, place: str, *more: str) -> subprocess.Popen:
    """A worker on its processor: several programs of one thread do more than one program of several."""
    kind, number = place[:3], place[3:].split(".")[0]
    environment = dict(os.environ)
    if kind == "gpu":
        environment["CUDA_VISIBLE_DEVICES"] = number
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    log = open(job.folder / "log", "ab")  # noqa: SIM115 - the worker's, until it ends
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.paper.worker", str(job.folder.resolve()), *more],
        env=environment, stdout=log, stderr=log, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    log.close()
    if kind == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {int(number)})  # before XLA counts its threads
    return process


def end(running: dict[str, tuple[Job, subprocess.Popen]]) -> None:
    """Stop what is running: training saves a checkpoint, and evaluations have their journals."""
    for _, process in running.values():
        process.terminate()
    for _, process in running.values():
        process.wait()


def share_done(job: Job) -> float:
    """How far a network is, about: training is half of it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        steps = read_jsonl(job.folder / "run" / "metrics.jsonl")[-1]["step"]
        total = job.config.total_steps
        there = [result_file(job.folder, job.scale, name).exists() for name in job.experiments]
        return 0.5 * min(1.0, steps / total) + 0.5 * sum(there) / len(there)
    return 0.0
