"""The README's numbers are those of the committed results, and its examples run."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(README.split())  # line breaks do not matter


def results(path):
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def row_of(library):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {library}")]
    return row


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_the_quickstart_table_is_the_committed_one():
    assert (RESULTS / "quickstart" / "table.md").read_text(encoding="utf-8").strip() in README


def test_the_speeds_of_the_solvers_are_the_measured_ones():
    def times(machine, table):
        rows = results(f"bench_solvers_{machine}/solvers.json")[table]
        return {row["solver"]: row for row in rows if (row["shape"], row["reg"]) == ("[64, 60, 60]", 0.01)}

    def ratios(of):
        ours, ott = of["fs_jax stabilized"], of["ott-jax log"]
        return (ott[what] / ours[what] for what in ("value_ms", "gradient_ms"))

    cpu = times("cpu", "equal_iterations")
    value, gradient = ratios(cpu)
    assert f"{value:.1f} times faster, with gradients {gradient:.0f} times" in row_of("ott-jax")
    assert f"{value:.1f} times faster than by ott-jax, and differentiated {gradient:.0f} times faster" in TEXT
    pot = cpu["POT"]["value_ms"] / cpu["fs_jax stabilized"]["value_ms"]
    assert f"the same problems, 50 iterations: {pot:.0f} times faster" in row_of("POT")
    value, gradient = ratios(times("cpu", "equal_error"))
    assert f"error of 1e-3: {value:.1f} times, with gradients {gradient:.0f} times" in row_of("ott-jax")
    value, gradient = ratios(times("gpu", "equal_iterations"))
    assert f"({value:.1f} and {gradient:.0f} times on an H200)" in TEXT


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def test_the_committed_report_has_no_findings_in_our_solvers():
    result = results("differential/fs_jax/report.json")
    assert f"On [{result['count']:,} problems]" in TEXT
    assert all(set(of) <= {"gave up"} for of in result["findings"].values())
    causes = re.findall(r"^\*\*", (RESULTS / "differential" / "findings.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"[{NUMBERS[len(causes)]} causes of errors]" in TEXT


def test_the_speeds_of_the_attacks_are_the_measured_ones():
    seconds = {row["name"]: row["seconds"] for row in results("bench_attacks/attacks.json")["autoattack"]}
    theirs = min(each for name, each in seconds.items() if name.startswith("torchattacks"))  # its faster batch size
    cached, compiled = (seconds[name] / theirs for name in ("ours", "ours, compilation included"))
    assert f"{cached:.2f} of its time, {compiled:.2f} with compilation" in row_of("torchattacks")


def test_the_agreement_with_autoattack_is_the_measured_one():
    tables = sorted((RESULTS / "autoattack_reference").glob("*/table.md"))
    agreements = {re.search(r"in the end ([\d.]+%) of the images", of.read_text(encoding="utf-8"))[1] for of in tables}
    (agreement,) = agreements
    assert len(tables) == 2
    assert f"{agreement} of 500 images" in row_of("AutoAttack")
    assert f"agrees with the authors' AutoAttack on {agreement} of the images" in TEXT


def test_the_robust_accuracies_are_the_measured_ones():
    def percent(table, row="feature scattering"):
        attacks = results(f"paper/{table}.json")["rows"][row]
        return " and ".join(f"{100 * attacks[attack]['accuracy']:.1f}%" for attack in ("pgd-20", "square"))

    on_pgd, on_autoattack = percent("digits/main_table").split(" and ")
    assert f"{on_pgd} of the images are robust under PGD-20 and {on_autoattack} under AutoAttack for feature" in TEXT
    assert f"{percent('digits/main_table', 'PGD-7')} for PGD training" in TEXT
    assert f"these are {percent('small/main_table')}; {percent('small/main_table', 'PGD-7')}." in TEXT
    equal_passes = "medium/equal_passes"
    assert f"are {percent(equal_passes)}; {percent(equal_passes, 'PGD-7, equal passes')} for PGD training with" in TEXT
    assert f"feature scattering has {percent('short/main_table')}." in TEXT


@pytest.mark.filterwarnings("ignore:2 of 2 images have a cross-entropy gradient of exactly zero")
def test_the_examples_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for the journal
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 1)).astype(np.float32)
    exec(blocks[1], names := {})
    assert names["gradients"].shape == (64, 60, 10)
    assert np.isfinite(names["values"]).all()
    # The network never predicts these labels, so that all images are misclassified at once and AutoAttack is quick.
    network = {"logits_fn": lambda x: x.reshape(len(x), -1) @ jnp.zeros((16, 5)) + jnp.arange(5.0)[None]}
    exec(blocks[0], names := {**network, "images": images, "labels": np.zeros(2, int)})
    assert names["result"].summary["worst"]["correct"] == 0


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_links_point_to_existing_files(link):
    assert (ROOT / link).exists()
