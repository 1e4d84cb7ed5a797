"""The command lines of all scripts, made by tyro from dataclasses. Numbers may be fractions; errors suggest a name."""

import dataclasses
import fractions
import io
import pathlib
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructConstructorSpec

from fs_jax._utils.text import radius
from fs_jax._utils.validation import check_choice

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
    """Parse a command line with `tyro.cli`. Numbers may be fractions such as 8/255; errors name the nearest choice.

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
        return tyro.cli(arguments, args=argv, registry=_RULES, **options)
    except SystemExit as stopped:
        if not stopped.code and examples:  # status 0: this was --help
            print(f"\nexamples:\n{examples}")
        raise


def documented(docstring: str | None) -> dict[str, str]:
    r"""Arguments of `parse` from a script's docstring: the description, and the commands after its line "Examples:".

    Example:
      >>> documented("Train. An hour.\n\nExamples:\n    python -m experiments.train")
      {'description': 'Train. An hour.', 'examples': '    python -m experiments.train'}
    """
    description, _, examples = (docstring or "").partition("\nExamples:\n")
    return {"description": description.strip(), "examples": examples.strip("\n")}


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


def shown(value: float) -> str:
    """A number as text: 8/255 in place of its 16 digits.

    Example:
      >>> shown(8 / 255), shown(1.0), shown(0.0002), shown(4e6)
      ('8/255', '1.0', '0.0002', '4000000.0')
    """
    fraction = radius(value)
    return fraction if "/" in fraction and 0 < value < 1 and len(str(value)) > len("0.0001") else str(value)


_RULES = ConstructorRegistry()


@_RULES.primitive_rule
def _fraction(info):
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [shown(value)],
    )


@_RULES.primitive_rule
def _choice(info):
    choices = get_args(info.type)
    if get_origin(info.type) is not Literal or not all(isinstance(choice, str) for choice in choices):
        return None

    def chosen(words):
        check_choice("choice", words[0], choices)
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=chosen,
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
    )


@_RULES.primitive_rule
def _optional(info):
    # X | None is read like X: None is not in the help, and errors are about X only.
    inner = [kind for kind in get_args(info.type) if kind is not type(None)]
    if get_origin(info.type) not in (Union, types.UnionType) or len(inner) != 1 or len(get_args(info.type)) != 2:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


@_RULES.struct_rule
def _dataclass(info):
    # As in tyro, but the help omits empty defaults and fields with metadata {"internal": True}.
    if not dataclasses.is_dataclass(info.type) or info.type in _IN_PROGRESS:
        return None
    _IN_PROGRESS.append(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _IN_PROGRESS.remove(info.type)
    if not isinstance(spec, StructConstructorSpec):
        return None
    internal = {field.name for field in dataclasses.fields(info.type) if field.metadata.get("internal")}

    def changed(field):
        if field.name in internal:
            return dataclasses.replace(field, type=Annotated[field.type, tyro.conf.Suppress])
        if field.default in (None, ()):
            return dataclasses.replace(field, type=Annotated[field.type, tyro.conf.arg(help_behavior_hint="")])
        return field

    return dataclasses.replace(spec, fields=tuple(map(changed, spec.fields)))


_IN_PROGRESS: list[type] = []  # dataclasses that tyro's own rule is reading


def _ours() -> set[pathlib.Path]:
    return {path for folder in ("fs_jax", "experiments") for path in (_ROOT / folder, *(_ROOT / folder).rglob("*/"))}
