"""Run the networks of some experiments in parallel, and write tables and figures.

Each network has its own folder and process. Finished networks are skipped, and interrupted ones resume.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from experiments import command_line
from experiments.output import write_files
from experiments.paper import costs, reuse, writing
from experiments.paper.experiment import Experiment
from experiments.paper.jobs import Job, digest, experiment, finished_rows, is_finished, jobs, result_file, weights_file
from experiments.paper.scales import EXPERIMENTS, SCALES, Scale, scale_of
from fs_jax._utils.files import local_path, locked
from fs_jax._utils.validation import check_number
from fs_jax.config import to_dict

EXAMPLES = """\
  {prog} --list
  {prog} --scale digits
  {prog} --scale small --seeds 0 1 2 --max-minutes 55
  {prog} --scale small --reuse-networks --results runs/results
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train, attack and measure networks for tables and figures: 1.4 hours at scale digits on two CPU cores."""

    scale: str = "digits"
    """trial, digits, small, medium, short or paper; --list describes them."""
    seeds: tuple[int, ...] = (0,)
    """Seeds. Each row is trained once per seed."""
    dataset: str | None = None
    """Replaces the scale's data set: cifar10, cifar100, svhn_cropped, digits, or the path of an .npz file
    (its format is in fs_jax/data/README.md)."""
    rows: tuple[str, ...] = ()
    """Labels of the rows to train and measure; by default all. --list lists them."""
    workdir: pathlib.Path = pathlib.Path("runs/paper")
    """Folder of the networks: a new one, or the one to resume."""
    results: pathlib.Path = pathlib.Path("experiments/results/paper")
    """Folder of the tables and figures, with one folder per scale. The default has the committed results."""
    data_dir: pathlib.Path | None = None
    """TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    workers: int | None = None
    """Number of networks in parallel; by default one per accelerator or, without accelerators, per CPU core.
    Commands that run at the same time use the same cores, unless each has its own, as in `taskset -c 1 python ...`."""
    reuse_results: bool = False
    """Do not train and measure networks again whose records are in the results folder (tables only, not figures). So
    rows can be added in a new workdir, or on another machine."""
    reuse_networks: bool = False
    """Do not train networks that are in experiments/weights, rounded to bfloat16, but restore and measure them."""
    max_minutes: float | None = None
    """Stop cleanly after this many minutes, with exit status 75. Rerun the same command to resume. (The timing
    of each kind of training, once per workdir, takes about a minute.)"""
    list: bool = False
    """List scales, experiments, the rows of the chosen ones, and how many networks are not finished. Run nothing."""


def main(chosen: Experiment) -> None:
    """The command line of one table or figure."""
    command_line.run(lambda argv: run([chosen.name], argv))


def run(names: Sequence[str] | None, argv: list[str]) -> int | None:
    """Run these experiments, or all experiments of the scale, with the options in `argv`."""
    prog = f"python -m experiments.paper{'' if names is None else f'.{names[0]}'}"
    arguments = command_line.parse(
        Arguments, argv, prog=prog, description=description(names), examples=EXAMPLES.format(prog=prog)
    )
    dataset = arguments.dataset  # a file by its absolute path, as workers run in another folder
    if dataset is not None and dataset.endswith(".npz"):
        dataset = str(local_path("dataset", dataset).resolve())
    scale = scale_of(arguments.scale, dataset)
    if not arguments.seeds:
        raise ValueError("seeds: expected one or more; got none.")
    for seed in arguments.seeds:
        check_number("seeds", seed, at_least=0, at_most=2**32 - 2, integer=True)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"seeds: expected distinct seeds; got {', '.join(map(str, arguments.seeds))}.")
    if arguments.max_minutes is not None:
        check_number("max_minutes", arguments.max_minutes, above=0)
    names = names or scale.experiments
    check_labels(arguments.rows, {row.label for name in names for row in experiment(name).rows})
    workdir = local_path("workdir", arguments.workdir)
    results = local_path("results", arguments.results) / scale.folder
    needed = jobs(scale, names, arguments.seeds, workdir, arguments.rows)
    if arguments.list:
        print(listing(scale, names, needed, workdir))
        return None
    with locked_workdir(workdir):
        tables = [writing.file_name(experiment(name), arguments.seeds) for name in names]
        every = jobs(scale, names, arguments.seeds, workdir)  # rows that are not to be run stay in the tables
        if arguments.reuse_results:
            print(f"Results of networks taken from {results}: {reuse.take_results(results, tables, every)}.")
        missing = [job for job in needed if not is_finished(job)]
        if arguments.reuse_networks:
            print("\n".join(reuse.restore_networks(missing, arguments.data_dir) or ["No network to restore."]))
        else:
            check_trained(needed, workdir)
        for name in names:
            rows = [row.label for row in experiment(name).rows if not arguments.rows or row.label in arguments.rows]
            there = [of.row.label for of in finished_rows(name, scale, arguments.seeds, workdir)]
            restored = reuse.restored_rows(name, scale, arguments.seeds, workdir)
            writing.check_results(experiment(name), scale, arguments.seeds, results, {*rows, *there}, restored)
        stopped, failed = execute(missing, arguments) if missing else (False, [])
        try:
            with locked_results(results):
                if arguments.reuse_results and (taken := reuse.take_results(results, tables, every)):
                    print(f"Results of networks that another process has added to {results}: {taken}.")
                not_written = write(names, scale, arguments.seeds, workdir, results)
            if stopped:  # the rows that are not finished can be among those in the results
                print("\n".join(not_written))
            else:
                failed += not_written
        except (OSError, ValueError) as error:  # the messages of failed workers must not be lost
            failed.append(f"Not all tables are written: {error}")
    if failed:
        raise ChildProcessError("\n".join(failed))
    if stopped:
        print("Stopped. Rerun the same command to resume.")
        return command_line.STOPPED
    return None


def description(names: Sequence[str] | None) -> str:
    """The description for --help. For a single experiment, it includes the title."""
    what = "all tables and figures" if names is None else f'"{experiment(names[0]).title}"'
    return f"Train, attack and measure networks for {what}. The command estimates its time before it starts."


def check_labels(rows: Sequence[str], labels: Collection[str]) -> None:
    """Raise a ValueError, with the nearest label, unless all rows are labels."""
    for row in rows:
        if row not in labels:
            near = difflib.get_close_matches(row, sorted(labels), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"rows: expected labels of --list; got {row!r}.{hint}")


def check_trained(needed: Sequence[Job], workdir: pathlib.Path) -> None:
    """Raise a ValueError if the workdir has restored networks."""
    if restored := [job.folder.name for job in needed if weights_file(job.folder).exists()]:
        raise ValueError(
            f"workdir: expected trained networks; got restored ones in {workdir}: {', '.join(restored)}. Add "
            "--reuse-networks, or choose another folder with --workdir."
        )


@contextlib.contextmanager
def locked_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Lock the workdir. On SIGTERM, stop like on Ctrl-C, which ends the workers first."""
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(workdir / "runner")
    except BlockingIOError:
        raise BlockingIOError(
            f"workdir: expected an unused folder; got {workdir}, which another process is using. Wait for it, or "
            "choose another folder with --workdir."
        ) from None
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        lock.release()


def write(
    names: Sequence[str], scale: Scale, seeds: Sequence[int], workdir: pathlib.Path, results: pathlib.Path
) -> list[str]:
    """Write and print tables and figures. Returns a message for each that would lose rows."""
    written, not_written = [], []
    for name in names:
        try:
            path = writing.write(experiment(name), scale, seeds, workdir, results)
        except writing.MoreRows as error:
            not_written.append(str(error))
            continue
        if path is not None:
            written.append(path)
            print(f"\n{path.read_text(encoding='utf-8')}")
    print(f"Written: {', '.join(map(str, written)) or 'nothing'}.")
    return not_written


@contextlib.contextmanager
def locked_results(results: pathlib.Path) -> Iterator[None]:
    """Lock the results folder, so that no other process writes between the checks and the writing."""
    results.mkdir(parents=True, exist_ok=True)
    lock = locked(results / "tables", wait=True)
    try:
        yield
    finally:
        lock.release()


def listing(scale: Scale, names: Sequence[str], needed: list[Job], workdir: pathlib.Path) -> str:
    """The scales, the experiments, the rows of the chosen ones, and the number of unfinished networks."""
    lines = ["Scales:", *(f"  {name:8} {about.summary}" for name, about in SCALES.items())]
    lines += ["Experiments, and the labels of their rows:"]
    for name in EXPERIMENTS:
        lines += [f"  {name:24} {experiment(name).title}"]
        lines += [f"    {row.label}" for row in experiment(name).rows if name in names]
    if others := [name for name in EXPERIMENTS if name not in scale.experiments]:
        lines += [f"Not run by default at scale {scale.name}: {', '.join(others)}."]
    missing = sum(not is_finished(job) for job in needed)
    lines += [f"At scale {scale.folder}: {len(needed)} networks, {missing} of them to train or measure in {workdir}."]
    return "\n".join(lines)


def execute(missing: list[Job], arguments: Arguments) -> tuple[bool, list[str]]:
    """Run these jobs. Returns whether they were stopped early, and the messages of failed ones."""
    from tqdm import tqdm

    from fs_jax import data

    workdir, data_dir = local_path("workdir", arguments.workdir), arguments.data_dir
    places = processors(arguments.workers)
    # Check the data once, here, instead of in each worker after its training.
    check_data(data.load(missing[0].config.dataset, data_dir=data_dir), missing)
    for job in missing:
        spec: dict[str, Any] = {"scale": job.scale.name, "dataset": job.scale.dataset, "config": to_dict(job.config)}
        spec |= {"experiments": job.experiments, "data_dir": None if data_dir is None else str(data_dir.resolve())}
        write_files(job.folder, {"job.json": spec})
    began = time.monotonic()
    deadline = float("inf") if arguments.max_minutes is None else began + 60 * arguments.max_minutes
    running: dict[str, tuple[Job, Worker]] = {}
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.callback(end, running)
        costs_of = time_kinds(missing, places, running, workdir, deadline, failed)
        if costs_of is None:
            return True, failed
        missing = [job for job in missing if costs.kind(job.config) in costs_of]
        if not missing:
            return False, failed
        each = [costs.seconds_of(job, costs_of[costs.kind(job.config)]) for job in missing]
        estimated = max(sum(each) / len(places), max(each))
        count, about = len(missing), writing.duration(max(60, estimated))
        print(f"{count} network{'s' * (count > 1)}, {len(places)} in parallel: about {about}.", flush=True)
        bar = stack.enter_context(tqdm(total=len(missing), unit="network"))
        waiting, done, timed = list(missing), 0, time.monotonic()
        while (waiting or running) and time.monotonic() < deadline:
            for place in places:
                if waiting and place not in running:
                    running[place] = (waiting[0], start(waiting.pop(0), place))
            for place, (job, worker) in list(running.items()):
                status = worker.process.poll()
                if status is not None:
                    del running[place]
                    done += status == 0
                    if status not in (0, command_line.STOPPED):
                        failed.append(failure(job, worker))
            so_far = round(done + sum(share_done(job) for job, _ in running.values()), 2)
            if so_far != bar.n:  # tqdm would wait for updates as large as the largest one so far
                bar.n = so_far
                bar.refresh()
            time.sleep(1)
    stopped = not failed and not all(is_finished(job) for job in missing)
    if not stopped:
        print(f"Time: {writing.duration(time.monotonic() - timed)}; estimated: {writing.duration(estimated)}.")
    return stopped, failed


def check_data(dataset: Any, missing: list[Job]) -> None:
    """Check that the workers can use the data set.

    Raises:
      ValueError: for too few training images, or too few classes for an experiment.
    """
    scale, batch = missing[0].scale, max(job.config.batch_size for job in missing)
    if len(dataset.train_labels) < batch:
        raise ValueError(
            f"dataset: expected at least {batch} training images, a batch; got {len(dataset.train_labels)}."
        )
    names = dict.fromkeys(name for job in missing for name in job.experiments)
    needed = {name: experiment(name).measurement.least_classes(scale) for name in names}
    if too_few := [name for name, classes in needed.items() if classes > dataset.info.num_classes]:
        others = [
            name
            for name in EXPERIMENTS
            if experiment(name).measurement.least_classes(scale) <= dataset.info.num_classes
        ]
        raise ValueError(
            f"dataset: expected at least {max(needed.values())} classes for {', '.join(too_few)}; got "
            f"{dataset.info.num_classes} in {missing[0].config.dataset}. These experiments can run: "
            f"{', '.join(others)}."
        )


def time_kinds(
    missing: list[Job], places: list[str], running: dict, workdir: pathlib.Path, deadline: float, failed: list[str]
) -> dict[str, dict[str, float]] | None:
    """Times of a training step and a pass, for each kind of network, measured once and saved; None at the deadline.

    Kinds that fail are left out, and their messages added to `failed`.
    """
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
                failed.append(failure(job, worker))
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.exists()}


def processors(count: int | None = None) -> list[str]:
    """Places to run workers: accelerators or, without accelerators, CPU cores."""
    if count is not None:
        check_number("workers", count, at_least=1, integer=True)
    # In a subprocess, as this process would reserve the accelerators that its workers need.
    asked = "import jax; print(*(f'{d.platform} {d.id}' for d in jax.local_devices()), sep=';')"
    found = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout
    devices = [device.split() for device in found.strip().splitlines()[-1].split(";")]
    if devices[0][0] == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        devices = [["cpu", str(core)] for core in cores]
    return [f"{':'.join(devices[i % len(devices)])}:{i}" for i in range(count or len(devices))]


class Worker(NamedTuple):
    """The process that trains and measures a network."""

    process: subprocess.Popen
    log: pathlib.Path
    begins: int
    """Position in the log file where its lines begin."""


def start(job: Job, place: str, *more: str) -> Worker:
    """Start a worker on one processor. On CPUs, single-threaded workers in parallel have the highest throughput."""
    kind, number, _ = place.split(":")
    environment = dict(os.environ)
    if kind in ("gpu", "cuda", "rocm"):
        name = "ROCR_VISIBLE_DEVICES" if kind == "rocm" else "CUDA_VISIBLE_DEVICES"
        seen = os.environ.get(name)  # the accelerators that this process may use
        environment[name] = seen.split(",")[int(number)] if seen else number
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    elif kind == "tpu":
        environment |= {
            "TPU_VISIBLE_CHIPS": number, "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1",
        }  # fmt: skip
    path = job.folder / "log"
    log = open(path, "ab")  # noqa: SIM115 - the worker writes to it
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.paper.worker", str(job.folder.resolve()), *more],
        env=environment, stdout=log, stderr=log, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    begins = log.tell()
    log.close()
    if kind == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {int(number)})  # before XLA counts the cores
    return Worker(process, path, begins)


def failure(job: Job, worker: Worker) -> str:
    """The error message for a failed worker."""
    log = worker.log.read_bytes()[worker.begins :].decode(errors="replace")
    advice = "Finished networks are kept. Rerun the same command to try the others again."
    if "No space left on device" in log:  # which TensorStore calls RESOURCE_EXHAUSTED too
        advice = f"The disk is full: free space for {job.folder.parent}, or choose another --workdir. {advice}"
    elif "RESOURCE_EXHAUSTED" in log or "Out of memory" in log:
        advice = f"Out of memory: run fewer networks in parallel (--workers 1), or a smaller scale. {advice}"
    return f"{job.folder.name} failed; the end of {worker.log} is:\n{log[-2000:]}\n{advice}"


def end(running: dict[str, tuple[Job, Worker]]) -> None:
    """Stop the workers. They resume from the last checkpoint or from the journal of the evaluation."""
    for _, worker in running.values():
        worker.process.terminate()
    for _, worker in running.values():
        try:
            worker.process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # only the work since the last checkpoint is lost
            worker.process.kill()


def share_done(job: Job) -> float:
    """Estimated progress of a network, from 0 to 1. Training counts as half of the work."""
    with contextlib.suppress(OSError, ValueError):
        trained = 1 - costs.remaining_steps(job.folder, job.config) / job.config.total_steps
        finished = [result_file(job.folder, job.scale, name).exists() for name in job.experiments]
        return 0.5 * trained + 0.5 * sum(finished) / len(finished)
    return 0.0
