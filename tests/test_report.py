"""Tables and figures show what the records have, and files are complete."""

import itertools
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fs_jax import report
from fs_jax._utils import files


def record(name, accuracy, low, high, **more):
    return {"name": name, "accuracy": accuracy, "low": low, "high": high, **more}


CLEAN = record("clean", 0.9, 0.888, 0.911, total=2000, epsilon=0.0, restarts=1)
PGD = record("pgd-20", 0.4514, 0.43, 0.4738, total=2000, epsilon=8 / 255, restarts=5)
CW = record("cw-20", 0.0, 0.0, 0.0018, total=2000, epsilon=8 / 255, restarts=5)
EVALUATIONS = {
    "standard": {"attacks": [CLEAN, CW], "worst": CW},
    "feature scattering": {"attacks": [CLEAN, PGD, CW], "worst": PGD},
}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_table_has_a_row_per_network_and_the_worst_case_last():
    header, rule, *rows = cells(report.accuracy_table(EVALUATIONS))
    assert header == ["network", "clean", "cw-20", "pgd-20", "worst case"]
    assert set("".join(rule)) == {":", "-"}
    assert rows == [
        ["standard", "90.0 [88.8, 91.1]", "0.0 [0.0, 0.2]", "–", "0.0 [0.0, 0.2]"],
        ["feature scattering", "90.0 [88.8, 91.1]", "0.0 [0.0, 0.2]", "45.1 [43.0, 47.4]", "45.1 [43.0, 47.4]"],
    ]


def test_numeric_names_are_not_reformatted():
    _, _, row = cells(report.accuracy_table({"1e3": {"attacks": [CLEAN], "worst": CLEAN}}))
    assert row[0] == "1e3"


def test_caption_gives_ranges_and_ignores_the_clean_pass():
    assert report.caption(EVALUATIONS) == (
        "Accuracy in % of 2,000 images with 95% intervals; L∞ radius 8/255; 5 restarts"
    )
    other = {"attacks": [PGD | {"total": 500, "epsilon": 0.1}], "worst": PGD}
    assert report.caption({"a": other}) == (
        "Accuracy in % of 500 to 2,000 images with 95% intervals; L∞ radius 8/255 to 0.1; 5 restarts"
    )
    without_radius = PGD | {"name": "local-search", "norm": None, "epsilon": 1.0}
    assert "L∞ radius 8/255;" in report.caption({"a": {"attacks": [PGD, without_radius], "worst": PGD}})
    assert report.caption({"a": {"attacks": [record("clean", 1, 1, 1)], "worst": record("clean", 1, 1, 1)}}) == (
        "Accuracy in % with 95% intervals"
    )


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ({}, "at least one network; got none"),
        ({"a": {"attacks": [CLEAN]}}, r"evaluations\['a'\]: expected the key 'worst'"),
        (
            {"a": {"attacks": [CLEAN | {"accuracy": 90.0}], "worst": PGD}},
            r"clean: expected accuracy in \[0, 1\]; got 90",
        ),
        ({"a": {"attacks": [CLEAN | {"low": float("nan")}], "worst": PGD}}, r"expected low in \[0, 1\]; got nan"),
        ({"a": {"attacks": [{"name": "clean"}], "worst": PGD}}, "expected records with 'accuracy'"),
        ({"a": {"attacks": [PGD, PGD], "worst": PGD}}, "got two of 'pgd-20'"),
    ],
)
def test_bad_evaluations_raise_an_error(evaluations, message):
    with pytest.raises(ValueError, match=message):
        report.accuracy_table(evaluations)


def test_bars_show_accuracies_and_intervals(tmp_path):
    figure = report.accuracy_bars(EVALUATIONS, tmp_path / "bars.png", title="digits")
    (axes,) = figure.axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [container.get_label() for container in bars] == ["standard", "feature scattering"]
    np.testing.assert_allclose([bar.get_height() for bar in bars[1]], [90, 0, 45.14, 45.14])
    # pgd-20 wasn't run on the first network: it has bars at clean, cw-20 and the worst case.
    np.testing.assert_array_equal(np.round([bar.get_center()[0] for bar in bars[0]]), [0, 1, 3])
    (_, _, (intervals,)) = bars[1].errorbar.lines
    np.testing.assert_allclose(
        [segment[:, 1] for segment in intervals.get_segments()], [[88.8, 91.1], [0, 0.18], [43, 47.38], [43, 47.38]]
    )
    width, height = figure.get_size_inches()
    assert png_size(tmp_path / "bars.png") == (int(width * 160), int(height * 160))


def test_an_attack_on_no_image_has_no_bar(tmp_path):
    nothing = record("square", None, None, None)
    figure = report.accuracy_bars({"a": {"attacks": [CLEAN, nothing], "worst": CLEAN}}, tmp_path / "bars.png")
    (bars,) = [container for container in figure.axes[0].containers if hasattr(container, "patches")]
    assert len(bars) == 2


def test_bars_of_different_networks_do_not_overlap(tmp_path):
    nine = {f"network {i}": EVALUATIONS["feature scattering"] for i in range(9)}
    (axes,) = report.accuracy_bars(nine, tmp_path / "bars.png").axes
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert len(spans) == 36
    assert all(right <= left for (_, right), (left, _) in itertools.pairwise(spans))
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 9


def rows_of_a_run(steps=10, per_epoch=5):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "epoch": step / per_epoch}
        rows.append(row | {"loss": 2 / step, "accuracy": 0.02 * step, "natural_accuracy": 0.05 * step})
        if step % per_epoch == 0:
            rows.append(row | {"monitor_clean": 0.6, "monitor_robust": 0.01 * step})
    return rows


def lines(axes):
    return [np.stack(line.get_data()) for line in axes.lines]


def test_curves_show_each_run_in_percent_over_epochs(tmp_path):
    figure = report.training_curves({"a": rows_of_a_run(), "b": rows_of_a_run()[:3]}, tmp_path / "curves.png")
    loss, training, held_out = figure.axes
    epochs = np.arange(1, 11) / 5
    (a, b), (a_clean, a_attacked, _, _), (clean, robust) = lines(loss), lines(training), lines(held_out)
    np.testing.assert_allclose(a, [epochs, 2 / np.arange(1, 11)])
    assert b.shape == (2, 3)
    np.testing.assert_allclose(a_clean[1], 5 * np.arange(1, 11))
    np.testing.assert_allclose(a_attacked[1], 2 * np.arange(1, 11))
    np.testing.assert_allclose(clean, [[1, 2], [60, 60]])
    np.testing.assert_allclose(robust, [[1, 2], [5, 10]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    width, height = figure.get_size_inches()
    assert png_size(tmp_path / "curves.png") == (int(width * 160), int(height * 160))


def test_curves_without_held_out_images_have_two_panels(tmp_path):
    rows = [row for row in rows_of_a_run() if "loss" in row]
    assert len(report.training_curves({"a": rows}, tmp_path / "curves.png").axes) == 2


def test_a_resumed_run_is_one_line_that_never_goes_back(tmp_path):
    rows = rows_of_a_run()
    lost = [row | {"loss": 99.0} for row in rows if "loss" in row and 4 <= row["step"] <= 7]
    before = [row for row in rows if row["step"] <= 3]
    after = [row for row in rows if row["step"] > 3]
    resumed = report.training_curves({"a": before + lost + after}, tmp_path / "resumed.png")
    alone = report.training_curves({"a": rows}, tmp_path / "alone.png")
    for one, other in zip(resumed.axes, alone.axes, strict=True):
        np.testing.assert_array_equal(lines(one), lines(other))


def test_a_long_run_is_smoothed_by_a_centred_mean_and_the_figure_says_so(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    rows = [{"step": step, "epoch": step / 50, "loss": float(value)} for step, value in enumerate(values)]
    figure = report.training_curves({"a": rows}, tmp_path / "curves.png")
    raw, mean = (line[1] for line in lines(figure.axes[0]))
    np.testing.assert_array_equal(raw, values)
    half = 200 // 25 // 2
    np.testing.assert_allclose(mean, [values[max(0, i - half) : i + half + 1].mean() for i in range(200)], atol=1e-12)
    assert "running mean" in figure.get_supxlabel()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "expected rows of at least one run"),
        ({"a": []}, "expected rows of at least one run"),
        ({"a": [{"step": 1, "epoch": 0.1}, {"step": 2}]}, r"metrics\['a'\], row 2: expected 'step' and 'epoch'"),
    ],
)
def test_bad_metrics_raise_an_error(tmp_path, metrics, message):
    with pytest.raises(ValueError, match=message):
        report.training_curves(metrics, tmp_path / "curves.png")
    assert listing(tmp_path) == []


EPSILON = 8 / 255


def attacked_pair(channels, count=2):
    images = np.random.default_rng(0).uniform(0.2, 0.8, (count, 8, 8, channels)).astype(np.float32)
    signs = np.where(np.arange(8)[:, None, None] < 4, 1, -1).astype(np.float32)
    signs[0] = 0
    return images, images + np.float32(EPSILON) * signs, signs


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_scale_the_perturbation_to_the_full_range(tmp_path, channels):
    images, adversarial, signs = attacked_pair(channels)
    labels = np.array([1, 0])
    path = tmp_path / "examples.png"
    figure = report.attack_examples(images, adversarial, labels, labels, labels, path, epsilon=EPSILON)
    shown = [np.asarray(axes.images[0].get_array()).reshape(8, 8, channels) for axes in figure.axes]
    np.testing.assert_array_equal(shown[:2], images)
    np.testing.assert_allclose(shown[2], np.broadcast_to((signs + 1) / 2, (8, 8, channels)), atol=1e-5)
    np.testing.assert_array_equal(shown[4:], adversarial)
    assert figure.axes[2].get_ylabel() == "perturbation\n×16"
    assert all(axes.images[0].get_clim() == (0, 1) for axes in figure.axes)
    width, height = figure.get_size_inches()
    assert png_size(path) == (int(width * 160), int(height * 160))


def test_examples_show_predictions_with_probabilities(tmp_path):
    images, adversarial, _ = attacked_pair(3)
    clean = np.log(np.array([[0.75, 0.25, 1e-9], [0.1, 0.3, 0.6]])) + 1000  # a naive softmax overflows
    figure = report.attack_examples(
        images, adversarial, np.array([0, 1]), clean, np.array([1, 1]), tmp_path / "examples.png",
        class_names=["cat", "dog", "ship"], epsilon=EPSILON, title="a title",
    )  # fmt: skip
    grid = np.reshape(figure.axes, (3, 2))
    assert [axes.get_title() for axes in grid[0]] == ["true: cat", "true: dog"]
    assert [axes.get_xlabel() for axes in grid[0]] == ["✓ cat 75%", "✗ ship 60%"]
    assert [axes.get_xlabel() for axes in grid[2]] == ["✗ dog", "✓ dog"]
    right, wrong = (grid[0, i].xaxis.label.get_color() for i in (0, 1))
    assert [axes.xaxis.label.get_color() for axes in grid[2]] == [wrong, right] != [right, wrong]
    assert figure.get_suptitle() == "a title"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 8, 8))}, r"images: expected \[n, h, w, 1 or 3\]"),
        ({"adversarial": np.zeros((2, 8, 7, 1))}, r"adversarial: expected the images' shape"),
        ({"images": np.full((2, 8, 8, 1), 255, np.uint8)}, r"images: expected floats in \[0, 1\]; got uint8"),
        ({"adversarial": np.full((2, 8, 8, 1), -1.0)}, r"adversarial: expected floats in \[0, 1\]"),
        ({"labels": np.array([0.0, 1.0])}, "labels: expected 2 integers; got float64"),
        ({"clean_predictions": np.zeros((3, 10))}, r"clean_predictions: expected 2 integers, or logits of shape \(2,"),
        ({"class_names": ["zero"]}, "class_names: expected a name for class 1; got 1 names"),
        ({"epsilon": 0.0}, "epsilon: expected a positive radius"),
        ({"path": "examples.jpg"}, "path: expected a name that ends in .png or .svg"),
    ],
)
def test_bad_examples_raise_an_error(tmp_path, change, message):
    labels = np.array([0, 1])
    images = np.full((2, 8, 8, 1), 0.5)
    arguments = {
        "images": images, "adversarial": images, "labels": labels, "clean_predictions": labels,
        "adversarial_predictions": labels, "path": tmp_path / "examples.png", "epsilon": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        report.attack_examples(**(arguments | change))
    assert listing(tmp_path) == []


def attack_record(name, **more):
    costs = {"judged_by": "any iterate", "attacked": 1500, "seconds": 1234.56, "forward": 21_000, "backward": 20_000}
    return record(name, 0.4514, 0.43, 0.4738, total=2000, lowest_single_run=None, **costs) | more


def test_the_table_of_attacks_has_results_and_costs():
    attacks = [attack_record("pgd-20"), attack_record("pgd-100x5", lowest_single_run=0.46)]
    header, _, *rows = cells(report.attack_table({"attacks": attacks, "worst": PGD}))
    assert header == ["attack", "decides", "images", "accuracy, %", "lowest run", "seconds", "forward", "backward"]
    costs = ["1,234.6", "21,000", "20,000"]
    assert rows == [
        ["pgd-20", "any iterate", "1,500 of 2,000", "45.1 [43.0, 47.4]", "–", *costs],
        ["pgd-100x5", "any iterate", "1,500 of 2,000", "45.1 [43.0, 47.4]", "46.0", *costs],
        ["worst case", "", "2,000", "45.1 [43.0, 47.4]", "", "", "", ""],
    ]
    assert len(cells(report.attack_table({"attacks": attacks}))) == 4  # no row without a worst case


def test_strength_is_shown_over_steps_and_over_the_radius(tmp_path):
    attacks = [
        {"name": "pgd-100x5", "by_step": [[1, 0.6], [10, 0.5], [100, 0.4]]},
        {"name": "pgd-20", "num_steps": 20, "accuracy": 0.55},
    ]
    radii = [record("", a, a - 0.1, a + 0.1, epsilon=level / 255) for level, a in ((8, 0.3), (0, 0.8), (2, 0.6))]
    figure = report.attack_strength(attacks, radii, tmp_path / "strength.png", worst=0.35)
    over_steps, over_radius = figure.axes
    line, mark, worst = lines(over_steps)
    np.testing.assert_allclose(line, [[1, 10, 100], [60, 50, 40]])
    np.testing.assert_allclose(mark, [[20], [55]])
    np.testing.assert_allclose(worst[1], [35, 35])
    assert [text.get_text() for text in over_steps.texts] == ["pgd-20"]
    np.testing.assert_allclose(lines(over_radius)[0], [[0, 2, 8], [80, 60, 30]])
    assert len(report.attack_strength(attacks, [], tmp_path / "strength.png").axes) == 1
    assert png_size(tmp_path / "strength.png")
    with pytest.raises(ValueError, match="at least one, or one radius"):
        report.attack_strength([], [], tmp_path / "none.png")


def test_surfaces_show_each_image_and_its_decision_boundary(tmp_path):
    slope = np.broadcast_to(np.linspace(0, 1, 5), (5, 5, 5)) * np.arange(1, 6)[:, None, None]
    margins = np.where(
        np.arange(5)[:, None, None] < 3, 0.6 - slope, 1.0
    )  # two images are classified correctly everywhere
    figure = report.loss_surfaces(
        slope, margins, tmp_path / "surface.png", epsilon=EPSILON, titles=["a", "b", "c", "d", "e"]
    )
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in shown] == ["a", "b", "c", "d", "e"]
    np.testing.assert_allclose(shown[0].get_xlim(), (-8, 8))
    # Filled contours of the loss, and a line where the class changes.
    assert [len(axes.collections) for axes in shown] == [2, 2, 2, 1, 1]
    assert png_size(tmp_path / "surface.png")


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        report.accuracy_bars(EVALUATIONS, tmp_path / "new folder" / name)
    assert listing(tmp_path / "new folder") == ["one.png", "two.png"]
    assert (tmp_path / "new folder/one.png").read_bytes() == (tmp_path / "new folder/two.png").read_bytes()


def test_a_failed_write_keeps_the_old_figure(tmp_path, monkeypatch):
    def disk_full(figure, target, **_):
        target.write(b"half a pict")
        raise OSError("No space left on device")

    path = tmp_path / "bars.png"
    report.accuracy_bars(EVALUATIONS, path)
    before = path.read_bytes()
    monkeypatch.setattr(Figure, "savefig", disk_full)
    with pytest.raises(OSError, match="No space"):
        report.accuracy_bars(EVALUATIONS, path)
    assert listing(tmp_path) == ["bars.png"]
    assert path.read_bytes() == before


def test_figures_need_no_display_and_the_module_loads_no_matplotlib(tmp_path):
    script = (
        "import sys; from fs_jax import report; assert 'matplotlib' not in sys.modules\n"
        "record = {'name': 'clean', 'accuracy': 0.5, 'low': 0.4, 'high': 0.6}\n"
        "report.accuracy_bars({'a': {'attacks': [record], 'worst': record}}, sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"MPLBACKEND": "TkAgg"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "bars.png"], env=environment, check=True)
    png_size(tmp_path / "bars.png")


def test_jsonl_cut_in_its_last_line_gives_the_lines_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "note": "ε = 8/255"}]
    first, second = (json.dumps(row, ensure_ascii=False).encode() for row in rows)
    for cut in range(len(second)):
        path.write_bytes(first + b"\n" + second[:cut])
        assert files.read_jsonl(path) == rows[:1]
    for end in (b"", b"\n", b"\n\n"):
        path.write_bytes(first + b"\n" + second + end)
        assert files.read_jsonl(path) == rows


@pytest.mark.parametrize("broken", [b'{"step": 2, "lo\n', b'{"step": 2, "lo{"step": 2}\n', b"[2, 3]\n", b'"\xce\n'])
def test_jsonl_broken_elsewhere_raises_an_error_with_the_line(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n' + broken + b'{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: expected a JSON object; got "):
        files.read_jsonl(path)
