"""The paper's tables: declarations are valid, networks are shared, and numbers are pooled and compared correctly."""

import csv
import dataclasses
import io
import json
import lzma
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import weights
from experiments.paper import ablation, attacked, autoattack_gap, costs, jobs, reuse, runner, tables, writing
from experiments.paper.experiment import PGD_7, Finished, Row, at_equal_passes
from experiments.paper.scales import EXPERIMENTS, SCALES, changed, scale_of
from fs_jax._utils.files import locked
from fs_jax.attacks import parse_attack
from fs_jax.config import TrainConfig, from_dict, to_dict
from fs_jax.data import load
from fs_jax.evaluation import evaluate
from fs_jax.evaluation.journal import SCHEMA
from fs_jax.models import WideResNet
from fs_jax.training import make_method
from fs_jax.training.loop import training_fingerprint
from tests.paper_results import ENVIRONMENT, evaluated, finish

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_run_at_every_scale(name, scale):
    experiment = jobs.experiment(name)
    assert experiment.name == name
    assert len({row.label for row in experiment.rows}) == len(experiment.rows)
    json.dumps(experiment.measurement.settings(SCALES[scale]))
    folders = set()
    for row in experiment.rows:
        configs = jobs.configurations(experiment, SCALES[scale], row, [0])
        assert len(configs) == (len(SCALES[scale].datasets) if experiment.pooled else 1)
        for config in configs:
            assert config.dataset in SCALES[scale].datasets
            make_method(config)
            folders.add(jobs.folder_of(pathlib.Path(), SCALES[scale], config))
    # All rows are different networks, except at scale trial, whose single epoch cannot be shortened to equal passes.
    assert scale == "trial" or len(folders) == len(experiment.rows) * len(configs)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_numbers_are_for_attacks_that_are_run(name):
    experiment = jobs.experiment(name)
    reported = {attack for row in experiment.rows for attack in row.paper}
    if reported:
        settings = experiment.measurement.settings(SCALES["paper"])
        assert settings[0][0] == "clean"
        assert reported <= {attack for attack, *_ in settings}


def test_experiments_share_networks(tmp_path):
    alone = {name: jobs.jobs(SCALES["digits"], [name], [0], tmp_path) for name in EXPERIMENTS}
    together = jobs.jobs(SCALES["digits"], EXPERIMENTS, [0], tmp_path)
    assert len(together) < sum(map(len, alone.values()))
    # All experiments except one have a row with the paper's configuration.
    (own,) = [job for job in together if job.folder == alone["table1_strong_attacks"][0].folder]
    assert set(own.experiments) == set(EXPERIMENTS) - {"table4_ipot_beta"}
    # Tables with the same attacks share its evaluation.
    files = {name: jobs.result_file(own.folder, SCALES["digits"], name) for name in own.experiments}
    assert files["table2_label_smoothing"] == files["table3_sinkhorn_tau"] != files["matching"]
    assert files["main_table"] == files["matching"] == files["autoattack_gap"]


def test_rows_can_be_selected(tmp_path):
    (job, *_) = some = jobs.jobs(SCALES["digits"], ["main_table", "transfer"], [0], tmp_path, rows=["TRADES"])
    assert {job.config.method for job in some} == {"trades"}
    assert job.experiments == ("main_table", "transfer")


def test_rows_at_equal_passes_have_equal_passes():
    config = SCALES["medium"].config
    fewer = changed(config, at_equal_passes(PGD_7).changes)
    assert fewer.epochs * (2 * 7 + 3) == pytest.approx(config.epochs * (2 + 3 + 1), rel=0.05)
    assert fewer.decay_epochs == (5, 6)


def test_changes_have_dotted_names():
    config = changed(TrainConfig(), {"smoothing": 0.3, "transport.reg": 0.05, "attack.num_steps": lambda c: c.epochs})
    assert (config.smoothing, config.transport.reg, config.attack.num_steps) == (0.3, 0.05, 200)
    assert config.attack.epsilon == TrainConfig().attack.epsilon


def test_folds_are_pooled():
    correct = tables.pooled([evaluated([2, 2, 1]), evaluated([0, 1])], datasets=2)
    assert correct["clean"].tolist() == [1, 1, 1, 0, 1]
    assert correct["pgd-20"].tolist() == [1, 1, 0, 0, 0]
    assert tables.by_network([evaluated([2, 2, 1]), evaluated([0, 1])], "clean") == [1.0, 0.5]
    chained = evaluated([2, 1, 0])
    chained["attacks"][1]["after"] = ["clean"]
    del chained["records"][2]["misclassified_at"]["pgd-20"]  # not attacked, as it is misclassified already
    assert tables.survived(chained, "pgd-20").tolist() == [True, False, False]
    chained["attacks"][1]["num_images"] = 2
    assert tables.survived(chained, "pgd-20").tolist() == [True, False]


def test_an_image_counts_once_for_several_seeds():
    of_seeds = [evaluated([2, 2, 1, 0]), evaluated([2, 1, 0, 0])]
    correct = tables.pooled(of_seeds, datasets=1)
    assert correct["clean"].tolist() == [1, 1, 0.5, 0]
    # Networks that agree on all images have the interval of a single one.
    one, same = (np.arange(100) < 50 for _ in range(2))
    several = tables.mean_accuracy(np.mean([one, same], 0))
    assert several == tables.mean_accuracy(one)
    mixed = tables.mean_accuracy(np.array([1, 0.5, 0, 0.5] * 25))
    assert (mixed["accuracy"], mixed["total"]) == (0.5, 100)
    assert mixed["high"] - mixed["accuracy"] == pytest.approx(1.96 * np.sqrt(0.125 / 99), rel=1e-6)


@pytest.mark.parametrize(("ours", "theirs", "word"), [
    (900, 900, "equal"), (960, 900, "higher"), (840, 900, "lower"), (905, 895, "equal"),
])  # fmt: skip
def test_rows_are_equal_only_if_the_interval_is_within_two_points(ours, theirs, word):
    assert difference(np.arange(1000) < ours, np.arange(1000) < theirs)["verdict"] == word


def difference(ours, theirs):
    """That of two rows with one network each."""
    return tables.difference(ours, theirs, [np.mean(ours)], [np.mean(theirs)])


def test_few_images_without_a_difference_are_undetermined():
    same = np.ones(20, bool)
    assert difference(same, same)["verdict"] == "undetermined"
    assert difference(np.ones(200, bool), np.ones(200, bool))["verdict"] == "equal"


def test_the_interval_of_a_difference_includes_the_variation_of_training():
    ours, theirs = np.arange(1000) < 900, np.arange(1000) < 850
    alike = tables.difference(ours, theirs, [0.9] * 5, [0.85] * 5, folds=5)
    images = alike["half"]
    assert images == alike["over_images"] == difference(ours, theirs)["half"]
    rows = [0.95, 0.85, 0.9, 0.99, 0.81], [0.85] * 5
    folds, seeds = (tables.difference(ours, theirs, *rows, folds=folds) for folds in (5, 1))
    # The t distribution's 97.5% quantile for 4 degrees of freedom is 2.776, and its 99.5% quantile is 4.604.
    expected = 2.776 * np.std([10, 0, 5, 14, -4], ddof=1) / np.sqrt(5)
    assert folds["half"] == pytest.approx(expected, rel=1e-3)
    assert seeds["half"] == pytest.approx(np.hypot(expected, images), rel=1e-3)
    assert (alike["verdict"], folds["verdict"]) == ("higher", "undetermined")
    assert tables.half_width(folds) == folds["half"]
    assert tables.half_width(folds, 0.99) == pytest.approx(expected * 4.604 / 2.776, rel=1e-3)
    both = np.hypot(expected * 4.604 / 2.776, images * 2.576 / 1.96)
    assert tables.half_width(seeds, 0.99) == pytest.approx(both, rel=1e-3)
    assert tables.half_width(difference(ours, theirs), 0.99) == pytest.approx(images * 2.576 / 1.96, rel=1e-3)
    # Seeds of the same fold count as one network.
    twice = tables.difference(ours, theirs, np.repeat(rows[0], 2) + np.tile([0.01, -0.01], 5), [0.85] * 10, folds=5)
    assert twice["half"] == pytest.approx(folds["half"])


def test_the_interval_covers_the_difference_of_two_methods():
    """Of 400 simulated pairs of rows, about 95% of the intervals contain the true difference of 0.

    An image has a difficulty in common for all networks, and each network its own mean, so both images and seeds vary.
    """
    rng, images, seeds, repetitions = np.random.default_rng(0), 200, 3, 400
    covered = 0
    for _ in range(repetitions):
        method = rng.normal(size=(2, 1, images))  # whether a method is good at an image
        network = 0.3 * rng.normal(size=(2, seeds, 1))
        correct = method + network + 0.5 * rng.normal(size=(2, seeds, images)) > 0
        ours, theirs = correct.mean(1)
        found = tables.difference(ours, theirs, *correct.mean(2))
        covered += abs(found["points"]) <= found["half"]
    error = np.sqrt(0.95 * 0.05 * repetitions)  # the standard error of the number of intervals
    assert abs(covered - 0.95 * repetitions) <= 2 * error


def test_data_are_checked_before_the_workers_start(tmp_path):
    few = dataclasses.make_dataclass("Few", ["train_labels", "info"])
    info = dataclasses.make_dataclass("Info", ["num_classes"])
    missing = jobs.jobs(SCALES["trial"], ["main_table"], [0], tmp_path)
    with pytest.raises(ValueError, match="dataset: expected at least 60 training images, a batch; got 30"):
        runner.check_data(few(np.zeros(30), info(10)), missing)
    with pytest.raises(ValueError, match=r"at least 4 classes for main_table; .* can run: .*table4_ipot_beta"):
        runner.check_data(few(np.zeros(90), info(3)), missing)
    runner.check_data(few(np.zeros(90), info(4)), missing)


def test_few_images_are_undetermined():
    rng = np.random.default_rng(0)
    assert difference(rng.random(100) < 0.5, rng.random(100) < 0.5)["verdict"] == "undetermined"


def test_files_have_our_accuracies_and_the_papers(tmp_path):
    experiment = jobs.experiment("table4_ipot_beta")
    assert (
        writing.write(experiment, SCALES["trial"], [0], tmp_path, tmp_path / "r") is None
    )  # not before a row is finished
    finish("table4_ipot_beta", "trial", tmp_path)
    path = writing.write(experiment, SCALES["trial"], [0], tmp_path, tmp_path / "r")
    assert "| β = 1 | 100.0" in " ".join(path.read_text(encoding="utf-8").split())
    assert "(69.9)" in path.read_text(encoding="utf-8")
    hours = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["hours"]
    assert hours == {"training": 0.5, "measuring": round(2 / 3600, 3)}
    assert "\\toprule" in path.with_suffix(".tex").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text(encoding="utf-8"))))
    assert rows[2] == {
        "row": "β = 1", "attack": "pgd-20", "correct": "15", "total": "20", "accuracy": "0.75", "low": rows[2]["low"],
        "high": rows[2]["high"], "paper": "0.699",
    }  # fmt: skip


def test_a_table_names_missing_rows(tmp_path):
    finish("table3_sinkhorn_tau", "trial", tmp_path, rows=2)
    path = writing.write(jobs.experiment("table3_sinkhorn_tau"), SCALES["trial"], [0], tmp_path, tmp_path / "r")
    assert "Not run yet: τ = 0.005; τ = 0.05; τ = 0.5." in path.read_text(encoding="utf-8")


def test_rows_are_compared_with_the_first_row_only(tmp_path):
    """Rows are not compared with the first finished row."""
    finish("matching", "trial", tmp_path)
    scale, experiment = SCALES["trial"], jobs.experiment("matching")
    whole = json.loads(
        writing.write(experiment, scale, [0], tmp_path, tmp_path / "r").with_suffix(".json").read_text(encoding="utf-8")
    )
    assert whole["rows"]["identity plan"]["pgd-20"]["difference"]["points"] == 0
    (first,) = jobs.configurations(experiment, scale, experiment.rows[0], [0])
    jobs.result_file(jobs.folder_of(tmp_path, scale, first), scale, "matching").unlink()
    rest = json.loads(
        writing.write(experiment, scale, [0], tmp_path, tmp_path / "s").with_suffix(".json").read_text(encoding="utf-8")
    )
    assert rest["rows"]["identity plan"]["pgd-20"]["difference"] is None


def test_the_gap_is_the_sum_over_the_attacks(tmp_path):
    finish("autoattack_gap", "trial", tmp_path, rows=1)
    path = writing.write(jobs.experiment("autoattack_gap"), SCALES["trial"], [0], tmp_path, tmp_path / "r")
    parts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["networks"]["feature scattering"]["parts"]
    assert (parts["misclassified"], parts["PGD-20"], parts["robust"]) == (0, 0.25, 0.75)
    assert sum(parts.values()) == 1
    assert path.with_suffix(".png").stat().st_size > 1000


def test_the_gap_of_several_seeds_is_their_mean():
    """Not the images that some network misclassifies, of which there are more with more seeds."""
    chain = list(dict.fromkeys([*autoattack_gap.STEPS.values(), *(f"pgd-20, logits x {f}" for f in ("0.1", "10"))]))
    lost = [[len(chain)] * 9 + [1], [1] + [len(chain)] * 9, [len(chain)] * 9 + [1]]  # another image for each seed
    of = Finished(Row("mine"), [evaluated(right, chain) for right in lost], [])
    assert autoattack_gap.parts(of, 1)["parts"]["PGD-20"] == pytest.approx(0.1)
    assert autoattack_gap.parts(of, 1)["parts"]["robust"] == pytest.approx(0.9)


def test_the_ablation_has_the_mean_difference_over_pairs_that_differ_in_the_plan_only():
    robust = {
        "transport, 1 step, Δ = 0.5": 60, "identity, 1 step, Δ = 0.5": 61, "noise, Δ = 0.5": 0,
        "transport, 1 step, Δ = 0": 50, "identity, 1 step, Δ = 0": 53, "transport, 7 steps, Δ = 0": 70,
    }  # fmt: skip
    finished = [
        Finished(Row(label), [evaluated([2] * count + [1] * (1000 - count))], []) for label, count in robust.items()
    ]
    data = ablation.EXPERIMENT.collect(ablation.EXPERIMENT, SCALES["small"], finished)
    assert data["plans"]["pairs"] == 2
    of = data["plans"]["differences"]["pgd-20"]
    assert of["points"] == pytest.approx(0.2)
    # Student's t with one degree of freedom, and the interval over images.
    assert of["half"] == pytest.approx(np.hypot(12.706 * 0.1, of["over_images"]), rel=1e-3)
    one = {"images": {"datasets": ["cifar10_16x16"]}, "seeds": [0]}
    assert "over the 2 pairs of rows that differ in the plan only" in ablation.EXPERIMENT.show({**data, **one})
    alone = ablation.EXPERIMENT.collect(ablation.EXPERIMENT, SCALES["small"], finished[:1])
    assert "plan only" not in ablation.EXPERIMENT.show({**alone, **one})


def test_experiments_of_one_network_name_its_seed_and_fold(tmp_path):
    mechanism, matching = (jobs.experiment(name) for name in ("mechanism", "matching"))
    assert writing.used_seeds(mechanism, [3, 4]) == [3]
    assert writing.used_seeds(matching, [3, 4]) == [3, 4]
    data = {
        "scale": "digits", "dataset": None, "pixels": [8, 8], "seeds": [0], "experiment": "mechanism",
        "images": {"datasets": ["digits", "digits_fold1"]}, "config": {"attack": {"epsilon": 0.1}},
        "missing": [], "environments": [ENVIRONMENT], "hours": {"training": 1.0, "measuring": 1.0},
    }  # fmt: skip
    assert "seed 0, first fold." in writing.caption(mechanism, data)
    assert "seed 0. Reference" in writing.caption(matching, data)


def test_strong_attacks_have_the_paper_s_numbers_beside_the_strongest_restart(tmp_path):
    experiment, scale = jobs.experiment("table1_strong_attacks"), SCALES["trial"]
    finish("table1_strong_attacks", "trial", tmp_path)
    (config,) = jobs.configurations(experiment, scale, experiment.rows[0], [0])
    path = jobs.result_file(jobs.folder_of(tmp_path, scale, config), scale, "table1_strong_attacks")
    result = json.loads(path.read_text(encoding="utf-8"))
    for attack in result["attacks"]:
        attack |= {"total": 20, "lowest_single_run": None if attack["name"] == "clean" else 0.8}
    path.write_text(json.dumps(result), encoding="utf-8")
    text = writing.write(experiment, scale, [0], tmp_path, tmp_path / "r").read_text(encoding="utf-8")
    assert "| lowest of 5 restarts | | 80.0 (64.5) | 80.0 (64.2) | 80.0 (56.8) |" in " ".join(text.split())
    assert "| worst case over 5 restarts | 100.0 [83.9, 100.0] | 75.0 [53.1, 88.8] |" in " ".join(text.split())
    assert "on these images" not in text
    finish("main_table", "trial", tmp_path)  # 2 of its 20 images are the strong attacks'
    text = writing.write(experiment, scale, [0], tmp_path, tmp_path / "r").read_text(encoding="utf-8")
    assert "on these images: pgd-20 100.0, cw-100 100.0, AutoAttack 100.0." in text


def test_a_table_says_how_many_images_each_column_has_and_what_is_left_out():
    numbers = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "paper": None}
    few, many = ({**numbers, "total": total, "by_network": [0.5, 0.7]} for total in (100, 1797))
    data = {"rows": {"mine": {"clean": many, "spsa": few, "square": few, "pgd-20": few}}, "seeds": [0, 1]}
    text = tables.about(data, ["clean", "spsa", "square"])
    assert text == (
        "Accuracy in % on 100 test images (clean: 1,797), with 95% intervals over images. The CSV file also has pgd-20."
    )
    assert tables.about(data, ["clean"]).startswith("Accuracy in % on 1,797 test images, with")
    data["rows"]["mine"]["clean"]["paper"] = 90.0
    assert "in parentheses" in tables.about(data, ["clean"])
    folds = {"images": {"datasets": ["one"]}}
    assert "over 2 seeds, in points: clean 14.1." in tables.spread_over_networks({**data, **folds}, ["clean"])
    data["seeds"], folds = [0], {"images": {"datasets": ["one", "two"]}}
    assert "over 2 folds, in points" in tables.spread_over_networks({**data, **folds}, ["clean"])


@pytest.mark.parametrize(
    ("other", "text"), [(0.4, "stronger than the network's own for mine:"), (0.49, "No transferred")]
)
def test_transferred_attacks_are_stronger_if_the_intervals_do_not_overlap(other, text):
    own, transferred = (
        {"accuracy": of, "low": of - 0.02, "high": of + 0.02, "total": 100, "paper": None} for of in (0.5, other)
    )
    assert text in jobs.experiment("transfer").show({"rows": {"mine": {"itself": own, "theirs": transferred}}})


ALL = ("β = 0.5", "β = 1")


def test_other_results_are_not_overwritten(tmp_path):
    experiment = jobs.experiment("table4_ipot_beta")
    finish("table4_ipot_beta", "trial", tmp_path)
    path = writing.write(experiment, SCALES["trial"], [0], tmp_path, tmp_path)
    writing.check_results(experiment, SCALES["trial"], [0], tmp_path, ALL)  # the same results, which may get more rows
    assert writing.file_name(experiment, [0, 1]) != path.stem  # other seeds
    with pytest.raises(ValueError, match=r"results: expected a new folder.*epochs 200 here, 1 there"):
        writing.check_results(experiment, SCALES["paper"], [0], tmp_path, ALL)
    with pytest.raises(ValueError, match=r"got more rows in .*: β = 0.5"):
        writing.check_results(experiment, SCALES["trial"], [0], tmp_path, ["β = 1"])
    finish("table4_ipot_beta", "trial", tmp_path / "other", rows=1)
    with pytest.raises(writing.MoreRows, match=r"got more rows in .*: β = 0.5\. To keep them, add --reuse-results"):
        writing.write(experiment, SCALES["trial"], [0], tmp_path / "other", tmp_path)
    assert "β = 0.5" in path.read_text(encoding="utf-8")
    path.with_suffix(".json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results: expected .* an unreadable file"):
        writing.check_results(experiment, SCALES["trial"], [0], tmp_path, ALL)


def test_results_of_finished_attacks_are_reused(tmp_path):
    logits_fn = lambda x: 10 * jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)  # noqa: E731
    images, labels = np.linspace(0.5, 1, 12, dtype=np.float32).reshape(12, 1, 1, 1), np.zeros(12, int)
    few, more = ([parse_attack(word, 0.1) for word in words] for words in (["clean", "pgd-5"], ["pgd-5", "fgsm"]))

    def run(name, attacks):
        journal = tmp_path / f"{name}.journal.jsonl"
        attacked.take_over(journal, tmp_path.glob("*.jsonl"), attacks, len(labels))
        return journal, evaluate(logits_fn, images, labels, attacks, journal=journal, progress=False)

    run("first", few)
    taken = tmp_path / "second.journal.jsonl"
    others = [tmp_path / "first.journal.jsonl", tmp_path / "missing.journal.jsonl"]
    attacked.take_over(taken, others, more, len(labels))
    lines = [json.loads(line) for line in taken.read_text(encoding="utf-8").splitlines()]
    assert {line["attack"] for line in lines if "index" in line} == {"pgd-5"}
    alone = evaluate(logits_fn, images, labels, more, progress=False)
    assert run("second", more)[1].records == alone.records
    further = [parse_attack(word, 0.2) for word in ("clean", "pgd-5")]  # at another radius, only clean can be reused
    attacked.take_over(tmp_path / "third.journal.jsonl", others, further, len(labels))
    assert '"pgd-5"' not in (tmp_path / "third.journal.jsonl").read_text(encoding="utf-8")

    # Journals of another version of the format are not used.
    text = others[0].read_text(encoding="utf-8").replace(SCHEMA, "evaluation by fs_jax, version 0")
    (tmp_path / "old.journal.jsonl").write_text(text, encoding="utf-8")
    attacked.take_over(tmp_path / "fourth.journal.jsonl", [tmp_path / "old.journal.jsonl"], more, len(labels))
    assert not (tmp_path / "fourth.journal.jsonl").exists()


def test_the_list_has_rows_of_the_chosen_experiments_only(tmp_path, capsys):
    runner.run(["table4_ipot_beta"], ["--list", "--workdir", str(tmp_path / "mine")])
    text = capsys.readouterr().out
    assert "  table4_ipot_beta         IPOT, proximal weight β\n    β = 1\n    β = 0.5\n  figure1" in text
    assert f"10 networks, 10 of them to train or measure in {tmp_path / 'mine'}." in text


@pytest.mark.parametrize(("words", "message"), [
    (["--scale", "digts"], "scale: expected one of trial, digits, small, medium, short, paper; got 'digts'."),
    (["--seeds", "-1"], "seeds: expected an integer of at least 0"), (["--workers", "0"], "workers: expected"),
    (["--seeds", "1", "1"], "seeds: expected distinct seeds"),
    (["--rows", "β = 2"], "rows: expected labels of --list; got 'β = 2'. Did you mean 'β = "),
    (["--rows", "foo"], "rows: expected labels of --list; got 'foo'.$"),
    (["--max-minutes", "0"], "max_minutes: expected a finite number above 0"),
    (["--scale", "small", "--data-dir", "/nowhere"], "data_dir: expected cifar10/<version>"),
])  # fmt: skip
def test_wrong_options_raise_an_error_at_once(words, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        runner.run(["table4_ipot_beta"], [*words, "--workdir", str(tmp_path), "--results", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} <= {".runner.lock"}


def test_a_workdir_is_locked(tmp_path):
    with (
        runner.locked_workdir(tmp_path),
        pytest.raises(BlockingIOError, match="workdir: expected an unused folder"),
    ):
        runner.run(["table4_ipot_beta"], ["--workdir", str(tmp_path)])


def test_workers_use_the_visible_accelerators_only(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda words, env, **_: started.append(env))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    (job,) = jobs.jobs(SCALES["trial"], ["table1_strong_attacks"], [0], tmp_path)
    job.folder.mkdir(parents=True)
    for place in ("gpu:0:0", "gpu:1:1", "tpu:3:0"):
        runner.start(job, place)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["2", "3", "2,3"]
    assert started[2]["TPU_VISIBLE_CHIPS"] == "3"


@pytest.mark.parametrize(
    ("logged", "advice"),
    [
        (
            "ValueError: RESOURCE_EXHAUSTED: Failed to write 408159 bytes to file 11: No space left on device",
            "The disk is full",
        ),
        ("OSError: [Errno 28] No space left on device: 'journal.jsonl'", "The disk is full: free space for"),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 1000 bytes", r"--workers 1"),
    ],
)
def test_a_failure_says_what_to_do(tmp_path, logged, advice):
    (tmp_path / "log").write_text(f"an earlier line\n{logged}\n", encoding="utf-8")
    job = jobs.Job(SCALES["trial"], SCALES["trial"].config, tmp_path / "network", ())
    message = runner.failure(job, runner.Worker(None, tmp_path / "log", len("an earlier line\n")))
    assert logged in message
    assert advice in message
    assert "earlier" not in message


def test_rows_are_added_to_a_table_in_a_new_workdir(tmp_path, capsys):
    name, scale = "table4_ipot_beta", SCALES["trial"]
    experiment, results = jobs.experiment(name), tmp_path / "r" / "trial"
    first, second = (row.label for row in experiment.rows)
    finish(name, "trial", tmp_path / "first", rows=1, robust=12)
    before = writing.write(experiment, scale, [0], tmp_path / "first", results).with_suffix(".json").read_bytes()

    # The records alone give the same table, bit for bit.
    needed = jobs.jobs(scale, [name], [0], tmp_path / "same")
    assert reuse.take_results(results, [name], needed) == 1
    path = writing.write(experiment, scale, [0], tmp_path / "same", tmp_path / "same results")
    assert path.with_suffix(".json").read_bytes() == before
    assert reuse.take_results(results, [name], needed) == 0  # results in the workdir are kept

    # With the second row in another workdir, both are in the table.
    finish(name, "trial", tmp_path / "second")
    for job in jobs.jobs(scale, [name], [0], tmp_path / "second", [first]):
        jobs.result_file(job.folder, scale, name).unlink()
    arguments = ["--scale", "trial", "--workdir", str(tmp_path / "second"), "--results", str(tmp_path / "r")]
    with pytest.raises(ValueError, match=f"got more rows in .*: {first}"):
        runner.run([name], [*arguments, "--rows", second])
    runner.run([name], [*arguments, "--rows", second, "--reuse-results"])
    assert f"Results of networks taken from {results}: 1." in capsys.readouterr().out
    after = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    assert after["finished"] == [first, second]
    assert [after["rows"][label]["pgd-20"]["correct"] for label in (first, second)] == [12, 15]
    assert after["hours"]["training"] == 0.5


def others_row_meanwhile(tmp_path, monkeypatch, *, stopped=False):
    """Let a run finish the second row of a table, while another process writes the first.

    Returns the name of the table, the arguments of the run, and a function that reads the rows of the table.
    """
    name, scale = "table4_ipot_beta", SCALES["trial"]
    first, _second = (row.label for row in jobs.experiment(name).rows)

    def execute(missing, arguments):
        finish(name, "trial", tmp_path / "first", rows=1)
        writing.write(jobs.experiment(name), scale, [0], tmp_path / "first", tmp_path / "r" / "trial")
        finish(name, "trial", tmp_path / "second")
        for job in jobs.jobs(scale, [name], [0], tmp_path / "second", [first]):
            jobs.result_file(job.folder, scale, name).unlink()
        return stopped, []

    def rows():
        return json.loads((tmp_path / "r" / "trial" / f"{name}.json").read_text(encoding="utf-8"))["finished"]

    monkeypatch.setattr(runner, "execute", execute)
    arguments = ["--scale", "trial", "--workdir", str(tmp_path / "second"), "--results", str(tmp_path / "r")]
    return name, arguments, rows


def test_rows_that_another_process_adds_meanwhile_are_kept(tmp_path, monkeypatch):
    name, arguments, rows = others_row_meanwhile(tmp_path, monkeypatch)
    first, second = (row.label for row in jobs.experiment(name).rows)
    with pytest.raises(ChildProcessError, match=f"got more rows in .*: {first}. To keep them, add --reuse-results"):
        runner.run([name], [*arguments, "--rows", second])
    assert rows() == [first]
    assert runner.run([name], [*arguments, "--rows", second, "--reuse-results"]) is None
    assert rows() == [first, second]


def test_a_stop_before_rows_that_are_in_the_results_is_no_error(tmp_path, monkeypatch, capsys):
    name, arguments, rows = others_row_meanwhile(tmp_path, monkeypatch, stopped=True)
    assert runner.run([name], arguments) == 75
    assert "got more rows in" in capsys.readouterr().out
    assert rows() == [jobs.experiment(name).rows[0].label]


def test_results_are_written_under_a_lock(tmp_path, monkeypatch):
    name, arguments, _rows = others_row_meanwhile(tmp_path, monkeypatch)

    def write(*_arguments):
        with pytest.raises(BlockingIOError):
            locked(tmp_path / "r" / "trial" / "tables")

    monkeypatch.setattr(runner, "execute", lambda missing, arguments: (False, []))
    monkeypatch.setattr(writing, "write", write)
    runner.run([name], arguments)
    locked(tmp_path / "r" / "trial" / "tables").release()


def test_messages_of_failed_workers_are_shown_although_writing_fails_too(tmp_path, monkeypatch):
    name, arguments, _rows = others_row_meanwhile(tmp_path, monkeypatch)

    def write(*_arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(runner, "execute", lambda missing, arguments: (False, ["a worker's message"]))
    monkeypatch.setattr(writing, "write", write)
    with pytest.raises(ChildProcessError, match=r"a worker's message\nNot all tables are written: No space left"):
        runner.run([name], arguments)


def test_a_kind_of_network_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    """Workers that write times and results, but for one method, which runs out of memory when it is timed."""
    scale, started = SCALES["trial"], []

    def start(job, place, *cost):
        started.append((job.config.method, bool(cost)))
        code = "pass"
        if cost and job.config.method == "trades":
            code = "raise SystemExit(1)"
        elif cost:
            times = {"step": 1.0, "pass": 1.0, "train_images": 100, "test_images": 20}
            pathlib.Path(cost[0]).write_text(json.dumps(times), encoding="utf-8")
        else:
            for name in job.experiments:
                jobs.result_file(job.folder, scale, name).write_text("{}", encoding="utf-8")
        return runner.Worker(subprocess.Popen([sys.executable, "-c", code]), job.folder / "log", 0)

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner, "processors", lambda workers: ["cpu:0:0"])
    (tmp_path / "runs" / "costs").mkdir(parents=True)
    needed = jobs.jobs(scale, ["main_table"], [0], tmp_path / "runs")
    for job in needed:
        job.folder.mkdir(parents=True)
        (job.folder / "log").write_text("RESOURCE_EXHAUSTED", encoding="utf-8")
    stopped, failed = runner.execute(needed, runner.Arguments(scale="trial", workdir=tmp_path / "runs"))
    assert not stopped
    assert len(failed) == 1
    assert "trades" in failed[0]
    assert "fewer networks in parallel" in failed[0]
    assert [method for method, timed in started if not timed] == ["feature_scatter", "standard", "pgd"]


@pytest.mark.parametrize(
    "content",
    [b"not compressed", lzma.compress(b"{}")[:-8], lzma.compress(b'{"a": 1}'), lzma.compress(b'[{"network": "a"}]')],
)
def test_records_that_cannot_be_read_are_reported(tmp_path, content):
    (tmp_path / f"matching{reuse.SUFFIX}").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected records of networks in .*matching.records.json.xz, which cannot"):
        reuse.take_results(tmp_path, [], [])


def test_a_data_file_is_known_by_its_name_and_content(tmp_path):
    name, files = "table4_ipot_beta", [tmp_path / folder / "mine.npz" for folder in ("here", "there", "other")]
    for path, pixel in zip(files, (1, 1, 2), strict=True):
        path.parent.mkdir()
        images = np.full((100, 8, 8, 1), pixel, np.uint8)
        labels = np.arange(100) % 10
        np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    here, there, other = (scale_of("trial", str(path)) for path in files)
    finish(name, "trial", tmp_path / "runs", dataset=str(files[0]))
    path = writing.write(jobs.experiment(name), here, [0], tmp_path / "runs", tmp_path / "r")
    assert str(tmp_path) not in path.with_suffix(".json").read_text(encoding="utf-8")
    # The same file elsewhere: its results are found, and may be written again.
    needed = jobs.jobs(there, [name], [0], tmp_path / "second")
    assert reuse.take_results(tmp_path / "r", [name], needed) == 2
    writing.check_results(jobs.experiment(name), there, [0], tmp_path / "r", ALL)
    # Another file of the same name
    assert reuse.take_results(tmp_path / "r", [name], jobs.jobs(other, [name], [0], tmp_path / "third")) == 0
    with pytest.raises(ValueError, match=r"got others in .*: data .* here, .* there"):
        writing.check_results(jobs.experiment(name), other, [0], tmp_path / "r", ALL)


def test_the_command_of_some_rows_has_their_labels():
    data = {
        "experiment": "matching", "scale": "small", "dataset": None, "seeds": [0], "missing": ["independent plan"],
        "finished": ["Sinkhorn, τ = 0.01"],
    }  # fmt: skip
    assert writing.command(data) == ("python -m experiments.paper.matching --scale small --rows 'Sinkhorn, τ = 0.01'")


def test_records_of_other_attacks_are_not_used(tmp_path):
    name, scale = "table4_ipot_beta", SCALES["trial"]
    finish(name, "trial", tmp_path / "first")
    writing.write(jobs.experiment(name), scale, [0], tmp_path / "first", tmp_path / "r")
    fewer = dataclasses.replace(scale, test_images=10)
    for other, names, seeds in ((fewer, [name], [0]), (scale, ["matching"], [0]), (scale, [name], [1])):
        assert reuse.take_results(tmp_path / "r", names, jobs.jobs(other, names, seeds, tmp_path / "second")) == 0
    assert not (tmp_path / "second").exists()


def test_records_of_the_table_itself_are_used_first(tmp_path):
    scale, names = SCALES["trial"], ("autoattack_gap", "main_table")  # with the same measurement
    for robust, name in zip((5, 10), names, strict=True):
        finish(name, "trial", tmp_path / name, robust=robust)
        writing.write(jobs.experiment(name), scale, [0], tmp_path / name, tmp_path / "r")
    for robust, name in zip((5, 10), names, strict=True):
        workdir = tmp_path / f"of {name}"
        assert reuse.take_results(tmp_path / "r", [name], jobs.jobs(scale, [name], [0], workdir)) > 0
        row = jobs.finished_rows(name, scale, [0], workdir)[0]
        assert sum(record["misclassified_at"]["pgd-20"] < 0 for record in row.results[0]["records"]) == robust


def stored_row(tmp_path, *, data="its own"):
    """The networks of a table, of which the first is stored, and the folder that it is stored in."""
    needed = jobs.jobs(SCALES["trial"], ["table4_ipot_beta"], [0], tmp_path / "runs")
    if data == "its own":
        data = training_fingerprint(load("digits"))
    # The configuration of a run has the number of training images and their hash.
    config = dataclasses.replace(needed[0].config, train_size=1437, data=data)
    network = WideResNet(10, 1)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    weights.keep(network, variables, {"config": to_dict(config)}, "ours", tmp_path / "w")
    return needed, tmp_path / "w"


def test_restored_networks_are_not_trained(tmp_path):
    needed, folder = stored_row(tmp_path)
    assert reuse.restore_networks(needed, None, folder) == ["ours: restored."]
    assert reuse.restore_networks(needed, None, folder) == []
    ours, other = needed
    assert jobs.weights_file(ours.folder).exists()
    assert not other.folder.exists()
    cost = {"step": 1.0, "pass": 0.0, "train_images": 1437, "test_images": 20}
    steps = costs.seconds_of(other, cost) - costs.seconds_of(ours, cost)
    assert steps == dataclasses.replace(other.config, train_size=1437).total_steps
    assert runner.share_done(ours) == 0.5
    assert runner.share_done(other) == 0


def test_networks_of_other_data_or_in_training_are_not_restored(tmp_path):
    needed, folder = stored_row(tmp_path, data="another hash")
    assert reuse.restore_networks(needed, None, folder) == ["ours: not restored, as it was trained on other data."]
    (needed[0].folder / "run").mkdir(parents=True)
    (message,) = reuse.restore_networks(needed, None, folder)
    assert message.startswith("ours: not restored, as its training has begun in ")
    assert not jobs.weights_file(needed[0].folder).exists()


def test_restored_networks_do_not_replace_trained_ones(tmp_path):
    name, scale = "table4_ipot_beta", SCALES["trial"]
    finish(name, "trial", tmp_path / "trained")
    writing.write(jobs.experiment(name), scale, [0], tmp_path / "trained", tmp_path / "r" / "trial")
    needed, folder = stored_row(tmp_path)
    reuse.restore_networks(needed, None, folder)
    arguments = ["--scale", "trial", "--workdir", str(tmp_path / "runs"), "--results", str(tmp_path / "r")]
    with pytest.raises(ValueError, match="workdir: expected trained networks; got restored ones"):
        runner.run([name], arguments)
    first = jobs.experiment(name).rows[0].label
    with pytest.raises(ValueError, match=f"got those of trained ones in .*: {first}. Choose another folder with --res"):
        runner.run([name], [*arguments, "--reuse-networks"])


def test_a_table_says_which_networks_were_restored(tmp_path):
    name, scale = "table4_ipot_beta", SCALES["trial"]
    finish(name, "trial", tmp_path / "runs")
    (job, *_) = jobs.jobs(scale, [name], [0], tmp_path / "runs")
    path = jobs.result_file(job.folder, scale, name)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "restored": True}), encoding="utf-8")
    text = writing.write(jobs.experiment(name), scale, [0], tmp_path / "runs", tmp_path / "r").read_text(
        encoding="utf-8"
    )
    assert f"in bfloat16): {jobs.experiment(name).rows[0].label}, 1 of 1." in text
    assert "--scale trial --reuse-networks`" in text

    # Another process has meanwhile written the results of trained networks.
    finish(name, "trial", tmp_path / "trained")
    writing.write(jobs.experiment(name), scale, [0], tmp_path / "trained", tmp_path / "others")
    with pytest.raises(ValueError, match="got those of trained ones"):
        writing.write(jobs.experiment(name), scale, [0], tmp_path / "runs", tmp_path / "others")


def test_committed_networks_are_those_of_rows(tmp_path):
    rows = {
        reuse.config_hash(job.config)
        for scale in SCALES.values()
        for job in jobs.jobs(scale, scale.experiments, [0, 1, 2], tmp_path)
    }
    stored = {name: reuse.config_hash(from_dict(of["config"])) for name, of in weights.manifest(weights.FOLDER).items()}
    assert len(stored) >= 7
    assert not [name for name, key in stored.items() if key not in rows]
    assert len(set(stored.values())) == len(stored)


@pytest.mark.slow
def test_a_figure_of_restored_networks(tmp_path):
    command = [
        sys.executable, "-m", "experiments.paper.figure2_embeddings", "--scale", "digits", "--reuse-networks",
        "--workdir", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results" / "digits" / "figure2_embeddings.md").read_text(encoding="utf-8")
    assert "in bfloat16): standard, 1 of 1; feature scattering, 1 of 1." in text
    assert not list((tmp_path / "runs").glob("digits/*/run"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_a_table_that_is_killed_twice_resumes(tmp_path):
    command = [
        sys.executable, "-m", "experiments.paper.table4_ipot_beta", "--scale", "trial",
        "--workdir", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
    ]  # fmt: skip
    for number, seconds in ((signal.SIGKILL, 12), (signal.SIGTERM, 8)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        process.send_signal(number)
        process.wait(timeout=90)
        process.stdout.close()
    # New workers wait until those of the killed runner have noticed that it has ended.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "Not run yet" not in (tmp_path / "results" / "trial" / "table4_ipot_beta.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_stopped_table_resumes(tmp_path):
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
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")
    }  # nothing was run again


def test_estimates_count_the_test_images_and_the_passes_of_the_attacks(tmp_path):
    (job, *_) = jobs.jobs(SCALES["paper"], ["table3_sinkhorn_tau"], [0], tmp_path)
    cost = {"step": 0.0, "pass": 1.0, "train_images": 50_000}
    few, many = (costs.seconds_of(job, {**cost, "test_images": n}) for n in (100, 10_000))
    # Per image: a forward pass, FGSM, 20 and 100 steps of PGD and of CW, which are judged at the last iterate.
    assert many - few == pytest.approx(9_900 * (0.5 + 1 + 2 * (20 + 100)))
    slow = costs.seconds_of(job, {**cost, "step": 2.0, "test_images": 100})
    assert slow - few == 2 * job.config.total_steps


def test_networks_that_take_the_same_time_are_timed_once():
    needed = jobs.jobs(SCALES["digits"], ["trade_off", "table3_sinkhorn_tau"], [0], pathlib.Path("runs"))
    assert len({costs.kind(job.config) for job in needed}) == 2  # feature scattering, and one step on the cross-entropy


@pytest.mark.slow
def test_all_experiments_of_a_scale_run(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.paper", "--scale", "trial",
            "--workdir", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
        ],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in EXPERIMENTS:
        text = (tmp_path / "results" / "trial" / f"{name}.md").read_text(encoding="utf-8")
        assert "Not run yet" not in text


@pytest.mark.slow
def test_a_scale_can_have_another_data_set(tmp_path):
    rng = np.random.default_rng(0)  # images with the shape of CIFAR-100's
    arrays = {
        f"{split}_{name}": values
        for split, count in (("train", 300), ("test", 20))
        for name, values in (
            ("images", rng.integers(0, 256, (count, 32, 32, 3), np.uint8)), ("labels", np.arange(count) % 100),
        )
    }  # fmt: skip
    np.savez(tmp_path / "hundred.npz", **arrays)
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.paper.main_table", "--scale", "trial", "--rows", "standard", "PGD-7",
            "--dataset", str(tmp_path / "hundred.npz"), "--workdir", str(tmp_path / "runs"),
            "--results", str(tmp_path / "results"),
        ],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results" / "trial-hundred" / "main_table.md").read_text(encoding="utf-8")
    assert "32 x 32 pixels" in text
    assert "Not run yet: feature scattering; TRADES." in text


@pytest.mark.parametrize("dataset", ["cifar100", "svhn_cropped"])
def test_the_caption_names_the_data_set(dataset, tmp_path):
    finish("table4_ipot_beta", "short", tmp_path, dataset=dataset)
    scale = scale_of("short", dataset)
    path = writing.write(jobs.experiment("table4_ipot_beta"), scale, [0], tmp_path, tmp_path / "r")
    text = path.read_text(encoding="utf-8")
    assert f"--scale short --dataset {dataset}`" in text
    assert "in parentheses, the paper's accuracy on CIFAR-10" in text
