"""The paper's tables: every declaration is whole, networks are shared, and numbers are pooled and compared rightly."""

import csv
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.paper import costs, jobs, runner, tables
from experiments.paper.scales import SCALES, changed
from fs_jax.config import TrainConfig, to_dict

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", jobs.SWEEPS)
def test_every_table_can_be_run_at_every_scale(name, scale):
    sweep = jobs.sweep(name)
    attacks = sweep.attacks(SCALES[scale])
    assert sweep.name == name
    assert attacks[0].name == "clean"
    assert len({row.label for row in sweep.rows}) == len(sweep.rows)
    for row in sweep.rows:
        assert row.paper.keys() <= {attack.name for attack in attacks}
        for config in jobs.configurations(SCALES[scale], row, [0]):
            assert config.dataset in SCALES[scale].datasets
            json.dumps(to_dict(config))
    folders = {
        jobs.folder_of(pathlib.Path(), scale, config)
        for row in sweep.rows
        for config in jobs.configurations(SCALES[scale], row, [0])
    }
    assert len(folders) == len(sweep.rows) * len(SCALES[scale].datasets)  # no two rows are the same network


def test_tables_share_the_networks_that_they_have_in_common(tmp_path):
    alone = {name: jobs.jobs("digits", [name], [0], tmp_path) for name in jobs.SWEEPS}
    together = jobs.jobs("digits", jobs.SWEEPS, [0], tmp_path)
    assert len(together) < sum(map(len, alone.values()))
    # The paper's own configuration is a row of all but one of them.
    (own,) = [job for job in together if job.folder == alone["table1_strong_attacks"][0].folder]
    assert set(own.sweeps) == set(jobs.SWEEPS) - {"table4_ipot_beta"}
    # And tables with the same attacks have one evaluation of it.
    files = {name: jobs.evaluation_file(own.folder, SCALES["digits"], name) for name in own.sweeps}
    assert files["table2_label_smoothing"] == files["table3_sinkhorn_tau"] != files["matching"]


def test_changes_are_named_as_on_the_command_line():
    config = changed(TrainConfig(), {"smoothing": 0.3, "transport.reg": 0.05, "attack.num_steps": lambda c: c.epochs})
    assert (config.smoothing, config.transport.reg, config.attack.num_steps) == (0.3, 0.05, 200)
    assert config.attack.epsilon == TrainConfig().attack.epsilon


def evaluated(right, chain=("clean", "pgd-20")):
    """An evaluation in which image i is right after the first right[i] attacks."""
    attacks = [{"name": name, "after": [], "num_images": None} for name in chain]
    records = [{"misclassified_at": {n: -1 if k < count else 0 for k, n in enumerate(chain)}} for count in right]
    return {"attacks": attacks, "records": records, "environments": [{"device": "cpu", "cpu_count": 2, "jax": "0"}]}


def test_folds_are_pooled():
    numbers = tables.pooled([evaluated([2, 2, 1]), evaluated([0, 1])])
    assert (numbers["clean"]["correct"], numbers["pgd-20"]["correct"], numbers["clean"]["total"]) == (4, 2, 5)
    chained = evaluated([2, 1, 0])
    chained["attacks"][1]["after"] = ["clean"]
    del chained["records"][2]["misclassified_at"]["pgd-20"]  # spared, and no less wrong
    assert tables.pooled([chained])["pgd-20"]["correct"] == 1


@pytest.mark.parametrize(("ours", "theirs", "word"), [
    (900, 900, "equal"), (960, 900, "higher"), (840, 900, "lower"), (905, 895, "equal"),
])  # fmt: skip
def test_rows_are_equal_only_within_two_points_for_sure(ours, theirs, word):
    rows = [{"images": np.arange(1000) < count} for count in (ours, theirs)]
    assert tables.verdict(*rows).endswith(word)


def test_few_images_decide_nothing():
    rng = np.random.default_rng(0)
    rows = [{"images": rng.random(100) < 0.5} for _ in range(2)]
    assert tables.verdict(*rows).endswith("undetermined")


def test_files_have_ours_and_the_papers(tmp_path):
    sweep, scale = jobs.sweep("table4_ipot_beta"), SCALES["trial"]
    assert tables.files(sweep, "trial", [0], tmp_path) is None  # not before all rows are there
    for row in sweep.rows:
        for config in jobs.configurations(scale, row, [0]):
            path = jobs.evaluation_file(jobs.folder_of(tmp_path, "trial", config), scale, sweep.name)
            path.parent.mkdir(parents=True)
            names = [attack.name for attack in sweep.attacks(scale)]
            path.write_text(json.dumps(evaluated([6] * 15 + [1] * 5, names)), encoding="utf-8")
    files = tables.files(sweep, "trial", [0], tmp_path)
    assert "| β = 1 | 100.0" in " ".join(files[f"{sweep.name}.md"].split())
    assert "(69.9)" in files[f"{sweep.name}.md"]
    assert "\\toprule" in files[f"{sweep.name}.tex"]
    rows = list(csv.DictReader(io.StringIO(files[f"{sweep.name}.csv"])))
    assert rows[2] == {
        "row": "β = 1", "attack": "pgd-20", "correct": "15", "total": "20", "accuracy": "0.75", "low": rows[2]["low"],
        "high": rows[2]["high"], "paper": "69.9",
    }  # fmt: skip


@pytest.mark.parametrize(("words", "message"), [
    (["--scale", "digts"], "scale: expected one of trial, digits, small, paper; got 'digts'. Did you mean 'digits'"),
    (["--seeds", "-1"], "seeds: expected an integer of at least 0"), (["--workers", "0"], "workers: expected"),
    (["--scale", "small", "--data-dir", "/nowhere"], "data_dir: expected cifar10/<version>"),
])  # fmt: skip
def test_what_is_wrong_is_said_at_once(words, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        runner.run(["table4_ipot_beta"], [*words, "--workdir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_table_is_stopped_resumed_and_written(tmp_path):
    command = [
        sys.executable, "-m", "experiments.paper.table4_ipot_beta", "--scale", "trial",
        "--workdir", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
    ]  # fmt: skip

    def run(*more):
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")

    stopped = run("--max-minutes", "0.1")
    assert stopped.returncode == 75, stopped.stderr
    done = run()
    assert done.returncode == 0, done.stderr
    assert "IPOT, proximal weight β" in done.stdout
    assert (tmp_path / "results" / "trial" / "table4_ipot_beta.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert run().returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}  # nothing ran


def test_estimates_count_the_test_images_and_the_passes_of_the_attacks(tmp_path):
    (job, *_) = jobs.jobs("paper", ["table3_sinkhorn_tau"], [0], tmp_path)
    few, many = (costs.seconds_of(job, {"step": 0.0, "pass": 1.0, "test_images": n}) for n in (100, 10_000))
    # Of each image: a look, FGSM, 20 and 100 steps of PGD and of CW, whose last iterate decides.
    assert many - few == pytest.approx(9_900 * (0.4 + 1 + 2 * (20 + 100)))
    slow = costs.seconds_of(job, {"step": 2.0, "pass": 1.0, "test_images": 100})
    assert slow - few == 2 * job.config.total_steps
