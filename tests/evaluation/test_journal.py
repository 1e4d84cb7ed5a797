"""The log of an evaluation goes on after any end, and takes no other evaluation for its own."""

import json
import re

import numpy as np
import pytest

from fs_jax.evaluation.journal import Journal, Record, fingerprint

HEADER = {"weights": "1f", "epsilon": 0.1, "shape": [8, 8]}
SETTINGS = {"num_steps": 20, "after": ("clean",)}
RECORDS = [Record(index, run, 20, -1 if index else 3, 0.5 - index, 0.1) for run in (0, 1) for index in (0, 1, 2)]


def write(path):
    with Journal(path, HEADER) as journal:
        journal.begin("clean", {})
        journal.append("clean", RECORDS[:1], seconds=0.25)
        journal.begin("pgd-20", SETTINGS)
        journal.append("pgd-20", RECORDS[:2], seconds=1.5)
        journal.append("pgd-20", RECORDS[2:], seconds=2.5)


def read(path):
    with Journal(path, HEADER) as journal:
        return journal.records, journal.seconds


def test_what_was_written_is_there_again(tmp_path):
    write(tmp_path / "records.jsonl")
    records, seconds = read(tmp_path / "records.jsonl")
    assert records["pgd-20"] == {(record.index, record.run): record for record in RECORDS}
    assert seconds == {"clean": 0.25, "pgd-20": 4.0}


def test_cut_anywhere_it_keeps_the_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, HEADER) as journal:
            journal.begin("pgd-20", SETTINGS)
            journal.append("pgd-20", RECORDS, seconds=1)
        assert all(json.loads(line) for line in path.read_text().splitlines())
        # The lines before the cut, word for word; but for the first, without which nothing follows.
        kept = whole[:cut].rfind(b"\n") + 1
        assert path.read_bytes().startswith(whole[:kept])
        assert read(path)[0]["pgd-20"].keys() == {(record.index, record.run) for record in RECORDS}


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        ({"weights": "2e"}, {}, "weights: expected '1f', as in"),
        ({"epsilon": 0.2}, {}, "epsilon: expected 0.1, as in"),
        ({"split": "test"}, {}, "split: expected none, as in"),
        ({}, {"num_steps": 40}, "pgd-20: num_steps: expected 20, as in"),
        ({}, {"after": ()}, "pgd-20: after: expected ['clean'], as in"),
    ],
)
def test_another_evaluation_is_refused_and_nothing_is_changed(tmp_path, header, settings, message):
    path = tmp_path / "records.jsonl"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)), Journal(path, HEADER | header) as journal:
        journal.begin("pgd-20", SETTINGS | settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ['{"step": 1}\n{"step": 2}\n', "no JSON", "[1]\n"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"records\.jsonl.*: expected"):
        Journal(path, HEADER)
    assert path.read_text() == content


def test_two_do_not_write_at_once(tmp_path):
    path = tmp_path / "records.jsonl"
    with Journal(path, HEADER), pytest.raises(BlockingIOError, match="another process is writing it"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()  # the first is closed, and so is the one that was refused


def test_fingerprints_tell_names_shapes_types_and_values_apart():
    trees = [
        {"w": np.zeros(4, np.float32)},
        {"v": np.zeros(4, np.float32)},
        {"w": np.zeros((2, 2), np.float32)},
        {"w": np.zeros(4, np.int32)},
        {"w": np.array([0, 0, 1e-30, 0], np.float32)},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint(trees[0]) == fingerprint({"w": np.zeros(8, np.float32)[::2]})  # a view
