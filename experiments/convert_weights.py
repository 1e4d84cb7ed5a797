"""Turns weights of one kind of file into another's: `python -m experiments.convert_weights SOURCE TARGET`.

    python -m experiments.convert_weights runs/cifar10 network.pt                                   # a run's network
    python -m experiments.convert_weights Carmon2019Unlabeled.pt network.safetensors --mean 0 --std 1

The target says by itself how its network's images are normalised; where a source doesn't, --mean and --std do.
"""

import dataclasses
import pathlib
from typing import Literal

import tyro

from experiments import command_line
from experiments.networks import load_network


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Turn weights of one kind of file into another's."""

    source: tyro.conf.Positional[pathlib.Path]
    """A file of weights (.safetensors, .npz, any other for PyTorch's), or the folder of a run of experiments.train."""
    target: tyro.conf.Positional[pathlib.Path]
    """A new file: .safetensors, .npz, or, where PyTorch is installed, .pt or .pth."""
    mean: tuple[float, ...] | None = None
    """The network takes (images - mean) / std of images in [0, 1]: one number, or one for each channel. By default as
    the source says; 0 and 1 for images as they are."""
    std: tuple[float, ...] | None = None
    """As mean."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Of a run: the last one, or the one with the best accuracy on the monitored images."""


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.convert_weights")

    from fs_jax.models import convert

    if arguments.target.exists():
        raise ValueError(f"target: expected a new file; {arguments.target} exists.")
    if arguments.source.is_dir() and (arguments.mean or arguments.std):
        raise ValueError("mean, std: expected neither for a run, whose network is known.")
    model, variables, _ = load_network(
        arguments.source, checkpoint=arguments.checkpoint, mean=arguments.mean, std=arguments.std
    )
    convert.save_weights(arguments.target, model, variables)
    normalisation = f"(images - {model.mean}) / {model.std}"
    print(f"{arguments.target}: WRN-{model.depth}-{model.width}, {model.num_classes} classes, takes {normalisation}")


if __name__ == "__main__":
    command_line.run(main)
