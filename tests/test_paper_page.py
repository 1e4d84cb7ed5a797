"""The page of results: its verdicts follow from the numbers, and the HTML file is self-contained."""

import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from experiments import report
from experiments.paper import findings, jobs, summary, writing
from experiments.paper.scales import EXPERIMENTS, scale_of
from experiments.paper.trade_off import SUPERVISED_ROWS
from tests.paper_results import finish

ROOT = pathlib.Path(__file__).parents[1]


def results_of(tmp_path, *names):
    """Files of these tables, as if they had been run at scale digits."""
    for name in names:
        finish(name, "digits", tmp_path / "runs")
        writing.write(
            jobs.experiment(name), scale_of("digits"), [0], tmp_path / "runs", tmp_path / "results" / "digits"
        )
    return tmp_path / "results"


def test_the_page_has_all_results_and_the_html_is_self_contained(tmp_path):
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
    assert (
        not {name for name in re.findall(r"url\(#([^)]+)\)", page)} & shared
    )  # no figure uses the clip path of another


def test_the_committed_page_is_what_the_code_writes():
    folder = ROOT / "experiments" / "results" / "paper"
    assert report.page(report.read(folder)) == (folder / "report.md").read_text(encoding="utf-8")


def test_without_results_there_is_an_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"results: expected a folder with results.*python -m experiments.paper --scale"
    ):
        report.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_title_names_the_data_sets(tmp_path):
    folder = results_of(tmp_path, "table4_ipot_beta")
    digits = report.read(folder)
    assert report.page(digits).startswith(
        "# Feature scattering: the paper's claims, checked on scikit-learn's digits\n"
    )
    assert "none on CIFAR-10" in report.page(digits)
    finish("table4_ipot_beta", "small", tmp_path / "runs")
    small = scale_of("small")
    writing.write(jobs.experiment("table4_ipot_beta"), small, [0], tmp_path / "runs", folder / "small")
    both = report.page(report.read(folder))
    assert both.startswith("# Feature scattering: the paper's claims, checked on CIFAR-10 and scikit-learn's digits\n")
    assert re.search(r"\(scale small\) *\| scikit-learn's digits, 8 x 8, radius 0.1 \(scale digits\)", both)
    assert "none on CIFAR-10" not in both


def test_the_page_says_what_is_not_complete(tmp_path):
    folder = results_of(tmp_path, "table4_ipot_beta")
    text = report.page(report.read(folder))
    (line,) = re.findall(r"\*\*Not run, or not all rows:\*\* (.*)\.", text)
    assert jobs.experiment("ablation").title in line
    assert jobs.experiment("table4_ipot_beta").title not in line
    assert len(line.split("; ")) == len(EXPERIMENTS) - 1


def row(*, points=0.0, half=1.0, verdict="equal", accuracy=0.5):
    numbers = {
        "accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02, "total": 100, "paper": 60.0,
        "difference": {"points": points, "half": half, "verdict": verdict, "over_images": half, "networks": 1},
        "by_network": [accuracy],
    }  # fmt: skip
    names = ("clean", "pgd-20", "square", "apgd-t alone", "spsa", "spsa, 1 step", "square alone")
    return {name: dict(numbers) for name in (*names, "local search, 10 rounds", "local-search-projected")}


def table(reference, **rows):
    first = {name: {**of, "difference": None} for name, of in row().items()}
    return {"reference": reference, "rows": {reference: first, **rows}, "missing": [], "seeds": [0]}


def gap(lost):
    parts = {"misclassified": 0.1, "PGD-20": 0.2, "loss": lost, "no gradient (Square)": 0.0, "robust": 0.7 - lost}
    return {"total": 1000, "parts": parts}


def network(*, lost=5, robust=45, purity=(0.9, 0.9)):
    clean, attacked = (
        {"mean": mean, "half": 0.02, "shares": np.clip([mean - 0.05, mean + 0.05] * 100, 0, 1)} for mean in purity
    )
    loss = {"mean": [1.0] + [2.0] * 100}
    return {
        "outcomes": {"survives PGD-20, falls to APGD-T": lost, "robust": robust},
        "curves": [{"loss": loss}],
        "purity": {"clean": clean, "supervised attack": attacked, "feature scattering": clean},
    }


def whole(**changes):
    """Results of all experiments that the claims need."""
    plan = {"diagonal": 0.97, "identity_signs": 0.99, "cross_entropy_signs": 0.52}
    return {
        "main_table": table("feature scattering", **{"PGD-7": row()}),
        "equal_passes": table(
            "feature scattering",
            **{"PGD-7, equal passes": row(), "feature scattering, Δ = 0": row(), "identity plan": row()},
        ),
        "autoattack_gap": {"networks": {"feature scattering": gap(0.2), "PGD-7": gap(0.01)}},
        "matching": table("Sinkhorn, τ = 0.01", **{"identity plan": row(), "independent plan": row()}),
        "mechanism": {"points": [{"plans": {"Sinkhorn, τ = 0.01": plan}}]},
        "table2_label_smoothing": table("Δ = 0.5", **{"Δ = 0.3": row(), "Δ = 0.7": row()}),
        "table3_sinkhorn_tau": table("τ = 0.01", **{"τ = 0.5": row()}),
        "table4_ipot_beta": table("β = 1", **{"β = 0.5": row()}),
        "ablation": table(
            "transport, 1 step, Δ = 0.5",
            **dict.fromkeys(
                ("transport, 1 step, Δ = 0", *(f"cross-entropy, 1 step, Δ = {d}" for d in ("0", "0.5"))), row()
            ),
        ),
        "trade_off": table("feature scattering", **dict.fromkeys(SUPERVISED_ROWS, row())),
        "gradient_free": table("feature scattering"),
        "figure1_loss_curves": {"networks": {"feature scattering": network()}},
        "figure2_embeddings": {"networks": {"feature scattering": network(), "standard": network()}},
        **changes,
    }


def verdict(about, results):
    (found,) = (each for each in findings.findings(results) if about in each.claim)
    return found.verdict


def test_every_claim_is_checked():
    assert len(findings.findings(whole())) == len(findings.CLAIMS)
    # The rows here are rows of the experiments.
    for name, data in whole().items():
        labels = [row.label for row in jobs.experiment(name).rows]
        assert set(data.get("rows", {})) <= set(labels)
        assert data.get("reference", labels[0]) == labels[0]
        assert set(data.get("networks", {})) <= set(labels)


def test_without_results_there_is_no_finding():
    assert findings.findings({}) == []
    alone = {
        "reference": "β = 1",
        "missing": ["β = 1"],
        "rows": {"β = 0.5": {name: {**of, "difference": None} for name, of in row().items()}},
    }
    assert len(findings.findings(whole(table4_ipot_beta=alone))) == len(findings.CLAIMS) - 1
    # Without the method's row, others cannot be compared.
    only = table("feature scattering", **{"PGD-7, equal passes": row()})
    only["rows"] = {"PGD-7, equal passes": {name: {**of, "difference": None} for name, of in row().items()}}
    results = whole(equal_passes=only, autoattack_gap={"networks": {"PGD-7": gap(0.01)}})
    assert len(findings.findings(results)) == len(findings.CLAIMS) - 3  # one step, smoothing, PGD
    assert "At equal passes" not in summary.summary({"digits": results})


def test_an_error_in_a_finding_is_not_taken_for_missing_results():
    results = whole()
    del results["gradient_free"]["rows"]["feature scattering"]["spsa"]
    with pytest.raises(KeyError, match="spsa"):
        findings.findings(results)


def test_a_row_that_does_not_decide_a_verdict_can_be_missing():
    results = whole()
    for name, label in (
        ("equal_passes", "feature scattering, Δ = 0"), ("ablation", "transport, 1 step, Δ = 0"),
        ("table2_label_smoothing", "Δ = 0.3"), ("matching", "identity plan"), ("matching", "independent plan"),
    ):  # fmt: skip
        del results[name]["rows"][label]
    del results["autoattack_gap"]["networks"]["PGD-7"]
    results["figure1_loss_curves"]["networks"]["PGD-7, equal passes"] = network(lost=0, robust=0)
    missing = {claim for claim, _check in findings.CLAIMS} - {each.claim for each in findings.findings(results)}
    assert [claim for claim in missing if "smoothing" not in claim] == []
    assert "For other networks" not in str(findings.findings(results))


@pytest.mark.parametrize(("difference", "expected"), [
    ("lower", "agrees"), ("higher", "disagrees"), ("equal", "disagrees"), ("undetermined", "undetermined"),
])  # fmt: skip
@pytest.mark.parametrize(("about", "experiment", "label"), [
    ("more robust than adversarial", "main_table", "PGD-7"), ("One step", "equal_passes", "PGD-7, equal passes"),
    ("without labels", "ablation", "cross-entropy, 1 step, Δ = 0.5"),
    ("matching by optimal transport", "matching", "identity plan"),
    ("smoothing", "equal_passes", "feature scattering, Δ = 0"),
])  # fmt: skip
def test_claims_of_more_robustness_are_decided_by_the_strongest_attack(about, experiment, label, difference, expected):
    strongest = "apgd-t alone" if experiment == "ablation" else "square"
    results = whole()
    results[experiment]["rows"][label] = {**row(), strongest: row(verdict=difference)[strongest]}
    assert verdict(about, results) == expected


@pytest.mark.parametrize(("clean", "attacked", "expected"), [
    ((-8.0, 0.0, 1.0), (9.0, 5.0, -1.0), "disagrees"), ((-8.0, 0.0, 1.0), (9.0, -5.0, -6.0), "agrees"),
    ((-8.0, 0.0, 1.0), (9.0, -1.0, -6.0), "undetermined"), ((-8.0, -7.0, -5.0), (-9.0, -9.0, -9.0), "undetermined"),
    ((-8.0, -2.5, 1.0), (9.0, 5.0, -6.0), "undetermined"),  # the second row may be as accurate
    ((-8.0, -0.9, 1.0), (9.0, 5.0, -6.0), "undetermined"),  # the interval of one of three rows is wider than 1 point
])  # fmt: skip
def test_the_trade_off_is_judged_at_the_same_clean_accuracy(clean, attacked, expected):
    rows = {
        label: {"clean": row(points=at_rest)["clean"], "apgd-t alone": row(points=under_attack)["apgd-t alone"]}
        for label, at_rest, under_attack in zip(SUPERVISED_ROWS, clean, attacked, strict=True)
    }
    results = whole(trade_off=table("feature scattering", **rows))
    assert verdict("clean accuracy of feature scattering is worth it", results) == expected
    del rows[SUPERVISED_ROWS[-1]]  # without the row of the smallest radius, there is no verdict
    incomplete = whole(trade_off=table("feature scattering", **rows))
    assert not [each for each in findings.findings(incomplete) if "worth it" in each.claim]


def test_a_scale_with_few_experiments_has_the_findings_that_its_tables_allow():
    few = {name: whole()[name] for name in ("equal_passes", "figure1_loss_curves")}
    found = [each.claim for each in findings.findings(few)]
    for about in ("One step", "matching by optimal transport", "smoothing", "plateau"):
        assert sum(about in claim for claim in found) == 1
    assert len(found) == 4


def test_the_summary_has_a_column_for_each_scale():
    digits, small = whole(), whole()
    small["main_table"]["rows"]["PGD-7"]["square"]["accuracy"] = 0.25
    small["ablation"]["rows"]["transport, 1 step, Δ = 0"] = row(points=-3.0, verdict="lower")
    del small["matching"], small["equal_passes"]
    plans = {"apgd-t alone": {"points": 0.4, "half": 1.2, "verdict": "equal"}}
    digits["ablation"]["plans"] = {"pairs": 5, "differences": plans}
    text = summary.summary({"digits": digits, "small": small})
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.split("\n")
        if "|" in line
    }
    assert lines["PGD-7, as many epochs, with 2.8 times the passes"] == [
        "50.0 [48.0, 52.0] / 50.0",
        "25.0 [48.0, 52.0] / 50.0",
    ]
    assert lines["PGD-7, as many passes as feature scattering"] == ["50.0 [48.0, 52.0] / 50.0", "not run"]
    assert lines["no label smoothing"] == ["+0.0 ±1.0", "-3.0 ±1.0"]
    assert lines["the identity plan, on average over all pairs of rows that differ in the plan only"] == [
        "+0.4 ±1.2",
        "not run",
    ]
    assert "a gain by the transport is at most 0.8 points" in str(findings.findings(digits))
    one_step = "one step on the cross-entropy (with labels) without label smoothing, with 0.8 times the passes"
    assert lines[one_step] == ["50.0 [48.0, 52.0]\\* / 50.0"] * 2
    assert "IPOT instead of Sinkhorn's algorithm" not in lines
    assert lines["The matching by optimal transport makes the method work."] == ["disagrees", "not run"]
    assert summary.summary({"digits": {}}) == ""
    text = summary.summary({"a": digits, "b": {"main_table": small["main_table"]}})
    training, ablation = (part.splitlines()[0] for part in text.split("\n\n")[3:6:2])
    assert "| b " in training
    assert "| b " not in ablation  # where it has no rows


def test_the_summary_says_which_rows_differ():
    rows = {"standard": row(verdict="lower"), "PGD-7": row(verdict="higher"), "TRADES": row()}
    changes = {"transport, 1 step, Δ = 0": row(verdict="higher"), "independent plan": row(verdict="lower")}
    supervised = {"cross-entropy, 1 step": row(points=-8.0), "cross-entropy, 1 step, radius x 0.5": row(points=-2.0)}
    results = whole(
        main_table=table("feature scattering", **rows),
        ablation=table("transport, 1 step, Δ = 0.5", **changes),
        trade_off=table("feature scattering", **supervised),
    )
    first, *_ = summary.summary({"digits": results}).split("\n\n")
    assert first == (
        "**digits:** Feature scattering has 50.0% / 50.0% under AutoAttack / on clean images. More robust: PGD-7 "
        "(50.0% / 50.0%). Less robust: standard (50.0% / 50.0%). Not clearly more or less robust: TRADES (50.0% / "
        "50.0%). At equal passes: PGD-7 (50.0% / 50.0%), equally robust. Of the rows with one attack step on the "
        "cross-entropy, *cross-entropy, 1 step, radius x 0.5* has the closest clean accuracy: -2.0 ±1.0 points on "
        "clean images, and -2.0 ±1.0 under APGD-T. Changes that make it more robust, under APGD-T: no label smoothing. "
        "Changes that make it less robust: the independent plan instead of the transport."
    )
    smoothed = table("transport, 1 step, Δ = 0.5", **{findings.SMOOTHED_PGD_7: row(verdict="lower")})
    assert "With the method's label smoothing, PGD-7 at equal passes is less robust" in summary.conclusions(
        "digits", {**results, "ablation": smoothed}
    )
    results["main_table"]["seeds"] = [0, 1]
    results["main_table"]["rows"]["feature scattering"]["square"]["by_network"] = [0.49, 0.51]
    assert "(2 networks; their standard deviation under AutoAttack is 1.4 points.)" in summary.conclusions("a", results)


def test_the_summary_of_one_row_says_that_it_is_alone():
    alone, others = table("feature scattering"), table("feature scattering", **{"PGD-7, equal passes": row()})
    ours = "**short:** Feature scattering has 50.0% / 50.0% under AutoAttack / on clean images."
    assert summary.conclusions("short", {"main_table": alone}) == f"{ours} No other method was run at this scale."
    assert summary.conclusions("short", {"main_table": alone, "equal_passes": others}) == (
        f"{ours} At equal passes: PGD-7 (50.0% / 50.0%), equally robust."
    )
    without = table("feature scattering", PGD=row())
    del without["rows"]["feature scattering"]
    without["rows"]["PGD"] = {name: {**of, "difference": None} for name, of in row().items()}
    assert summary.conclusions("short", {"main_table": without}) == ""


def test_without_the_main_table_the_summary_compares_at_equal_passes():
    rows = {"identity plan": row(), "PGD-7, equal passes": row(verdict="higher")}
    assert summary.conclusions("medium", {"equal_passes": table("feature scattering", **rows)}) == (
        "**medium:** Feature scattering has 50.0% / 50.0% under AutoAttack / on clean images. More robust: PGD-7, "
        "equal passes (50.0% / 50.0%). Not clearly more or less robust: identity plan (50.0% / 50.0%)."
    )


def test_the_rows_of_the_summary_are_rows_of_the_tables():
    labels = {name: [row.label for row in jobs.experiment(name).rows] for name in EXPERIMENTS}
    assert set(summary.TRAINING) <= {label for name, _attack, _star in summary.MEASURED for label in labels[name]}
    assert set(summary.CHANGES) - {summary.PLANS} <= set(labels["ablation"])


@pytest.mark.parametrize(("points", "half", "expected"), [
    ((0.1, 0.2), 1.0, "agrees"), ((0.1, 1.1), 1.0, "undetermined"), ((0.1, 5.0), 1.0, "disagrees"),
    ((0.0, 1.1), 1.0, "undetermined"),  # not enough with two rows: one of them can differ by chance
])  # fmt: skip
def test_stable_means_that_all_rows_are_equal(points, half, expected):
    rows = {f"τ = {n}": row(points=each, half=half) for n, each in enumerate(points)}
    assert verdict("Sinkhorn's τ", whole(table3_sinkhorn_tau=table("τ = 0.01", **rows))) == expected


@pytest.mark.parametrize(("lost", "expected"), [(0.2, "disagrees"), (0.005, "agrees"), (0.02, "undetermined")])
def test_pgd_measures_robustness_if_autoattack_agrees(lost, expected):
    networks = {"feature scattering": gap(lost), "PGD-7": gap(0.01)}
    assert verdict("Accuracy under PGD", whole(autoattack_gap={"networks": networks})) == expected


@pytest.mark.parametrize(("weak", "expected"), [(0.9, "disagrees"), (0.52, "undetermined")])
def test_gradient_free_attacks_prove_nothing_if_weak_ones_miss_what_strong_ones_find(weak, expected):
    changed = {**row(), "spsa, 1 step": row(accuracy=weak)["clean"], "square alone": row(accuracy=0.1)["clean"]}
    results = whole(gradient_free={"reference": "feature scattering", "rows": {"feature scattering": changed}})
    (found,) = (each for each in findings.findings(results) if "gradient-free" in each.claim)
    assert found.verdict == expected
    assert ("so a high number proves nothing" in found.evidence) == (weak == 0.9)
    assert f"spsa, 1 step {100 * weak:.1f}%" in found.evidence


@pytest.mark.parametrize(("lost", "expected"), [(20, "disagrees"), (1, "undetermined")])
def test_plateaus_are_evidence_if_all_images_with_one_are_robust(lost, expected):
    networks = {"feature scattering": network(lost=lost, robust=50 - lost)}
    assert verdict("plateau", whole(figure1_loss_curves={"networks": networks})) == expected


@pytest.mark.parametrize(("standard", "expected"), [(0.5, "agrees"), (0.9, "undetermined"), (0.94, "disagrees")])
def test_clusters_mix_less_if_their_purity_drops_less(standard, expected):
    networks = {"standard": network(purity=(0.9, standard)), "feature scattering": network()}
    assert verdict("clusters", whole(figure2_embeddings={"networks": networks})) == expected


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
