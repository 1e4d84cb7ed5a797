"""Convert weights between file formats: `python -m experiments.convert_weights SOURCE TARGET`."""

import dataclasses
import pathlib
from typing import Literal

import tyro

from experiments import command_line
from experiments.networks import load_network


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Convert weights between file formats, in seconds. The target file contains the normalisation of images."""

    source: tyro.conf.Positional[pathlib.Path]
    """A file of weights (.safetensors, .npz, or any PyTorch file), or the folder of a run of experiments.train."""
    target: tyro.conf.Positional[pathlib.Path]
    """A new file: .safetensors or .npz; .pt or .pth if PyTorch is installed."""
    mean: tuple[float, ...] | None = None
    """The network takes (images - mean) / std. One number, or one per channel; by default, that of the source."""
    std: tuple[float, ...] | None = None
    """See mean. Use 0 and 1 for a network without normalisation."""
    checkpoint: Literal["latest", "best"] = "latest"
    """For a run: the latest checkpoint, or the one with the highest accuracy on the monitored images."""


EXAMPLES = """\
  python -m experiments.convert_weights runs/cifar10 network.pt
  python -m experiments.convert_weights Carmon2019Unlabeled.pt network.safetensors --mean 0 --std 1
"""


def main(argv: list[str]) -> None:
    arguments = command_line.parse(Arguments, argv, prog="python -m experiments.convert_weights", examples=EXAMPLES)

    from fs_jax.models import convert

    if arguments.target.exists():
        raise ValueError(f"target: expected a new file; got {arguments.target}, which exists. Choose another.")
    if arguments.source.is_dir() and (arguments.mean or arguments.std):
        raise ValueError("mean, std: expected neither for a run, as its normalisation is known. Remove them.")
    model, variables, _ = load_network(
        arguments.source, checkpoint=arguments.checkpoint, mean=arguments.mean, std=arguments.std
    )
    convert.save_weights(arguments.target, model, variables)
    normalisation = f"(images - {model.mean}) / {model.std}"
    print(f"{arguments.target}: WRN-{model.depth}-{model.width}, {model.num_classes} classes, input {normalisation}")


if __name__ == "__main__":
    command_line.run(main)
