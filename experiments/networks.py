"""Load a network from the folder of a run or from a file of weights."""

import pathlib
from typing import Any, Literal


def load_network(
    path: pathlib.Path,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Load a network.

    Args:
      path: Folder of a run of experiments.train, or a file of weights.
      checkpoint: Which checkpoint of a run.
      mean: For a file without a normalisation: the network takes (images - mean) / std.
      std: See mean.

    Returns:
      The model, its variables, and a description of their origin for result files.

    Raises:
      ValueError: if the path is neither, the run has no such checkpoint, or the file has no Wide-ResNet.
    """
    from fs_jax.config import to_dict
    from fs_jax.models import convert
    from fs_jax.training import Checkpoints, make_method, make_model
    from fs_jax.training.loop import read_config

    if not path.exists():
        raise ValueError(
            f"{path}: expected the folder of a run, or a file of weights; got no file or folder. Check the path."
        )
    if path.is_file():
        return *convert.load_weights(path, mean=mean, std=std), {"file": path.name}
    config = read_config(path)
    with Checkpoints(path, config, read_only=True) as checkpoints:
        state = checkpoints.restore_best() if checkpoint == "best" else checkpoints.restore_latest()
    if state is None:
        raise ValueError(f"{path}: expected a run with a {checkpoint} checkpoint; got one without. Train it first.")
    model = make_model(config, state.params["fc"]["bias"].shape[0])
    return model, state.evaluated(make_method(config)), {"step": int(state.step), "config": to_dict(config)}
