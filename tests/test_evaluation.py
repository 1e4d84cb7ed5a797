"""Every image counts once, restarts and attacks are worst cases, and the batch size changes nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import data
from fs_jax.config import preset
from fs_jax.evaluation import Attack, accuracy, attack_batch, evaluate, parse_attack
from fs_jax.training import create_state, make_model

DIGITS = data.load("digits")
IMAGES, LABELS = DIGITS.test_images[:50], DIGITS.test_labels[:50]


@pytest.fixture(scope="module")
def network():
    config = preset("digits")
    variables = create_state(config, jax.random.key(0)).variables
    # A fresh network's answers barely depend on the image: brighten its last layer, so that there is something to lose.
    variables["params"]["fc"]["kernel"] = variables["params"]["fc"]["kernel"] * 30
    return make_model(config), variables


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
    assert [record["prediction"]["clean"] for record in result.records] == list(labels)
    # The margin is the label's logit less the highest other one.
    assert {round(record["margin"]["clean"], 3) for record in result.records} == {10.0, -10.0}


def test_the_batch_size_changes_nothing(network):
    attacks = [Attack("clean"), Attack("pgd", 0.1, num_steps=3)]
    by_size = [evaluate(*network, IMAGES, LABELS, attacks, batch_size=b, progress=False) for b in (50, 16)]
    for one, other in zip(*(result.records for result in by_size), strict=True):
        for name in ("clean", "pgd-3"):
            # Sums of differently shaped products, in float32, of logits of size 10.
            assert abs(one["margin"][name] - other["margin"][name]) < 1e-3


def test_restarts_and_attacks_are_worst_cases(network):
    attacks = [Attack("clean"), Attack("pgd", 0.03, num_steps=2), Attack("pgd", 0.03, num_steps=2, restarts=4)]
    result = evaluate(*network, IMAGES, LABELS, attacks, batch_size=50, progress=False)
    clean, once, often = result.summary["attacks"]
    assert [attack["name"] for attack in result.summary["attacks"]] == ["clean", "pgd-2", "pgd-2x4"]
    runs = []
    for restart in range(4):
        _, logits = attack_batch(*network, attacks[2], IMAGES, LABELS, np.arange(50), restart=restart)
        runs.append(np.argmax(logits, -1) == LABELS)
    assert often["accuracy"] == np.mean(np.all(runs, axis=0))
    assert often["lowest_single_run"] == np.mean(runs, axis=1).min()
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
    ],
)
def test_bad_input_is_refused(network, change, error, message):
    arguments = {"images": IMAGES, "labels": LABELS, "attack_list": [Attack("clean")], "batch_size": 50, **change}
    with pytest.raises(error, match=re.escape(message)):
        evaluate(*network, **arguments, progress=False)


def test_a_network_without_finite_logits_is_refused(network):
    model, variables = network
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(FloatingPointError, match="expected finite logits; 50 images have none, under clean"):
        evaluate(model, broken, IMAGES, LABELS, [Attack("clean")], batch_size=50, progress=False)
