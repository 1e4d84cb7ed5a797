"""The scripts, as they are typed: what they write, and what they say to a typo."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def run(*words):
        # A wide terminal, so that messages aren't broken into lines.
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_quickstart_writes_its_table_and_figures_and_evaluate_works_on_its_runs(script, tmp_path):
    done = script("experiments.quickstart", "--workdir", str(tmp_path), "--epochs", "1", "--no-progress")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in done.stdout
    for word in ("standard", "PGD training", "feature scattering", "clean", "fgsm", "pgd-20", "cw-20", "worst case"):
        assert word in table
    for figure in ("training", "accuracy", "attacks"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    for run in ("standard", "pgd", "feature_scatter"):
        result = json.loads((tmp_path / f"{run}.json").read_text())
        assert result["config"]["method"] == run
        assert len(result["records"]) == result["attacks"][0]["total"] == 360
        assert list((tmp_path / run / "tensorboard").iterdir())
        assert json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 0

    run = tmp_path / "standard"
    words = ("experiments.evaluate", "--workdir", str(run), "--attacks", "clean", "pgd-2", "--num-images", "40")
    done = script(*words, "--restarts", "2", "--epsilon", "0.05", "--no-progress")
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "evaluations" / "evaluation.json").read_text())
    assert result["images"] == 40
    assert [attack["name"] for attack in result["attacks"]] == ["clean", "pgd-2x2"]
    assert result["attacks"][1]["epsilon"] == 0.05
    # A second result of the same name is refused, and the first is left.
    done = script(*words)
    assert done.returncode == 2
    assert "exists. Give another --name" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("experiments.train", "digitz", "--workdir", "x"), "Did you mean 'digits'?"),
        (("experiments.train", "digits"), "--workdir"),
        (("experiments.train", "digits", "--workdir", "x", "--model.deph", "16"), "--model.depth"),
        (("experiments.train", "digits", "--workdir", "x", "--model.depth", "17"), "depth: expected 6n + 4"),
        (("experiments.train", "digits", "--workdir", "x", "--smoothing", "2"), "smoothing: expected a finite number"),
        (("experiments.train", "digits", "--workdir", "x", "--dataset", "digts"), "'digits'"),
        (("experiments.train", "cifar10_wrn10_2", "--workdir", "x", "--data-dir", "/nowhere"), "prepare_data cifar10"),
        (("experiments.evaluate", "--workdir", "nowhere"), "expected the folder of a run"),
        (("experiments.evaluate", "--workdir", "nowhere", "--epsilom", "1"), "--epsilon"),
        (("experiments.quickstart", "--epoch", "1"), "--epochs"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_before_anything_is_written(script, words, message):
    done = script(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "x").exists()


def test_import_is_quick_and_loads_nothing_heavy():
    # Rooms load when they are used.
    code = "import sys, fs_jax; assert not {'jax', 'flax', 'numpy'} & sys.modules.keys(); fs_jax.models.WideResNet"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
