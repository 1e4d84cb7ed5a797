"""Runs the networks of some experiments, as many at a time as there are processors for, and writes what they show.

Each network has a folder and a process of its own. What is finished is skipped; what was interrupted or killed
resumes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tyro

from experiments import command_line
from experiments.output import write_files
from experiments.paper import costs, writing
from experiments.paper.experiment import Experiment
from experiments.paper.jobs import EXPERIMENTS, Job, digest, experiment, finished_rows, is_finished, jobs, result_file
from experiments.paper.scales import SCALES, Scale, scale_of
from fs_jax._utils.files import local_path, locked, read_jsonl
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
    dataset = arguments.dataset  # a file by its whole name, as workers are in another folder
    if dataset is not None and dataset.endswith(".npz"):
        dataset = str(local_path("dataset", dataset).resolve())
    scale = scale_of(arguments.scale, dataset)
    if not arguments.seeds:
        raise ValueError("seeds: expected one or more; got none.")
    for seed in arguments.seeds:
        check_number("seeds", seed, at_least=0, at_most=2**32 - 2, integer=True)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"seeds: expected each once; got {', '.join(map(str, arguments.seeds))}.")
    if arguments.max_minutes is not None:
        check_number("max_minutes", arguments.max_minutes, above=0)
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
    with locked_workdir(workdir):
        for name in names:
            rows = [row.label for row in experiment(name).rows if not arguments.rows or row.label in arguments.rows]
            there = [of.row.label for of in finished_rows(name, scale, arguments.seeds, workdir)]
            writing.check_results(experiment(name), scale, arguments.seeds, results, {*rows, *there})
        stopped, failed = execute(missing, arguments) if missing else (False, [])
        written = []
        for name in names:
            path = writing.write(experiment(name), scale, arguments.seeds, workdir, results)
            if path is not None:
                written.append(path)
                print(f"\n{path.read_text(encoding='utf-8')}")
    print(f"Written: {', '.join(map(str, written)) or 'nothing, as no row is complete'}.")
    if failed:
        raise ChildProcessError("\n".join(failed))
    if stopped:
        print("Stopped. The same command resumes.")
        return command_line.STOPPED
    return None


@contextlib.contextmanager
def locked_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """The workdir for this process alone; asked to end, it ends as by Ctrl-C: workers first."""
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(workdir / "runner")
    except BlockingIOError:
        raise BlockingIOError(
            f"workdir: expected a folder that no other run is using; got {workdir}, which one is. Wait for its end, or "
            "choose another with --workdir."
        ) from None
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        lock.release()


def listing(scale: Scale, names: Sequence[str], needed: list[Job], missing: list[Job]) -> str:
    """Scales and experiments; and of those chosen the rows, and what is missing."""
    lines = ["Scales:", *(f"  {name:8} {about.summary}" for name, about in SCALES.items())]
    lines += ["Experiments:"]
    lines += [f"  {name:24} {experiment(name).title}" for name in EXPERIMENTS]
    lines += [f"Rows of {', '.join(names)}:"]
    lines += [f"  {label}" for label in dict.fromkeys(row.label for name in names for row in experiment(name).rows)]
    lines += [f"At scale {scale.folder}: {len(needed)} networks, {len(missing)} to train or measure."]
    return "\n".join(lines)


def execute(missing: list[Job], arguments: Arguments) -> tuple[bool, list[str]]:
    """Run these jobs; whether they were stopped before their end, and what failed."""
    from tqdm import tqdm

    from fs_jax import data

    workdir, data_dir = local_path("workdir", arguments.workdir), arguments.data_dir
    places = processors(arguments.workers)
    # What is wrong with the data is said here, once, and not by each worker after its training.
    check_data(data.load(missing[0].config.dataset, data_dir=data_dir), missing)
    for job in missing:
        spec: dict[str, Any] = {"scale": job.scale.name, "dataset": job.scale.dataset, "config": to_dict(job.config)}
        spec |= {"experiments": job.experiments, "data_dir": None if data_dir is None else str(data_dir.resolve())}
        write_files(job.folder, {"job.json": spec})
    began = time.monotonic()
    deadline = float("inf") if arguments.max_minutes is None else began + 60 * arguments.max_minutes
    running: dict[str, tuple[Job, Worker]] = {}
    waiting, failed = list(missing), []
    with contextlib.ExitStack() as stack:
        stack.callback(end, running)
        costs_of = time_kinds(missing, places, running, workdir, deadline)
        if costs_of is None:
            return True, []
        each = [costs.seconds_of(job, costs_of[costs.kind(job.config)]) for job in missing]
        estimated = max(sum(each) / len(places), max(each))
        print(f"{len(missing)} networks, {len(places)} at a time: about {words(estimated)}.", flush=True)
        bar = stack.enter_context(tqdm(total=len(missing), unit="network"))
        timed = time.monotonic()
        while (waiting or running) and time.monotonic() < deadline:
            for place in places:
                if waiting and place not in running:
                    running[place] = (waiting[0], start(waiting.pop(0), place))
            for place, (job, worker) in list(running.items()):
                status = worker.process.poll()
                if status is not None:
                    del running[place]
                    if status not in (0, command_line.STOPPED):
                        failed.append(failure(job, worker))
            done = len(missing) - len(waiting) - len(running) - len(failed)
            so_far = round(done + sum(share_done(job) for job, _ in running.values()), 2)
            if so_far != bar.n:  # tqdm itself would wait for steps as large as the largest so far
                bar.n = so_far
                bar.refresh()
            time.sleep(1)
    stopped = not failed and not all(is_finished(job) for job in missing)
    if not stopped:
        print(f"It took {words(time.monotonic() - timed)}; estimated were {words(estimated)}.")
    return stopped, failed


def check_data(dataset: Any, missing: list[Job]) -> None:
    """Refuse what workers would fail at.

    Raises:
      ValueError: for too few images to train on, or classes for some experiment.
    """
    scale, batch = missing[0].scale, max(job.config.batch_size for job in missing)
    if len(dataset.train_labels) < batch:
        raise ValueError(f"dataset: expected at least {batch} training images; got {len(dataset.train_labels)}.")
    names = dict.fromkeys(name for job in missing for name in job.experiments)
    needed = {name: experiment(name).measurement.least_classes(scale) for name in names}
    if too_few := [name for name, classes in needed.items() if classes > dataset.info.num_classes]:
        others = [
            name
            for name in EXPERIMENTS
            if experiment(name).measurement.least_classes(scale) <= dataset.info.num_classes
        ]
        raise ValueError(
            f"dataset: expected at least {max(needed.values())} classes for {', '.join(too_few)}; "
            f"{missing[0].config.dataset} has {dataset.info.num_classes}. These can be run: {', '.join(others)}."
        )


def time_kinds(
    missing: list[Job], places: list[str], running: dict, workdir: pathlib.Path, deadline: float
) -> dict[str, dict[str, float]] | None:
    """What a step and a pass cost of each kind of network, each timed once and for all; None if there was no time."""
    from tqdm import tqdm

    kinds = {costs.kind(job.config): job for job in missing}
    files = {name: workdir / "costs" / f"{digest([name, places])}.json" for name in kinds}
    unknown = [name for name in kinds if not files[name].exists()]
    for begin in tqdm(range(0, len(unknown), len(places)), "Timing each kind of training", disable=not unknown):
        batch = list(zip(unknown[begin : begin + len(places)], places, strict=False))
        for name, place in batch:
            running[place] = (kinds[name], start(kinds[name], place, str(files[name].resolve())))
        for _, place in batch:
            job, worker = running[place]
            while worker.process.poll() is None:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.2)
            del running[place]
            if worker.process.returncode:
                raise ChildProcessError(failure(job, worker))
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


def words(seconds: float) -> str:
    """A time for people."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def processors(count: int | None = None) -> list[str]:
    """Places to run at: an accelerator, or a processor, each."""
    if count is not None:
        check_number("workers", count, at_least=1, integer=True)
    # In a process of its own: this one would keep the accelerators from its workers.
    asked = "import jax; print(*(f'{d.platform} {d.id}' for d in jax.local_devices()), sep=';')"
    found = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout
    devices = [device.split() for device in found.strip().splitlines()[-1].split(";")]
    if devices[0][0] == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        devices = [["cpu", str(core)] for core in cores]
    return [f"{':'.join(devices[i % len(devices)])}:{i}" for i in range(count or len(devices))]


class Worker(NamedTuple):
    """A process that trains and measures a network."""

    process: subprocess.Popen
    log: pathlib.Path
    begins: int
    """Where in the log its own lines begin."""


def start(job: Job, place: str, *more: str) -> Worker:
    """A worker on its processor: several programs of one thread do more than one program of several."""
    kind, number, _ = place.split(":")
    environment = dict(os.environ)
    if kind in ("gpu", "cuda", "rocm"):
        name = "ROCR_VISIBLE_DEVICES" if kind == "rocm" else "CUDA_VISIBLE_DEVICES"
        seen = os.environ.get(name)  # of those that this process may use
        environment[name] = seen.split(",")[int(number)] if seen else number
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    elif kind == "tpu":
        environment |= {
            "TPU_VISIBLE_CHIPS": number, "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1",
        }  # fmt: skip
    path = job.folder / "log"
    log = open(path, "ab")  # noqa: SIM115 - the worker's, until it ends
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.paper.worker", str(job.folder.resolve()), *more],
        env=environment, stdout=log, stderr=log, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    begins = log.tell()
    log.close()
    if kind == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {int(number)})  # before XLA counts its threads
    return Worker(process, path, begins)


def failure(job: Job, worker: Worker) -> str:
    """What to say of a worker that failed."""
    log = worker.log.read_bytes()[worker.begins :].decode(errors="replace")
    advice = "What is finished is kept; the same command tries the others again."
    if "RESOURCE_EXHAUSTED" in log or "Out of memory" in log:
        advice = f"Out of memory: run fewer networks at a time (--workers 1), or a smaller scale. {advice}"
    return f"{job.folder.name} failed; the end of {worker.log} is:\n{log[-2000:]}\n{advice}"


def end(running: dict[str, tuple[Job, Worker]]) -> None:
    """Stop what is running: training saves a checkpoint, and evaluations have their journals."""
    for _, worker in running.values():
        worker.process.terminate()
    for _, worker in running.values():
        try:
            worker.process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # nothing is lost but what came since the last checkpoint
            worker.process.kill()


def share_done(job: Job) -> float:
    """How far a network is, about: training is half of it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        steps = read_jsonl(job.folder / "run" / "metrics.jsonl")[-1]["step"]
        total = job.config.total_steps
        there = [result_file(job.folder, job.scale, name).exists() for name in job.experiments]
        return 0.5 * min(1.0, steps / total) + 0.5 * sum(there) / len(there)
    return 0.0
