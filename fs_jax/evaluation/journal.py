"""Append-only log of an evaluation: one line per image and run; an interrupted evaluation resumes from it.

The file has one JSON object in each line. The first line is the header, which identifies the evaluation: hashes of the
network's weights and of the data, the seed, the precision. Each process that writes adds a line with its versions and
device. Each attack has a line with its settings, then one line for each image and run (a random start, or a target) as
it is finished, and lines with the seconds spent. If a process is killed while it writes a line, the next process
removes the incomplete line. Resuming with another network, other data or other settings raises an error that names the
field.

The fields are documented where they are made: those of the header in `fs_jax.evaluation.driver`, settings in
`Attack.described`, those of images in `fs_jax.attacks.chain.Outcome`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fs_jax._utils.files import local_path, locked, read_jsonl
from fs_jax.attacks.chain import Log, Outcome

SCHEMA = "evaluation by fs_jax, version 3"
"""Version of the journal and of the results; it changes when a field changes its name or its meaning."""


class Journal(Log):
    """A `Log` that is also written to a file.

    Args:
      path: JSONL file, a new one or the one to resume.
      header: Identifies the evaluation, as plain JSON data. A file with another header raises an error.
      environment: Versions and device of this process, as plain JSON data; `environments` has those of all processes.

    Raises:
      ValueError: if the file is of another evaluation, with the field that differs; or isn't a journal.
      BlockingIOError: if another process is writing to it.

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
          ValueError: if the journal has the attack with other settings.
        """
        settings = _plain(settings)
        if attack in self._settings:
            _refuse_changes(f"{attack}: ", _flat(self._settings[attack]), _flat(settings), self.path)
            return
        self._settings[attack] = settings
        super().begin(attack, settings)
        self._write([{"attack": attack, "settings": settings}])

    def append(self, attack: str, outcomes: Iterable[Outcome], *, seconds: float) -> None:
        """Add outcomes of an attack after `begin`, and the seconds that they took."""
        outcomes = list(outcomes)
        super().append(attack, outcomes, seconds=seconds)
        # The seconds come first, so that a line that is cut off loses one image's outcome, and nothing else.
        self._write([{"attack": attack, "seconds": seconds}, *({"attack": attack, **o._asdict()} for o in outcomes)])

    @staticmethod
    def header(path: str | os.PathLike) -> dict[str, Any]:
        """The first line of a journal, which identifies the evaluation.

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
          ValueError: if its header differs, or it has an attack with other settings or one that isn't in `settings`.
        """
        _refuse_changes("", Journal.header(path), {"schema": SCHEMA, **_plain(header)}, path)
        lines = read_jsonl(path)[1:]
        for line in lines:
            if "settings" in line:
                ours = _plain(settings.get(line["attack"], {}))
                _refuse_changes(f"{line['attack']}: ", _flat(line["settings"]), _flat(ours), path)
        return lines

    def take_over(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines from `part`, which are from an evaluation of other images."""
        new = []
        for line in lines:
            if line.get("attack") in self._settings and "settings" in line:
                continue
            if "environment" not in line or line["environment"] not in self.environments:
                self._read(dict(line))
                new.append(line)
        self._write(new)

    def close(self) -> None:
        """Close the file, so that another process can resume from it."""
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
            if _line(header).startswith(self.path.read_bytes()):  # new, or incomplete in its first line
                self._file.truncate(0)
                self._write([header])
            _refuse_changes("", self.header(self.path), header, self.path)
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # drop an incomplete last line
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
        # One write for all lines, which is on disk before the next.
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
    """Whether logits are of the same network, possibly on another machine.

    Another machine, or bfloat16, changes logits by about a hundredth of the largest; another network by more.
    """
    if then is None or now is None:
        return then is now
    then, now = np.array(then), np.array(now)
    return then.shape == now.shape and np.max(np.abs(then - now)) <= 0.05 * np.max(np.abs(then))


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an attack with its settings in one dictionary, so that a message names the one that differs."""
    return {**{name: value for name, value in data.items() if name != "settings"}, **data.get("settings", {})}


def _plain(data: Any) -> Any:
    """The data after a round trip through JSON, which makes tuples lists."""
    return json.loads(json.dumps(data))


def _line(data: Any) -> bytes:
    return json.dumps(data, allow_nan=False).encode() + b"\n"
