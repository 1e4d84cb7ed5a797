"""Every image counts once, restarts and attacks are worst cases, and the batch size changes nothing."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import data
from fs_jax.attacks import cross_entropy
from fs_jax.evaluation import Attack, accuracy, evaluate, parse_attack, suite
from fs_jax.evaluation.journal import Journal

pytestmark = pytest.mark.usefixtures("small_programs")

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = data.load("digits")
IMAGES = DIGITS.test_images[:50]


class Perceptron:
    """Two layers on digits: small enough that what is tested here is the evaluation."""

    def apply(self, variables, images, train=False):
        hidden = jnp.tanh(images.reshape(len(images), -1) @ variables["first"])
        return hidden @ variables["second"], hidden


PERCEPTRON = Perceptron()  # the same one everywhere, so that programs are compiled once


def make_network():
    rng = np.random.default_rng(0)
    first, second = rng.normal(scale=0.3, size=(64, 64)), rng.normal(scale=0.3, size=(64, 10))
    return PERCEPTRON, {"first": first.astype(np.float32), "second": second.astype(np.float32)}


@pytest.fixture(scope="module")
def network():
    return make_network()


# What the network says of the images, but for one in ten: so clean accuracy is 90%.
LABELS = np.asarray(jnp.argmax(PERCEPTRON.apply(make_network()[1], IMAGES / np.float32(255))[0], -1))
LABELS = np.where(np.arange(50) % 10 == 3, (LABELS + 1) % 10, LABELS)


class LabelReader:
    """A network that reads the label off the first pixel, and is sure of it: nothing fools it below 1/20."""

    def apply(self, variables, images, train=False):
        level = jnp.round(images[:, 0, 0, 0] * 10).astype(int)
        return 10.0 * jax.nn.one_hot(level, 10) + 0 * jnp.sum(images), None


def test_every_image_counts_once_with_a_masked_last_batch():
    labels = np.arange(23) % 10
    images = np.zeros((23, 2, 2, 1), np.float32) + (labels / 10)[:, None, None, None].astype(np.float32)
    wrong = labels.copy()
    wrong[[3, 22]] = (wrong[[3, 22]] + 1) % 10  # one in the midst, and the very last, which stands in the filled batch
    result = evaluate(LabelReader(), {}, images, wrong, [Attack("clean")], batch_size=8, progress=False)
    assert result.summary["images"] == 23
    assert result.summary["attacks"][0]["correct"] == 21
    assert [record["index"] for record in result.records] == list(range(23))
    assert [record["index"] for record in result.records if not record["robust"]] == [3, 22]
    # The margin is the label's logit less the highest other one.
    assert {round(record["margin"]["clean"], 3) for record in result.records} == {10.0, -10.0}


@pytest.mark.slow
def test_the_batch_size_changes_nothing(network):
    attacks = [Attack("clean"), Attack("pgd", 0.1, num_steps=3)]
    by_size = [evaluate(*network, IMAGES, LABELS, attacks, batch_size=b, progress=False) for b in (50, 16)]
    for one, other in zip(*(result.records for result in by_size), strict=True):
        for name in ("clean", "pgd-3"):
            # Sums of differently shaped products, in float32, of logits of size 10.
            assert abs(one["margin"][name] - other["margin"][name]) < 1e-3


def test_restarts_and_attacks_are_worst_cases(network):
    attacks = [Attack("clean"), Attack("pgd", 0.03, num_steps=2), Attack("pgd", 0.03, num_steps=2, restarts=4)]
    journal = Journal(None, {})
    result = evaluate(*network, IMAGES, LABELS, attacks, batch_size=50, journal=journal, progress=False)
    clean, once, often = result.summary["attacks"]
    assert [attack["name"] for attack in result.summary["attacks"]] == ["clean", "pgd-2", "pgd-2x4"]
    runs = np.array([[journal.records["pgd-2x4"][i, run].margin > 0 for i in range(50)] for run in range(4)])
    assert often["accuracy"] == np.mean(np.all(runs, axis=0))
    assert often["lowest_single_run"] == np.mean(runs, axis=1).min() > often["accuracy"]
    # The first start of four is the one start of one, so that more starts can only find more.
    assert (runs[0] == [record["margin"]["pgd-2"] > 0 for record in result.records]).all()
    survivors = [all(record["margin"][name] > 0 for name in record["margin"]) for record in result.records]
    assert survivors == [record["robust"] for record in result.records]
    assert result.summary["worst"]["correct"] == sum(survivors) <= min(clean["correct"], once["correct"])


def test_the_same_seed_gives_the_same_result_and_another_another(network):
    def margins(seed):
        result = evaluate(*network, IMAGES, LABELS, [Attack("fgsm", 0.1)], batch_size=50, seed=seed, progress=False)
        return [record["margin"]["fgsm"] for record in result.records]

    assert margins(0) == margins(0) != margins(1)


def test_images_leave_when_they_fall_and_the_table_says_what_that_saved(network):
    attack = Attack("pgd", 0.03, num_steps=30, restarts=2, any_iterate=True)
    journal = Journal(None, {})
    result = evaluate(*network, IMAGES, LABELS, [attack], batch_size=16, journal=journal, progress=False)
    (summary,) = result.summary["attacks"]
    runs = journal.records["pgd-30x2"].values()
    assert all(run.steps == (run.fallen_at if run.fallen_at >= 0 else 30) for run in runs)
    # A start is one pass in either direction, and so is a step.
    assert summary["forward"] == summary["backward"] == sum(1 + run.steps for run in runs) < 100 * 31
    falls = [[run.fallen_at for run in runs if run.index == i and run.fallen_at > 0] for i in range(50)]
    first = np.array([min(steps, default=99) for steps in falls])
    assert summary["by_step"] == [[n, np.mean(first > n)] for n in (1, 2, 5, 10, 20, 30)]
    assert summary["by_step"][-1][1] == summary["accuracy"] < summary["by_step"][0][1]
    assert all(0 < record["linf"]["pgd-30x2"] <= 0.03 for record in result.records)


def test_an_attack_after_others_spares_what_they_broke(network):
    pgd = Attack("pgd", 0.02, num_steps=5)
    chained = [Attack("clean"), pgd, Attack("apgd-ce", 0.02, after=("clean", "pgd-5"), num_images=30)]
    result = evaluate(*network, IMAGES, LABELS, chained, batch_size=50, progress=False)
    standing = [r["index"] for r in result.records[:30] if r["margin"]["clean"] > 0 and r["margin"]["pgd-5"] > 0]
    assert [r["index"] for r in result.records if "apgd-ce" in r["margin"]] == standing
    _, _, last = result.summary["attacks"]
    assert (last["attacked"], last["total"]) == (len(standing), 30)
    assert last["correct"] == sum(r["margin"].get("apgd-ce", -1) > 0 for r in result.records)
    with pytest.raises(ValueError, match="apgd-ce: expected to come after pgd-5"):
        evaluate(*network, IMAGES, LABELS, [chained[0], chained[2]], batch_size=50, progress=False)


def check_worst_images(network, worst, result):
    logits = np.asarray(network[0].apply(network[1], worst)[0])
    is_true = np.arange(10) == LABELS[: len(worst), None]
    margins = logits[is_true] - np.where(is_true, -np.inf, logits).max(-1)
    near = [attack["name"] for attack in result.summary["attacks"] if not attack["apart"]]
    lowest = [min(r["margin"][name] for name in near) for r in result.records[: len(worst)]]
    # Sums of products in another order, in float32, of logits of size 10.
    np.testing.assert_allclose(margins, lowest, atol=1e-4)
    assert np.abs(worst - IMAGES[: len(worst)] / 255).max() <= 0.02 + 1e-6  # rounding of the sum
    assert all(r["robust"] == all(r["margin"][name] > 0 for name in near) for r in result.records)


CLEAN, FGSM, CW = Attack("clean"), Attack("fgsm", 0.02), Attack("cw", 0.02, num_steps=5)


def test_the_worst_images_are_those_of_the_lowest_margins(network):
    attacks = [CLEAN, FGSM, CW, Attack("fgsm", 1.0, apart=True, label="far")]
    worst = np.zeros((20, 8, 8, 1), np.float32)  # of the first images only
    result = evaluate(*network, IMAGES, LABELS, attacks, batch_size=50, worst_images=worst, progress=False)
    check_worst_images(network, worst, result)


def test_the_worst_images_stay_when_an_attack_is_put_before_those_that_were_run(network):
    worst, journal = np.zeros((20, 8, 8, 1), np.float32), Journal(None, {})
    for attacks in ([CLEAN, CW], [CLEAN, FGSM, CW]):
        result = evaluate(
            *network, IMAGES, LABELS, attacks, batch_size=50, worst_images=worst, journal=journal, progress=False
        )
        check_worst_images(network, worst, result)


def test_adversaries_of_another_network_are_made_there_and_judged_here(network):
    model, variables = network
    other = {"first": variables["first"][::-1], "second": variables["second"]}
    transfer = Attack("transfer", 0.05, source="other")
    worst = np.zeros(IMAGES.shape, np.float32)
    settings = {"batch_size": 50, "source": (model, other), "worst_images": worst, "progress": False}
    result = evaluate(*network, IMAGES, LABELS, [transfer], **settings)

    def loss_there(images):
        return float(jnp.mean(cross_entropy(model.apply(other, images)[0], LABELS)))

    assert loss_there(worst) > loss_there(IMAGES / np.float32(255)) + 0.5
    own = evaluate(*network, IMAGES, LABELS, [Attack("pgd", 0.05)], batch_size=50, progress=False)
    assert own.summary["worst"]["accuracy"] < result.summary["worst"]["accuracy"]
    with pytest.raises(ValueError, match="source: expected another network"):
        evaluate(*network, IMAGES, LABELS, [transfer], progress=False)
    fewer = {"first": variables["first"], "second": variables["second"][:, :7]}
    with pytest.raises(ValueError, match="source: expected a network of 10 classes, as the other has; got 7"):
        evaluate(*network, IMAGES, LABELS, [transfer], source=(model, fewer), progress=False)


# At this radius some images stand to the end.
LONG = Attack("pgd", 0.01, num_steps=6_000, restarts=2, any_iterate=True)
CHAIN = [Attack("clean"), LONG, Attack("apgd-t", 0.01, after=("clean", LONG.name))]
KILLED = """
import sys
import tests.conftest  # its settings, so that this process computes as the tests' does
from fs_jax.evaluation.journal import Journal
from tests.test_evaluation import CHAIN, records_of
with Journal(sys.argv[1], {}) as journal:
    records_of(journal, CHAIN[:2])
"""


def records_of(journal, attacks):
    return evaluate(*make_network(), IMAGES, LABELS, attacks, batch_size=16, journal=journal, progress=False).records


def assert_same_records(ours, theirs):
    """What is counted is the same; margins, of size 1 to 10, are so to what float32's sums know them to.

    Which images share a batch, and its size, depends on what was missing, and so may how their products are rounded.
    """
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("index", "label", "robust", "fallen_at"):
            assert one[name] == other[name]
        for name in ("margin", "linf"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_and_resumed_ends_in_the_same_numbers(tmp_path):
    path = tmp_path / "records.jsonl"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here: it rounds alike
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=ROOT, env=environment)

    def has_a_whole_record():  # of the long attack: what is written last may be cut off by the kill
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return any(LONG.name.encode() in line and b'"index"' in line for line in lines)

    while process.poll() is None and not has_a_whole_record():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = path.read_bytes()
    with Journal(path, {}) as journal:
        done = len(journal.records[LONG.name])
        resumed = records_of(journal, CHAIN)
        assert 0 < done < 100 == len(journal.records[LONG.name])  # it was killed in the midst of it
    whole = path.read_bytes()
    assert whole.startswith(killed[: killed.rfind(b"\n") + 1])  # nothing was done again
    assert_same_records(resumed, records_of(None, CHAIN))


def test_an_evaluation_resumed_from_a_truncated_journal_ends_in_the_same_numbers(tmp_path):
    path = tmp_path / "records.jsonl"
    chain = [Attack("clean"), Attack("apgd-t", 0.01, after=("clean",))]
    with Journal(path, {}) as journal:
        whole = records_of(journal, chain)
    # Among the targets of the attack.
    text = path.read_bytes()
    cut = text[: (text.index(b"apgd-t") + len(text)) // 2]
    path.write_bytes(cut)
    with Journal(path, {}) as journal:
        assert_same_records(records_of(journal, chain), whole)
    assert path.read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])  # nothing was done again


def test_an_attack_that_has_changed_is_refused(tmp_path):
    with Journal(tmp_path / "records.jsonl", {}) as journal:
        records_of(journal, [Attack("fgsm", 0.1)])
    with (
        Journal(tmp_path / "records.jsonl", {}) as journal,
        pytest.raises(ValueError, match="fgsm: epsilon: expected"),
    ):
        records_of(journal, [Attack("fgsm", 0.2)])


def test_attacks_that_a_journal_holds_are_not_left_out(tmp_path):
    # Their adversaries are among the worst images.
    with Journal(tmp_path / "records.jsonl", {}) as journal:
        records_of(journal, [Attack("fgsm", 0.1)])
    before = (tmp_path / "records.jsonl").read_bytes()
    with Journal(tmp_path / "records.jsonl", {}) as journal:
        with pytest.raises(ValueError, match=r"attack_list: expected fgsm too, as in .*records\.jsonl; got clean\."):
            records_of(journal, [Attack("clean")])
        assert (tmp_path / "records.jsonl").read_bytes() == before
        records_of(journal, [Attack("clean"), Attack("fgsm", 0.1)])  # more of them may come later


def test_suites():
    assert [attack.name for attack in suite("paper")] == [
        "clean", "fgsm", "pgd-20", "pgd-100", "cw-20", "cw-100", "pgd-500x5", "pgd-1000x5", "cw-500x5", "cw-1000x5",
    ]  # fmt: skip
    # As the paper runs its own: steps of 2/255 at 8/255, of 8/255 for FGSM; and the last iterate decides.
    assert {attack.name: (attack.step_size * 255, attack.any_iterate) for attack in suite("paper")[1:]} == {
        "fgsm": (8, False),
        **{f"{kind}-{steps}": (2, False) for kind in ("pgd", "cw") for steps in (20, 100)},
        **{f"{kind}-{steps}x5": (2, True) for kind in ("pgd", "cw") for steps in (500, 1000)},
    }
    assert [attack.after for attack in suite("autoattack")[1:]] == [
        ("clean", "apgd-ce", "apgd-t", "fab-t")[:count] for count in (1, 2, 3, 4)
    ]
    unbounded, projected = suite("gradient-free", epsilon=0.1, gradient_free_images=7)[2:]
    assert (unbounded.epsilon, unbounded.apart, projected.epsilon, projected.apart) == (1.0, True, 0.1, False)
    assert [attack.name for attack in suite("all")].count("clean") == 1
    with pytest.raises(ValueError, match=r"suite: expected one of paper.*Did you mean 'autoattack'"):
        suite("autoatack")


def test_intervals_are_wilsons():
    # By hand: center (k + z^2/2) / (n + z^2), half-width z sqrt(k (n - k) / n + z^2 / 4) / (n + z^2), z = 1.959964.
    k, n, z = 42, 120, 1.959964
    half = z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
    center = (k + z**2 / 2) / (n + z**2)
    ours = accuracy(np.arange(n) < k)
    np.testing.assert_allclose([ours["low"], ours["high"]], [center - half, center + half], rtol=1e-6)
    assert accuracy(np.zeros(5, bool))["low"] == 0


def test_words_for_attacks():
    assert parse_attack("pgd-100", epsilon=0.1) == Attack("pgd", 0.1, 0.025, 100)
    assert parse_attack("cw-7", step_size=0.01, restarts=5) == Attack("cw", 8 / 255, 0.01, 7, 5)
    assert parse_attack("fgsm", epsilon=0.1).step_size == 0.1
    for word in ("pdg-20", "pgd", "fsgm", "cw-x"):
        with pytest.raises(ValueError, match=r"attack: expected one of clean, fgsm.*Did you mean"):
            parse_attack(word)
    with pytest.raises(ValueError, match="num_steps: expected an integer of at least 1"):
        parse_attack("pgd-0")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES[0]}, ValueError, "images: expected shape [N, height, width, channels]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "with N > 0"),
        ({"labels": LABELS[:-1]}, ValueError, "labels: expected shape (50,)"),
        ({"images": IMAGES.astype(np.float32)}, ValueError, "images: expected values in [0, 1]; got [0, 255]"),
        ({"images": IMAGES.astype(np.int32)}, TypeError, "images: expected uint8, or floating point in [0, 1]"),
        ({"labels": LABELS.astype(float)}, TypeError, "labels: expected integers"),
        ({"attack_list": []}, ValueError, "attack_list: expected at least one attack"),
        ({"attack_list": [Attack("fgsm"), Attack("fgsm")]}, ValueError, "none twice"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1"),
        ({"labels": LABELS + 90}, ValueError, "labels: expected classes 0 to 9"),
        ({"images": IMAGES[:, :4]}, ValueError, "images: expected of a shape that the network takes; got (4, 8, 1)"),
    ],
)
def test_bad_input_is_refused(network, change, error, message):
    arguments = {"images": IMAGES, "labels": LABELS, "attack_list": [Attack("clean")], "batch_size": 50, **change}
    with pytest.raises(error, match=re.escape(message)):
        evaluate(*network, **arguments, progress=False)


def test_a_network_without_finite_logits_is_refused(network):
    model, variables = network
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(FloatingPointError, match="expected finite logits and gradients"):
        evaluate(model, broken, IMAGES, LABELS, [Attack("clean")], batch_size=50, progress=False)
