"""The log of an evaluation: one line per image and attack, appended as it goes, and gone on with after any end.

A file of JSON lines. The first says what is evaluated: the network's weights and the data as hashes, and the seed.
Then each attack has a line with its settings, followed, in the order in which they are finished, by a line for each
image and run (a restart, or a target), and by lines with the seconds spent. A line stands whole or, where a process was
killed within it, is cut off by the next one. What was evaluated otherwise is refused, field by field.
"""

import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fs_jax._utils.files import read_jsonl


class Record(NamedTuple):
    """What one run of an attack did to one image."""

    index: int
    """Of the image in the split."""
    run: int
    """Restart, or target."""
    steps: int
    """Steps done."""
    fallen_at: int
    """The step at which the image was first misclassified, 0 for the start; -1 if it stands."""
    margin: float
    """Lowest margin: logit of the label less the highest other one, above 0 where the image stands."""
    linf: float
    """Size of the perturbation there, in L-infinity on [0, 1]."""


class Journal:
    """Records by attack; with a path, on disk too.

    Args:
      path: JSONL file, a new one or the one to resume; None keeps the records in memory only.
      header: What is evaluated, as plain JSON data. A file with another header is refused.

    Raises:
      ValueError: if the file is of another evaluation, with the fields that differ; or isn't a journal.
      BlockingIOError: if another process writes it.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/records.jsonl"
      >>> with Journal(path, {"seed": 0}) as journal:
      ...   journal.begin("pgd-20", {"epsilon": 0.1})
      ...   journal.append("pgd-20", [Record(7, 0, 20, -1, 0.5, 0.1)], seconds=2.0)
      >>> with Journal(path, {"seed": 0}) as journal:
      ...   journal.begin("pgd-20", {"epsilon": 0.1})
      ...   journal.records["pgd-20"][7, 0].margin, journal.seconds["pgd-20"]
      (0.5, 2.0)
      >>> Journal(path, {"seed": 1})
      Traceback (most recent call last):
      ValueError: seed: expected 0, as in ...records.jsonl; got 1. Give the same, or write to another folder.
    """

    def __init__(self, path: str | os.PathLike | None, header: Mapping[str, Any]):
        self.records: dict[str, dict[tuple[int, int], Record]] = {}
        self.seconds: dict[str, float] = {}
        self._settings: dict[str, Mapping[str, Any]] = {}
        self.path = None if path is None else pathlib.Path(path)
        self._file = None
        if self.path is not None:
            self._open(_plain(header))

    def begin(self, attack: str, settings: Mapping[str, Any]) -> None:
        """Go on with an attack, or start it.

        Raises:
          ValueError: if the attack has run with other settings.
        """
        settings = _plain(settings)
        if attack in self._settings:
            self._refuse_changes(f"{attack}: ", self._settings[attack], settings)
            return
        self._add_attack(attack, settings)
        self._write([{"attack": attack, "settings": settings}])

    def append(self, attack: str, records: Iterable[Record], *, seconds: float) -> None:
        """Add finished records of an attack that was begun, and the seconds that they took."""
        records = list(records)
        self._add(attack, records, seconds)
        # The seconds first: a line that is cut off takes its own image's work with it, and no more.
        self._write([{"attack": attack, "seconds": seconds}, *({"attack": attack, **r._asdict()} for r in records)])

    def close(self) -> None:
        """Close the file, so that another process may go on."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self, header):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{self.path}: another process is writing it. Wait for its end.") from None
            header = {"journal": _FORMAT, **header}
            if _line(header).startswith(self.path.read_bytes()):  # new, or killed within its first line
                self._file.truncate(0)
                self._write([header])
            first = (read_jsonl(self.path) or [{}])[0]
            if first.get("journal") != _FORMAT:
                raise ValueError(f"{self.path}: expected the records of an evaluation; got another file.")
            self._refuse_changes("", first, header)
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # what a killed process didn't finish
            _, *rest = read_jsonl(self.path)
            for line in rest:
                attack = line.pop("attack")
                if "settings" in line:
                    self._add_attack(attack, line["settings"])
                elif "seconds" in line:
                    self._add(attack, [], line["seconds"])
                else:
                    self._add(attack, [Record(**line)], 0)
        except BaseException:
            self.close()
            raise

    def _add_attack(self, attack, settings):
        self._settings[attack], self.records[attack], self.seconds[attack] = settings, {}, 0.0

    def _add(self, attack, records, seconds):
        self.seconds[attack] += seconds
        self.records[attack].update({(record.index, record.run): record for record in records})

    def _write(self, lines):
        if self._file is not None:
            # All at once, and on the disk before the next ones.
            self._file.write(b"".join(map(_line, lines)))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _refuse_changes(self, where, theirs, ours):
        missing = object()
        for name in {**theirs, **ours}:
            then, now = theirs.get(name, missing), ours.get(name, missing)
            if then != now:
                then, now = ("none" if value is missing else repr(value) for value in (then, now))
                raise ValueError(
                    f"{where}{name}: expected {then}, as in {self.path}; got {now}. "
                    "Give the same, or write to another folder."
                )


_FORMAT = "fs_jax evaluation 1"


def fingerprint(tree: PyTree) -> str:
    """A hash of names, shapes, types and values of a tree of arrays: equal for equal weights, wherever they are.

    Example:
      >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.zeros(2)}) != fingerprint({"w": np.ones(2)})
      True
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _plain(data: Any) -> Any:
    """The data as it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(data))


def _line(data: Any) -> bytes:
    return json.dumps(data).encode() + b"\n"
