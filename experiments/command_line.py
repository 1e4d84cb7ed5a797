"""What the scripts' command lines share. tyro makes them from dataclasses, with help, types and the nearest name."""

import io
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable

STOPPED = 75  # exit status of a run that was stopped before its end: "temporary failure", to job queues

_ROOT = pathlib.Path(__file__).parents[1]


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run `main` on the command line's words; what it says of bad input is printed as one error, with status 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a τ or ∞ is no reason to fail where the system's encoding has none
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("Interrupted. The same command resumes what was begun.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        # Raised by the project's own checks, or by the file system; what a library raises is a bug, and shown whole.
        raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not isinstance(error, OSError) and raised_in.parent not in _ours():
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _ours() -> set[pathlib.Path]:
    return {path for room in ("fs_jax", "experiments") for path in (_ROOT / room, *(_ROOT / room).rglob("*/"))}
