"""Training runs: interrupted and uninterrupted ones give the same weights; errors come before anything is written."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from experiments import train as train_script
from experiments.networks import load_network
from fs_jax import data
from fs_jax.config import ModelConfig, TrainConfig, TransportConfig
from fs_jax.training import Checkpoints, loop, make_method, train
from fs_jax.training.loop import read_config

pytestmark = pytest.mark.usefixtures("one_batch_size")

DIGITS = data.load("digits")
SHORT = TrainConfig(
    dataset="digits",
    train_size=1437,
    model=ModelConfig(10, 1),
    method="standard",  # its step compiles fastest
    batch_size=128,
    epochs=3,
    decay_epochs=(2,),
)
# PGD with one step: it draws noise as feature scattering does, and compiles faster.
WORDS = [
    "digits", "--batch-size", "128", "--epochs", "2", "--decay-epochs", "1", "--holdout", "256",
    "--monitor-images", "4", "--steps-per-dispatch", "3", "--checkpoint-minutes", "0", "--devices", "1",
    "--method", "pgd", "--attack.num-steps", "1",
]  # fmt: skip
ROOT = pathlib.Path(__file__).parents[2]
# The same as `python -m experiments.train`, but with the simulated rounding of this process, if any (`tests.disturb`).
MODULE = """
import runpy
from tests import disturb
disturb.if_asked()
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


def command(workdir, *options):
    """Run the command in this process, where its programs are already compiled, and return its exit status."""
    return train_script.main([*WORDS, "--workdir", str(workdir), *options])


def start(workdir):
    """Start the command in a process of its own, with as many devices as this process has."""
    return subprocess.Popen(
        [sys.executable, "-c", MODULE, *WORDS, "--workdir", str(workdir)],
        cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.local_device_count())},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def rows(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
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
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert command(workdir) == 0
    return workdir


def same_run(workdir, other):
    """The same weights, momentum and statistics, bit for bit, and the same log."""
    jax.tree.map(np.testing.assert_array_equal, last_state(workdir), last_state(other))
    timeless = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(w)] for w in (workdir, other)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        (signal.SIGKILL, [12]),
        pytest.param(signal.SIGKILL, [5, 12], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, [5, 12], marks=pytest.mark.slow),
    ],
    ids=["SIGKILL", "SIGKILL twice", "SIGTERM twice"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stop, at, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert command(workdir, "--max-minutes", "0") == 75
    # One dispatch: even without time, a run makes progress.
    assert "Stopped at step 3. Rerun the same command to resume" in capsys.readouterr().out
    for reached in at:  # within an epoch of 9 steps
        process = start(workdir)
        wait_for(lambda reached=reached: rows(workdir)[-1]["step"] >= reached, process)
        if stop == signal.SIGKILL:
            process.send_signal(signal.SIGSTOP)  # so that it cannot end before it is killed
            with pytest.raises(BlockingIOError, match="another process is training"):
                command(workdir)
        process.send_signal(stop)
        out, err = process.communicate(timeout=240)
        if stop == signal.SIGTERM:
            assert process.returncode == 75, err
            assert "Rerun the same command to resume" in out
        else:
            assert process.returncode == -signal.SIGKILL
    assert command(workdir) == 0
    out, err = capsys.readouterr()
    assert "Resuming from step" in err
    assert "python -m experiments.evaluate --workdir" in out
    assert int(last_state(workdir).step) == 18
    same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_feature_scattering_stopped_after_each_dispatch_equals_an_uninterrupted_run_bit_for_bit(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(whole, "--method", "feature_scatter") == 0
    stops = 0
    while command(stopped, "--method", "feature_scatter", "--max-minutes", "0") == 75:
        stops += 1
    assert stops >= 5  # of 18 steps in dispatches of 3
    same_run(stopped, whole)


def test_a_finished_run_is_not_changed(uninterrupted):
    before = rows(uninterrupted)
    run = train(read_config(uninterrupted), DIGITS, uninterrupted, devices=jax.devices()[:1], progress=False)
    assert run.finished
    assert rows(uninterrupted) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    # The weights grow 4,000-fold per step, so they overflow float32 (3e38) after about ten steps.
    config = dataclasses.replace(SHORT, learning_rate=2e7, epochs=3, decay_epochs=())
    with pytest.raises(FloatingPointError, match=r"Not finite .* Training stopped.*Try a lower learning rate") as error:
        train(
            config, DIGITS, tmp_path, devices=jax.devices()[:1], monitor_images=0, progress=False,
            steps_per_dispatch=1, checkpoint_minutes=0,
        )  # fmt: skip
    state = last_state(tmp_path)
    assert f"The last good checkpoint is at step {int(state.step)}." in str(error.value)
    assert int(state.step) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_best_checkpoint_is_the_best_monitored_epoch(uninterrupted):
    monitored = [row for row in rows(uninterrupted) if "monitor_robust" in row]
    assert len(monitored) == 2
    best = max(monitored, key=lambda row: row["monitor_robust"])  # the first one, if several are equal
    config = read_config(uninterrupted)
    with Checkpoints(uninterrupted, config) as checkpoints:
        assert int(checkpoints.restore_best().step) == best["step"]
        assert checkpoints.best_scores() == {k: best[k] for k in ("monitor_clean", "monitor_robust")}
    assert config.steps_per_epoch == (1437 - 256) // 128
    assert list((uninterrupted / "tensorboard").iterdir())


def test_another_configuration_cannot_resume_a_run(uninterrupted):
    with pytest.raises(ValueError, match=r"expected a run with this configuration.*seed: 1 here, 0 there"):
        train(dataclasses.replace(read_config(uninterrupted), seed=1), DIGITS, uninterrupted, devices=jax.devices()[:1])


def test_a_folder_with_other_files_raises_an_error_and_is_not_changed(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"contains thesis.tex but no config.json.*nothing was changed"):
        train(SHORT, DIGITS, tmp_path, devices=jax.devices()[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_as_workdir_raises_an_error(tmp_path, below):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match=r"workdir: expected a folder that can be created; got .*file"):
        train(SHORT, DIGITS, tmp_path / "file" / below, devices=jax.devices()[:1])
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_workdir_that_is_not_writable_raises_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as with mode 0o500, if the tests do not run as root
    with pytest.raises(PermissionError, match="workdir: expected a writable folder"):
        train(SHORT, DIGITS, tmp_path, devices=jax.devices()[:1])


@pytest.mark.parametrize("text", ['{"name": "a web page"}', "[1, 2]", '{"dataset": "dig'])
def test_an_invalid_configuration_in_the_workdir_raises_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"workdir: expected the folder of a run; got an invalid configuration in .*config.json"
    ):
        train(SHORT, DIGITS, tmp_path, devices=jax.devices()[:1])


def test_a_configuration_that_does_not_work_creates_no_folder(tmp_path):
    config = dataclasses.replace(SHORT, model=ModelConfig(10, 1, "float64"))
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16, as JAX is not in 64-bit mode"):
        train(config, DIGITS, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def test_a_holdout_of_all_images_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="holdout: expected an integer of at least 0 of at most 1436; got 1437"):
        train(dataclasses.replace(SHORT, holdout=1437), DIGITS, tmp_path / "run", devices=jax.devices()[:1])


def test_a_batch_larger_than_the_data_raises_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch_size: expected at most 1437, the number of training images; got 2000"):
        train(dataclasses.replace(SHORT, batch_size=2000), DIGITS, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["gs://bucket/run", "file:///tmp/run", pathlib.Path("s3://bucket/run")])
def test_a_url_as_workdir_raises_an_error(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"workdir: expected a local folder; got the address \w+://.*Mount it"):
        train(SHORT, DIGITS, address, progress=False)
    assert not list(tmp_path.iterdir())


def test_other_data_cannot_resume_a_run(uninterrupted):
    images = DIGITS.train_images.copy()
    images[0, 0, 0] ^= 1
    with pytest.raises(ValueError, match=r"data: '\w+' here, '\w+' there"):
        train(
            read_config(uninterrupted), dataclasses.replace(DIGITS, train_images=images), uninterrupted, progress=False
        )


def test_another_augmentation_cannot_resume_a_run(tmp_path):
    arrays = {name: getattr(DIGITS, name)[:64] for name in data.types.ARRAYS}
    path, config = tmp_path / "mine.npz", dataclasses.replace(SHORT, batch_size=32, epochs=1, decay_epochs=())
    np.savez(path, **arrays)
    loop.open_workdir(tmp_path / "run", loop._fit_to_data(config, data.load(path)))
    np.savez(path, **arrays, flip=True)
    with pytest.raises(ValueError, match=r"data: '\w+' here, '\w+' there \(data: .* or their augmentation"):
        train(config, data.load(path), tmp_path / "run", devices=jax.devices()[:1], progress=False)


def test_the_augmentation_of_a_registered_data_set_is_known_by_its_name():
    of_arrays = loop.fingerprint([DIGITS.train_images, DIGITS.train_labels])
    assert loop.training_fingerprint(DIGITS) == of_arrays  # so that older runs can be resumed
    flipped = dataclasses.replace(DIGITS, info=dataclasses.replace(DIGITS.info, flip=True))
    assert loop.training_fingerprint(flipped) != of_arrays


def test_the_configuration_has_the_name_of_the_data_set():
    mine = dataclasses.replace(DIGITS, info=dataclasses.replace(DIGITS.info, name="mine"))
    assert loop._fit_to_data(SHORT, mine).dataset == "mine"


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_labels": DIGITS.train_labels + 1}, "dataset: train_labels: expected 0 to 9; got 10"),
    ({"train_images": DIGITS.train_images / 255}, "dataset: train_images: expected uint8 in 0, ..., 255; got float64"),
    ({"train_labels": DIGITS.train_labels[1:]}, "dataset: train_labels: expected 1437, one per image; got 1436"),
])  # fmt: skip
def test_an_invalid_data_set_raises_an_error_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(SHORT, dataclasses.replace(DIGITS, **changes), tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"epochs": 2}, r"decay_epochs: expected epochs before the end of training, after 2 epochs; got 2"),
        ({"batch_size": 62}, r"Only 2 of 4 devices are used, as more cannot share the batch_size of 62"),
        (
            {"transport": TransportConfig(scope="device"), "method": "feature_scatter"},
            "4 devices solves a transport problem",
        ),
        ({"sync_batch_norm": False}, "BatchNorm normalises over the 32 images of each device"),
    ],
)
def test_a_warning_says_how_the_number_of_devices_changes_the_method(changes, note, tmp_path):
    (tmp_path / "other").touch()
    config = dataclasses.replace(SHORT, **changes)
    with pytest.warns(UserWarning, match=note), pytest.raises(ValueError, match="workdir: expected a new folder"):
        train(config, DIGITS, tmp_path, progress=False)


def test_without_an_effect_of_the_number_of_devices_there_is_no_warning(tmp_path):
    (tmp_path / "other").touch()
    config = dataclasses.replace(SHORT, method="feature_scatter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="workdir: expected a new folder"):
            train(config, DIGITS, tmp_path, progress=False)


def test_a_dispatch_takes_about_ten_seconds():
    pace = loop._Pace(None)
    lengths = []
    for seconds in (60.0, 10.6, 4.0, 0.1, 50.0):  # the first one compiles
        lengths.append(pace.steps)
        pace.record(pace.steps, seconds)
    assert [*lengths, pace.steps] == [1, 1, 1, 2, 25, 5]
    fixed = loop._Pace(3)
    fixed.record(3, 99.0)
    fixed.record(3, 99.0)
    assert fixed.steps == 3


PAPER = """
import dataclasses, sys, numpy as np, jax
from fs_jax import data
from fs_jax.config import preset
from fs_jax.training import train
rng = np.random.default_rng(0)
images, labels = rng.integers(0, 256, (120, 32, 32, 3), np.uint8), np.arange(120, dtype=np.int32) % 10
dataset = data.Dataset(data.info("cifar10"), images, labels, images[:2], labels[:2])
run = train(preset("cifar10_wrn28_10"), dataset, sys.argv[1], max_minutes=0, monitor_images=0, progress=False)
print(int(run.state.step), jax.local_device_count())
"""


@pytest.mark.slow  # and needs about 4 GB
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_papers_preset_takes_a_step_on_any_number_of_devices(devices, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PAPER, str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["1", str(devices)], done.stderr
    assert ("6 of 8 devices are used" in done.stderr) == (devices == 8)
    assert "a different method" not in done.stderr


@pytest.mark.slow
def test_the_average_of_the_weights_is_monitored_saved_and_returned(tmp_path):
    config = dataclasses.replace(SHORT, epochs=2, decay_epochs=(1,), weight_average=0.9)
    run = train(config, DIGITS, tmp_path / "run", devices=jax.devices()[:1], monitor_images=64, progress=False)
    method = make_method(config)
    jax.tree.map(np.testing.assert_array_equal, run.variables, run.state.own["average"])
    assert not np.array_equal(run.variables["params"]["fc"]["bias"], run.state.params["fc"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "run").evaluated(method), run.variables)
    _, variables, _ = load_network(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, variables, run.variables)


def test_a_run_whose_method_depends_on_the_number_of_devices_resumes_with_that_number_only(tmp_path):
    config = dataclasses.replace(SHORT, sync_batch_norm=False)
    loop.open_workdir(tmp_path / "run", loop._fit_to_data(dataclasses.replace(config, parts=4), DIGITS))
    with pytest.raises(
        ValueError, match=r"parts: 1 here, 4 there \(parts: the number of devices that have a transport"
    ):
        train(config, DIGITS, tmp_path / "run", devices=jax.devices()[:1], progress=False)


@pytest.mark.slow
def test_on_epoch_is_called_before_the_first_epoch_and_after_each_epoch(tmp_path):
    seen = []

    def on_epoch(epoch, variables):
        seen.append((epoch, float(np.abs(variables["params"]["fc"]["kernel"]).sum())))

    stopped = train(SHORT, DIGITS, tmp_path, max_minutes=0, on_epoch=on_epoch, monitor_images=0, progress=False)
    run = train(SHORT, DIGITS, tmp_path, on_epoch=on_epoch, monitor_images=0, progress=False)
    assert not stopped.finished
    assert [epoch for epoch, _ in seen] == list(range(SHORT.epochs + 1))
    assert seen[-1][1] == pytest.approx(float(np.abs(run.variables["params"]["fc"]["kernel"]).sum()))
    assert len({weights for _, weights in seen}) == len(seen)
