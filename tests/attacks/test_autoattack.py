"""AutoAttack: the worst case over its attacks in order, for any batch size; and its warnings."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import attacks
from fs_jax.attacks.autoattack import VERSIONS
from fs_jax.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("small_programs")

KEY = jax.random.key(8)
EPSILON = 0.045
COUNT = 9
NOISE = np.random.default_rng(0)


@pytest.fixture(scope="module")
def problem(classifier):
    """The classifier of 5 classes and 9 images, of which it misclassifies the first."""
    logits_fn, _, _ = classifier
    images = np.random.default_rng(1).uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
    labels = np.array(jnp.argmax(logits_fn(images), -1))
    labels[0] = (labels[0] + 1) % 5
    return logits_fn, images, labels


def run(problem, **settings):
    logits_fn, images, labels = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the record holds them too
        return attacks.autoattack(logits_fn, KEY, images, labels, **{"epsilon": EPSILON, "batch_size": 1, **settings})


@pytest.fixture(scope="module")
def record(problem):
    return run(problem)


def test_the_record_agrees_with_the_network_on_its_images(problem, record):
    logits_fn, images, labels = problem
    margins = attacks.logit_margin(logits_fn(record.images), labels)
    np.testing.assert_allclose(record.margin, margins, atol=1e-5)  # rounding of differently shaped products
    np.testing.assert_array_equal(record.robust, margins > 0)
    assert 0 < record.robust.sum() < COUNT - 1
    assert np.abs(record.images - images).max() <= EPSILON + 6e-8
    assert record.images.min() >= 0
    assert record.images.max() <= 1


def test_the_record_is_consistent(record):
    assert list(record.stages) == ["clean", *VERSIONS["standard"]]
    for done, (name, share) in enumerate(record.stages.items(), 1):
        misclassified = sum(to in list(record.stages)[:done] for to in record.broken_by)
        assert share == 1 - misclassified / COUNT, name
    assert record.stages["square"] == record.robust.mean()
    assert record.broken_by[0] == "clean"
    np.testing.assert_array_equal(record.robust, [not to for to in record.broken_by])
    np.testing.assert_array_equal(record.robust, record.steps < 0)
    expected = {"num_steps": 100, "targets": 4, "loss": "targeted", "alpha": 0.75, "rho": 0.75}
    assert record.settings["apgd-t"] == expected
    assert record.settings["epsilon"] == EPSILON
    # Robust images make all steps of all runs.
    assert record.queries["square"][0] >= 5001 * record.robust.sum()
    assert record.queries["square"][1] == 0
    assert record.warnings == []


def test_an_image_is_broken_by_the_first_attack_that_breaks_it_alone(problem, record):
    logits_fn, images, labels = problem
    expected = ["clean"] + [""] * (COUNT - 1)
    for attack in attacks.autoattack_attacks(epsilon=EPSILON, num_classes=5)[1:]:
        steps = attack.steps(5)
        keys = attack.keys(KEY, jnp.arange(COUNT), steps.num_runs)
        for report in attacks.packed(steps, logits_fn, keys, images, labels, batch_size=1):
            for job in report.finished:
                if job.misclassified and not expected[job.image]:
                    expected[job.image] = attack.name
    assert record.broken_by == expected


def test_evaluate_runs_the_same_attacks_with_the_same_numbers(problem, record):
    chain = attacks.autoattack_attacks(epsilon=EPSILON, num_classes=5)
    worst = np.zeros_like(record.images)
    result = evaluate(*problem, chain, seed=8, batch_size=1, worst_images=worst, progress=False)
    assert [of_image["robust"] for of_image in result.records] == record.robust.tolist()
    assert {attack["name"]: attack["accuracy"] for attack in result.summary["attacks"]} == record.stages
    np.testing.assert_array_equal(worst, record.images)
    by_attack = {attack["name"]: (attack["forward"], attack["backward"]) for attack in result.summary["attacks"]}
    assert {name: by_attack[name] for name in record.queries} == record.queries


def test_results_do_not_depend_on_the_batch_size(problem, record):
    other = run(problem, version=["apgd-ce"], batch_size=2)
    misclassified = np.array([to in ("clean", "apgd-ce") for to in record.broken_by])
    assert record.broken_by.count("apgd-ce") > 1
    assert other.broken_by == [to if by_it else "" for to, by_it in zip(record.broken_by, misclassified, strict=True)]
    np.testing.assert_array_equal(other.steps[misclassified], record.steps[misclassified])
    np.testing.assert_allclose(other.images[misclassified], record.images[misclassified], atol=1e-6)


@pytest.mark.slow
def test_one_misclassified_draw_does_not_end_a_run():
    def logits_fn(x, keys):
        darkness = (0.5 - x[..., 0].mean((1, 2))) / EPSILON  # 1 at the full radius
        # If the second channel is dark, no attack helps; among the 5 draws of each of 101 iterates, nearly every image
        # has a misclassified one. If it is bright, few draws are misclassified at the start of a run, and all at its
        # end: if the run ended at the first one, these images would count as robust.
        can_win = x[..., 1].mean((1, 2)) > 0.5
        share_wrong = 0.05 + 0.95 * jnp.where(can_win, jnp.clip(2 * darkness, 0, 1), 0)
        right = jax.vmap(jax.random.uniform)(keys) > share_wrong
        margin = jnp.where(right, 1.0, -1.0) - (
            darkness - jax.lax.stop_gradient(darkness)
        )  # the gradient darkens the image
        return jnp.stack([margin, jnp.zeros_like(margin)], -1)

    images, drawn = np.full((64, 2, 2, 2), 0.5, np.float32), attacks.Attack("apgd-ce", EPSILON, num_draws=5)
    images[:32, ..., 1], images[32:, ..., 1] = 0, 1
    record = run((logits_fn, images, np.zeros(64, int)), version=[drawn], batch_size=64)
    assert (
        record.robust[:32].mean() > 0.7
    )  # 0.95 in the clean stage, 0.95 again here; the standard error of 32 images is 0.05
    assert record.robust[32:].mean() == 0
    # No run ends early; the draw that decides is one more forward pass.
    attacked = 64 * record.stages["clean"]
    assert record.queries["apgd-ce"] == (attacked * (5 * 101 + 1), attacked * 5 * 101)


@pytest.mark.parametrize(
    ("network", "doubt"),
    [
        (jax.nn.softmax, "looks like probabilities"),
        (lambda logits: jax.nn.softmax(logits.astype(jnp.bfloat16)), "looks like probabilities"),
        (jnp.round, "9 of 9 images have a cross-entropy gradient of exactly zero"),
        (
            lambda logits: logits + np.float32(0.01 * NOISE.normal(size=(1, 5))),
            "different logits when it is called again",
        ),
        (lambda logits: logits - logits.mean(0, keepdims=True), "different logits in different batches"),
    ],
)
def test_warns_of_networks_that_mislead_attacks(problem, network, doubt):
    logits_fn, images, _ = problem
    all_wrong = (np.asarray(jnp.argmax(logits_fn(images), -1)) + 1) % 5  # so that no attack is needed
    with pytest.warns(UserWarning, match=doubt) as caught:
        record = attacks.autoattack(lambda x: network(logits_fn(x)), KEY, images, all_wrong, version=["apgd-ce"])
    with pytest.warns(UserWarning, match=doubt):
        result = evaluate(
            lambda x: network(logits_fn(x)),
            images,
            all_wrong,
            attacks.autoattack_attacks(["apgd-ce"], num_classes=5),
            progress=False,
        )
    assert result.summary["warnings"] == record.warnings
    assert [str(warning.message) for warning in caught] == record.warnings
    assert len(record.warnings) == 1
    assert record.stages == {"clean": 0.0, "apgd-ce": 0.0}


def test_many_logits_of_half_precision_do_not_look_like_probabilities():
    """Their sums are near 0 or 1 by chance."""
    weights = jax.random.normal(KEY, (4, 1000)) / 10
    centred = weights - weights.mean(-1, keepdims=True)

    def logits_fn(x):
        return (x.reshape(len(x), -1) @ centred).astype(jnp.bfloat16)

    images, labels = np.random.default_rng(0).uniform(size=(20, 2, 2, 1)).astype(np.float32), np.zeros(20, int)
    assert attacks.sanity_warnings(logits_fn, images, labels) == []


@pytest.mark.slow
def test_warns_if_square_finds_more_than_attacks_with_gradients(problem):
    logits_fn, images, labels = problem

    def masked(x):
        # The gradient comes from the pixels' rounding errors alone, so it is misleading.
        return logits_fn(jnp.round(x, 3) + 1e-6 * jnp.sin(1e4 * x))

    record = run((masked, images, labels), version=["apgd-ce", "square"], batch_size=1, epsilon=0.08)
    assert record.stages["square"] < record.stages["apgd-ce"]
    assert any("square, blind to gradients, broke" in doubt for doubt in record.warnings)


def test_a_list_may_have_words_and_attacks(problem):
    logits_fn, images, labels = problem
    all_wrong = (labels + 1) % 5  # so that no attack is needed
    all_wrong[0] = (all_wrong[0] + 1) % 5
    record = run((logits_fn, images, all_wrong), version=["pgd-3", attacks.Attack("square", EPSILON, num_steps=20)])
    assert list(record.stages) == ["clean", "pgd-3", "square"]
    assert record.settings["version"] == ["pgd-3", "square"]
    assert record.settings["square"]["num_steps"] == 20


def test_versions_are_as_published():
    assert list(VERSIONS["standard"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(VERSIONS["plus"]) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert list(VERSIONS["rand"]) == ["apgd-ce", "apgd-dlr"]
    plus = {attack.name: attack.steps(10) for attack in attacks.autoattack_attacks("plus")}
    assert {name: (attack.num_steps, attack.num_runs) for name, attack in plus.items()} == {
        "clean": (0, 1),
        "apgd-ce": (100, 5),
        "apgd-dlr": (100, 5),
        "fab": (100, 5),
        "square": (5000, 1),
        "apgd-t": (100, 9),
        "fab-t": (100, 9),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": "standart"}, ValueError, "version: expected one of standard, plus, rand; got 'standart'. Did you"),
        ({"version": ["apgd-c"]}, ValueError, "got 'apgd-c'. Did you mean 'apgd-ce'?"),
        (
            {"version": ["fab", "fab"]},
            ValueError,
            "version: expected at least one attack, and none twice",
        ),
        ({"version": []}, ValueError, "version: expected at least one attack"),
        (
            {"version": [attacks.REGISTRY["square"]]},
            TypeError,
            "version: expected names and Attacks; got Specification",
        ),
        ({"version": [attacks.Attack("square", 0.1)]}, ValueError, "version: expected attacks of radius 0.045 on all"),
        (
            {"version": "rand"},
            ValueError,
            "function that takes images (N, 4, 4, 1) and one key for each, in inference mode",
        ),
        ({"epsilon": 8}, ValueError, "epsilon: expected a finite number of at least 0 of at most 1; got 8"),
    ],
)
def test_bad_settings_raise_an_error(problem, change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run(problem, **change)


def test_bad_networks_and_images_raise_an_error(problem):
    logits_fn, images, labels = problem
    with pytest.raises(
        ValueError,
        match=r"apgd-t: .* 4 classes; it has 3\. .*apgd-dlr, fab, fab-t, square,",
    ):
        run((lambda x: logits_fn(x)[:, :3], images, labels % 3))
    with pytest.raises(FloatingPointError, match="got others for 9 clean images, the first at 0"):
        run((lambda x: jnp.nan * logits_fn(x), images, labels))
    with pytest.raises(ValueError, match="images: expected at least one"):
        run((logits_fn, images[:0], labels[:0]))
    with pytest.raises(ValueError, match="labels: expected classes 0 to 4, as logits_fn has 5; got 5 to 5"):
        run((logits_fn, images, 0 * labels + 5))
