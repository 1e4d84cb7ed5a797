"""APGD: gradient ascent with momentum, which halves the step size of an image when it makes no more progress."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from fs_jax.attacks.linf import LogitsFn, Scalar, check_attack, project
from fs_jax.attacks.losses import cross_entropy, dlr, targeted_dlr, wrong_class
from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged, where

Loss = Literal["ce", "dlr", "targeted"]

MOMENTUM = 0.25
RISES = 0.75  # the step size is halved if the loss rose in at most this share of an interval's steps


def apgd(
    logits_fn: LogitsFn,
    rng: Key[Array, ""] | Key[Array, "n"],
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"],
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 100,
    loss: Loss = "ce",
    num_runs: int | None = None,
) -> Float[Array, "n h w c"]:
    """Auto-PGD, the parameter-free attack of AutoAttack.

    From x_0 = clip(x + epsilon u / max|u|, 0, 1), u uniform in [-1, 1], with the projection P on the ball and on [0, 1]

      z = P(x_k + eta sign(grad L(x_k))),    x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})),

    except that x_1 = z. The step size eta is 2 epsilon at first. At checkpoints (of 100 steps, after 22, 41, 57, 70,
    80, 87, 93 and 99), eta is halved and the image restarts from its iterate of the highest loss, if one of these is
    true: the loss rose in at most 0.75 of the steps since the last checkpoint; or eta wasn't halved at the last
    checkpoint and the highest loss hasn't risen since. The attack stops at the first misclassified iterate, which may
    be x_0.

    Args:
      logits_fn: Network, from images to logits [N, classes]; inference mode.
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image.
      images: Images [N, H, W, C] in [0, 1].
      labels: True classes [N].
      epsilon: Radius, in units of [0, 1].
      num_steps: Steps of each run, at least 1.
      loss: L: the cross-entropy "ce", the difference of logits ratio "dlr" (at least 3 classes), or "targeted" (APGD-T,
        at least 4 classes): `targeted_dlr`, with another target in each run. Targets are the wrong classes in order of
        decreasing logits at the clean image.
      num_runs: Number of random starts, 1 by default. With "targeted" it is the number of targets, 9 by default and at
        most the number of wrong classes.

    Returns:
      Images [N, H, W, C] in the ball: the misclassified iterates, or else those of the lowest margin. No gradient flows
        through them.

    Raises:
      TypeError, ValueError: for wrong shapes or dtypes, images outside [0, 1], labels out of range, a negative radius,
        no steps, an unknown loss, too few classes for it.
      FloatingPointError: if logits or gradients aren't finite. (Under `jit`, values can't be checked.)

    Example:
      >>> logits_fn = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], -1)
      >>> images = jnp.full((1, 4, 4, 1), 0.56)
      >>> attacked = apgd(logits_fn, jax.random.key(0), images, jnp.array([0]), epsilon=0.1)
      >>> int(logits_fn(attacked).argmax())  # class 0 is for bright images, so the attack darkens this one
      1

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020, algorithm 1. It differs from the authors' code for confident networks in float32, where their
    cross-entropy loses the derivative by the true class's logit: see `cross_entropy`.
    """
    wrong_classes = check_attack(logits_fn, images, labels, epsilon=epsilon, num_steps=num_steps) - 1
    if num_runs is None:
        num_runs = min(9, wrong_classes) if loss == "targeted" else 1
    if num_runs < 1 or (loss == "targeted" and num_runs > wrong_classes):
        raise ValueError(
            f"num_runs: expected at least 1, and with targets at most {wrong_classes}, the number of wrong classes; "
            f"got {num_runs}."
        )
    attack = apgd_steps(epsilon=epsilon, num_steps=num_steps, loss=loss, num_runs=num_runs)
    return adversaries(attack, logits_fn, rng, images, labels, uses_gradients=True)


def apgd_steps(
    *,
    epsilon: Scalar = 8 / 255,
    num_steps: int = 100,
    loss: Loss = "ce",
    num_runs: int | None = None,
    num_draws: int | None = None,
) -> Stepwise:
    """`apgd` as a `Stepwise`.

    Args:
      epsilon: Radius, in units of [0, 1].
      num_steps: Steps of each run.
      loss: "ce", "dlr" or "targeted".
      num_runs: Number of random starts, 1 by default. With "targeted" it is the number of targets, 9 by default, which
        must be less than the number of classes.
      num_draws: For a randomised network, which takes images and a key for each, `logits_fn(images, keys)`: average the
        gradients of this number of draws (expectation over transformation), and the logits that choose the best
        iterate. A run then makes all its steps, and `packed` judges the best iterate with one more draw.

    Returns:
      The attack, for `stepwise.run` and `packing.packed`.

    Raises:
      ValueError: for an unknown loss, or `num_draws` with the targeted loss.

    Example:
      >>> apgd_steps(loss="targeted").num_runs
      9
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss: expected one of {', '.join(get_args(Loss))}; got {loss!r}.")
    targeted = loss == "targeted"
    if targeted and num_draws is not None:
        raise ValueError("num_draws: expected None for the targeted loss, which ranks the targets without drawing.")
    ascended = Partial({"ce": _cross_entropy, "dlr": _dlr, "targeted": targeted_dlr}[loss])
    if num_draws is None:
        start, step, gradient = _targeted_start if targeted else _start, _step, Partial(_gradient, loss=ascended)
    else:
        gradient = Partial(_mean_gradient, loss=ascended, num_draws=num_draws)
        start, step = _drawn_start, _drawn_step
    bound = {"epsilon": epsilon, "gradient": gradient}
    draws, judged_again = num_draws or 1, num_draws is not None
    return Stepwise(
        Partial(start, **bound),
        Partial(step, intervals=_intervals(num_steps), **bound),
        num_steps,
        num_runs or (9 if targeted else 1),
        ((draws + targeted + judged_again, draws), (draws, draws)),
        draws=num_draws is not None,
    )


class _State(NamedTuple):
    iterate: Float[Array, "n h w c"]
    before: Float[Array, "n h w c"]
    """The previous iterate, for the momentum."""
    direction: Float[Array, "n h w c"]
    """Sign of the gradient at the iterate; a NaN here makes the next iterate NaN too."""
    loss: Float[Array, "n"]
    """The loss that was computed last."""
    best: Float[Array, "n h w c"]
    """Iterate of the highest loss."""
    best_direction: Float[Array, "n h w c"]
    best_loss: Float[Array, "n"]
    step_size: Float[Array, "n"]
    rises: Int[Array, "n"]
    """Number of steps since the last checkpoint in which the loss rose."""
    checked_loss: Float[Array, "n"]
    """The highest loss at the last checkpoint."""
    halved: Bool[Array, "n"]
    """Whether the step size was halved at the last checkpoint."""
    targets: Int[Array, "n"]
    keys: Key[Array, "n"]
    progress: Progress


def _targeted_start(logits_fn, keys, images, labels, run, **settings):
    return _start(logits_fn, keys, images, labels, run, targets=wrong_class(logits_fn(images), labels, run), **settings)


def _start(logits_fn, keys, images, labels, run, *, epsilon, gradient, targets=None):
    targets = labels if targets is None else targets  # untargeted losses ignore them
    noise = jax.vmap(_noise, (0, None, None))(keys, images.shape[1:], images.dtype)
    first = jnp.clip(images + epsilon * noise, 0, 1).astype(images.dtype)
    direction, loss, logits = gradient(logits_fn, first, labels, targets, keys, jnp.zeros_like(labels))
    return _State(
        iterate=first,
        before=first,
        direction=direction,
        loss=loss,
        best=first,
        best_direction=direction,
        best_loss=loss,
        step_size=jnp.full(len(labels), 2 * epsilon, images.dtype),
        rises=jnp.zeros(len(labels), jnp.int32),
        checked_loss=loss,
        halved=jnp.ones(len(labels), bool),  # so that the first checkpoint depends on `rises` alone
        targets=targets,
        keys=keys,
        progress=first_judged(first, logits, labels),
    )


def _drawn_start(logits_fn, keys, images, labels, run, **settings):
    return _undecided(_start(logits_fn, keys, images, labels, run, **settings))


def _drawn_step(logits_fn, state, images, labels, **settings):
    return _undecided(_step(logits_fn, state, images, labels, **settings))


def _undecided(state):
    """Don't end a run at one misclassified draw: an image that is robust to most draws would count as misclassified."""
    progress = state.progress
    ended = jnp.where(jnp.isfinite(progress.margin), -1, progress.misclassified_at)  # but end it at a NaN
    return state._replace(progress=progress._replace(misclassified_at=ended))


def _noise(key, shape, dtype):
    """Uniform noise, scaled to the surface of the unit ball."""
    noise = jax.random.uniform(key, shape, dtype, -1, 1)
    return noise / jnp.max(jnp.abs(noise))


def _step(logits_fn, state, images, labels, *, epsilon, gradient, intervals):
    s, done = state, state.progress.step

    def by_image(values):
        return values[:, None, None, None]

    stepped = project(s.iterate + by_image(s.step_size) * s.direction, images, epsilon)
    momentum = by_image(jnp.where(done > 0, MOMENTUM, 0).astype(images.dtype))
    mixed = s.iterate + (1 - momentum) * (stepped - s.iterate) + momentum * (s.iterate - s.before)
    iterate = project(mixed, images, epsilon).astype(images.dtype)
    direction, loss, logits = gradient(logits_fn, iterate, labels, s.targets, s.keys, done + 1)

    improved = loss > s.best_loss
    best, best_direction, best_loss = where(
        improved, (iterate, direction, loss), (s.best, s.best_direction, s.best_loss)
    )
    rises = s.rises + (loss > s.loss).astype(jnp.int32)
    interval = jnp.asarray(intervals)[done]
    at_checkpoint = interval > 0
    stuck = (rises.astype(jnp.float32) <= RISES * interval.astype(jnp.float32)) | (
        ~s.halved & (best_loss <= s.checked_loss)
    )
    halve = at_checkpoint & stuck
    return _State(
        iterate=where(halve, best, iterate),
        before=s.iterate,
        direction=where(halve, best_direction, direction),
        loss=loss,
        best=best,
        best_direction=best_direction,
        best_loss=best_loss,
        step_size=jnp.where(halve, s.step_size / 2, s.step_size),
        rises=jnp.where(at_checkpoint, 0, rises),
        checked_loss=jnp.where(at_checkpoint, best_loss, s.checked_loss),
        halved=jnp.where(at_checkpoint, stuck, s.halved),
        targets=s.targets,
        keys=s.keys,
        progress=judged(s.progress, iterate, logits, labels),
    )


def _intervals(num_steps: int) -> Int[np.ndarray, "num_steps"]:
    """For each step, the length of the interval that ends with it, if it is followed by a checkpoint; else 0.

    The first interval has 0.22 of the steps. Each interval has 0.03 less than the one before, down to 0.06. Lengths are
    rounded down, to at least one step.
    """
    length, shrink, least = (max(hundredths * num_steps // 100, 1) for hundredths in (22, 3, 6))
    intervals, end = np.zeros(num_steps, np.int32), length
    while end <= num_steps:
        intervals[end - 1] = length
        length = max(length - shrink, least)
        end += length
    return intervals


def _gradient(logits_fn, iterates, labels, targets, keys, step, *, loss):
    """Signs of each image's gradient, its loss and its logits, from one pass."""

    def total(x):
        logits = logits_fn(x)
        losses = loss(logits, labels, targets)
        return jnp.sum(losses), (losses, logits)

    gradient, (losses, logits) = jax.grad(total, has_aux=True)(iterates)
    return jnp.sign(gradient), losses, logits


def _mean_gradient(logits_fn, iterates, labels, targets, keys, step, *, loss, num_draws):
    """Signs of the mean gradient over draws of a randomised network; the loss of the last draw; the mean logits."""
    keys = jax.vmap(jax.random.fold_in)(keys, step)

    def total(x, draw):
        logits = logits_fn(x, jax.vmap(jax.random.fold_in, (0, None))(keys, draw))
        losses = loss(logits, labels, targets)
        return jnp.sum(losses), (losses, logits)

    def add(draw, carry):
        gradient, (losses, logits) = jax.grad(total, has_aux=True)(iterates, draw)
        return carry[0] + gradient, losses, carry[2] + logits

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(total, iterates, 0)[1])
    gradient, losses, logits = jax.lax.fori_loop(0, num_draws, add, (jnp.zeros_like(iterates), *nothing))
    return jnp.sign(gradient), losses, logits / num_draws


def _cross_entropy(logits, labels, targets):
    return cross_entropy(logits, labels)


def _dlr(logits, labels, targets):
    return dlr(logits, labels)


def _build(loss):
    def build(*, epsilon, num_classes, num_steps, restarts, num_draws):
        return apgd_steps(epsilon=epsilon, num_steps=num_steps, loss=loss, num_runs=restarts, num_draws=num_draws)

    return build


def _build_targeted(*, epsilon, num_classes, num_steps, targets):
    num_runs = min(targets, num_classes - 1)
    return apgd_steps(epsilon=epsilon, num_steps=num_steps, loss="targeted", num_runs=num_runs)


_CONSTANTS = {"alpha": 1 - MOMENTUM, "rho": RISES}

APGD_CE = Specification(
    "apgd-ce",
    "AutoAttack's APGD with the cross-entropy",
    _build("ce"),
    {"num_steps": count(100), "restarts": count(1), "num_draws": count(None)},
    constants={"loss": "ce", **_CONSTANTS},
)
APGD_DLR = Specification(
    "apgd-dlr",
    "APGD with the difference of logits ratio",
    _build("dlr"),
    {"num_steps": count(100), "restarts": count(5), "num_draws": count(None)},
    constants={"loss": "dlr", **_CONSTANTS},
    least_classes=3,
)
APGD_T = Specification(
    "apgd-t",
    "AutoAttack's targeted APGD, with one target class in each run",
    _build_targeted,
    {"num_steps": count(100), "targets": count(9)},
    constants={"loss": "targeted", **_CONSTANTS},
    least_classes=4,
)
