"""An interrupted evaluation resumes from its journal; another evaluation raises an error."""

import json
import re

import numpy as np
import pytest

from fs_jax.attacks.chain import Outcome
from fs_jax.evaluation import Journal, fingerprint

HEADER = {"weights": "1f", "epsilon": 0.1, "shape": [8, 8]}
HERE = {"device": "cpu", "jax": "0.12"}
SETTINGS = {"settings": {"num_steps": 20}, "after": ("clean",)}
OUTCOMES = [Outcome(index, run, 20, -1 if index else 3, 0.5 - index, 0.1) for run in (0, 1) for index in (0, 1, 2)]


def write(path):
    with Journal(path, HEADER, HERE) as journal:
        journal.begin("clean", {})
        journal.append("clean", OUTCOMES[:1], seconds=0.25)
        journal.begin("pgd-20", SETTINGS)
        journal.append("pgd-20", OUTCOMES[:2], seconds=1.5)
        journal.append("pgd-20", OUTCOMES[2:], seconds=2.5)


def read(path):
    with Journal(path, HEADER, HERE) as journal:
        return journal.outcomes, journal.seconds


def test_reads_what_was_written(tmp_path):
    write(tmp_path / "records.jsonl")
    outcomes, seconds = read(tmp_path / "records.jsonl")
    assert outcomes["pgd-20"] == {(outcome.index, outcome.run): outcome for outcome in OUTCOMES}
    assert seconds == {"clean": 0.25, "pgd-20": 4.0}


def test_a_journal_cut_anywhere_keeps_its_complete_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 5):  # in every line, many times
        path.write_bytes(whole[:cut])
        with Journal(path, HEADER, HERE) as journal:
            journal.begin("pgd-20", SETTINGS)
            journal.append("pgd-20", OUTCOMES, seconds=1)
        assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        # The lines before the cut are unchanged, unless the first is cut: then the file starts again.
        kept = whole[:cut].rfind(b"\n") + 1
        assert path.read_bytes().startswith(whole[:kept])
        assert read(path)[0]["pgd-20"].keys() == {(outcome.index, outcome.run) for outcome in OUTCOMES}


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        ({"weights": "2e"}, {}, "weights: expected '1f', as in"),
        ({"epsilon": 0.2}, {}, "epsilon: expected 0.1, as in"),
        ({"split": "test"}, {}, "split: expected none, as in"),
        ({}, {"settings": {"num_steps": 40}}, "pgd-20: num_steps: expected 20, as in"),
        ({}, {"after": ()}, "pgd-20: after: expected ['clean'], as in"),
    ],
)
def test_another_evaluation_raises_an_error_and_changes_nothing(tmp_path, header, settings, message):
    path = tmp_path / "records.jsonl"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)), Journal(path, HEADER | header, HERE) as journal:
        journal.begin("pgd-20", SETTINGS | settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ['{"step": 1}\n{"step": 2}\n', "no JSON", "[1]\n"])
def test_another_file_raises_an_error_and_is_not_changed(tmp_path, content):
    path = tmp_path / "records.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.jsonl.*: expected"):
        Journal(path, HEADER, HERE)
    assert path.read_text(encoding="utf-8") == content


def test_every_environment_is_recorded_once(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path)
    for device in ("gpu", "cpu", "gpu"):
        with Journal(path, HEADER, HERE | {"device": device}) as journal:
            environments = journal.environments
    assert [environment["device"] for environment in environments] == ["cpu", "gpu"]


def test_two_processes_do_not_write_at_once(tmp_path):
    path = tmp_path / "records.jsonl"
    with Journal(path, HEADER, HERE), pytest.raises(BlockingIOError, match="another process is writing to it"):
        Journal(path, HEADER, HERE)
    Journal(path, HEADER, HERE).close()  # both are closed, the first and the one that failed


def test_fingerprints_depend_on_names_shapes_types_and_values():
    trees = [
        {"w": np.zeros(4, np.float32)},
        {"v": np.zeros(4, np.float32)},
        {"w": np.zeros((2, 2), np.float32)},
        {"w": np.zeros(4, np.int32)},
        {"w": np.array([0, 0, 1e-30, 0], np.float32)},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint(trees[0]) == fingerprint({"w": np.zeros(8, np.float32)[::2]})  # a view
