"""The scripts as run from the command line: the files that they write, and their errors for invalid options."""

import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import autoattack_reference, command_line, evaluate, quickstart, train
from experiments.evaluation_report import report_text
from fs_jax import data
from fs_jax.config import preset
from fs_jax.evaluation import Evaluation, accuracy
from fs_jax.models import WideResNet, convert
from fs_jax.training.loop import training_fingerprint

pytestmark = pytest.mark.usefixtures("one_batch_size")

ROOT = pathlib.Path(__file__).parents[1]


def script(*words):
    environment = {
        **os.environ,
        "COLUMNS": "200",  # so that messages aren't broken into lines
        "JAX_NUM_CPU_DEVICES": str(jax.local_device_count()),
    }
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def evaluate_here(monkeypatch, capsys, *words, main=evaluate.main):
    """The evaluation's command, or another, in this process: its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(main)
    return stopped.value.code or 0, *capsys.readouterr()


METHODS = {"standard": "standard", "pgd": "PGD training", "feature_scatter": "feature scattering"}


@pytest.mark.parametrize("methods", [["standard"], pytest.param(list(METHODS), marks=pytest.mark.slow)])
def test_quickstart_writes_its_table_and_figures_and_evaluate_works_on_its_runs(methods, tmp_path, monkeypatch, capsys):
    words = ("--workdir", str(tmp_path), "--epochs", "1", "--attacked-images", "8", "--methods", *methods)
    status, out, err = evaluate_here(monkeypatch, capsys, *words, "--no-progress", main=quickstart.main)
    assert status == 0, err
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.strip() in out
    for word in (*(METHODS[method] for method in methods), "clean", "fgsm", "pgd-20", "cw-20", "worst case"):
        assert word in table
    for figure in ("training", "accuracy", "attacks"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    for run in methods:
        result = json.loads((tmp_path / f"{run}.json").read_text(encoding="utf-8"))
        assert result["config"]["method"] == run
        # Clean accuracy is always of all images.
        assert [attack["total"] for attack in result["attacks"]] == [360, 8, 8, 8]
        assert len(result["records"]) == 8
        assert list((tmp_path / run / "tensorboard").iterdir())
        assert json.loads((tmp_path / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"] > 0

    run = tmp_path / methods[0]
    words = ("--workdir", str(run), "--attacks", "clean", "pgd-2", "--num-images", "8", "--batch-size", "1")
    words = (*words, "--restarts", "2", "--no-progress", "--save-images")
    status, out, err = evaluate_here(monkeypatch, capsys, *words, "--epsilon", "0.05")
    assert status == 0, err
    folder = run / "evaluations" / "attacks"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["images"] == len(result["records"]) == 8
    assert [attack["name"] for attack in result["attacks"]] == ["clean", "pgd-2x2"]
    assert result["attacks"][1]["epsilon"] == 0.05
    assert "| pgd-2x2 " in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8") in out
    for figure in ("strength", "examples"):
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "adversarial.npz") as saved:
        assert saved["images"].shape == (8, 8, 8, 1)
        assert list(saved["robust"]) == [record["robust"] for record in result["records"]]
    # Another radius would be another evaluation: an error, and the records are not changed.
    records = (folder / "records.jsonl").read_bytes()
    status, _, err = evaluate_here(monkeypatch, capsys, *words, "--epsilon", "0.06")
    assert status == 2
    assert "pgd-2x2: epsilon: expected 0.05, as in" in err
    assert (folder / "records.jsonl").read_bytes() == records


def test_the_comparison_counts_images_that_only_one_side_breaks():
    no = np.array([False] * 5)
    reference = {
        "labels": np.zeros(5, int),
        "clean_correct": ~no,
        **{f"standard/{name}_robust": no | [1, 1, 0, 0, 0] for name in autoattack_reference.STAGES},
        "alone/fab-t_robust": np.array([True, True, False]),  # of the first three
    }
    # Ours: 0, 1 and 3 are robust to APGD-CE; FAB-T breaks 1.
    records = [{"misclassified_at": {"clean": -1, "apgd-ce": 5, "fab-t alone": -1}} for _ in range(5)]
    for i in (0, 1, 3):
        records[i]["misclassified_at"] |= {"apgd-ce": -1, "apgd-t": -1, "fab-t": 3 if i == 1 else -1}
    for i in (0, 3):
        records[i]["misclassified_at"] |= {"square": -1}
    rows = autoattack_reference.compare(reference, Evaluation({}, records))
    assert [
        (r["attack"], r["images"], r["theirs"], r["ours"], r["agree"], r["only_theirs_fell"], r["only_ours_fell"])
        for r in rows
    ] == [
        ("clean", 5, 1.0, 1.0, 1.0, 0, 0),
        ("apgd-ce", 5, 0.4, 0.6, 0.8, 1, 0),
        ("apgd-t", 5, 0.4, 0.6, 0.8, 1, 0),
        ("fab-t", 5, 0.4, 0.4, 0.6, 1, 1),
        ("square", 5, 0.4, 0.4, 0.6, 1, 1),
        ("fab-t alone", 3, 2 / 3, 1.0, 2 / 3, 1, 0),
    ]
    summary = {"agreement": rows, "reference": "x.npz", "environments": [{"device": "cpu", "cpu_count": 2, "jax": "0"}]}
    text = autoattack_reference.table(summary, "WRN-10-2")
    assert "differ by at most 20.0 points (limit 0.6), and in the end 60.0% of the images agree" in text
    assert "**not like the authors' own.**" in text
    for row in rows:
        row |= {"ours": row["theirs"], "agree": 1.0}
    assert "**as strong as the authors' own.**" in autoattack_reference.table(summary, "WRN-10-2")


def test_the_report_says_what_was_run_and_links_what_was_drawn():
    attack = {
        "apart": False, "judged_by": "any iterate", "attacked": 30, "lowest_single_run": None, "seconds": 1.0,
        "forward": 1, "backward": 1, **accuracy(np.arange(50) < 7),
    }  # fmt: skip
    summary = {
        "network": "WRN-10-1", "file": "network.npz", "dataset": "digits", "images": 50, "split": "test",
        "epsilon": 0.05, "seed": 0, "weights": "abc", "warnings": ["no gradient"],
        "environments": [{"device": "cpu", "cpu_count": 2, "jax": "0"}],
        "attacks": [{**attack, "name": "square"}, {**attack, "name": "pgd-20 at 4/255", "apart": True}],
        "worst": accuracy(np.arange(50) < 7), "autoattack": {"square": {"num_steps": 5000}},
        "masking": [{"what": "honest", "verdict": "no", "why": "0 of 1"}],
    }  # fmt: skip
    text = report_text(summary, {"strength"})
    assert "**Warning.** no gradient" in text
    assert "**AutoAttack, standard version: 14.00% are robust** (7 of 50)" in text
    assert "square: num_steps 5000." in text
    assert text.index("| square ") < text.index("Not in the worst case") < text.index("| pgd-20 at 4/255 ")
    assert "| honest     | no     | 0 of 1" in text
    assert "](strength.png)" in text
    assert "](surface.png)" not in text


@pytest.mark.slow
def test_every_suite_runs_on_weights_from_a_file(tmp_path):
    # A new network, with a scaled last layer, so that some images are classified with a margin.
    model = WideResNet(10, 1)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    variables["params"]["fc"]["kernel"] *= 30
    for name, seed in (("network", 1), ("other", 2)):
        rng = np.random.default_rng(seed)
        moved = jax.tree.map(lambda x, rng=rng: x + 0.01 * rng.normal(size=x.shape).astype(x.dtype), variables)
        convert.save_weights(tmp_path / f"{name}.npz", model, moved)
    words = ("experiments.evaluate", "--weights", str(tmp_path / "network.npz"), "--dataset", "digits")
    words = (
        *words,
        "--transfer-from",
        str(tmp_path / "other.npz"),
        "--num-images",
        "64",
        "--gradient-free-images",
        "8",
    )
    for suite in ("paper", "autoattack", "gradient-free", "all"):
        done = script(*words, "--suite", suite, "--output", str(tmp_path / suite), "--epsilon", "0.05", "--no-progress")
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "all" / "result.json").read_text(encoding="utf-8"))
    accuracies = {attack["name"]: attack["accuracy"] for attack in result["attacks"]}
    assert accuracies["pgd-1000x5"] <= accuracies["pgd-20"] <= accuracies["clean"]
    assert accuracies["square"] <= accuracies["fab-t"] <= accuracies["apgd-t"] <= accuracies["apgd-ce"]
    assert result["robustbench"]["autoattack_acc"] == str(round(100 * accuracies["square"], 2))
    assert len(result["masking"]) == 7
    # Each suite alone gives the same accuracies.
    for suite in ("paper", "autoattack", "gradient-free"):
        alone = json.loads((tmp_path / suite / "result.json").read_text(encoding="utf-8"))
        assert {a["name"]: a["accuracy"] for a in alone["attacks"]}.items() <= accuracies.items()


@pytest.mark.slow
def test_shards_merge_into_the_whole(tmp_path, monkeypatch, capsys):
    model = WideResNet(10, 1)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    convert.save_weights(tmp_path / "network.npz", model, variables)
    words = ("--weights", str(tmp_path / "network.npz"), "--dataset", "digits", "--attacks", "fgsm", "pgd-3x2")
    words = (*words, "--first", "5", "--num-images", "21", "--epsilon", "0.02", "--no-progress", "--save-images")
    parts = [str(tmp_path / part) for part in ("1", "2")]
    for more in (
        ("--output", str(tmp_path / "whole")),
        ("--shard", "1/2", "--output", parts[0]),
        ("--shard", "2/2", "--output", parts[1]),
        ("--merge", *parts, "--output", str(tmp_path / "merged")),
    ):
        status, _, err = evaluate_here(monkeypatch, capsys, *words, *more)
        assert status == 0, err
    whole, merged = (
        json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8")) for name in ("whole", "merged")
    )
    assert [record["index"] for record in merged["records"]] == list(range(5, 26))
    assert merged["worst"] == whole["worst"]
    for one, other in zip(merged["records"], whole["records"], strict=True):
        assert one["misclassified_at"] == other["misclassified_at"]
    images = [np.load(tmp_path / name / "adversarial.npz")["images"] for name in ("whole", "merged")]
    # Batches of another size may be rounded differently, which can flip a gradient's sign in a few pixels.
    assert np.mean(np.abs(images[0] - images[1]) > 1e-6) < 0.01


def test_a_data_file_that_was_moved_is_found_by_its_new_path(tmp_path):
    rng = np.random.default_rng(0)

    def save(name):
        arrays = {"images": rng.integers(0, 256, (4, 8, 8, 1), np.uint8), "labels": np.arange(4, dtype=np.int32) % 2}
        path = tmp_path / name
        np.savez(path, **{f"{split}_{key}": array for split in ("train", "test") for key, array in arrays.items()})
        return str(path), training_fingerprint(data.load(path))

    (new, found), (other, _) = save("new.npz"), save("other.npz")
    config = dataclasses.replace(preset("digits"), dataset=str(tmp_path / "old.npz"), data=found)
    with pytest.raises(ValueError, match=r"old\.npz\. If it was moved, give its new path: --dataset FILE\.npz"):
        evaluate.load_data(evaluate.Arguments(), config)
    assert evaluate.load_data(evaluate.Arguments(dataset=new), config).info.name == new
    with pytest.raises(ValueError, match=r"other\.npz has other training images or labels"):
        evaluate.load_data(evaluate.Arguments(dataset=other), config)
    with pytest.raises(ValueError, match="dataset: expected none, as the training run's is digits"):
        evaluate.load_data(evaluate.Arguments(dataset=new), preset("digits"))


WEIGHTS = "tests/golden/losses.npz"  # a file, but without a network


def test_numbers_may_be_fractions_and_help_ends_with_examples(capsys):
    assert command_line.parse(evaluate.Arguments, ["--epsilon", "8/255", "--step-size", "0.01"]).epsilon == 8 / 255
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    printed = capsys.readouterr().out
    assert "Evaluate a network under attack" in printed.splitlines()[2]
    assert "--workdir PATH" in printed
    assert "None" not in printed
    assert printed.rstrip().splitlines()[-1].strip().startswith("python -m experiments.evaluate")


def test_fields_that_training_sets_are_not_options(capsys):
    with pytest.raises(SystemExit):
        train.main(["digits", "--help"])
    printed = capsys.readouterr().out
    assert "--batch-size INT" in printed
    assert not any(f"--{name} " in printed for name in ("train-size", "data", "parts"))
    with pytest.raises(SystemExit):
        train.main(["digits", "--workdir", "x", "--train-size", "10"])
    default = train.Arguments(train.Options(pathlib.Path()), preset("digits"))
    words = ["--workdir", "x", "--weight-average", "0.9", "--smoothing", "None"]
    assert command_line.parse(train.Arguments, words, default=default) == train.Arguments(
        train.Options(pathlib.Path("x")), dataclasses.replace(preset("digits"), weight_average=0.9)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("experiments.evaluate", "--weights", WEIGHTS, "--output", "x", "--shard", "3/2"),
            "shard: expected a part that is at most the number of parts; got 3/2",
        ),
        (("experiments.evaluate", "--weights", WEIGHTS, "--output", "x", "--shard", "2"), "such as 2/4; got '2'"),
        (
            ("experiments.evaluate", "--weights", WEIGHTS, "--output", "x", "--merge", "tests"),
            "tests has no records.jsonl",
        ),
        (("experiments.migrate_results", "tests/golden/README.md"), "expected the result of an evaluation"),
        (("experiments.train", "digitz", "--workdir", "x"), "Did you mean 'digits'?"),
        (("experiments.train", "digits"), "--workdir"),
        (("experiments.train", "digits", "--workdir", "x", "--model.deph", "16"), "--model.depth"),
        (("experiments.train", "digits", "--workdir", "x", "--model.depth", "17"), "depth: expected 6n + 4"),
        (("experiments.train", "digits", "--workdir", "x", "--smoothing", "2"), "smoothing: expected a finite number"),
        (("experiments.train", "digits", "--workdir", "x", "--dataset", "digts"), "dataset: expected one of cifar10"),
        (
            ("experiments.train", "cifar10_wrn10_2", "--workdir", "x", "--data-dir", "/nowhere"),
            "data.prepare('cifar10', '/nowhere')",
        ),
        (("experiments.evaluate", "--workdir", "nowhere"), "expected the folder of a run"),
        (("experiments.evaluate", "--workdir", "nowhere", "--epsilom", "1"), "--epsilon"),
        (("experiments.evaluate",), "workdir, weights: expected one network; got none. Give --workdir"),
        (("experiments.evaluate", "--weights", WEIGHTS), "output: expected a folder for the results"),
        (("experiments.evaluate", "--weights", "nofile.pt"), "weights: expected a file; there is no file nofile.pt"),
        (
            ("experiments.evaluate", "--weights", "tests", "--output", "x"),
            "is a folder. Give a training run's as --workdir",
        ),
        (
            ("experiments.evaluate", "--workdir", "x", "--dataset", "digits"),
            "the new path of the training run's .npz file",
        ),
        (("experiments.evaluate", "--weights", WEIGHTS, "--output", "tests"), "output: expected a new folder"),
        (
            ("experiments.evaluate", "--weights", WEIGHTS, "--output", "x", "--suite", "autoatack"),
            "suite: expected one of paper, autoattack, gradient-free, all; got 'autoatack'. Did you mean 'autoattack'?",
        ),
        (
            ("experiments.evaluate", "--weights", WEIGHTS, "--output", "x", "--attacks", "pdg-20"),
            "Did you mean 'pgd-20'",
        ),
        (
            ("experiments.evaluate", "--workdir", "x", "--suite", "all", "--restarts", "5"),
            "suite: expected no --attacks and no --restarts",
        ),
        (
            ("experiments.evaluate", "--weights", WEIGHTS, "--output", "x", "--epsilon", "8/o"),
            "such as 8/255; got '8/o'",
        ),
        (
            ("experiments.evaluate", "--weights", WEIGHTS, "--output", "x"),
            "expected the arrays of a Wide-",
        ),
        (("experiments.quickstart", "--epoch", "1"), "--epochs"),
        (
            ("experiments.quickstart", "--workdir", "x", "--attacked-images", "0"),
            "attacked_images: expected an integer",
        ),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_invalid_options_raise_an_error_before_anything_is_written(monkeypatch, capsys, words, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.delitem(sys.modules, words[0], raising=False)  # as if started afresh
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(words[0], run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (ROOT / "x").exists()


def test_importing_fs_jax_does_not_import_jax_flax_or_numpy():
    # Subpackages are imported on first use.
    code = "import sys, fs_jax; assert not {'jax', 'flax', 'numpy'} & sys.modules.keys(); fs_jax.models.WideResNet"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
