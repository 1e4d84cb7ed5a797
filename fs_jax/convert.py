"""Weights to and from PyTorch's names and layouts, as plain arrays: nothing here imports PyTorch or unpickles."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np


def from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `fs_jax.models.WideResNet` from the arrays of the paper's PyTorch network.

    Convolution kernels go from [out, in, h, w] to [h, w, in, out], the classifier's from [out, in] to [in, out].

    Args:
      state_dict: Arrays by PyTorch name (`conv1.weight`, `block1.layer.0.bn1.running_mean`, `fc.bias`, ...). A tensor
        passes as `tensor.numpy()`. `num_batches_tracked` is passed over.

    Returns:
      `{"params": ..., "batch_stats": ...}` in the arrays' own dtypes.

    Raises:
      ValueError: for a name that isn't one of a Wide-ResNet's, or a layer that is missing.

    Example:
      >>> import jax
      >>> from fs_jax.models import WideResNet
      >>> variables = WideResNet(10, 1).init(jax.random.key(0), np.zeros((1, 32, 32, 3)))
      >>> again = from_torch(to_torch(variables))
      >>> all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), dict(variables), again)))
      True
    """
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, array in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        collection, path, kind = _flax_path(name)
        node = variables[collection]
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = np.asarray(array).transpose(_AXES[kind][0])
    _check_complete(variables)
    return variables


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the paper's PyTorch network from variables of `fs_jax.models.WideResNet`: `from_torch` undone.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
      Arrays by PyTorch name, in PyTorch's layouts.

    Raises:
      ValueError: for variables that aren't a Wide-ResNet's.
    """
    state_dict = {}
    for collection in ("params", "batch_stats"):
        for path, array in _leaves(variables[collection]):
            name, kind = _torch_name(path)
            state_dict[name] = np.asarray(array).transpose(_AXES[kind][1])
    return state_dict


# Kind of array: how its axes move from PyTorch, and back.
_AXES = {"conv": ((2, 3, 1, 0), (3, 2, 0, 1)), "dense": ((1, 0), (1, 0)), "vector": ((0,), (0,))}
_BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
_TORCH_NAME = re.compile(
    r"(?:(?P<block>block[1-3])\.layer\.(?P<layer>\d+)\.)?"
    r"(?:(?P<bn>bn[12])\.(?P<stat>weight|bias|running_mean|running_var)"
    r"|(?P<conv>conv[12]|convShortcut)\.weight|(?P<fc>fc)\.(?P<part>weight|bias))"
)


def _flax_path(name: str) -> tuple[str, tuple[str, ...], str]:
    match = _TORCH_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"state_dict: expected names of a Wide-ResNet, such as 'block1.layer.0.conv1.weight'; got {name!r}. "
            "Remove a prefix that a wrapper added, such as 'module.'."
        )
    prefix = (f"{match['block']}_layer{match['layer']}",) if match["block"] else ()
    if match["bn"]:
        collection, leaf = _BATCH_NORM[match["stat"]]
        return collection, (*prefix, match["bn"], leaf), "vector"
    if match["conv"]:
        return "params", (*prefix, match["conv"].replace("convShortcut", "shortcut"), "kernel"), "conv"
    is_kernel = match["part"] == "weight"
    return "params", ("fc", "kernel" if is_kernel else "bias"), "dense" if is_kernel else "vector"


def _torch_name(path: tuple[str, ...]) -> tuple[str, str]:
    *parents, module, leaf = path
    prefix = "".join(re.sub(r"^(block\d)_layer(\d+)$", r"\1.layer.\2.", parent) for parent in parents)
    if module.startswith("bn"):
        by_leaf = {flax: torch for torch, (_, flax) in _BATCH_NORM.items()}
        return f"{prefix}{module}.{by_leaf[leaf]}", "vector"
    if module == "fc":
        return (f"fc.{'weight' if leaf == 'kernel' else 'bias'}", "dense" if leaf == "kernel" else "vector")
    if leaf == "kernel":
        return f"{prefix}{module.replace('shortcut', 'convShortcut')}.weight", "conv"
    raise ValueError(f"variables: expected those of a Wide-ResNet; got {'/'.join(path)!r}.")


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _check_complete(variables: Mapping[str, Any]) -> None:
    """Every block that is there has what a forward pass needs, and so has the network."""
    params, stats = variables["params"], variables["batch_stats"]
    layers = {g: sum(name.startswith(f"block{g}_layer") for name in params) for g in (1, 2, 3)}
    depth = max(layers.values())
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{stat}" for stat in _BATCH_NORM)}
    for group in (1, 2, 3):
        for layer in range(max(depth, 1)):
            block = f"block{group}.layer.{layer}"
            expected |= {f"{block}.{bn}.{stat}" for bn in ("bn1", "bn2") for stat in _BATCH_NORM}
            expected |= {f"{block}.{conv}.weight" for conv in ("conv1", "conv2")}
            kernel = params.get(f"block{group}_layer{layer}", {}).get("conv1", {}).get("kernel")
            if kernel is not None and kernel.shape[2] != kernel.shape[3]:  # the width changes
                expected.add(f"{block}.convShortcut.weight")
    found = {_torch_name(path)[0] for tree in (params, stats) for path, _ in _leaves(tree)}
    missing = sorted(expected - found)
    if missing:
        raise ValueError(
            f"state_dict: expected all of a Wide-ResNet; {len(missing)} are missing, the first is {missing[0]!r}."
        )
