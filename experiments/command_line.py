"""What the scripts' command lines share. tyro makes them from dataclasses, with help, types and the nearest name."""

import sys
from collections.abc import Callable

STOPPED = 75  # exit status of a run that was stopped before its end: "temporary failure", to job queues


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run `main` on the command line's words; what it says of bad input is printed as one error, with status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
