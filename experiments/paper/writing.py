"""Write the files of an experiment: Markdown, JSON, a figure, and CSV and LaTeX for tables."""

import json
import pathlib
import shlex
from collections.abc import Container, Sequence
from typing import Any

from experiments.output import made_on, write_files
from experiments.paper.experiment import Data, Experiment, Finished
from experiments.paper.jobs import file_hash, finished_rows, portable
from experiments.paper.reuse import SUFFIX, save_records
from experiments.paper.scales import Scale
from fs_jax._utils.text import radius
from fs_jax.config import differences, from_dict, to_dict


def file_name(experiment: Experiment, seeds: Sequence[int]) -> str:
    """The file name of an experiment's results, without suffix. It depends on the seeds that the experiment uses.

    Example:
      >>> from experiments.paper.jobs import experiment
      >>> [file_name(experiment(name), [0, 1]) for name in ("matching", "mechanism")]
      ['matching-seeds-0-1', 'mechanism']
    """
    seeds = used_seeds(experiment, seeds)
    return experiment.name if seeds == [0] else f"{experiment.name}-seeds-{'-'.join(map(str, seeds))}"


def used_seeds(experiment: Experiment, seeds: Sequence[int]) -> list[int]:
    """The seeds of the networks that an experiment measures."""
    return list(seeds if experiment.pooled else seeds[:1])


class MoreRows(ValueError):
    """Existing results have rows that the new ones do not have."""


def check_results(
    experiment: Experiment,
    scale: Scale,
    seeds: Sequence[int],
    results: pathlib.Path,
    coming: Container[str],
    restored: Container[str] = (),
) -> None:
    """Check that writing will not overwrite results of another configuration, of trained networks, or with more rows.

    Args:
      experiment: The experiment.
      scale: Its scale.
      seeds: The seeds of the rows.
      results: Folder of the results.
      coming: Labels of the rows that are finished or will be run.
      restored: Labels of the rows with restored networks, which must not replace results of trained ones.

    Raises:
      MoreRows: if rows would be lost. The message names them.
      ValueError: for another configuration, of which it names the fields, and for results of trained networks.
    """
    path = results / f"{file_name(experiment, seeds)}.json"
    if not path.exists():
        return
    here, there = scale.config, json.loads(path.read_text(encoding="utf-8"))
    try:
        changes = {
            **differences(portable(here), from_dict(there["config"])),
            "data": (file_hash(here.dataset), there.get("data_hash", [])),
            **{name: (now, there["images"][name]) for name, now in images_of(scale).items()},
        }
        found = [f"{name} {now} here, {then} there" for name, (now, then) in changes.items() if now != then]
    except (KeyError, ValueError, TypeError) as error:
        found = [f"an unreadable file ({error!r})"]
    if found:
        raise ValueError(
            f"results: expected a new folder, or results of this configuration; got others in {path}: "
            f"{'; '.join(found)}. Choose another folder with --results; nothing was changed."
        )
    check_version(there, path)
    if lost := [label for label in there["finished"] if label not in coming]:
        has_records = path.with_name(f"{path.stem}{SUFFIX}").exists()
        raise MoreRows(
            f"results: expected a new folder, or results with the rows of this workdir only; got more rows in {path}: "
            f"{'; '.join(lost)}. {'To keep them, add --reuse-results. ' if has_records else ''}Choose another folder "
            "with --results, or omit --rows; nothing was changed."
        )
    if trained := [
        label for label in there["finished"] if label in restored and label not in there.get("restored", {})
    ]:
        raise ValueError(
            f"results: expected a new folder, or results of restored networks; got those of trained ones in {path}: "
            f"{'; '.join(trained)}. Choose another folder with --results; nothing was changed."
        )


def check_version(data: Data, path: pathlib.Path) -> None:
    """Raise a ValueError for results of an older version, which lack data that this one needs."""
    numbers = [of for row in data.get("rows", {}).values() for of in row.values()]
    without_folds = any("folds" not in of["difference"] for of in numbers if of.get("difference"))
    if "environments" not in data or without_folds:
        raise ValueError(
            f"results: expected results of this version; got those of an older one in {path}. Remove the file, and run "
            f"its command again with the same --workdir: {command(data)}"
        )


def images_of(scale: Scale) -> dict[str, Any]:
    """The test images of a scale: data sets, files by name, and numbers of images."""
    numbers = ("test_images", "strong_images", "gradient_free_images")
    datasets = [pathlib.Path(dataset).name for dataset in scale.datasets]
    return {"datasets": datasets, **{name: getattr(scale, name) for name in numbers}}


def write(
    experiment: Experiment, scale: Scale, seeds: Sequence[int], workdir: pathlib.Path, results: pathlib.Path
) -> pathlib.Path | None:
    """Write the finished rows. Returns the path of the Markdown file, or None if they do not suffice.

    Raises:
      MoreRows, ValueError: as `check_results`.
    """
    finished = finished_rows(experiment.name, scale, seeds, workdir)
    if not finished:
        return None
    labels = [of.row.label for of in finished]
    name = file_name(experiment, seeds)
    check_results(experiment, scale, seeds, results, labels, restored_networks(finished))
    if (collected := experiment.collect(experiment, scale, finished)) is None:
        return None
    data: Data = {
        "experiment": experiment.name,
        "scale": scale.name,
        "dataset": None if scale.dataset is None else pathlib.Path(scale.dataset).name,
        "data_hash": file_hash(scale.config.dataset),
        "pixels": list(pixels(scale)),
        "seeds": used_seeds(experiment, seeds),
        "finished": labels,
        "missing": [row.label for row in experiment.rows if row.label not in labels],
        "config": to_dict(portable(scale.config)),
        "images": images_of(scale),
        "environments": environments(finished),
        "commits": commits(finished),
        "hours": hours(finished),
        **collected,
    }
    if restored := restored_networks(finished):
        data["restored"] = restored
    figure = None if experiment.draw is None else f"{name}.png"
    others: dict[str, Any] = {name + ending: text for ending, text in experiment.other_files(data).items()}
    if all("records" in result for of in finished for result in of.results):
        results.mkdir(parents=True, exist_ok=True)
        save_records(results / f"{name}{SUFFIX}", experiment, scale, finished)
    write_files(results, {f"{name}.json": data, f"{name}.md": as_markdown(experiment, data, figure), **others})
    if experiment.draw is not None:
        experiment.draw(data, results / f"{name}.png")
    return results / f"{name}.md"


def environments(finished: Sequence[Finished]) -> list[Data]:
    """The devices and versions that measured these networks, without those that differ only in the commit."""
    found = {made_on(environment): environment for environment in every_environment(finished)}
    return [found[text] for text in sorted(found)]


def every_environment(finished: Sequence[Finished]) -> list[Data]:
    """The environments of all processes that measured these networks: an evaluation can have several."""
    return [
        environment
        for of in finished
        for result in of.results
        for environment in (result["environment"], *result.get("environments", []))
    ]


def restored_networks(finished: Sequence[Finished]) -> dict[str, str]:
    """For each row with restored networks, which part of its networks they are, as text."""
    counts = {of.row.label: [result["restored"] for result in of.results] for of in finished}
    return {label: f"{sum(each)} of {len(each)}" for label, each in counts.items() if any(each)}


def machines(data: Data) -> str:
    """The devices and versions of these results, as text."""
    return "; ".join(made_on(environment) for environment in data["environments"])


def commits(finished: Sequence[Finished]) -> list[str]:
    """The commits of the code that measured these networks; with a plus sign if it was changed."""
    return sorted({environment["commit"] for environment in every_environment(finished)})


def hours(finished: Sequence[Finished]) -> dict[str, float]:
    """Hours of training and measuring the networks, summed over networks. Restored networks take none to train."""
    results = {folder: result for of in finished for folder, result in zip(of.folders, of.results, strict=True)}
    training = sum(result["training_hours"] for result in results.values())
    measuring = sum(
        # The times of attacks include those in earlier processes, from the journal of the evaluation.
        sum(attack["seconds"] for attack in result["attacks"]) if "attacks" in result else result["seconds"]
        for result in results.values()
    )
    return {"training": round(training, 3), "measuring": round(measuring / 3600, 3)}


def as_markdown(experiment: Experiment, data: Data, figure: str | None) -> str:
    """The Markdown of an experiment: title, note, figure, tables and caption."""
    parts = [
        f"# {experiment.title}" + ("" if data["seeds"] == [0] else f", {seeds_text(data)}"),
        experiment.reading,
        f"![{experiment.title}]({figure})" if figure else "",
        experiment.show(data),
        f"Not run yet: {'; '.join(data['missing'])}." if data["missing"] else "",
        restored_text(data["restored"]) if "restored" in data else "",
        caption(experiment, data),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def restored_text(restored: dict[str, str]) -> str:
    """The restored networks, by row.

    Example:
      >>> restored_text({"standard": "1 of 5"})
      'Restored networks, not trained for these results (see `experiments/weights`; in bfloat16): standard, 1 of 5.'
    """
    rows = "; ".join(f"{label}, {part}" for label, part in restored.items())
    return f"Restored networks, not trained for these results (see `experiments/weights`; in bfloat16): {rows}."


def caption(experiment: Experiment, data: Data) -> str:
    """The origin of the numbers: scale, radius, seeds, machine and command."""
    dataset = "" if data["dataset"] is None else f" on {data['dataset']}"
    size = " x ".join(map(str, data["pixels"]))
    fold = ", first fold" if not experiment.pooled and len(data["images"]["datasets"]) > 1 else ""
    return (
        f"Scale `{data['scale']}`{dataset} ({size} pixels, L∞ radius {radius(data['config']['attack']['epsilon'])}), "
        f"{seeds_text(data)}{fold}. Reference: {experiment.source}. On "
        f"{machines(data)}, {spent(data['hours'])}: "
        f"`{command(data)}`"
    )


def seeds_text(data: Data) -> str:
    """The seeds of results.

    Example:
      >>> seeds_text({"seeds": [0, 1]})
      'seeds 0, 1'
    """
    return f"seed{'s' * (len(data['seeds']) > 1)} {', '.join(map(str, data['seeds']))}"


def command(data: Data) -> str:
    """The command that makes these results."""
    reuse = " --reuse-networks" * ("restored" in data)
    seeds = "" if data["seeds"] == [0] else f" --seeds {' '.join(map(str, data['seeds']))}"
    dataset = "" if data["dataset"] is None else f" --dataset {data['dataset']}"
    rows = f" --rows {shlex.join(data['finished'])}" if data["missing"] else ""
    return f"python -m experiments.paper.{data['experiment']} --scale {data['scale']}{dataset}{seeds}{rows}{reuse}"


def spent(hours: dict[str, float]) -> str:
    """The times of training and measuring, as text.

    Example:
      >>> spent({"training": 1.26, "measuring": 0.5})
      '1 h 16 min of training and 30 min of measuring, summed over networks'
    """
    training, measuring = (duration(3600 * hours[name]) for name in ("training", "measuring"))
    return f"{training} of training and {measuring} of measuring, summed over networks"


def duration(seconds: float) -> str:
    """A time as text, in hours and minutes.

    Example:
      >>> duration(5000), duration(1080), duration(15)
      ('1 h 23 min', '18 min', 'under a minute')
    """
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else "under a minute"


def pixels(scale: Scale) -> tuple[int, int]:
    """Height and width of the images of a scale."""
    from fs_jax import data

    return data.info(scale.datasets[0]).image_shape[:2]
