"""The page of results: what it says follows from the numbers, and it needs nothing but itself."""

import pathlib
import re
import shutil
import subprocess

import pytest

from experiments import report
from experiments.paper import findings, jobs, writing
from experiments.paper.scales import scale_of
from tests.paper_results import finish


def results_of(tmp_path, *names):
    """Files of these tables, as if they had been run at the scale of digits."""
    for name in names:
        finish(name, "digits", tmp_path / "runs")
        writing.write(
            jobs.experiment(name), scale_of("digits"), [0], tmp_path / "runs", tmp_path / "results" / "digits"
        )
    return tmp_path / "results"


def test_the_page_has_all_results_and_the_html_is_whole(tmp_path):
    folder = results_of(tmp_path, "table4_ipot_beta", "autoattack_gap", "ablation")
    report.main(["--results", str(folder)])
    text, page = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    for name in ("table4_ipot_beta", "autoattack_gap", "ablation"):
        assert f"python -m experiments.paper.{name} --scale digits" in text
        assert jobs.experiment(name).title in page
    assert (text.count("![From"), page.count("<svg"), page.count("<img")) == (1, 2, 0)
    assert not re.search(r'(src|href)="(?!https://robustbench)', re.sub(r'xlink:href="#[^"]*"', "", page))
    ids = re.findall(r' id="([^"]+)"', page)
    shared = {name for name in ids if ids.count(name) > 1}
    assert not {name for name in re.findall(r"url\(#([^)]+)\)", page)} & shared  # no figure is cut by another's frame


def test_no_page_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results: expected folders .*python -m experiments.paper --scale"):
        report.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def row(*, points=0.0, verdict="equal", accuracy=0.5):
    numbers = {
        "accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02,
        "difference": {"points": points, "half": 1.0, "verdict": verdict},
    }  # fmt: skip
    return {name: numbers for name in ("pgd-20", "square", "apgd-t alone")}


@pytest.mark.parametrize(("verdict", "said"), [
    ("lower", "agrees"), ("higher", "disagrees"), ("equal", "undetermined"), ("undetermined", "undetermined"),
])  # fmt: skip
def test_who_is_more_robust_is_what_autoattack_says(verdict, said):
    rows = {"feature scattering": row(), "PGD-7": row(verdict=verdict)}
    (first, *_) = findings.findings({"main_table": {"rows": rows}})
    assert (first.claim[:30], first.verdict) == ("Feature scattering is more rob", said)


@pytest.mark.parametrize(("verdicts", "said"), [
    (("equal", "equal"), "agrees"), (("equal", "undetermined"), "undetermined"), (("equal", "lower"), "disagrees"),
])  # fmt: skip
def test_stable_means_equal_everywhere(verdicts, said):
    rows = {"τ = 0.01": row(), **{f"τ = {n}": row(verdict=verdict) for n, verdict in enumerate(verdicts)}}
    (found,) = findings.findings({"table3_sinkhorn_tau": {"rows": rows}})
    assert found.verdict == said


@pytest.mark.parametrize(("verdict", "said"), [
    ("lower", "agrees"), ("equal", "disagrees"), ("higher", "disagrees"), ("undetermined", "undetermined"),
])  # fmt: skip
def test_transport_matters_if_the_identity_plan_is_worse(verdict, said):
    (found,) = findings.findings({"matching": {"rows": {"identity plan": row(verdict=verdict)}}})
    assert (found.verdict, "mass" in found.evidence) == (said, False)
    plan = {"diagonal": 0.97, "identity_signs": 0.99}
    points = [{"plans": {"Sinkhorn, τ = 0.01": plan}}]
    (found,) = findings.findings({
        "matching": {"rows": {"identity plan": row(verdict=verdict)}}, "mechanism": {"points": points},
    })  # fmt: skip
    assert "97.0% of its mass on the diagonal" in found.evidence


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_is_wider_than_the_window(width, tmp_path):
    folder = results_of(tmp_path, "table4_ipot_beta", "autoattack_gap")
    report.main(["--results", str(folder)])
    page = (folder / "report.html").read_text(encoding="utf-8")
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}",
            f"--window-size={width},900", "--dump-dom", pathlib.Path(tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    wide, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups())
    assert wide <= window
    assert abs(window - width) < 40


def test_every_claim_is_of_experiments_that_there_are():
    names = set(
        re.findall(r'results\["(\w+)"\]|results, "(\w+)"', pathlib.Path(findings.__file__).read_text(encoding="utf-8"))
    )
    assert {name for pair in names for name in pair if name} <= set(jobs.EXPERIMENTS)
