"""Comparable times: programs take turns in one process, so that noise affects all of them alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


def seconds_in_turn(
    programs: Mapping[Name, Callable[[], Any]], rounds: int, *, pause: float | None = None, title: str | None = None
) -> dict[Name, list[float]]:
    """Time each program once per round, after a warm-up round.

    Args:
      programs: Functions without arguments. Their results are waited for.
      rounds: Number of timed rounds.
      pause: Seconds of pause before a program, followed by a call that is not timed. Use it for libraries with threads
        of their own: their threads spin for some milliseconds after a call, which slows down the next program; and
        after they have gone to sleep, the first call waits for them to wake up.
      title: Title of a progress bar; None for no progress bar.

    Returns:
      Seconds of each round, by program.
    """
    times: dict[Name, list[float]] = {name: [] for name in programs}
    for number in tqdm(range(rounds + 1), title, unit="round", disable=title is None):
        for name, program in programs.items():
            if pause is not None:
                time.sleep(pause)
                timed(program)
            seconds, _ = timed(program)
            if number:
                times[name].append(seconds)
    return times


def timed(program: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    began = time.perf_counter()
    result = jax.block_until_ready(program())
    return time.perf_counter() - began, result
