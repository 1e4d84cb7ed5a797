"""Files that are written completely or not at all, and JSONL files that may end in an incomplete line."""

import contextlib
import json
import os
import pathlib
import re
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import filelock
import platformdirs


def local_path(argument: str, path: str | os.PathLike) -> pathlib.Path:
    """Expand ~ in a local path; raise an error for the address of a bucket or another remote place.

    Locks, append-only logs and atomic replacement need a file system. (`pathlib` would turn the address of a bucket
    into a local folder named `gs:`.)

    Example:
      >>> local_path("workdir", "gs://bucket/run")
      Traceback (most recent call last):
      ValueError: workdir: expected a local folder; got the address gs://bucket/run. Mount it, or use a local...
    """
    if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", os.fspath(path)):  # at least two letters: not a drive
        rest = os.fspath(path)[address.end() :]
        raise ValueError(
            f"{argument}: expected a local folder; got the address {address[1]}://{rest}. Mount it, or use a local "
            "folder and copy it; nothing was written."
        )
    return pathlib.Path(path).expanduser()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` when it is complete, and not at all if writing fails.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "result"
      >>> with replacing(path) as file:
      ...     _ = file.write(b"whole")
      >>> path.read_bytes()
      b'whole'
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file completely, or not at all.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "table.md"
      >>> write_text(path, "| a |")
      >>> path.read_text(encoding="utf-8")
      '| a |'
    """
    with replacing(path) as file:
        file.write(text.encode())


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    r"""Read one JSON object per line, and drop an incomplete last line, which a killed process didn't finish.

    Args:
      path: A JSONL file.

    Returns:
      The objects, in the order of the lines. Blank lines are skipped.

    Raises:
      ValueError: if another line isn't a JSON object; the message has its number.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"step": 1, "loss": 2.3}\n{"step": 2, "lo', encoding="utf-8")
      >>> read_jsonl(path)
      [{'step': 1, 'loss': 2.3}]
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")  # the text after the last newline is incomplete
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or cut within a character
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object; got {line[:60]!r} ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object; got {line[:60]!r}.")
        rows.append(row)
    return rows


def locked(path: str | os.PathLike, *, wait: bool = False) -> filelock.BaseFileLock:
    """Lock a file until the lock is released or the process ends.

    The lock is another file in the same folder, which isn't removed.

    Args:
      path: The file, which need not exist.
      wait: Wait while another process has locked it.

    Raises:
      BlockingIOError: if another process has locked it, unless `wait`.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/records.jsonl"
      >>> lock = locked(path)
      >>> locked(path)
      Traceback (most recent call last):
      BlockingIOError: ...records.jsonl: another process is writing to it. Wait until it has finished.
      >>> lock.release()
    """
    path = pathlib.Path(path)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), blocking=wait)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"{path}: another process is writing to it. Wait until it has finished.") from None
    return lock


def cache_home() -> pathlib.Path:
    """The project's folder in the user's cache folder, `~/.cache/fs_jax` on Linux."""
    return platformdirs.user_cache_path("fs_jax", appauthor=False)
