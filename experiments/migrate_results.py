"""Convert results of older versions to the current schema: `python -m experiments.migrate_results FILE...`.

Converts the `result.json` of `experiments.evaluate` and of `experiments.autoattack_reference`, and the JSON files of
networks that the quickstart and `experiments.cifar10_short` write. No attack is run; fields that an older version did
not record are null. Older versions counted images outside an attack's subset as robust to it. Now they are unknown, so
the worst case and the `report.md` in the same folder may change. Files of the current schema are not changed.
"""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import tyro

from experiments import command_line
from experiments.output import write_files


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Convert results of older versions to the current schema, in place, in seconds. No attack is run."""

    files: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    """JSON files of results, which are overwritten."""


EXAMPLES = """\
  python -m experiments.migrate_results runs/cifar10/evaluations/attacks/result.json
"""


def main(argv: list[str]) -> None:
    arguments = command_line.parse(Arguments, argv, prog="python -m experiments.migrate_results", examples=EXAMPLES)

    from experiments.evaluation_report import report_text
    from fs_jax.evaluation.journal import SCHEMA

    for path in arguments.files:
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            old = None
        if not isinstance(old, dict) or "attacks" not in old or "records" not in old:
            raise ValueError(
                f"{path}: expected the result of an evaluation, with attacks and records; got another file."
            )
        if old.get("schema") == SCHEMA:
            print(f"{path}: already has the current schema")
            continue
        new = migrated(old) if "schema" not in old else {**old, "schema": SCHEMA, "warnings": old.get("warnings")}
        write_files(path.parent, {path.name: new})
        if (path.parent / "report.md").exists():
            figures = {figure.stem for figure in path.parent.glob("*.png")}
            write_files(path.parent, {"report.md": report_text(new, figures)})
        print(f"{path}: migrated")


def migrated(old: dict[str, Any]) -> dict[str, Any]:
    """A result in the current schema."""
    import numpy as np

    from fs_jax._utils.keys import IMPLEMENTATION
    from fs_jax.evaluation import accuracy
    from fs_jax.evaluation.journal import SCHEMA

    old = {**old, "attacks": [{"apart": False, "num_images": None, **attack} for attack in old["attacks"]]}
    attacks = [migrated_attack(attack) for attack in old["attacks"]]
    names = {before["name"]: after["name"] for before, after in zip(old["attacks"], attacks, strict=True)}
    by_name = {attack["name"]: attack for attack in attacks}
    together = [attack for attack in attacks if not attack["apart"]]
    records = [migrated_record(record, names, by_name) for record in old["records"]]
    for record in records:
        covered = all(record["index"] < (attack["num_images"] or np.inf) for attack in together)
        broken = any(record["misclassified_at"].get(attack["name"], -1) >= 0 for attack in together)
        record["robust"] = False if broken else True if covered else None
    known = [record for record in records if all(record["index"] < (a["num_images"] or np.inf) for a in together)]
    evaluated = {
        "schema": SCHEMA,
        "images": len(records),
        "first": 0,
        "seed": old["seed"],
        "precision": "float32" if old["environment"]["platform"] == "cpu" else "default",
        "prng": IMPLEMENTATION,
        "weights": old.get("weights"),
        "data": old.get("data"),
        "warnings": old.get("warnings"),
    }
    kept = {name: value for name, value in old.items() if name not in ("environment", "adversaries_kept")}
    return {
        **kept,
        **evaluated,
        "environments": [old["environment"]],
        "attacks": attacks,
        "worst": {
            **accuracy(np.array([bool(record["robust"]) for record in known], bool)),
            "unknown": len(records) - len(known),
        },
        "records": records,
    }


def migrated_attack(old: dict[str, Any]) -> dict[str, Any]:
    """The summary of an attack in the current schema, with the names of settings of its specification."""
    from fs_jax.attacks import REGISTRY, Attack
    from fs_jax.attacks.transfer import TRANSFER

    kind = "local-search-projected" if old["kind"] == "local-search" and not old["apart"] else old["kind"]
    specification = TRANSFER if kind == "transfer" else REGISTRY[kind]
    given = {**old, "targets": old["restarts"]}
    settings = {name: given[name] for name in specification.settings if given.get(name) is not None}
    attack = Attack(
        specification, old["epsilon"], after=old.get("after", ()), num_images=old["num_images"], apart=old["apart"],
        label=old.get("label"), **settings,
    )  # fmt: skip
    found = ("correct", "total", "accuracy", "low", "high", "forward", "backward", "lowest_single_run", "seconds")
    return {
        "name": attack.name,
        **attack.described(),
        "num_steps": 0 if specification.judges_only else old["num_steps"],
        "restarts": settings.get("restarts", 1),
        "judged_by": attack.judged_by,
        "uses_gradients": specification.uses_gradients,
        "attacked": old.get("attacked", old["total"]),
        **{name: old.get(name) for name in found},
        **({"by_step": old["by_step"]} if "by_step" in old else {}),
    }


def migrated_record(old: dict[str, Any], names: dict[str, str], attacks: dict[str, Any]) -> dict[str, Any]:
    """The record of an image in the current schema."""
    margin = {names[name]: value for name, value in old["margin"].items()}
    if "fallen_at" in old:
        misclassified_at = {names[name]: value for name, value in old["fallen_at"].items()}
    else:  # the last iterate was judged
        misclassified_at = {name: -1 if value > 0 else attacks[name]["num_steps"] for name, value in margin.items()}
    return {
        "index": old["index"],
        "label": old["label"],
        "robust": None,
        "margin": margin,
        "misclassified_at": misclassified_at,
        "distance": {names[name]: value for name, value in old.get("linf", {}).items()},
        **({"network": old["network"]} if "network" in old else {}),
    }


if __name__ == "__main__":
    command_line.run(main)
