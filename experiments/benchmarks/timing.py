"""Times that can be compared: programs take turns in one process, so that noise falls on all alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


def seconds_in_turn(
    programs: Mapping[Name, Callable[[], Any]], rounds: int, *, pause: float | None = None, title: str | None = None
) -> dict[Name, list[float]]:
    """Seconds of each program in each round; in every round each runs once, after one round that isn't counted.

    Args:
      programs: Functions of nothing. What they return is waited for.
      rounds: How many are counted.
      pause: For libraries with threads of their own. These spin for some milliseconds after a run, on the cores of who
        is next; and once they sleep, the first run waits for them to wake. So a turn is a pause of so many seconds, a
        run that isn't counted, and one that is.
      title: Of a progress bar; None for none.
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
    """Seconds of one run, and what it returned."""
    began = time.perf_counter()
    result = jax.block_until_ready(program())
    return time.perf_counter() - began, result
