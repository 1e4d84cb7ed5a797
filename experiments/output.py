"""What scripts write: files that appear whole, and a line that says where their numbers come from."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fs_jax._utils.files import write_text


def write_files(folder: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Write text as it is and everything else as JSON, with a line for each field unless there are records.

    Args:
      folder: It is made if it isn't there.
      files: What to write, by the file's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, str):
            has_records = isinstance(content, Mapping) and "records" in content
            content = json.dumps(content, indent=None if has_records else 1, default=os.fspath) + "\n"
        write_text(folder / name, content)


def made_on(environment: Mapping[str, Any]) -> str:
    """Device and versions, from what `fs_jax._utils.backend.describe` says and what a script has added to it.

    Example:
      >>> made_on({"device": "cpu", "cpu_count": 2, "jax": "0.12.0.1", "torch": "2.14.1"})
      'cpu, 2 cores, jax 0.12.0.1, torch 2.14.1'
    """
    libraries = [f"{name} {environment[name]}" for name in LIBRARIES if name in environment]
    return ", ".join([environment["device"], f"{environment['cpu_count']} cores", *libraries])


LIBRARIES = ("jax", "ott-jax", "POT", "torch", "torchattacks")
