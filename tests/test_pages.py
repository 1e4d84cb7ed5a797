"""The examples on the packages' pages run as they are, and do what the pages say."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fs_jax
from fs_jax import ot

pytestmark = pytest.mark.usefixtures("small_programs", "standard_promotion")

ROOT = pathlib.Path(fs_jax.__file__).parent

# The number of examples of each page, all of which are tested below.
EXAMPLES = {"ot": 12, "attacks": 4, "evaluation": 4, "training": 4, "data": 4, "models": 3}
CONTINUED = ("attacks", "evaluation")  # each of their examples continues from the first one


@functools.cache
def examples(package):
    page = (ROOT / package / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def run(package, number):
    """The names that an example defines."""
    names = dict(first(package)) if number and package in CONTINUED else {}
    exec(compile(examples(package)[number], f"fs_jax/{package}/README.md", "exec"), names)
    return names


def run_all(package):
    """The names that a page's examples define, in order, in one namespace."""
    names = {}
    for example in examples(package):
        exec(compile(example, f"fs_jax/{package}/README.md", "exec"), names)
    return names


@functools.cache
def first(package):
    return run(package, 0)


def test_every_page_and_every_example_is_tested():
    pages = {path.parent.name: len(examples(path.parent.name)) for path in ROOT.glob("*/README.md")}
    assert pages == EXAMPLES


@pytest.mark.parametrize("package", EXAMPLES)
def test_links_on_a_page_point_to_existing_files(package):
    page = (ROOT / package / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page):
        assert (ROOT / package / link).exists(), link


def test_first_example():
    result = run("ot", 0)["result"]
    np.testing.assert_allclose(result.plan, [[0, 0.5], [0.5, 0]], atol=1e-3)  # matched by direction


@pytest.mark.slow
def test_generator():
    losses = run("ot", 1)["losses"]
    assert losses[-1] < 0.2 * losses[0]


def test_batch():
    names = run("ot", 2)
    result, alone = names["result"], names["alone"]
    assert (result.status == ot.Status.CONVERGED).all()
    assert len(set(result.num_iters.tolist())) > 1
    # The same iterations in float32, with zeros added to the sums.
    np.testing.assert_allclose(result.primal_cost[0], alone.primal_cost, rtol=1e-5)


@pytest.mark.slow
def test_learned_metric():
    # The accuracy after 300 steps of Adam; the smallest weight affects the plan least, and is learned last.
    np.testing.assert_allclose(jnp.exp(run("ot", 3)["learned"]), [2, 0.5, 0.1], atol=0.02)


def test_divergence():
    names = run("ot", 4)
    x, distance = names["x"], names["distance"]
    assert distance(x, x) == 0
    np.testing.assert_allclose(distance(x, x + 0.5), 0.5, rtol=0.02)  # entropic: a little less than the exact 0.5
    assert distance(names["moved"], x) < 0.05 * distance(x, x + 0.5)


def test_new_points():
    np.testing.assert_allclose(run("ot", 5)["mapped"], [[1.2, 0.85]], atol=0.15)  # 200 points, blurred by the entropy


def test_bounds():
    names = run("ot", 6)
    assert names["lower"] <= names["upper"] <= names["lower"] * 1.02


def test_dustbin():
    np.testing.assert_allclose(run("ot", 7)["matched"], [[0, 1], [1, 0], [0, 0]], atol=1e-3)


@pytest.mark.slow
def test_unbalanced():
    result = run("ot", 8)["result"]
    assert result.converged.all()
    to_outliers = result.plan[:, :, :3].sum((1, 2))
    assert to_outliers[0] < 1e-3
    assert 0.01 < to_outliers[1] < 0.09
    np.testing.assert_allclose(to_outliers[2], 0.1, rtol=0.01)  # a gap of 1e-3, for a cost of about 5


@pytest.mark.slow
def test_sharded_rows():
    names = run("ot", 9)
    # The same iterations in float32, with sums in another order.
    np.testing.assert_allclose(names["value"], names["alone"], rtol=1e-5)
    whole = jax.grad(
        lambda x: ot.sinkhorn(ot.sqeuclidean_cost(x, names["y"]), reg=0.1, num_iters=2000, threshold=1e-3).primal_cost
    )
    np.testing.assert_allclose(names["gradient"], whole(names["x"]), atol=1e-6)


def test_warm_starts():
    first, *others = run("ot", 10)["iterations"].tolist()
    assert max(others) < first / 2


def test_your_own_solver_is_checked():
    found = run("ot", 11)["found"]
    checks = {finding.check for of in found.values() for finding in of}
    assert checks == {"marginals"}  # fifty iterations aren't enough for all, but it claims to converge


def accuracy(logits_fn, images, labels):
    return float(np.mean(logits_fn(images).argmax(-1) == labels))


def test_first_attack():
    names = first("attacks")
    logits_fn, images, labels, attacked = (names[name] for name in ("logits_fn", "images", "labels", "attacked"))
    assert np.abs(attacked - images).max() <= 0.2 + 6e-8  # rounding of float32
    assert accuracy(logits_fn, attacked, labels) < accuracy(logits_fn, images, labels) - 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("one_batch_size")  # which compiles less
def test_autoattack():
    names = run("attacks", 1)
    record = names["record"]
    assert list(record.stages) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert record.warnings == []
    assert record.robust.mean() <= accuracy(names["logits_fn"], names["attacked"], names["labels"])


def test_networks_of_every_framework_can_be_attacked():
    names = run("attacks", 2)
    for framework, network in names["networks"].items():
        attacked = names["attacked"][framework]
        assert np.abs(attacked - names["images"]).max() <= 0.1 + 6e-8  # rounding of float32
        assert accuracy(network, attacked, names["labels"]) <= accuracy(network, names["images"], names["labels"])


def test_your_own_attack():
    record = run("attacks", 3)["corners"]
    assert record.stages["corners"] <= record.stages["clean"]
    assert record.queries["corners"][1] == 0  # it uses no gradients


@pytest.mark.usefixtures("one_batch_size")
def test_first_evaluation():
    result = first("evaluation")["result"]
    assert [attack["name"] for attack in result.summary["attacks"]] == ["clean", "pgd-20", "cw-20x2", "square"]
    assert 0 < result.summary["worst"]["accuracy"] < result.summary["attacks"][0]["accuracy"]


@pytest.mark.slow
def test_evaluation_of_a_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("evaluation", 1)
    images = names["images"][:2].astype(np.float32) / 255
    assert names["logits_fn_of_file"](images).shape == (2, 10)


def test_evaluation_with_your_own_attack():
    clean, pgd, bim, larger = run("evaluation", 2)["mine"].summary["attacks"]
    assert (bim["name"], bim["attacked"], bim["total"]) == ("bim-10", pgd["correct"], 50)
    assert larger["apart"]
    assert larger["accuracy"] < pgd["accuracy"] < clean["accuracy"]


def test_merged_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("evaluation", 3)
    whole = names["result"].records
    # The same images with the same seed: what PGD-20 finds doesn't depend on the part.
    for one, other in zip(names["merged"].records, whole, strict=True):
        assert one["misclassified_at"]["pgd-20"] == other["misclassified_at"]["pgd-20"]


@pytest.mark.usefixtures("one_batch_size")
def test_data():
    names = run_all("data")
    assert names["digits"].train_images.shape == (1437, 8, 8, 1)
    assert names["mine"].info.class_names == names["same"].info.class_names == ("ant", "bee", "cat")
    assert names["augmented"].shape == (8, 16, 16, 3)
    assert not np.array_equal(names["augmented"], names["images"])


@pytest.mark.usefixtures("one_batch_size")
def test_models():
    names = run_all("models")
    assert (names["logits"].shape, names["features"].shape) == ((2, 10), (2, 64))
    assert (names["model"].depth, names["model"].width) == (10, 1)  # read from the file
    attacks = {attack["name"]: attack["accuracy"] for attack in names["result"].summary["attacks"]}
    assert attacks["clean"] == 1  # the labels are the network's own


@pytest.mark.slow  # other tests train a configuration and a custom network
def test_training():
    names = run_all("training")
    assert names["run"].finished
    assert {"loss", "accuracy"} <= names["metrics"].keys()
    assert int(names["unreplicate"](names["state"]).step) == 1
