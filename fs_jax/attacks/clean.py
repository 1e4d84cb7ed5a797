"""The clean images, as an attack that changes nothing; every evaluation starts with it."""

from typing import NamedTuple

from jax.tree_util import Partial

from fs_jax.attacks.specification import Specification, count
from fs_jax.attacks.stepwise import Progress, Stepwise, first_judged


def whole(start: Partial, *, forward: int = 1, draws: bool = False) -> Stepwise:
    """An attack without steps: `start(logits_fn, keys, images, labels, run) -> Progress` is all of it.

    Example:
      >>> whole(Partial(judge)).num_steps
      0
    """
    return Stepwise(
        Partial(_started, start=start), Partial(_no_step), num_steps=0, passes=((forward, 0), (0, 0)), draws=draws
    )


def judge(logits_fn, keys, images, labels, run) -> Progress:
    """Classify the images unchanged."""
    return first_judged(images, logits_fn(images), labels)


class _Done(NamedTuple):
    progress: Progress


def _started(logits_fn, keys, images, labels, run, *, start):
    return _Done(start(logits_fn, keys, images, labels, run))


def _no_step(logits_fn, state, images, labels):
    return state


def _judge_drawn(logits_fn, keys, images, labels, run):
    return first_judged(images, logits_fn(images, keys), labels)


def _build(*, epsilon, num_classes, num_draws):
    return whole(Partial(judge)) if num_draws is None else whole(Partial(_judge_drawn), draws=True)


CLEAN = Specification(
    "clean",
    "the clean images, unchanged",
    _build,
    {"num_draws": count(None)},
    fixed_radius=0.0,
    uses_gradients=False,
    judges_only=True,
)
