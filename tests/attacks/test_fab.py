"""FAB: its projection against linear programming, and the attack on networks whose smallest perturbations are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from fs_jax._utils.keys import run_keys
from fs_jax.attacks.fab import _nearest_boundary, fab, fab_steps, to_hyperplane

pytestmark = pytest.mark.usefixtures("small_programs")


def smallest_move(point, normal, value):
    """Length of the smallest move to the hyperplane, by linear programming over (d, r); None if out of reach."""
    count = len(point)
    within_r = np.block([[np.eye(count), -np.ones((count, 1))], [-np.eye(count), -np.ones((count, 1))]])
    solved = linprog(
        c=np.r_[np.zeros(count), 1],
        A_ub=within_r,
        b_ub=np.zeros(2 * count),
        A_eq=np.r_[normal, 0][None],
        b_eq=[-value],
        bounds=[*zip(-point, 1 - point, strict=True), (0, None)],
    )
    return solved.fun if solved.status == 0 else None


def problems():
    """Points, normals and values [60, 7]: with zeros in the normal, points at walls, hyperplanes out of reach, ..."""
    rng = np.random.default_rng(0)
    points, normals = rng.uniform(size=(60, 7)), rng.normal(size=(60, 7))
    normals[10:30] *= rng.uniform(size=(20, 7)) < 0.5
    points[20:40] = np.round(points[20:40])
    normals[40:45] *= 10.0 ** rng.uniform(-6, 0, size=(5, 7))
    normals[45] = 0
    # Half of what all walls together allow; most can reach it.
    values = rng.normal(size=60) * np.abs(normals).sum(1) / 4
    values[46] = 0
    values[47:50] *= 100
    return points, normals, values


@pytest.mark.usefixtures("float64")
def test_projection_equals_linear_programming():
    points, normals, values = problems()
    moves = np.asarray(jax.jit(jax.vmap(to_hyperplane))(points, normals, values))
    lengths = [smallest_move(*problem) for problem in zip(points, normals, values, strict=True)]
    reached = np.array([length is not None for length in lengths])
    assert 5 < (~reached).sum() < 30  # both kinds are tested
    # HiGHS solves to 1e-7 of feasibility.
    np.testing.assert_allclose(np.abs(moves).max(1)[reached], np.array(lengths)[reached].astype(float), atol=1e-6)
    np.testing.assert_allclose((moves * normals).sum(1)[reached], -values[reached], atol=1e-12)
    # Out of reach: each pixel with a nonzero normal is at the wall in its direction.
    nearest = np.where(normals * values[:, None] > 0, -points, 1 - points) * (normals != 0)
    np.testing.assert_array_equal(moves[~reached], nearest[~reached])
    assert (points + moves >= 0).all()
    assert (points + moves <= 1).all()
    assert not moves[normals == 0].any()
    assert not moves[46].any()


@pytest.fixture(scope="module")
def linear():
    """A linear network of 5 classes, 8 images that it classifies correctly, and their smallest perturbations."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(16, 5))
    images = rng.uniform(0.2, 0.8, size=(40, 16))
    logits = images @ weights
    # The images nearest to a boundary, so that no pixel reaches 0 or 1.
    labels = logits.argmax(1)
    gaps = logits[np.arange(40), labels][:, None] - logits
    norms = np.abs(weights.T[labels][:, None] - weights.T[None]).sum(-1)
    gaps[np.arange(40), labels], norms[np.arange(40), labels] = np.inf, 1
    distances = (gaps / norms).min(1)
    chosen = np.argsort(distances)[:8]
    assert distances[chosen].max() < 0.15  # no pixel reaches 0 or 1, even at 1.05 times this

    def logits_fn(images):
        return images.reshape(len(images), -1) @ jnp.asarray(weights, jnp.float32)

    as_images = jnp.asarray(images[chosen].reshape(8, 4, 4, 1), jnp.float32)
    return logits_fn, as_images, jnp.asarray(labels[chosen]), distances[chosen]


def states_after(attack, num_steps, logits_fn, images, labels, run):
    """The state after some steps, which misclassified images make too: they search for a smaller perturbation."""
    keys, runs = jax.random.split(jax.random.key(0), len(images)), jnp.full(len(images), run, jnp.int32)

    @jax.jit
    def advance(keys, runs):
        state = attack.start(logits_fn, keys, images, labels, runs)
        return jax.lax.fori_loop(0, num_steps, lambda _, s: attack.step(logits_fn, s, images, labels), state)

    return advance(keys, runs)


# For a linear boundary at distance 1, the first step goes from the image to 1.05, and back to 0.9 * 1.05 = 0.945. The
# second step starts there: the projection of the iterate is 0.055 away, that of the image 1. Of all steps, the second
# one ends closest to the image.
_ALPHA = 0.055 / 1.055
CLOSEST = (1 - _ALPHA) * (0.945 + 1.05 * 0.055) + _ALPHA * 1.05


def test_finds_the_smallest_perturbation_of_a_linear_network(linear):
    logits_fn, images, labels, smallest = linear
    state = states_after(fab_steps(epsilon=0.1), 10, logits_fn, images, labels, run=0)
    # Differences of logits are at least 0.1, with a rounding error of 1e-6.
    np.testing.assert_allclose(state.distance, CLOSEST * smallest, rtol=1e-4)


def test_the_best_target_gives_the_smallest_perturbation(linear):
    logits_fn, images, labels, smallest = linear
    attack = fab_steps(epsilon=0.1, targeted=True)
    states = [states_after(attack, 10, logits_fn, images, labels, run) for run in range(4)]
    np.testing.assert_allclose(np.min([state.distance for state in states], 0), CLOSEST * smallest, rtol=1e-4)
    ranked = np.argsort(-logits_fn(images), -1)
    np.testing.assert_array_equal(np.stack([state.target for state in states], 1), ranked[:, 1:])
    assert (ranked[:, 0] == labels).all()


def test_the_first_run_starts_at_the_image_and_others_at_half_the_radius(linear):
    logits_fn, images, labels, _ = linear
    start, keys = (
        jax.jit(lambda *args: fab_steps(epsilon=0.1).start(logits_fn, *args)),
        jax.random.split(jax.random.key(0), 8),
    )
    firsts = [start(run_keys(keys, jnp.full(8, run)), images, labels, jnp.full(8, run)).iterate for run in range(3)]
    np.testing.assert_array_equal(firsts[0], images)
    noise = np.stack(firsts[1:]) - images[None]
    # No pixel reaches 0 or 1; the rounding error of float32 is 6e-8.
    np.testing.assert_allclose(np.abs(noise).max((2, 3, 4)), 0.05, atol=1e-7)
    assert (np.abs(noise[0] - noise[1]).max((1, 2, 3)) > 0.01).all()


def test_the_weight_of_the_image_in_a_step_is_at_most_a_tenth(linear):
    logits_fn, images, labels, _ = linear
    attack = fab_steps(epsilon=0.1, targeted=True)
    keys, each = jax.random.split(jax.random.key(0), 8), np.arange(8)
    start = jax.jit(lambda keys: attack.start(logits_fn, keys, images, labels, jnp.zeros(8, jnp.int32)))(keys)

    def lead(x):
        logits = logits_fn(x)
        return logits[each, start.target] - logits[each, labels]

    value, normal = map(np.asarray, jax.jit(lambda x: (lead(x), jax.grad(lambda x: jnp.sum(lead(x)))(x)))(images))
    move = -np.sign(value)[:, None, None, None] * np.sign(normal)
    move *= (np.abs(value) / np.abs(normal).sum((1, 2, 3)))[:, None, None, None]
    # An iterate that is as far from the boundary as the image: without the limit, the weight would be a half.
    flat, aside = normal.reshape(8, 16), np.zeros((8, 16), np.float32)
    aside[:, 0], aside[:, 1] = flat[:, 1], -flat[:, 0]
    aside = aside.reshape(images.shape) * np.float32(0.05) / np.abs(aside).max(1)[:, None, None, None]
    state = jax.jit(lambda x: attack.step(logits_fn, start._replace(iterate=x), images, labels))(images + aside)
    # The step crosses the boundary, so it is moved back to 0.9. The projection has the error of float32 sums, 1e-6.
    np.testing.assert_allclose(state.iterate - images, 0.9 * (1.05 * move + 0.9 * aside), atol=1e-5)


def test_only_iterates_in_the_ball_count(linear):
    logits_fn, images, labels, smallest = linear
    epsilon = float(np.median(smallest))  # of 8 images, so it differs from each
    attacked = jax.jit(lambda rng, x: fab(logits_fn, rng, x, labels, epsilon=epsilon, num_steps=10, num_runs=2))(
        jax.random.key(0), images
    )
    assert np.abs(smallest / epsilon - 1).min() > CLOSEST - 1  # no image is so near the radius that it could be missed
    np.testing.assert_array_equal(logits_fn(attacked).argmax(-1) != labels, smallest < epsilon)
    assert np.abs(attacked - images).max() <= epsilon


def test_the_nearest_boundary_equals_that_from_all_gradients(classifier):
    logits_fn, images, labels = classifier
    value, normal = jax.jit(lambda x: _nearest_boundary(logits_fn, x, labels))(images)

    def leads(image, label):
        logits = logits_fn(image[None])[0]
        return logits - logits[label]

    derivatives = jax.jit(jax.vmap(lambda image, label: (leads(image, label), jax.jacrev(leads)(image, label))))
    values, normals = map(np.asarray, derivatives(images, labels))
    labels = np.asarray(labels)
    each, norms = np.arange(len(images)), np.abs(normals).sum((2, 3, 4))
    wrong = np.arange(5) != labels[:, None]  # the true class has no boundary with itself
    nearest = np.where(wrong, np.abs(values) / np.where(wrong, norms, 1), np.inf).argmin(1)
    # Sums of 16 and 12 products of float32 in another order.
    np.testing.assert_allclose(value, values[each, nearest], atol=1e-5)
    np.testing.assert_allclose(normal, normals[each, nearest], atol=1e-5)
    assert len(set((nearest - labels).tolist())) > 1
