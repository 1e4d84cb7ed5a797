"""Every image counts once, restarts and attacks give worst cases, and results don't depend on the batch size."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from fs_jax import data
from fs_jax.attacks import REGISTRY, Specification, cross_entropy, logit_margin, stepwise, transfer
from fs_jax.attacks.chain import Outcome
from fs_jax.evaluation import Attack, accuracy, evaluate, parse_attack, suite
from fs_jax.evaluation.journal import Journal

pytestmark = pytest.mark.usefixtures("small_programs", "one_batch_size")

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = data.load("digits")
IMAGES = DIGITS.test_images[:50]


def perceptron(variables, images):
    """Two layers on digits: a small network, as these tests are about the evaluation."""
    return jnp.tanh(images.reshape(len(images), -1) @ variables["first"]) @ variables["second"]


def make_network(**changed):
    rng = np.random.default_rng(0)
    first, second = rng.normal(scale=0.3, size=(64, 64)), rng.normal(scale=0.3, size=(64, 10))
    variables = {"first": first.astype(np.float32), "second": second.astype(np.float32), **changed}
    return functools.partial(perceptron, variables)


@pytest.fixture(scope="module")
def network():
    return make_network()


def outside(change):
    """An attack that adds a change, without clipping; its logits are those of the images."""

    def start(logits_fn, keys, images, labels, run):
        return stepwise.Progress(*stepwise.first_judged(images + change, logits_fn(images), labels))

    class State(NamedTuple):
        progress: stepwise.Progress

    def build(*, epsilon, num_classes):
        begin = Partial(lambda *given: State(start(*given)))
        return stepwise.Stepwise(begin, Partial(lambda logits_fn, state, images, labels: state), num_steps=0)

    return Attack(Specification("outside", "outside of [0, 1]", build, {}), 0.1)


# The network's predictions, with one in ten changed: clean accuracy is 90%.
LABELS = np.asarray(jnp.argmax(make_network()(IMAGES / np.float32(255)), -1))
LABELS = np.where(np.arange(50) % 10 == 3, (LABELS + 1) % 10, LABELS)


def label_reader(images):
    """A network that reads the label from the first pixel: it is robust at radii below 1/20."""
    level = jnp.round(images[:, 0, 0, 0] * 10).astype(int)
    return 10.0 * jax.nn.one_hot(level, 10) + 0 * jnp.sum(images)


def test_every_image_counts_once_with_a_masked_last_batch():
    labels = np.arange(23) % 10
    images = np.zeros((23, 2, 2, 1), np.float32) + (labels / 10)[:, None, None, None].astype(np.float32)
    wrong = labels.copy()
    wrong[[3, 22]] = (wrong[[3, 22]] + 1) % 10  # one in the middle, and the last one, in the padded batch
    result = evaluate(label_reader, images, wrong, [Attack("clean")], batch_size=8, progress=False)
    assert result.summary["images"] == 23
    assert result.summary["attacks"][0]["correct"] == 21
    assert [record["index"] for record in result.records] == list(range(23))
    assert [record["index"] for record in result.records if not record["robust"]] == [3, 22]
    # The margin is the label's logit minus the highest other logit.
    assert {round(record["margin"]["clean"], 3) for record in result.records} == {10.0, -10.0}


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch_size(network):
    attacks = [Attack("clean"), Attack("pgd", 0.1, num_steps=3)]
    by_size = [evaluate(network, IMAGES, LABELS, attacks, batch_size=b, progress=False) for b in (50, 16)]
    for one, other in zip(*(result.records for result in by_size), strict=True):
        for name in ("clean", "pgd-3"):
            # Rounding of differently shaped products in float32, for logits of size 10.
            assert abs(one["margin"][name] - other["margin"][name]) < 1e-3


def test_restarts_and_attacks_give_worst_cases(network, tmp_path):
    attacks = [Attack("clean"), Attack("pgd", 0.03, num_steps=2), Attack("pgd", 0.03, num_steps=2, restarts=4)]
    path = tmp_path / "records.jsonl"
    result = evaluate(network, IMAGES, LABELS, attacks, batch_size=50, journal=path, progress=False)
    outcomes = outcomes_of(path, "pgd-2x4")
    clean, once, often = result.summary["attacks"]
    assert [attack["name"] for attack in result.summary["attacks"]] == ["clean", "pgd-2", "pgd-2x4"]
    runs = np.array([[outcomes[i, run].margin > 0 for i in range(50)] for run in range(4)])
    assert often["accuracy"] == np.mean(np.all(runs, axis=0))
    assert often["lowest_single_run"] == np.mean(runs, axis=1).min() > often["accuracy"]
    # The first of four starts is the same as a single start, so that more starts find at least as much.
    assert (runs[0] == [record["margin"]["pgd-2"] > 0 for record in result.records]).all()
    survivors = [all(record["margin"][name] > 0 for name in record["margin"]) for record in result.records]
    assert survivors == [record["robust"] for record in result.records]
    assert result.summary["worst"]["correct"] == sum(survivors) <= min(clean["correct"], once["correct"])


def test_the_same_seed_gives_the_same_result_and_another_seed_another(network):
    def margins(seed):
        result = evaluate(network, IMAGES, LABELS, [Attack("fgsm", 0.1)], batch_size=50, seed=seed, progress=False)
        return [record["margin"]["fgsm"] for record in result.records]

    assert margins(0) == margins(0) != margins(1)


def test_misclassified_images_are_dropped_and_the_passes_are_counted(network, tmp_path):
    attack = Attack("pgd", 0.03, num_steps=30, restarts=2, any_iterate=True)
    path = tmp_path / "records.jsonl"
    result = evaluate(network, IMAGES, LABELS, [attack], batch_size=16, journal=path, progress=False)
    (summary,) = result.summary["attacks"]
    runs = outcomes_of(path, "pgd-30x2").values()
    assert all(run.steps == (run.misclassified_at if run.misclassified_at >= 0 else 30) for run in runs)
    # A start is one forward and one backward pass, and so is a step.
    assert summary["forward"] == summary["backward"] == sum(1 + run.steps for run in runs) < 100 * 31
    falls = [[run.misclassified_at for run in runs if run.index == i and run.misclassified_at > 0] for i in range(50)]
    first = np.array([min(steps, default=99) for steps in falls])
    assert summary["by_step"] == [[n, np.mean(first > n)] for n in (1, 2, 5, 10, 20, 30)]
    assert summary["by_step"][-1][1] == summary["accuracy"] < summary["by_step"][0][1]
    assert all(0 < record["distance"]["pgd-30x2"] <= 0.03 for record in result.records)


def test_an_attack_after_others_skips_what_they_broke(network):
    pgd = Attack("pgd", 0.02, num_steps=5)
    chained = [Attack("clean"), pgd, Attack("apgd-ce", 0.02, after=("clean", "pgd-5"), num_images=30)]
    result = evaluate(network, IMAGES, LABELS, chained, batch_size=50, progress=False)
    robust = [r["index"] for r in result.records[:30] if r["margin"]["clean"] > 0 and r["margin"]["pgd-5"] > 0]
    assert [r["index"] for r in result.records if "apgd-ce" in r["margin"]] == robust
    _, _, last = result.summary["attacks"]
    assert (last["attacked"], last["total"]) == (len(robust), 30)
    assert last["correct"] == sum(r["margin"].get("apgd-ce", -1) > 0 for r in result.records)
    with pytest.raises(ValueError, match="apgd-ce: expected to come after pgd-5"):
        evaluate(network, IMAGES, LABELS, [chained[0], chained[2]], batch_size=50, progress=False)


def check_worst_images(network, worst, result):
    logits = np.asarray(network(worst))
    is_true = np.arange(10) == LABELS[: len(worst), None]
    margins = logits[is_true] - np.where(is_true, -np.inf, logits).max(-1)
    near = [attack["name"] for attack in result.summary["attacks"] if not attack["apart"]]
    lowest = [min(r["margin"][name] for name in near) for r in result.records[: len(worst)]]
    # Rounding of sums in another order in float32, for logits of size 10.
    np.testing.assert_allclose(margins, lowest, atol=1e-4)
    assert np.abs(worst - IMAGES[: len(worst)] / 255).max() <= 0.02 + 1e-6  # rounding of the sum
    assert all(r["robust"] == all(r["margin"][name] > 0 for name in near) for r in result.records)


CLEAN, FGSM, CW = Attack("clean"), Attack("fgsm", 0.02), Attack("cw", 0.02, num_steps=5)


def test_the_worst_images_have_the_lowest_margins(network):
    attacks = [CLEAN, FGSM, CW, Attack("fgsm", 1.0, apart=True, label="far")]
    worst = np.zeros((20, 8, 8, 1), np.float32)  # for the first images only
    result = evaluate(network, IMAGES, LABELS, attacks, batch_size=50, worst_images=worst, progress=False)
    check_worst_images(network, worst, result)


def test_the_worst_images_are_kept_when_a_resume_adds_an_attack_before_the_others(network, tmp_path):
    worst, path = np.zeros((20, 8, 8, 1), np.float32), tmp_path / "records.jsonl"
    for attacks in ([CLEAN, CW], [CLEAN, FGSM, CW]):
        result = evaluate(
            network, IMAGES, LABELS, attacks, batch_size=50, worst_images=worst, journal=path, progress=False
        )
        check_worst_images(network, worst, result)


def test_adversaries_of_another_network_are_judged_by_this_one(network):
    other = make_network(first=network.args[0]["first"][::-1])
    attack = transfer(other, IMAGES, LABELS, epsilon=0.05, source="other")
    result = evaluate(network, IMAGES, LABELS, [CLEAN, attack], batch_size=50, progress=False)

    def loss_there(images):
        return float(jnp.mean(cross_entropy(other(images), LABELS)))

    assert loss_there(attack.images) > loss_there(IMAGES / np.float32(255)) + 0.5
    margins = logit_margin(network(attack.images), LABELS)
    np.testing.assert_allclose([record["margin"]["transfer"] for record in result.records], margins, atol=1e-4)
    assert all(0.04 < record["distance"]["transfer"] <= 0.05 for record in result.records)
    own = evaluate(network, IMAGES, LABELS, [Attack("pgd", 0.05)], batch_size=50, progress=False)
    clean, transferred = result.summary["attacks"]
    assert own.summary["worst"]["accuracy"] < transferred["accuracy"] < clean["accuracy"]
    assert result.summary["worst"]["accuracy"] == clean["accuracy"]  # transfer is excluded
    with pytest.raises(ValueError, match=r"transfer: expected adversarial images of shape \(49, 8, 8, 1\)"):
        evaluate(network, IMAGES[1:], LABELS[1:], [CLEAN, attack], progress=False)


# At this radius some images are robust.
LONG = Attack("pgd", 0.01, num_steps=6_000, restarts=2, any_iterate=True)
CHAIN = [Attack("clean"), LONG, Attack("apgd-t", 0.01, after=("clean", LONG.name))]
KILLED = """
import pathlib, sys
import tests.conftest  # its settings, so that this process rounds as the tests do
from tests.evaluation.test_evaluation import CHAIN, records_of
records_of(pathlib.Path(sys.argv[1]), CHAIN[:2])
"""


def outcomes_of(path, attack):
    """The lines of a journal for one attack, by image and run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.endswith("}")]
    outcomes = [
        Outcome(**{name: line[name] for name in Outcome._fields})
        for line in lines
        if line.get("attack") == attack and "index" in line
    ]
    return {(outcome.index, outcome.run): outcome for outcome in outcomes}


def records_of(journal, attacks):
    return evaluate(make_network(), IMAGES, LABELS, attacks, batch_size=2, journal=journal, progress=False).records


def assert_same_records(ours, theirs):
    """Integers are equal; margins, of size 1 to 10, are equal up to rounding of float32's sums.

    A resumed run attacks only the missing images, so its batches differ, and products may be rounded differently.
    """
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("index", "label", "robust", "misclassified_at"):
            assert one[name] == other[name]
        for name in ("margin", "distance"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_and_resumed_gives_the_same_numbers(tmp_path):
    path = tmp_path / "records.jsonl"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here, for the same rounding
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=ROOT, env=environment)

    def has_a_whole_record():  # of the long attack; the last line may be cut off by the kill
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return any(LONG.name.encode() in line and b'"index"' in line for line in lines)

    while process.poll() is None and not has_a_whole_record():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = path.read_bytes()
    done = len(outcomes_of(path, LONG.name))
    resumed = records_of(path, CHAIN)
    assert 0 < done < 100 == len(outcomes_of(path, LONG.name))  # it was killed in the middle of it
    whole = path.read_bytes()
    assert whole.startswith(killed[: killed.rfind(b"\n") + 1])  # nothing was computed again
    assert_same_records(resumed, records_of(None, CHAIN))


def test_an_evaluation_resumed_from_a_truncated_journal_gives_the_same_numbers(tmp_path):
    path = tmp_path / "records.jsonl"
    chain = [Attack("clean"), Attack("apgd-t", 0.01, num_steps=20, targets=3, after=("clean",))]
    whole = records_of(path, chain)
    # The cut is between two targets of the attack.
    text = path.read_bytes()
    cut = text[: (text.index(b"apgd-t") + len(text)) // 2]
    path.write_bytes(cut)
    assert_same_records(records_of(path, chain), whole)
    assert path.read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])  # nothing was computed again


def test_resuming_a_changed_attack_raises_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    records_of(path, [Attack("fgsm", 0.1)])
    with pytest.raises(ValueError, match="fgsm: epsilon: expected"):
        records_of(path, [Attack("fgsm", 0.2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: expected 0, as in"),
        ({"precision": "default"}, "precision: expected 'float32', as in"),
        ({"first": 100}, "first: expected 0, as in"),
        ({"about": {"split": "train"}}, "split: expected none, as in"),
        ({"logits_fn": make_network(second=np.zeros((64, 10), np.float32))}, "weights: expected"),
        ({"labels": (LABELS + 1) % 10}, "data: expected"),
        ({"logits_fn": lambda x: -make_network()(x)}, "logits: expected"),
    ],
)
def test_resuming_another_evaluation_raises_an_error(network, tmp_path, change, message):
    path = tmp_path / "records.jsonl"
    arguments = {"logits_fn": network, "images": IMAGES, "labels": LABELS, "attacks": [CLEAN], "journal": path}
    evaluate(**arguments, progress=False)
    with pytest.raises(ValueError, match=message):
        evaluate(**{**arguments, **change}, progress=False)


def test_images_of_float64_give_the_results_of_float32(network):
    wide = IMAGES[:20] / 255  # NumPy's default
    assert wide.dtype == np.float64
    results = [
        evaluate(network, images, LABELS[:20], ["clean", "pgd-5"], epsilon=0.1, progress=False)
        for images in (wide, wide.astype(np.float32))
    ]
    assert results[0].records == results[1].records


def test_facts_cannot_replace_what_the_journal_compares(network, tmp_path):
    path = tmp_path / "journal.jsonl"
    evaluate(network, IMAGES, LABELS, ["clean"], journal=path, about={"mine": 0}, progress=False)
    names = Journal.header(path).keys() - {"mine"}
    assert {"logits", "seed"} <= names
    for name in names:
        with pytest.raises(ValueError, match=f"about: expected names that the journal doesn't use; got {name}"):
            evaluate(network, IMAGES, LABELS, ["clean"], journal=tmp_path / "other", about={name: 0})
    assert not (tmp_path / "other").exists()


def test_resuming_without_an_attack_of_the_journal_raises_an_error(tmp_path):
    # Their adversaries are among the worst images.
    path = tmp_path / "records.jsonl"
    records_of(path, [Attack("fgsm", 0.1)])
    before = outcomes_of(path, "fgsm")
    with pytest.raises(ValueError, match=r"attacks: expected fgsm too, which the journal has; got clean\."):
        records_of(path, [Attack("clean")])
    assert outcomes_of(path, "fgsm") == before
    records_of(path, [Attack("clean"), Attack("fgsm", 0.1)])  # but more attacks may be added later


def test_images_that_an_attack_does_not_cover_are_unknown(network):
    few = Attack("square", 0.02, num_steps=20, num_images=20, after=["clean"])
    result = evaluate(network, IMAGES, LABELS, [CLEAN, few], batch_size=50, progress=False)
    robust = [record["robust"] for record in result.records]
    clean = [record["margin"]["clean"] > 0 for record in result.records]
    # Images that are misclassified without an attack are known not to be robust.
    assert robust[20:] == [None if right else False for right in clean[20:]]
    assert None not in robust[:20]
    worst = result.summary["worst"]
    assert (worst["correct"], worst["total"], worst["unknown"]) == (sum(robust[:20]), 20, 30)
    assert worst["correct"] == result.summary["attacks"][1]["correct"]


@pytest.mark.slow
def test_a_part_of_the_images_gives_the_same_as_in_the_whole(network):
    attacks = [CLEAN, "pgd-3x2", Attack("apgd-t", 0.02, num_steps=5, after=["clean"])]
    settings = {"epsilon": 0.02, "batch_size": 10, "progress": False}
    whole = evaluate(network, IMAGES, LABELS, attacks, **settings)
    part = evaluate(network, IMAGES[30:], LABELS[30:], attacks, first=30, **settings)
    assert_same_records(part.records, whole.records[30:])


@pytest.mark.slow
def test_merged_parts_give_the_same_as_the_whole(network, tmp_path):
    few = Attack("square", 0.02, num_steps=20, num_images=30, after=["clean"])  # 30 in total, not in each part
    attacks = [CLEAN, Attack("pgd", 0.02, num_steps=3, restarts=2), few]
    settings = {"batch_size": 2, "progress": False, "about": {"split": "test"}}
    whole = evaluate(network, IMAGES, LABELS, attacks, **settings)
    parts = [tmp_path / f"{first}.jsonl" for first in (0, 20, 40)]
    for path, first in zip(parts, (0, 20, 40), strict=True):
        part = slice(first, first + 20)
        evaluate(network, IMAGES[part], LABELS[part], attacks, first=first, journal=path, **settings)
    worst = np.zeros(IMAGES.shape, np.float32)
    with pytest.raises(ValueError, match="journal: expected a new file that parts are merged into"):
        evaluate(network, IMAGES, LABELS, attacks, journal=parts[0], parts=parts, **settings)
    with pytest.raises(ValueError, match=r"data: expected .*40\.jsonl"):
        evaluate(network, IMAGES, LABELS[::-1], attacks, journal=tmp_path / "a", parts=parts[2:], **settings)
    path, other = tmp_path / "whole.jsonl", [CLEAN, Attack("pgd", 0.02, num_steps=3, restarts=2, any_iterate=True), few]
    with pytest.raises(ValueError, match=r"pgd-3x2: any_iterate: expected False, as in .*0\.jsonl; got True"):
        evaluate(network, IMAGES, LABELS, other, journal=path, parts=parts, **settings)
    merged = evaluate(network, IMAGES, LABELS, attacks, journal=path, parts=parts, worst_images=worst, **settings)
    assert not worst.any()  # no attack was run
    assert_same_records(merged.records, whole.records)
    for one, other in zip(merged.summary["attacks"], whole.summary["attacks"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert merged.summary["worst"] == whole.summary["worst"]


def test_numbers_do_not_depend_on_the_implementation_of_keys(network):
    def margins():
        result = evaluate(network, IMAGES, LABELS, [Attack("fgsm", 0.1)], batch_size=50, progress=False)
        return [record["margin"]["fgsm"] for record in result.records]

    before = margins()
    with jax.default_prng_impl("rbg"):
        assert margins() == before


def test_suites_have_the_published_attacks_and_settings():
    assert [attack.name for attack in suite("paper")] == [
        "clean", "fgsm", "pgd-20", "pgd-100", "cw-20", "cw-100", "pgd-500x5", "pgd-1000x5", "cw-500x5", "cw-1000x5",
    ]  # fmt: skip
    # As in the paper: steps of 2/255 at 8/255, of 8/255 for FGSM; and the last iterate decides.
    assert {a.name: (a.settings["step_size"] * 255, a.any_iterate) for a in suite("paper")[1:]} == {
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


def test_words_are_parsed_into_attacks():
    assert parse_attack("pgd-100", epsilon=0.1) == Attack("pgd", 0.1, step_size=0.025, num_steps=100)
    assert parse_attack("cw-7", step_size=0.01, restarts=5) == Attack("cw", step_size=0.01, num_steps=7, restarts=5)
    assert parse_attack("cw-7x5") == parse_attack("cw-7", restarts=5)
    assert parse_attack("fgsm", epsilon=0.1).settings["step_size"] == 0.1
    for name in REGISTRY:
        assert parse_attack(parse_attack(name).name) == Attack(name)
    for word in ("pdg-20", "fsgm", "cw-x", "square-20", "apgd-cex3", "pgd-20-20"):
        with pytest.raises(ValueError, match=r"attack: expected one of clean, fgsm.*Did you mean"):
            parse_attack(word)
    with pytest.raises(ValueError, match="num_steps: expected an integer of at least 1"):
        parse_attack("pgd-0")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES[0]}, ValueError, "images: expected shape [N, height, width, channels]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "images: expected at least one; got none"),
        ({"labels": LABELS[:-1]}, ValueError, "labels: expected shape (50,)"),
        ({"images": IMAGES.astype(np.float32)}, ValueError, "images: expected values in [0, 1]; got [0, 255]"),
        ({"images": IMAGES.astype(np.int32)}, TypeError, "images: expected uint8, or floating point in [0, 1]"),
        ({"labels": LABELS.astype(float)}, TypeError, "labels: expected integers"),
        ({"attacks": []}, ValueError, "attacks: expected at least one in the worst case"),
        ({"attacks": ["local-search"]}, ValueError, "in the worst case; got local-search"),
        ({"attacks": [Attack("fgsm"), Attack("fgsm")]}, ValueError, "attacks: expected different names"),
        ({"attacks": ["clean", Attack("apgd-ce", num_draws=20)]}, ValueError, "attacks: expected num_draws for all"),
        (
            {"attacks": ["pgd-2", Attack("cw", 0.1)]},
            ValueError,
            "expected one radius in the worst case; got pgd-2",
        ),
        ({"attacks": [Attack("cw", 0.1)], "epsilon": 0.2}, ValueError, "(epsilon=0.2); got cw-20 0.1. Give each"),
        ({"first": -1}, ValueError, "first: expected an integer of at least 0"),
        ({"precision": "float16"}, ValueError, "precision: expected one of float32, default"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1"),
        (
            {"worst_images": np.zeros_like(IMAGES)},
            TypeError,
            "worst_images: expected a writable NumPy array of floating",
        ),
        ({"worst_images": jnp.zeros(IMAGES.shape)}, TypeError, "got ArrayImpl of float32. Make it with np.zeros"),
        ({"worst_images": np.zeros((50, 4, 4, 1))}, ValueError, "worst_images: expected shape (50, 8, 8, 1), or fewer"),
        ({"attacks": [outside(-0.05)]}, ValueError, "outside: expected images in [0, 1] within 0.1; it gave one at"),
        ({"attacks": [outside(np.nan)]}, ValueError, "within 0.1; it gave one at nan"),
        ({"labels": LABELS + 90}, ValueError, "labels: expected classes 0 to 9"),
        ({"logits_fn": lambda x: np.asarray(x).sum((1, 2))}, ValueError, "use jax.numpy in place of numpy"),
        ({"logits_fn": lambda x: x.sum((1, 2)) * float(x[0, 0, 0, 0])}, ValueError, "a function that JAX can trace"),
        ({"logits_fn": lambda x: x.permute(0, 3, 1, 2)}, ValueError, "rewrite a PyTorch network in JAX"),
        ({"images": IMAGES[:, :4]}, ValueError, "logits_fn: expected a function that takes images (N, 4, 8, 1)"),
        ({"logits_fn": lambda x: x}, ValueError, "logits_fn: expected logits of shape [N, classes]; got (2, 8, 8, 1)"),
    ],
)
def test_bad_input_raises_an_error(network, change, error, message):
    arguments = {"logits_fn": network, "images": IMAGES, "labels": LABELS, "attacks": ["clean"], "batch_size": 50}
    with pytest.raises(error, match=re.escape(message)):
        evaluate(**{**arguments, **change}, progress=False)


def test_a_network_without_finite_logits_raises_an_error():
    broken = make_network(second=np.full((64, 10), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="expected finite logits and gradients"):
        evaluate(broken, IMAGES, LABELS, ["clean"], batch_size=50, progress=False)


def test_warns_if_gradient_free_attacks_find_more():
    def masked(x):
        return jax.lax.stop_gradient(jnp.stack([x.mean((1, 2, 3)), 0.95 - x.mean((1, 2, 3))], -1))

    images, labels = np.full((4, 8, 8, 1), 0.5, np.float32), np.zeros(4, int)
    attacks = ["clean", Attack("apgd-ce", 0.1, num_steps=3), Attack("square", 0.1, num_steps=100)]
    with pytest.warns(UserWarning, match="gradient") as caught:
        result = evaluate(masked, images, labels, attacks, epsilon=0.1, progress=False)
    flat, beaten = result.summary["warnings"]
    assert [str(warning.message) for warning in caught] == [flat, beaten]
    assert flat.startswith("4 of 4 images have a cross-entropy gradient of exactly zero")
    assert beaten.startswith("square, without gradients, broke 100.0% of the images")
    assert evaluate(masked, images, labels, ["clean"], progress=False).summary["warnings"] == []
    # No warning if the attack with gradients is weak.
    weak = ["clean", "pgd-2", attacks[2]]
    with pytest.warns(UserWarning, match="gradient"):
        assert evaluate(masked, images, labels, weak, epsilon=0.1, progress=False).summary["warnings"] == [flat]


def test_gradient_free_attacks_work_for_a_network_without_gradients():
    def outside(x):  # has no derivative
        margin = jax.pure_callback(lambda x: np.mean(x, (1, 2, 3)) - 0.5, jax.ShapeDtypeStruct(x.shape[:1], x.dtype), x)
        return jnp.stack([margin, -margin], -1)

    images, labels = np.full((3, 4, 4, 1), 0.55, np.float32), np.zeros(3, int)
    attacks = ["clean", Attack("square", 0.1, num_steps=50)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(outside, images, labels, attacks, progress=False)
    assert result.summary["worst"]["correct"] == 0


@pytest.mark.parametrize("seed", [-5, 2**32])
def test_a_seed_whose_key_depends_on_the_64_bit_mode_raises_an_error(seed, network):
    for run in (lambda: evaluate(network, IMAGES, LABELS, ["clean"], seed=seed),
                lambda: transfer(network, IMAGES, LABELS, epsilon=0.1, seed=seed)):  # fmt: skip
        with pytest.raises(ValueError, match=f"seed: expected an integer of at least 0.*; got {seed}"):
            run()


def test_a_norm_that_cannot_be_measured_raises_an_error():
    with pytest.raises(ValueError, match="norm: expected 'linf' or None; got 'l2'"):
        dataclasses.replace(REGISTRY["pgd"], norm="l2")


def test_suites_without_autoattack_work_with_few_classes():
    assert "spsa" in [attack.name for attack in suite("gradient-free", num_classes=3)]
    assert "cw-1000x5" in [attack.name for attack in suite("paper", num_classes=3)]
    with pytest.raises(ValueError, match=r"apgd-t: expected a network of at least 4 classes.*version=\[\.\.\.\]"):
        suite("autoattack", num_classes=3)
    with pytest.raises(TypeError, match=r"attacks: expected a list; got 'autoattack'. Write suite\('autoattack'\)"):
        evaluate(lambda x: x, np.zeros((1, 2, 2, 1)), np.zeros(1, int), "autoattack")
