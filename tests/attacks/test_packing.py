"""Batch compaction: results depend on an image's key and run alone, and finished images cost nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import attacks
from fs_jax.attacks.stepwise import run

pytestmark = pytest.mark.usefixtures("small_programs")

KEY = jax.random.key(5)
COUNT = 21
# A radius at which some images are misclassified at once, some later, and some are robust.
ATTACK = attacks.pgd_steps(epsilon=0.05, step_size=0.004, num_steps=25, num_runs=3)


@pytest.fixture(scope="module")
def problem(classifier):
    """The classifier with 21 images; it classifies all of them correctly before the attack."""
    logits_fn, _, _ = classifier
    images = np.random.default_rng(1).uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
    return logits_fn, images, np.asarray(jnp.argmax(logits_fn(images), -1))


def finished(problem, attack=ATTACK, rng=KEY, **settings):
    """All jobs by image and run, and the progress reports."""
    logits_fn, images, labels = problem
    reports = list(attacks.packed(attack, logits_fn, rng, images, labels, **settings))
    return {(job.image, job.run): job for report in reports for job in report.finished}, reports


def assert_same_results(one, other):
    assert one.keys() == other.keys()
    for job, fate in one.items():
        assert fate.step == other[job].step, job
        assert fate.misclassified == other[job].misclassified, job
        # Products of differently shaped batches are rounded differently, by 1e-7 of logits of about 1 at each step.
        np.testing.assert_allclose(fate.margin, other[job].margin, atol=1e-5)
        np.testing.assert_allclose(fate.adversarial, other[job].adversarial, atol=1e-6)


@pytest.fixture(scope="module")
def in_batches_of_4(problem):
    return finished(problem, batch_size=4)


def test_packed_gives_the_same_as_one_batch_of_all_images(problem, in_batches_of_4):
    logits_fn, images, labels = problem
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(COUNT))
    whole = run(ATTACK, logits_fn, keys, jnp.asarray(images), jnp.asarray(labels))
    jobs, _ = in_batches_of_4
    lowest = {}
    for (image, _), job in sorted(jobs.items()):
        if image not in lowest or job.margin < lowest[image].margin:
            lowest[image] = job
    assert 0 < sum(job.misclassified for job in lowest.values()) < COUNT  # else this test compares nothing
    for image, job in lowest.items():
        assert (job.step if job.misclassified else -1) == whole.misclassified_at[image]
        np.testing.assert_allclose(job.margin, whole.margin[image], atol=1e-5)
        np.testing.assert_allclose(job.adversarial, whole.adversarial[image], atol=1e-6)


def test_batch_size_changes_nothing(problem, in_batches_of_4):
    assert_same_results(in_batches_of_4[0], finished(problem, batch_size=2)[0])


def test_a_misclassified_image_makes_no_later_run_unless_every_run_is_set(problem, in_batches_of_4):
    jobs, _ = in_batches_of_4
    for (image, number), job in jobs.items():
        assert ((image, number + 1) in jobs) == (not job.misclassified and number + 1 < ATTACK.num_runs)
    every, _ = finished(problem, batch_size=4, every_run=True)
    assert set(every) == {(image, number) for image in range(COUNT) for number in range(3)}
    assert_same_results(jobs, {job: every[job] for job in jobs})


def test_missing_jobs_can_be_done_later(problem, in_batches_of_4):
    jobs, _ = in_batches_of_4
    once, robust = min(jobs)[0], next(image for image, number in jobs if number == 2)
    rest, _ = finished(problem, batch_size=4, jobs=[(once, 0), (robust, 1)])
    missing = [job for job in jobs if job[0] == once] + [(robust, 1), (robust, 2)]
    assert_same_results(rest, {job: jobs[job] for job in missing})


def test_passes_are_those_of_the_steps_made_and_of_few_empty_slots(problem, in_batches_of_4):
    jobs, reports = in_batches_of_4
    needed = sum(1 + job.step for job in jobs.values())
    spent = sum(report.forward for report in reports)
    assert spent == sum(report.backward for report in reports)
    assert needed <= spent <= 1.1 * needed
    # As if no image were dropped: all runs of all images, all steps.
    assert spent < 0.9 * COUNT * 3 * (1 + ATTACK.num_steps)


def test_reports_count_running_and_waiting_jobs(in_batches_of_4):
    _, reports = in_batches_of_4
    assert all(report.running <= 4 for report in reports)
    assert (reports[-1].running, reports[-1].waiting) == (0, 0)


def test_last_only_judges_the_last_iterate_as_the_plain_function_does(problem):
    logits_fn, images, labels = problem
    settings = {"epsilon": 0.05, "step_size": 0.01, "num_steps": 9}
    keys = jax.random.split(KEY, COUNT)
    jobs, reports = finished(problem, attacks.pgd_steps(**settings, last_only=True), keys, batch_size=COUNT)
    starts = attacks.random_start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), images, 0.05)
    plain = attacks.pgd(logits_fn, KEY, jnp.asarray(images), jnp.asarray(labels), start=starts, **settings)
    for image in range(COUNT):
        np.testing.assert_allclose(jobs[image, 0].adversarial, plain[image], atol=1e-6)
        assert jobs[image, 0].step == 9
    margins = attacks.logit_margin(logits_fn(plain), labels)
    np.testing.assert_allclose([jobs[image, 0].margin for image in range(COUNT)], margins, atol=1e-5)
    assert sum(report.backward for report in reports) == COUNT * 9


def test_uint8_images_are_scaled(problem):
    logits_fn, images, _ = problem
    stored = np.round(images[:3] * 255).astype(np.uint8)
    labels = np.asarray(jnp.argmax(logits_fn(stored / 255), -1))
    attack = attacks.pgd_steps(epsilon=0.0, num_steps=1)
    jobs, _ = finished((logits_fn, stored, labels), attack, batch_size=3)
    for image in range(3):
        np.testing.assert_allclose(jobs[image, 0].adversarial, stored[image] / 255, atol=1e-7)


def test_another_radius_compiles_nothing(problem, compilations):
    finished(problem, attacks.pgd_steps(epsilon=0.03, num_steps=3), batch_size=4, jobs=[(0, 0)])
    with compilations() as compiled:
        finished(problem, attacks.pgd_steps(epsilon=0.01, num_steps=3), batch_size=4, jobs=[(0, 0)])
    assert not compiled


@pytest.mark.parametrize(
    "attack",
    [
        attacks.pgd_steps(num_steps=3),
        attacks.pgd_steps(num_steps=1, last_only=True),
        attacks.apgd_steps(num_steps=3),
        pytest.param(attacks.fab_steps(), marks=pytest.mark.slow),
        attacks.fab_steps(targeted=True),
    ],
    ids=["pgd", "last of pgd", "apgd", "fab", "fab-t"],
)
def test_nan_gradients_stop_the_attack(problem, attack):
    logits_fn, images, labels = problem

    @jax.custom_jvp
    def finite(x):
        return logits_fn(x)

    finite.defjvp(lambda x, tangents: (finite(*x), jnp.nan * jnp.sum(*tangents) * jnp.ones_like(finite(*x))))
    # A NaN gradient makes the iterate NaN, and so the logits.
    with pytest.raises(FloatingPointError, match=r"got others for image \d under attack, after 1 steps"):
        finished((finite, images, labels), attack, batch_size=4)


def test_nan_logits_stop_the_attack(problem):
    logits_fn, images, labels = problem

    def overflows(x):
        return jnp.where(x[:, :1, 0, 0] > 0.5, jnp.nan, logits_fn(x))

    with pytest.raises(FloatingPointError, match="logits_fn: expected finite logits and gradients; got others"):
        finished((overflows, images, labels), batch_size=4)
    with pytest.raises(ValueError, match="batch_size: expected at least 1; got 0"):
        finished(problem, batch_size=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.full((COUNT, 4, 4, 1), 254.0, np.float32)}, ValueError, r"images: expected values in \[0, 1\]"),
        ({"labels": np.full(COUNT, 1000)}, ValueError, r"labels: expected classes 0 to \d+, .*; got 1000 to 1000"),
        ({"labels": np.zeros(COUNT + 1, int)}, ValueError, r"labels: expected shape \(21,\)"),
        (
            {"rng": jax.random.split(KEY, (COUNT, 1))},
            ValueError,
            r"rng: expected keys of shape \(21, 3\).* got \(21, 1\)",
        ),
    ],
)
def test_bad_input_raises_an_error(problem, change, error, message):
    logits_fn, images, labels = problem
    given = {"rng": KEY, "images": images, "labels": labels, **change}
    with pytest.raises(error, match=message):
        next(attacks.packed(ATTACK, logits_fn, **given))


def test_plain_functions_raise_an_error_for_a_network_that_is_not_finite(problem):
    """As argmax of NaN logits is class 0, images of class 0 would be robust."""
    logits_fn, images, _ = problem
    images, labels = jnp.asarray(images), jnp.zeros(COUNT, int)

    def overflows(x):
        return jnp.where(x[:, :1, 0, 0] > 0.5, jnp.nan, logits_fn(x))

    for attack in (attacks.pgd, attacks.square):
        with pytest.raises(FloatingPointError, match="logits_fn: expected finite logits and gradients; got others"):
            attack(overflows, KEY, images, labels, num_steps=1)
        jitted = jax.jit(functools.partial(attack, overflows, num_steps=1))
        assert jitted(KEY, images, labels).shape == images.shape  # values are unknown there

    def overflows_at_the_end(x):  # class 0 is for bright images, so the attack darkens this one
        bright = x.mean((1, 2, 3))
        return jnp.where(bright[:, None] < 0.48, jnp.nan, jnp.stack([bright, 1 - bright], -1))

    grey = jnp.full((1, 4, 4, 1), 0.5)
    with pytest.raises(FloatingPointError, match="logits_fn: expected finite logits and gradients; got others"):
        attacks.fgsm(overflows_at_the_end, KEY, grey, jnp.array([0]), epsilon=0.1, start=grey)
    assert attacks.fgsm(overflows_at_the_end, KEY, grey[:0], jnp.zeros(0, int)).shape == (0, 4, 4, 1)


def test_an_attack_that_does_not_count_its_steps_raises_an_error():
    attack = attacks.pgd_steps(num_steps=3)
    forgetful = attack._replace(step=lambda logits_fn, state, images, labels: state)
    images = np.full((2, 2, 2, 1), 0.7, np.float32)
    with pytest.raises(ValueError, match=r"attack\.step: expected progress\.step to be one higher"):
        list(
            attacks.packed(
                forgetful, lambda x: x.mean((1, 2)) * jnp.array([[1.0, -1.0]]), KEY, images, np.zeros(2, int)
            )
        )
