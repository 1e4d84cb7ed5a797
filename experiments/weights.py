"""Networks that come with this repository, to evaluate without training: `python -m experiments.weights`.

    python -m experiments.weights                                                  # which there are
    python -m experiments.weights digits/feature_scattering --output network.safetensors
    python -m experiments.evaluate --weights network.safetensors --dataset digits --epsilon 0.1 --suite autoattack

They are in `experiments/weights`: bfloat16, compressed, in files of 4 MB at most, with a manifest of hashes. What is
restored has the same bits, or is refused.
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
from fs_jax._utils.validation import check_choice

FOLDER = pathlib.Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
SHARD = 4 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """List the networks that come with this repository, or restore one; or add one."""

    name: tyro.conf.Positional[str | None] = None
    """The network, as the list has it."""
    output: pathlib.Path | None = None
    """A new file to restore it to, .safetensors."""
    keep: pathlib.Path | None = None
    """The folder of a run, to add its network under this name."""
    folder: pathlib.Path = FOLDER
    """Where they are."""


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.weights")
    if arguments.name is None:
        if arguments.output is not None or arguments.keep is not None:
            raise ValueError("name: expected the network's; got none. The command alone lists them.")
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
            f"{arguments.output} --dataset {of['dataset']} --epsilon {of['epsilon']:.6g} --suite autoattack"
        )


def listing(folder: pathlib.Path) -> str:
    """Names, networks and data sets."""
    import tabulate

    if not manifest(folder):
        return f"There are no networks in {folder} yet."
    rows = [
        [name, of["network"], of["dataset"], of["epsilon"], of["method"], of["bytes"]]
        for name, of in manifest(folder).items()
    ]
    return tabulate.tabulate(rows, headers=["name", "network", "data set", "radius", "method", "bytes"])


def manifest(folder: pathlib.Path) -> dict[str, Any]:
    """What is in the folder, by name."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(model: Any, variables: Any, about: dict[str, Any], name: str, folder: pathlib.Path = FOLDER) -> int:
    """Add a network, rounded to bfloat16; how many bytes it takes.

    Raises:
      ValueError: for a name that is taken, or a network that isn't a run's.
    """
    import jax
    import jax.numpy as jnp

    from fs_jax.models import convert

    there = manifest(folder)
    if name in there:
        raise ValueError(f"name: expected a new one; {name} is there.")
    if not re.fullmatch(r"\w+(/\w+)*", name):
        raise ValueError(f"name: expected letters, digits and _, such as small/ours; got {name!r}.")
    if "config" not in about:
        raise ValueError("keep: expected the folder of a run, which says how its network was trained; got a file.")
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
    """Write a network's file, whole or not at all.

    Raises:
      ValueError: for an unknown name, with the nearest one; for a file that exists; if any byte isn't what it was.
    """
    there = manifest(folder)
    if not there:
        raise ValueError(f"name: expected one of those in {folder}; there are none.")
    check_choice("name", name, there)
    if path.exists() or path.suffix != ".safetensors":
        raise ValueError(f"output: expected a new file .safetensors; got {path}{' exists' * path.exists()}.")
    packed = b""
    for shard in there[name]["shards"]:
        data = (folder / shard["file"]).read_bytes()
        check_hash(folder / shard["file"], data, shard["sha256"])
        packed += data
    # No more than it should be, whatever the file says.
    data = lzma.LZMADecompressor().decompress(packed, max_length=there[name]["bytes"])
    check_hash(folder / name, data, there[name]["sha256"])
    with replacing(path) as file:
        file.write(data)


def check_hash(path: pathlib.Path, data: bytes, expected: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}; got {got}. Fetch it again: git checkout -- {path}")


if __name__ == "__main__":
    command_line.run(main)
