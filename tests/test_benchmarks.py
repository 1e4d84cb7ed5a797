"""Timing of programs, and writing of result files."""

import json

import numpy as np
import pytest

from experiments.benchmarks.timing import seconds_in_turn, timed
from experiments.output import made_on, write_files


@pytest.mark.parametrize(("pause", "runs"), [(None, 4), (0.0, 8)])
def test_programs_take_turns_and_the_first_round_is_not_timed(pause, runs):
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = seconds_in_turn(programs, 3, pause=pause)
    assert {name: len(of) for name, of in times.items()} == {"a": 3, "b": 3}
    assert len(calls) == 2 * runs
    assert calls[: len(calls) // runs] == (["a", "b"] if pause is None else ["a", "a"])
    assert timed(lambda: 5)[1] == 5


def test_write_files_writes_text_and_json(tmp_path):
    write_files(tmp_path / "new", {"a.md": "τ", "b.json": {"x": 1, "path": tmp_path}, "c.json": {"records": [1, 2]}})
    assert (tmp_path / "new" / "a.md").read_text(encoding="utf-8") == "τ"
    assert json.loads((tmp_path / "new" / "b.json").read_text(encoding="utf-8")) == {"x": 1, "path": str(tmp_path)}
    assert (tmp_path / "new" / "c.json").read_text(encoding="utf-8").count("\n") == 1
    with pytest.raises(TypeError):  # instead of writing the number as a string
        write_files(tmp_path, {"d.json": {"x": np.float32(0.5)}})
    assert not (tmp_path / "d.json").exists()


def test_captions_have_device_and_libraries():
    environment = {"device": "cpu", "cpu_count": 2, "jax": "0.12", "flax": "0.12", "torch": "2.14"}
    assert made_on(environment) == "cpu, 2 cores, jax 0.12, torch 2.14"
