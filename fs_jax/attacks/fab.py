"""FAB: finds small perturbations by projecting on linearised decision boundaries, of all classes or of one target."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack
from fs_jax.attacks.losses import logit_margin, wrong_class
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, where

ALPHA_MAX = 0.1  # the largest weight of the clean image's own projection in a step
OVERSHOOT = 1.05
BACKWARD = 0.9


def fab(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 100,
    targeted: bool = False,
    num_runs: int | None = None,
) -> Float[Array, "n h w c"]:
    """Fast adaptive boundary attack in L-infinity: searches for small perturbations that are misclassified.

    At the iterate x_k, the boundary between the true class y and each other class i is linearised, which gives the
    hyperplanes {x: z_i - z_y + <grad(z_i - z_y), x - x_k> = 0}. The step uses the one that is nearest in L-infinity, at
    distance |z_i - z_y| / ||grad(z_i - z_y)||_1. Let d_k and d be the moves inside [0, 1] that project x_k and the
    clean image x on it (see `to_hyperplane`). Then

      alpha = min(||d_k|| / (||d_k|| + ||d||), 0.1),
      x_{k+1} = clip((1 - alpha) (x_k + 1.05 d_k) + alpha (x + 1.05 d), 0, 1).

    If x_{k+1} is misclassified, the search continues from x + 0.9 (x_{k+1} - x), closer to the image. Iterates may be
    outside the ball, but only those inside count. The first run starts at the image, the others at
    x + epsilon/2 * u / ||u||, u uniform in [-1, 1].

    With `targeted` (FAB-T), each run uses the boundary with one class only: the wrong classes in order of decreasing
    logits at the clean image. A step then takes one backward pass for any number of classes. All runs start at the
    image.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      num_steps: Steps of each run, at least 1.
      targeted: Use one target class in each run, in place of the nearest of all boundaries.
      num_runs: Runs of each image, 5 by default. If targeted, it is the number of targets, 9 by default and at most the
        number of wrong classes.

    Returns:
      Images [N, H, W, C] in the ball: the misclassified iterates, or else those of the lowest margin. No gradient flows
        through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no steps, no runs.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.6)
      >>> attacked = fab(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.2)
      >>> float(attacked.mean().round(3))  # the boundary is at 0.5; the step overshoots it by 1.05
      0.495

    Source: Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020,
    algorithm 1; targeted, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks" (AutoAttack), ICML 2020, by the same authors.
    """
    wrong_classes = check_attack(logits_fn, images, labels, epsilon=epsilon, num_steps=num_steps) - 1
    if num_runs is None:
        num_runs = min(9, wrong_classes) if targeted else 5
    if num_runs < 1 or (targeted and num_runs > wrong_classes):
        raise ValueError(
            f"num_runs: expected at least 1, and with targets at most {wrong_classes}, the number of wrong classes; "
            f"got {num_runs}."
        )
    attack = fab_steps(epsilon=epsilon, num_steps=num_steps, targeted=targeted, num_runs=num_runs)
    return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=True)


def fab_steps(
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 100,
    targeted: bool = False,
    num_runs: int | None = None,
    num_classes: int = 10,
) -> Stepwise:
    """`fab` as a `Stepwise`. The `distance` in its state is that of the closest misclassified iterate, in or out of the
    ball.

    Args:
      epsilon: Radius, in units of [0, 1].
      num_steps: Steps of each run.
      targeted: Use one target class in each run.
      num_runs: Runs of each image, 5 by default. If targeted, it is the number of targets, 9 by default, which must be
        less than the number of classes.
      num_classes: Classes of the network. Only `passes` depends on it: an untargeted step takes one backward pass for
        each wrong class.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`.

    Example:
      >>> fab_steps().passes, fab_steps(targeted=True).passes
      (((1, 0), (2, 9)), ((1, 0), (2, 1)))
    """
    step = Partial(_step_to_target if targeted else _step, epsilon=epsilon)
    if targeted:
        return Stepwise(Partial(_start_to_target), step, num_steps, num_runs or 9, ((1, 0), (2, 1)))
    return Stepwise(Partial(_start, epsilon=epsilon), step, num_steps, num_runs or 5, ((1, 0), (2, num_classes - 1)))


def to_hyperplane(point: Float[Array, "d"], normal: Float[Array, "d"], value: Float[Array, ""]) -> Float[Array, "d"]:
    """The smallest move, in L-infinity, from a point of the unit box to a hyperplane, inside the box.

    argmin_d ||d||_inf subject to <normal, d> = -value and 0 <= point + d <= 1. The solution has the form
    d_j = -sign(value normal_j) min(r, limit_j), where limit_j is the distance to the box's wall in this direction and
    r solves sum_j |normal_j| min(r, limit_j) = |value|. The left side is concave, increasing and piecewise linear in r.
    So Newton's method from r = 0 increases to the root and reaches it exactly after finitely many iterations: few in
    practice, as each one accounts for all walls within its radius. (FAB's authors sort the limits, which costs far
    more.)

    Args:
      point: Point in the unit box [d].
      normal: Normal vector of the hyperplane [d]; coordinates where it is zero don't move.
      value: <normal, point> minus the value of <normal, x> on the hyperplane.

    Returns:
      The move [d]. If the hyperplane doesn't intersect the box, the move to the point of the box where <normal, x> is
        closest to its value on the hyperplane.

    Example:
      >>> to_hyperplane(jnp.array([0.1, 0.5]), jnp.array([1.0, 1.0]), 0.4).round(3).tolist()
      [-0.1, -0.3]

    Source: Croce & Hein, ICML 2020 (FAB), section 2 and appendix, where it is solved by sorting.
    """
    weight, needed = jnp.abs(normal), jnp.abs(value)
    direction = -jnp.sign(value) * jnp.sign(normal)
    limit = jnp.where(direction > 0, 1 - point, point)

    def radius(at_wall):
        rest = jnp.sum(jnp.where(at_wall, 0, weight))
        still = needed - jnp.sum(jnp.where(at_wall, weight * limit, 0))
        return jnp.where(rest > 0, still / rest, jnp.inf)

    def advance(carry):
        at_wall, _ = carry
        now = at_wall | (limit < radius(at_wall))
        return now, jnp.any(now != at_wall)

    at_wall, _ = jax.lax.while_loop(lambda carry: carry[1], advance, (jnp.zeros(point.shape, bool), jnp.array(True)))
    return direction * jnp.minimum(radius(at_wall), limit)


class _Boundary(NamedTuple):
    iterate: Float[Array, "n h w c"]
    target: Int[Array, "n"] | None
    """The class whose boundary is used; None for the nearest boundary."""
    distance: Float[Array, "n"]
    """L-infinity distance of the closest misclassified iterate; infinite if there is none yet."""
    progress: Progress


def _start(logits_fn, keys, images, labels, run, *, epsilon):
    def noise(key):
        direction = jax.random.uniform(key, images.shape[1:], images.dtype, -1, 1)
        return epsilon / 2 * direction / jnp.max(jnp.abs(direction))

    random = jnp.clip(images + jax.vmap(noise)(keys), 0, 1).astype(images.dtype)
    first = where(run > 0, random, images)
    return _first_state(first, None, logits_fn(first), images, labels)


def _start_to_target(logits_fn, keys, images, labels, run):
    logits = logits_fn(images)
    return _first_state(images, wrong_class(logits, labels, run), logits, images, labels)


def _first_state(first, target, logits, images, labels):
    progress = first_judged(first, logits, labels)
    distance = jnp.where(progress.misclassified_at == 0, _length(first - images), jnp.inf)
    return _Boundary(first, target, distance, progress)


def _step(logits_fn, state, images, labels, *, epsilon):
    return _towards(*_nearest_boundary(logits_fn, state.iterate, labels), logits_fn, state, images, labels, epsilon)


def _step_to_target(logits_fn, state, images, labels, *, epsilon):
    value, vjp = jax.vjp(lambda x: _lead(logits_fn(x), state.target, labels), state.iterate)
    (normal,) = vjp(jnp.ones_like(value))
    return _towards(value, normal, logits_fn, state, images, labels, epsilon)


def _nearest_boundary(logits_fn, iterates, labels):
    """z_i - z_y [N] and its gradient, for the class i whose linearised boundary is nearest to each image."""
    logits, vjp = jax.vjp(lambda x: logits_fn(x).astype(jnp.float32), iterates)
    num_classes = logits.shape[-1]
    one_hot = functools.partial(jax.nn.one_hot, num_classes=num_classes, dtype=logits.dtype)

    def nearer(best, offset):
        other = (labels + offset) % num_classes
        value = _lead(logits, other, labels).astype(iterates.dtype)
        (normal,) = vjp(one_hot(other) - one_hot(labels))
        steepness = jnp.sum(jnp.abs(normal), (1, 2, 3))
        distance = jnp.abs(value) / (_above_zero(1e-12, steepness.dtype) + steepness)  # finite where gradients vanish
        return where(distance < best[0], (distance, value, normal), best), None

    # A loop over classes, so that only one gradient and the best so far are in memory. If all distances are NaN, so is
    # the value.
    inf, nan = (jnp.full(len(labels), number, iterates.dtype) for number in (jnp.inf, jnp.nan))
    none = inf, nan, jnp.zeros_like(iterates)
    (_, value, normal), _ = jax.lax.scan(nearer, none, jnp.arange(1, num_classes, dtype=labels.dtype))
    return value, normal


def _towards(value, normal, logits_fn, state, images, labels, epsilon):
    """A step towards the hyperplanes value + <normal, x - iterate> = 0."""
    project = jax.vmap(lambda point, normal, value: to_hyperplane(point.ravel(), normal.ravel(), value))
    value = value.astype(images.dtype)
    value_at_image = value + jnp.sum(normal * (images - state.iterate), (1, 2, 3))
    move = project(state.iterate, normal, value).reshape(images.shape)
    move_of_image = project(images, normal, value_at_image).reshape(images.shape)

    # Lengths are at least 1e-8, so that alpha is defined if neither moves.
    length, length_of_image = (jnp.maximum(_length(m), _above_zero(1e-8, m.dtype)) for m in (move, move_of_image))
    alpha = jnp.minimum(length / (length + length_of_image), ALPHA_MAX)[:, None, None, None]
    biased = (1 - alpha) * (state.iterate + OVERSHOOT * move) + alpha * (images + OVERSHOOT * move_of_image)
    iterate = jnp.clip(biased, 0, 1).astype(images.dtype)

    margin = logit_margin(logits_fn(iterate), labels).astype(jnp.float32)
    distance, misclassified = _length(iterate - images), ~(margin > 0)
    closer = misclassified & (distance < state.distance)
    # Keep the iterate of the lowest margin in the ball. The first misclassified one ends the run.
    progress, step = state.progress, state.progress.step + 1
    better = (distance <= epsilon) & (margin < progress.margin)
    better |= jnp.isnan(margin)  # in or outside the ball, so that no image is called robust because of a NaN
    return state._replace(
        iterate=where(misclassified, images + BACKWARD * (iterate - images), iterate),
        distance=jnp.where(closer, distance, state.distance),
        progress=Progress(
            adversarial=where(better, iterate, progress.adversarial),
            margin=jnp.where(better, margin, progress.margin),
            step=step,
            misclassified_at=jnp.where(
                (progress.misclassified_at < 0) & better & misclassified, step, progress.misclassified_at
            ),
        ),
    )


def _lead(logits, other, labels):
    pair = jnp.take_along_axis(logits.astype(jnp.float32), jnp.stack([other, labels], -1), axis=-1)
    return pair[:, 0] - pair[:, 1]


def _above_zero(number, dtype):
    """The number, or the smallest normal one of the type: 1e-8 is 0 in float16."""
    return max(number, float(jnp.finfo(dtype).tiny))


def _length(moves):
    return jnp.max(jnp.abs(moves), (1, 2, 3))


def _build(*, epsilon, num_classes, num_steps, restarts):
    return fab_steps(epsilon=epsilon, num_steps=num_steps, num_runs=restarts, num_classes=num_classes)


def _build_targeted(*, epsilon, num_classes, num_steps, targets):
    num_runs = min(targets, num_classes - 1)
    return fab_steps(epsilon=epsilon, num_steps=num_steps, targeted=True, num_runs=num_runs)


_CONSTANTS = {"alpha_max": ALPHA_MAX, "eta": OVERSHOOT, "beta": BACKWARD}

FAB = Specification(
    "fab",
    "projections on the nearest linearised decision boundary",
    _build,
    {"num_steps": count(100), "restarts": count(5)},
    constants={"targeted": False, **_CONSTANTS},
)
FAB_T = Specification(
    "fab-t",
    "AutoAttack's targeted FAB, with one target class in each run",
    _build_targeted,
    {"num_steps": count(100), "targets": count(9)},
    constants={"targeted": True, **_CONSTANTS},
)
