"""Runs: stopped, killed or left alone they end in the same weights; what is wrong is said before anything is lost."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fs_jax import data
from fs_jax.config import AttackConfig, ModelConfig, TrainConfig
from fs_jax.training import Checkpoints, train
from fs_jax.training.loop import read_config

DIGITS = data.load("digits")
SHORT = TrainConfig(
    dataset="digits",
    train_size=1437,
    model=ModelConfig(10, 1),
    attack=AttackConfig(epsilon=0.1),
    batch_size=128,
    epochs=3,
    decay_epochs=(2,),
)
COMMAND = [
    sys.executable, "-m", "experiments.train", "digits", "--batch-size", "128", "--epochs", "3", "--decay-epochs", "2",
    "--steps-per-dispatch", "2", "--monitor-images", "0", "--checkpoint-minutes", "0",
]  # fmt: skip
ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, *options, command=COMMAND):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *options],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def rows(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(what, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_state(workdir):
    with Checkpoints(workdir, read_config(workdir)) as checkpoints:
        return checkpoints.restore_latest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, out, err = finish(start(workdir))
    assert code == 0, err
    assert "python -m experiments.evaluate --workdir" in out
    return workdir


def same_run(workdir, other):
    """The same weights, momentum and statistics, bit for bit, and the same log."""
    jax.tree.map(np.testing.assert_array_equal, last_state(workdir), last_state(other))
    timeless = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(w)] for w in (workdir, other)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "stop", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGKILL", "SIGTERM"]
)
def test_a_run_that_is_stopped_and_resumed_equals_one_left_alone_bit_for_bit(stop, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    code, out, err = finish(start(workdir, "--max-minutes", "0"))
    assert code == 75, err
    assert "Stopped at step 2. The same command goes on" in out  # one dispatch: it never stops without progress
    # Twice more: once within an epoch, and once later on.
    for reached in (5, 20):
        process = start(workdir)
        wait_for(lambda reached=reached: rows(workdir) and rows(workdir)[-1]["step"] >= reached, process)
        process.send_signal(stop)
        code, out, err = finish(process)
        if stop == signal.SIGTERM:
            assert code == 75, err
            assert "The same command goes on" in out
        else:
            assert code == -signal.SIGKILL
    code, _, err = finish(start(workdir))
    assert code == 0, err
    assert "Going on from step" in err
    assert int(last_state(workdir).step) == 33
    same_run(workdir, undisturbed)


def test_a_finished_run_is_left_as_it_is(undisturbed):
    before = rows(undisturbed)
    run = train(read_config(undisturbed), DIGITS, undisturbed, devices=jax.devices()[:1], progress=False)
    assert run.finished
    assert rows(undisturbed) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    # Weights that grow 4,000-fold a step leave float32's range of 3e38 after some ten of them, not at once.
    config = dataclasses.replace(SHORT, learning_rate=2e7, epochs=3, decay_epochs=(), method="standard")
    with pytest.raises(FloatingPointError, match=r"Not finite .* The run stops.*Try a lower learning rate") as error:
        train(
            config, DIGITS, tmp_path, devices=jax.devices()[:1], monitor_images=0, progress=False,
            steps_per_dispatch=1, checkpoint_minutes=0,
        )  # fmt: skip
    state = last_state(tmp_path)
    assert f"The last good checkpoint is of step {int(state.step)}." in str(error.value)
    assert int(state.step) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_best_checkpoint_is_the_best_monitored_epoch(tmp_path):
    config = dataclasses.replace(SHORT, holdout=256)
    train(config, DIGITS, tmp_path, devices=jax.devices()[:1], monitor_images=128, progress=False)
    monitored = [row for row in rows(tmp_path) if "monitor_robust" in row]
    assert len(monitored) == 3
    best = max(monitored, key=lambda row: row["monitor_robust"])  # the first of equals
    with Checkpoints(tmp_path, config) as checkpoints:
        assert int(checkpoints.restore_best().step) == best["step"]
        assert checkpoints.best_scores() == {k: best[k] for k in ("monitor_clean", "monitor_robust")}
    assert config.steps_per_epoch == (1437 - 256) // 128
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_of_another_configuration_is_refused(undisturbed):
    with pytest.raises(ValueError, match=r"expected a run of this configuration.*seed: 1 here, 0 there"):
        train(dataclasses.replace(read_config(undisturbed), seed=1), DIGITS, undisturbed, devices=jax.devices()[:1])


def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no config.json but thesis.tex.*nothing was changed"):
        train(SHORT, DIGITS, tmp_path, devices=jax.devices()[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"workdir: expected a folder that can be made; got .*file"):
        train(SHORT, DIGITS, tmp_path / "file" / below, devices=jax.devices()[:1])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as a mode of 0o500 would have it, were the tests not root
    with pytest.raises(PermissionError, match="workdir: expected a folder that can be written to"):
        train(SHORT, DIGITS, tmp_path, devices=jax.devices()[:1])


@pytest.mark.parametrize("text", ['{"name": "a web page"}', "[1, 2]", '{"dataset": "dig'])
def test_a_foreign_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"workdir: expected the folder of a run; .*config.json is no configuration"):
        train(SHORT, DIGITS, tmp_path, devices=jax.devices()[:1])


def test_a_configuration_that_does_not_work_leaves_no_folder_behind(tmp_path):
    config = dataclasses.replace(SHORT, model=ModelConfig(10, 1, "float64"))
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16 unless JAX computes in 64 bits"):
        train(config, DIGITS, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    try:
        wait_for((workdir / ".lock").exists, process)  # from its start, long before its first step
        with pytest.raises(BlockingIOError, match="another process is training"):
            train(read_config(workdir), DIGITS, workdir, devices=jax.devices()[:1])
    finally:
        process.kill()
        process.communicate()


def test_a_holdout_of_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holdout: expected an integer of at least 0 of at most 1436; got 1437"):
        train(dataclasses.replace(SHORT, holdout=1437), DIGITS, tmp_path / "run", devices=jax.devices()[:1])


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch_size: expected at most the 1437 training images; got 2000"):
        train(dataclasses.replace(SHORT, batch_size=2000), DIGITS, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
