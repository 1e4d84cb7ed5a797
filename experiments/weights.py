"""List or restore the trained networks of this repository: `python -m experiments.weights`.

The networks are in `experiments/weights`: in bfloat16, compressed, in files of at most 4 MB, with their SHA-256 in a
manifest. A restored network has exactly the stored bits; a damaged file raises an error.
"""

import dataclasses
import hashlib
import json
import lzma
import pathlib
import re
import tempfile
from typing import Any

import tyro

from experiments import command_line
from experiments.output import write_files
from fs_jax._utils.files import replacing
from fs_jax._utils.text import radius
from fs_jax._utils.validation import check_choice

FOLDER = pathlib.Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
SHARD = 4 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """List the trained networks of this repository, restore one to a file, or add one, in seconds."""

    name: tyro.conf.Positional[str | None] = None
    """Name of the network. Without it, all networks are listed."""
    output: pathlib.Path | None = None
    """A new .safetensors file for the restored network."""
    keep: pathlib.Path | None = None
    """Folder of a run, whose network is added under this name."""
    folder: pathlib.Path = FOLDER
    """Folder of the stored networks."""


EXAMPLES = """\
  python -m experiments.weights
  python -m experiments.weights digits/feature_scattering --output network.safetensors
  python -m experiments.evaluate --weights network.safetensors --dataset digits --epsilon 0.1 --suite autoattack \\
      --output runs/autoattack
  python -m experiments.weights small/mine --keep runs/mine
"""


def main(argv: list[str]) -> None:
    arguments = command_line.parse(Arguments, argv, prog="python -m experiments.weights", examples=EXAMPLES)
    if arguments.name is None:
        if arguments.output is not None or arguments.keep is not None:
            raise ValueError(
                "name: expected the name of a network; got none. Without options, the command lists the names."
            )
        print(listing(arguments.folder))
    elif arguments.keep is not None:
        from experiments.networks import load_network

        print(f"{arguments.name}: {keep(*load_network(arguments.keep), arguments.name, arguments.folder):,} bytes")
    elif arguments.output is None:
        raise ValueError(f"output: expected a new file for {arguments.name}; got none. Give --output FILE.safetensors.")
    else:
        restore(arguments.name, arguments.output, arguments.folder)
        of = manifest(arguments.folder)[arguments.name]
        print(
            f"{arguments.output}: {of['network']}. Evaluate it: python -m experiments.evaluate --weights "
            f"{arguments.output} --dataset {of['dataset']} --epsilon {radius(of['epsilon'])} --suite autoattack "
            f"--output {arguments.output.with_suffix('')}"
        )


def listing(folder: pathlib.Path) -> str:
    """A table of the stored networks."""
    import tabulate

    if not manifest(folder):
        return f"No networks in {folder}."
    rows = [
        [name, of["network"], of["dataset"], of["epsilon"], of["method"], of["bytes"]]
        for name, of in manifest(folder).items()
    ]
    return tabulate.tabulate(rows, headers=["name", "network", "data set", "radius", "method", "bytes"])


def manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Descriptions of the stored networks, by name."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(model: Any, variables: Any, about: dict[str, Any], name: str, folder: pathlib.Path = FOLDER) -> int:
    """Add a network, rounded to bfloat16, and return its compressed size in bytes.

    Raises:
      ValueError: if the name exists or is invalid, or if the network does not come from a run.
    """
    import jax
    import jax.numpy as jnp

    from fs_jax.models import convert

    there = manifest(folder)
    if name in there:
        raise ValueError(f"name: expected a new name; got {name}, which exists. Choose another.")
    if not re.fullmatch(r"\w+(/\w+)*", name):
        raise ValueError(f"name: expected letters, digits, _ and /, such as small/mine; got {name!r}.")
    if "config" not in about:
        raise ValueError("keep: expected the folder of a run, with the configuration of its training; got a file.")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(temporary) / "network.safetensors"
        convert.save_weights(path, model, rounded)
        data = path.read_bytes()
    packed, shards = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), []
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for number, begin in enumerate(range(0, len(packed), SHARD)):
        shard = packed[begin : begin + SHARD]
        shards.append({"file": f"{name}-{number}.xz", "sha256": hashlib.sha256(shard).hexdigest()})
        with replacing(folder / shards[-1]["file"]) as file:
            file.write(shard)
    config = about["config"]
    there[name] = {
        "network": f"WRN-{model.depth}-{model.width}", "dataset": config["dataset"], "method": config["method"],
        "epsilon": config["attack"]["epsilon"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "shards": shards, "config": config,
    }  # fmt: skip
    write_files(folder, {MANIFEST: dict(sorted(there.items()))})
    return len(packed)


def restore(name: str, path: pathlib.Path, folder: pathlib.Path = FOLDER) -> None:
    """Restore a network to a file, atomically.

    Raises:
      ValueError: for an unknown name (the message suggests the nearest one), an existing file, or damaged data.
    """
    there = manifest(folder)
    if not there:
        raise ValueError(f"name: expected a network in {folder}; got {name!r}, but the folder has no networks.")
    check_choice("name", name, there)
    if path.exists() or path.suffix != ".safetensors":
        raise ValueError(f"output: expected a new .safetensors file; got {path}{', which exists' * path.exists()}.")
    packed = b""
    for shard in there[name]["shards"]:
        data = (folder / shard["file"]).read_bytes()
        check_hash(folder / shard["file"], data, shard["sha256"])
        packed += data
    # Limited to the known size, so that a manipulated file cannot fill the memory.
    data = lzma.LZMADecompressor().decompress(packed, max_length=there[name]["bytes"])
    check_hash(folder / name, data, there[name]["sha256"])
    with replacing(path) as file:
        file.write(data)


def check_hash(path: pathlib.Path, data: bytes, expected: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}; got {got}. Restore it with: git checkout -- {path}")


if __name__ == "__main__":
    command_line.run(main)
