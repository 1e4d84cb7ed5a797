"""What the scripts' command lines share. tyro makes them from dataclasses, with help, types and the nearest name."""

import fractions
import io
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from fs_jax._utils.text import radius

STOPPED = 75  # exit status of a script that stopped before its end: "temporary failure", to job queues

_ROOT = pathlib.Path(__file__).parents[1]

T = TypeVar("T")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run `main` on the words of the command line; an error about its input is printed as one line, with status 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a terminal whose encoding has no τ or ∞
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("Interrupted. Rerun the same command to resume.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        # Errors raised by this project's code or by the file system are about the input: one line. An error raised in a
        # library is a bug: it keeps its traceback.
        raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not isinstance(error, OSError) and raised_in.parent not in _ours():
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: Callable[..., T], argv: Sequence[str], *, examples: str = "", **options: Any) -> T:
    """Parse a command line with `tyro.cli`, where every number may also be a fraction such as 8/255.

    Args:
      arguments: A dataclass (or a function) with one field for each option.
      argv: The words of the command line.
      examples: Commands that `--help` prints at its end.
      **options: More arguments for `tyro.cli`, such as `prog`, `description` and `default`.

    Returns:
      An instance of the dataclass (or what the function returns).

    Example:
      >>> import dataclasses
      >>> Radius = dataclasses.make_dataclass("Radius", [("epsilon", float)])
      >>> parse(Radius, ["--epsilon", "51/255"])
      Radius(epsilon=0.2)
    """
    try:
        return tyro.cli(arguments, args=argv, registry=_FRACTIONS, **options)
    except SystemExit as stopped:
        if not stopped.code and examples:  # status 0: this was --help
            print(f"\nexamples:\n{examples}")
        raise


def number(text: str) -> float:
    """A number, or a fraction such as 8/255.

    Example:
      >>> number("8/o")
      Traceback (most recent call last):
      ValueError: expected a number, or a fraction such as 8/255; got '8/o'.
    """
    try:
        return float(fractions.Fraction(text) if "/" in text else text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number, or a fraction such as 8/255; got {text!r}.") from None


def _shown(value: float) -> str:
    """A default in the help text: 8/255 in place of its 16 digits."""
    fraction = radius(value)
    return fraction if "/" in fraction and len(str(value)) > len("0.0001") else str(value)


_FRACTIONS = ConstructorRegistry()


@_FRACTIONS.primitive_rule
def _fraction(info):
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [_shown(value)],
    )


def _ours() -> set[pathlib.Path]:
    return {path for folder in ("fs_jax", "experiments") for path in (_ROOT / folder, *(_ROOT / folder).rglob("*/"))}
