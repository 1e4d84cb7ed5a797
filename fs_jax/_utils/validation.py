"""Checks of arguments. Errors name the argument, what was expected, and what was given."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError with the nearest choice unless `value` is one of the choices."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}; got {value!r}.{hint}")


def check_number(
    argument: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    integer: bool = False,
) -> None:
    """Raise an error that says what was expected and given, unless `value` is a finite number in the range."""
    words = ["an integer" if integer else "a finite number"]
    words += [f"above {above}"] if above is not None else []
    words += [f"of at least {at_least}"] if at_least is not None else []
    words += [f"of at most {at_most}"] if at_most is not None else []
    words += [f"below {below}"] if below is not None else []
    expected = " ".join(words)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if integer else numbers.Real):
        raise TypeError(f"{argument}: expected {expected}; got {value!r} ({type(value).__name__}).")
    inside = (
        math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not inside:
        raise ValueError(f"{argument}: expected {expected}; got {value!r}.")
