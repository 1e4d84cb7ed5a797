"""Markdown tables of evaluations: functions of data that return a string."""

from collections.abc import Mapping, Sequence
from typing import Any

import tabulate

from fs_jax._utils.text import radius

WORST = "worst case"


def accuracy_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Make a Markdown table of accuracies in % with 95% intervals: a row for each network, a column for each attack.

    Args:
      evaluations: The evaluation of each network, by the network's name, as in the summary of
        `fs_jax.evaluation.evaluate`: a dictionary with `attacks`, a list of records, and `worst`, one record. A record
        has `accuracy`, `low` and `high` in [0, 1], and those of `attacks` have a `name`. Columns are in the order of
        the records, with the worst case last. An attack that wasn't run on a network gives a dash.

    Returns:
      The table in GitHub's Markdown.

    Example:
      >>> clean = {"name": "clean", "accuracy": 0.9, "low": 0.88, "high": 0.92}
      >>> pgd = {"name": "pgd-20", "accuracy": 0.45, "low": 0.42, "high": 0.48}
      >>> print(accuracy_table({"ours": {"attacks": [clean, pgd], "worst": pgd}}))
      | network   | clean             | pgd-20            | worst case        |
      |:----------|:------------------|:------------------|:------------------|
      | ours      | 90.0 [88.0, 92.0] | 45.0 [42.0, 48.0] | 45.0 [42.0, 48.0] |
    """
    attacks, records = records_by_network(evaluations)
    rows = [[name, *(_cell(of_network.get(attack)) for attack in attacks)] for name, of_network in records.items()]
    return tabulate.tabulate(
        rows, headers=["network", *attacks], tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(rows[0])
    )


def attack_table(evaluation: Mapping[str, Any]) -> str:
    """Make a Markdown table of one network's evaluation: a row for each attack, with the worst case last.

    Args:
      evaluation: The summary of `fs_jax.evaluation.evaluate`: `attacks`, a list of records with `name`, `judged_by`,
        `attacked`, `total`, `accuracy`, `low`, `high`, `lowest_single_run` (None gives a dash), `seconds`, and
        `forward` and `backward`, the passes of single images; and optionally `worst`, with `unknown`, the number of
        images that not all attacks cover.

    Returns:
      The table in GitHub's Markdown.

    Example:
      >>> clean = {"name": "clean", "judged_by": "the image", "attacked": 50, "total": 50, "seconds": 0.12}
      >>> clean |= {"accuracy": 0.9, "low": 0.79, "high": 0.96, "lowest_single_run": None, "forward": 50, "backward": 0}
      >>> print(attack_table({"attacks": [clean], "worst": clean}))
      | attack     | decides   | images   | accuracy, %       | lowest run   | seconds   | forward   | backward   |
      |:-----------|:----------|:---------|:------------------|:-------------|:----------|:----------|:-----------|
      | clean      | the image | 50 of 50 | 90.0 [79.0, 96.0] | –            | 0.1       | 50        | 0          |
      | worst case |           | 50       | 90.0 [79.0, 96.0] |              |           |           |            |
    """
    rows = [
        [
            record["name"],
            record["judged_by"],
            f"{record['attacked']:,} of {record['total']:,}",
            _cell(record),
            f"{100 * record['lowest_single_run']:.1f}" if record["lowest_single_run"] is not None else "–",
            f"{record['seconds']:,.1f}",
            f"{record['forward']:,}",
            f"{record['backward']:,}",
        ]
        for record in evaluation["attacks"]
    ]
    if "worst" in evaluation:
        worst = evaluation["worst"]
        unknown = f", {worst['unknown']:,} unknown" if worst.get("unknown") else ""
        rows.append([WORST, "", f"{worst['total']:,}{unknown}", _cell(worst), "", "", "", ""])
    headers = ["attack", "decides", "images", "accuracy, %", "lowest run", "seconds", "forward", "backward"]
    return tabulate.tabulate(
        rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(headers)
    )


def caption(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe what a table or a figure of these evaluations shows: images, radius, restarts, intervals.

    Args:
      evaluations: As in `accuracy_table`; records may also have `total`, `epsilon` and `restarts`.

    Returns:
      One sentence without a full stop. Values that differ between records are given as a range.

    Example:
      >>> record = {"name": "pgd-20", "accuracy": 0.45, "low": 0.42, "high": 0.48}
      >>> record |= {"total": 10_000, "epsilon": 8 / 255, "restarts": 5}
      >>> caption({"ours": {"attacks": [record], "worst": record}})
      'Accuracy in % of 10,000 images with 95% intervals; L∞ radius 8/255; 5 restarts'
    """
    _, networks = records_by_network(evaluations)
    records = [record for of_network in networks.values() for record in of_network.values()]

    # Clean images and attacks without a norm have no radius.
    attacked = [record for record in records if record["name"] != "clean" and record.get("norm", "linf") is not None]

    def values(among: Sequence[Mapping[str, Any]], key: str) -> list:
        return sorted({record[key] for record in among if key in record})

    def span(numbers: Sequence[str]) -> str:
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    text = "Accuracy in %"
    if totals := values(records, "total"):
        text += f" of {span([f'{total:,}' for total in totals])} images"
    text += " with 95% intervals"
    if radii := values(attacked, "epsilon"):
        text += f"; L∞ radius {span([radius(value) for value in radii])}"
    if (restarts := values(attacked, "restarts")) and restarts[-1] > 1:
        text += f"; {span([str(number) for number in restarts])} restarts"
    return text


def records_by_network(
    evaluations: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], dict[str, dict[str, Mapping[str, Any]]]]:
    """The columns in order, and the records of each network by column."""
    if not evaluations:
        raise ValueError("evaluations: expected at least one network; got none.")
    networks = {}
    for network, evaluation in evaluations.items():
        for key in ("attacks", "worst"):
            if key not in evaluation:
                raise ValueError(f"evaluations[{network!r}]: expected the key {key!r}; got {sorted(evaluation)}.")
        of_network = {}
        for record in (*evaluation["attacks"], {**evaluation["worst"], "name": WORST}):
            _check_record(network, record)
            if record["name"] in of_network:
                raise ValueError(
                    f"evaluations[{network!r}]: expected attacks of different names; got two of {record['name']!r}."
                )
            of_network[record["name"]] = record
        networks[network] = of_network
    attacks = dict.fromkeys(name for of_network in networks.values() for name in of_network if name != WORST)
    return [*attacks, WORST], networks


def _check_record(network: str, record: Mapping[str, Any]) -> None:
    for key in ("name", "accuracy", "low", "high"):
        if key not in record:
            raise ValueError(f"evaluations[{network!r}]: expected records with {key!r}; got one with {sorted(record)}.")
        if key != "name" and record[key] is not None and not 0 <= record[key] <= 1:
            raise ValueError(
                f"evaluations[{network!r}], {record['name']}: expected {key} in [0, 1]; got {record[key]!r}."
            )


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None or record["accuracy"] is None:
        return "–"
    accuracy, low, high = (100 * record[key] for key in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"
