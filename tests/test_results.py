"""All committed results have the current schema, and their summaries agree with their records."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.migrate_results import migrated
from fs_jax.evaluation import accuracy, evaluate
from fs_jax.evaluation.journal import SCHEMA

RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results"
EVALUATIONS = [
    path
    for path in sorted(RESULTS.rglob("*.json"))
    if {"attacks", "records"} <= json.loads(path.read_text(encoding="utf-8")).keys()
]


@pytest.fixture(scope="module")
def fresh():
    """A result of the current `evaluate`."""
    images, labels = np.full((3, 2, 2, 1), 0.5, np.float32), np.zeros(3, int)
    return evaluate(
        lambda x: x.mean((1, 2)) * jnp.array([[1.0, -1.0]]), images, labels, ["clean", "pgd-2"], progress=False
    )


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_committed_result_has_the_schema_and_agrees_with_its_records(path, fresh):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["schema"] == SCHEMA
    assert result.keys() >= fresh.summary.keys()
    assert len(result["records"]) > 0
    for attack in result["attacks"]:
        assert attack.keys() - {"by_step"} == fresh.summary["attacks"][0].keys() - {"by_step"}
    for record in result["records"]:
        assert record.keys() - {"network"} == fresh.records[0].keys()
    together = [attack for attack in result["attacks"] if not attack["apart"]]
    for attack in together:
        limit = attack["num_images"] or len(result["records"])
        if attack["total"] == min(limit, len(result["records"])):  # clean accuracy can be for more images
            before = (*attack["after"], attack["name"])
            at = [record["misclassified_at"] for record in result["records"][:limit]]
            assert attack["correct"] == sum(all(of.get(name, -1) < 0 for name in before) for of in at), attack["name"]
    known = [record["robust"] for record in result["records"] if record["index"] < _covered(together)]
    assert None not in known
    assert {**accuracy(np.array(known)), "unknown": len(result["records"]) - len(known)} == result["worst"]


def _covered(attacks):
    return min(attack["num_images"] or 10**9 for attack in attacks)


def test_images_that_counted_as_robust_to_an_attack_that_skipped_them_become_unknown():
    def attack(name, **more):
        return {
            "name": name, "kind": name, "epsilon": 0.1, "step_size": None, "num_steps": 0, "restarts": 1,
            "any_iterate": True, "num_directions": None, "after": [], "num_images": None, "apart": False, "label": None,
            "judged_by": "any iterate", "attacked": 3, "forward": 3, "backward": 0, "lowest_single_run": None,
            "seconds": 1.0, **accuracy(np.array([True, True, False])), **more,
        }  # fmt: skip

    square = attack("square", num_steps=9, num_images=1, after=["clean"], **accuracy(np.array([True])))
    old = {
        "seed": 0, "images": 3, "attacks": [attack("clean"), square], "environment": {"platform": "cpu"},
        "worst": accuracy(np.array([True, True, False])),
        "records": [
            {
                "index": i, "label": 0, "robust": i < 2, "margin": {"clean": 1.0 if i < 2 else -1.0},
                "fallen_at": {"clean": -1 if i < 2 else 0}, "linf": {"clean": 0.0},
            }
            for i in range(3)
        ],
    }  # fmt: skip
    new = migrated(old)
    assert [record["robust"] for record in new["records"]] == [True, None, False]
    assert (new["worst"]["correct"], new["worst"]["total"], new["worst"]["unknown"]) == (1, 1, 2)
    assert new["attacks"][1]["settings"] == {"num_steps": 9}
