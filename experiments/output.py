"""Output of the scripts: complete files, and a line with the device and the versions behind the numbers."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fs_jax._utils.files import write_text


def write_files(folder: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Write strings as text and other values as JSON, which has one line for each field unless it has records.

    Args:
      folder: The folder, which is created if it doesn't exist.
      files: The content of each file, by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, str):
            has_records = isinstance(content, Mapping) and "records" in content
            content = json.dumps(content, indent=None if has_records else 1, default=os.fspath) + "\n"
        write_text(folder / name, content)


def made_on(environment: Mapping[str, Any]) -> str:
    """The device and the versions, from `fs_jax._utils.backend.describe` and what a script has added to it.

    Example:
      >>> made_on({"device": "cpu", "cpu_count": 2, "jax": "0.12.0.1", "torch": "2.14.1"})
      'cpu, 2 cores, jax 0.12.0.1, torch 2.14.1'
    """
    libraries = [f"{name} {environment[name]}" for name in LIBRARIES if name in environment]
    return ", ".join([environment["device"], f"{environment['cpu_count']} cores", *libraries])


LIBRARIES = ("jax", "ott-jax", "POT", "torch", "torchattacks")
