"""Append-only log of an evaluation: one line per image and run; an interrupted evaluation resumes from it.

A file of JSON lines. The first says what is evaluated: the network's weights and the data as hashes, the seed, the
precision. Each process that writes adds a line about itself: versions and device. Then each attack has a line with its
settings, followed, in the order in which they are finished, by a line for each image and run (a random start, or a
target), and by lines with the seconds spent. A line is whole or, where a process was killed within it, cut off by the
next one. A resume with another network, other data or settings is refused, and the message says which field differs.

What these lines hold is said where it is made: the first in `fs_jax.evaluation.driver`, settings by `Attack.described`,
those of images by `fs_jax.attacks.chain.Outcome`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fs_jax._utils.files import local_path, locked, read_jsonl
from fs_jax.attacks.chain import Log, Outcome

SCHEMA = "evaluation by fs_jax, version 3"
"""Version of the journal and of the results: raised when a field changes its name or its meaning."""


class Journal(Log):
    """A `Log` that is on disk too.

    Args:
      path: JSONL file, a new one or the one to resume.
      header: What is evaluated, as plain JSON data. A file with another header is refused.
      environment: Versions and device of this process, as plain JSON data; `environments` are those of all.

    Raises:
      ValueError: if the file is of another evaluation, with the fields that differ; or isn't a journal.
      BlockingIOError: if another process writes it.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/records.jsonl"
      >>> with Journal(path, {"seed": 0}, {"device": "cpu"}) as journal:
      ...   journal.begin("pgd-20", {"epsilon": 0.1})
      ...   journal.append("pgd-20", [Outcome(7, 0, 20, -1, 0.5, 0.1)], seconds=2.0)
      >>> with Journal(path, {"seed": 0}, {"device": "gpu"}) as journal:
      ...   journal.begin("pgd-20", {"epsilon": 0.1})
      ...   journal.outcomes["pgd-20"][7, 0].margin, journal.seconds["pgd-20"], len(journal.environments)
      (0.5, 2.0, 2)
      >>> Journal(path, {"seed": 1}, {})
      Traceback (most recent call last):
      ValueError: seed: expected 0, as in ...records.jsonl; got 1. Give the same, or write to another folder.
    """

    def __init__(self, path: str | os.PathLike, header: Mapping[str, Any], environment: Mapping[str, Any]):
        super().__init__()
        self.environments: list[dict[str, Any]] = []
        self.path = local_path("journal", path)
        self._settings: dict[str, Mapping[str, Any]] = {}
        self._file = None
        self._open({"schema": SCHEMA, **_plain(header)}, _plain(environment))

    def begin(self, attack: str, settings: Mapping[str, Any]) -> None:
        """Start an attack, or resume it.

        Raises:
          ValueError: if the attack has run with other settings.
        """
        settings = _plain(settings)
        if attack in self._settings:
            _refuse_changes(f"{attack}: ", _flat(self._settings[attack]), _flat(settings), self.path)
            return
        self._settings[attack] = settings
        super().begin(attack, settings)
        self._write([{"attack": attack, "settings": settings}])

    def append(self, attack: str, outcomes: Iterable[Outcome], *, seconds: float) -> None:
        """Add outcomes of an attack that was begun, and the seconds that they took."""
        outcomes = list(outcomes)
        super().append(attack, outcomes, seconds=seconds)
        # The seconds first: a line that is cut off takes its own image's work with it, and no more.
        self._write([{"attack": attack, "seconds": seconds}, *({"attack": attack, **o._asdict()} for o in outcomes)])

    @staticmethod
    def header(path: str | os.PathLike) -> dict[str, Any]:
        """The first line of a journal: what is evaluated.

        Raises:
          ValueError: if the file isn't a journal of this schema.
        """
        first = (read_jsonl(path) or [{}])[0]
        if first.get("schema") != SCHEMA:
            got = first.get("schema") or first.get("journal") or "another file"
            raise ValueError(f"{path}: expected the records of an {SCHEMA}; got {got}. Write to another folder.")
        return first

    @staticmethod
    def part(
        path: str | os.PathLike, header: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """The lines of another journal, for `take_over`.

        Raises:
          ValueError: if it isn't of this header, or of an attack that isn't here or has other settings.
        """
        _refuse_changes("", Journal.header(path), {"schema": SCHEMA, **_plain(header)}, path)
        lines = read_jsonl(path)[1:]
        for line in lines:
            if "settings" in line:
                ours = _plain(settings.get(line["attack"], {}))
                _refuse_changes(f"{line['attack']}: ", _flat(line["settings"]), _flat(ours), path)
        return lines

    def take_over(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add what `part` has read, of an evaluation of other images."""
        new = []
        for line in lines:
            if line.get("attack") in self._settings and "settings" in line:
                continue
            if "environment" not in line or line["environment"] not in self.environments:
                self._read(dict(line))
                new.append(line)
        self._write(new)

    def close(self) -> None:
        """Close the file, so that another process may resume it."""
        try:
            if self._file is not None:
                self._file.close()
        finally:
            self._file = None
            self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self, header, environment):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.path)
        try:
            self._file = open(self.path, "a+b")  # noqa: SIM115
            if _line(header).startswith(self.path.read_bytes()):  # new, or killed within its first line
                self._file.truncate(0)
                self._write([header])
            _refuse_changes("", self.header(self.path), header, self.path)
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # what a killed process didn't finish
            _, *rest = read_jsonl(self.path)
            for line in rest:
                self._read(line)
            if environment not in self.environments:
                self._write([{"environment": environment}])
                self.environments.append(environment)
        except BaseException:
            self.close()
            raise

    def _read(self, line):
        if "environment" in line:
            self.environments.append(line["environment"])
            return
        attack = line.pop("attack")
        if "settings" in line:
            self._settings[attack] = line["settings"]
            super().begin(attack, line["settings"])
        elif "seconds" in line:
            super().append(attack, [], seconds=line["seconds"])
        else:
            super().append(attack, [Outcome(**line)], seconds=0)

    def _write(self, lines):
        # All at once, and on the disk before the next ones.
        self._file.write(b"".join(map(_line, lines)))
        self._file.flush()
        os.fsync(self._file.fileno())


def _refuse_changes(where, theirs, ours, path):
    missing = object()
    for name in {**theirs, **ours}:
        then, now = theirs.get(name, missing), ours.get(name, missing)
        if name == "logits" and then is not missing and now is not missing and _close(then, now):
            continue
        if then != now:
            then, now = ("none" if value is missing else repr(value) for value in (then, now))
            raise ValueError(
                f"{where}{name}: expected {then}, as in {path}; got {now}. Give the same, or write to another folder."
            )


def _close(then, now):
    """Whether logits are those of the same network, on another machine perhaps.

    Another machine, or bfloat16, rounds logits by about a hundredth of the largest; another network does more.
    """
    if then is None or now is None:
        return then is now
    then, now = np.array(then), np.array(now)
    return then.shape == now.shape and np.max(np.abs(then - now)) <= 0.05 * np.max(np.abs(then))


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an attack beside what else is known of it, so that a message names what differs."""
    return {**{name: value for name, value in data.items() if name != "settings"}, **data.get("settings", {})}


def _plain(data: Any) -> Any:
    """The data as it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(data))


def _line(data: Any) -> bytes:
    return json.dumps(data, allow_nan=False).encode() + b"\n"
