"""A network from where it is: the folder of a run, or a file of weights."""

import pathlib
from typing import Any, Literal


def load_network(
    path: pathlib.Path,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, variables, and for result files where they are from.

    Args:
      path: Folder of a run of experiments.train, or a file of weights.
      checkpoint: Of a run.
      mean: For a file that doesn't say it: the network takes (images - mean) / std.
      std: As mean.

    Raises:
      ValueError: if it is neither, the run has no such checkpoint, or the file isn't of a Wide-ResNet.
    """
    from fs_jax.config import to_dict
    from fs_jax.models import convert
    from fs_jax.training import Checkpoints, make_method, make_model
    from fs_jax.training.loop import read_config

    if not path.exists():
        raise ValueError(f"{path}: expected the folder of a run, or a file of weights; there is nothing.")
    if path.is_file():
        return *convert.load_weights(path, mean=mean, std=std), {"file": path.name}
    config = read_config(path)
    with Checkpoints(path, config, read_only=True) as checkpoints:
        state = checkpoints.restore_best() if checkpoint == "best" else checkpoints.restore_latest()
    if state is None:
        raise ValueError(f"{path}: expected a run with a {checkpoint} checkpoint; it has none.")
    model = make_model(config, state.params["fc"]["bias"].shape[0])
    return model, state.evaluated(make_method(config)), {"step": int(state.step), "config": to_dict(config)}
