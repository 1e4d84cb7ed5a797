"""Convert Wide-ResNet weights from and to PyTorch's names, layouts and files. Code in a file is never executed."""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from fs_jax._utils.extras import require
from fs_jax._utils.files import replacing
from fs_jax._utils.validation import check_choice
from fs_jax.models import WideResNet

PerChannel = float | tuple[float, ...]


def load_weights(
    path: str | os.PathLike, *, mean: PerChannel | None = None, std: PerChannel | None = None
) -> tuple[WideResNet, dict[str, Any]]:
    """Load a network from a file of weights: this project's, the paper's, or a Wide-ResNet of RobustBench.

    Depth, width and number of classes are inferred from the arrays. Any prefix of the names (such as `module.`,
    `module.basic_net.` or `model.`) and any wrapper (such as `{"net": ..., "epoch": ...}`) is removed. `sub_block1`, an
    unused group of blocks in TRADES' network and its descendants, is ignored. Half-precision weights become float32.

    The normalisation of images is part of the network. It is taken from, in this order:

    - the arguments `mean` and `std`;
    - buffers in the file: `mu` and `sigma`, as in RobustBench, or `mean` and `std`;
    - the prefix `basic_net.` of the paper's code, whose images are in [-1, 1].

    Otherwise there is an error. It is not guessed, because a wrong normalisation only lowers the accuracy.

    Args:
      path: A `.safetensors` or `.npz` file. All other files (`.pt`, `.pth`, without a suffix, ...) are read by PyTorch,
        if it is installed, as tensors only.
      mean: The network's input is (images - mean) / std for images in [0, 1]: a number, or one per channel. Use mean 0
        and std 1 for no normalisation, as in most Wide-ResNets of RobustBench; 0.5 and 0.5 for inputs in [-1, 1].
      std: See `mean`.

    Returns:
      The network, and its variables `{"params": ..., "batch_stats": ...}`.

    Raises:
      ValueError: for a file without weights or with another network's weights (the message gives the first missing and
        the first unexpected name), an array of the wrong shape, values that are not finite, or an unknown
        normalisation.
      ImportError: for a PyTorch file without PyTorch 2.10 or newer.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "wrn.safetensors"
      >>> model = WideResNet(10, 1)
      >>> save_weights(path, model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
      >>> loaded, variables = load_weights(path)
      >>> loaded.depth, loaded.width, loaded.num_classes, loaded.mean
      (10, 1, 10, 0.5)
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean, std: expected both or neither; got mean {mean} and std {std}.")
    try:
        arrays = _read(path)
        own = _take_normalisation(arrays)
        model, variables = _fit(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    if mean is None:
        mean, std = own
    if mean is None:
        raise ValueError(
            f"mean, std: expected values, as {path} does not contain the network's normalisation; got none. Pass 0 and "
            "1 for no normalisation (most of RobustBench), or 0.5 and 0.5 for inputs in [-1, 1] (the paper). "
            "save_weights stores the normalisation in the file."
        )
    wide = jax.tree.map(lambda x: x.astype(np.promote_types(x.dtype, np.float32)), variables)
    return model.clone(mean=_per_channel(mean), std=_per_channel(std)), wide


def save_weights(path: str | os.PathLike, model: WideResNet, variables: Mapping[str, Any]) -> None:
    """Write a network as PyTorch's `state_dict`, atomically, for `load_weights` and for PyTorch.

    The names are those of the paper's code and of RobustBench's `WideResNet`. The file also contains the normalisation
    as buffers `mu` and `sigma` [1, channels, 1, 1], as in RobustBench's networks. (The paper's files have none.)

    Args:
      path: A `.safetensors` or `.npz` file; `.pt` or `.pth` if PyTorch is installed.
      model: The network.
      variables: Its variables, `{"params": ..., "batch_stats": ...}`.

    Raises:
      ValueError: for another suffix, or variables that do not belong to a Wide-ResNet.
      ImportError: for a PyTorch file without PyTorch 2.10 or newer.

    Example:
      See `load_weights`.
    """
    suffix = pathlib.Path(path).suffix
    check_choice("suffix", suffix, _WRITERS)
    arrays = to_torch(variables)
    channels = arrays["conv1.weight"].shape[1]
    for name, value in (("mu", model.mean), ("sigma", model.std)):
        arrays[name] = np.broadcast_to(np.asarray(value, np.float32), channels).reshape(1, channels, 1, 1)
    with replacing(path) as file:
        # Transposed arrays are views; files need contiguous arrays.
        _WRITERS[suffix](file, {name: np.ascontiguousarray(array) for name, array in arrays.items()})


def from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert the arrays of the paper's PyTorch network to variables of `fs_jax.models.WideResNet`.

    Convolution kernels are transposed from [out, in, h, w] to [h, w, in, out], the classifier's from [out, in] to
    [in, out].

    Args:
      state_dict: Arrays by PyTorch name (`conv1.weight`, `block1.layer.0.bn1.running_mean`, `fc.bias`, ...), optionally
        all with the same prefix. Pass tensors as `tensor.numpy()`. `num_batches_tracked` and `sub_block1` are ignored.

    Returns:
      `{"params": ..., "batch_stats": ...}`, with the dtypes of the arrays.

    Raises:
      ValueError: if the arrays are not those of a Wide-ResNet (the message gives the first missing and the first
        unexpected name), or have the wrong shape or values that are not finite.

    Example:
      >>> variables = jax.jit(WideResNet(10, 1).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> again = from_torch(to_torch(variables))
      >>> all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), dict(variables), again)))
      True
    """
    return _fit(state_dict)[1]


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert variables of `fs_jax.models.WideResNet` to the arrays of the paper's PyTorch network.

    This is the inverse of `from_torch`.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
      Arrays by PyTorch name, in PyTorch's layouts.

    Raises:
      ValueError: for variables that do not belong to a Wide-ResNet.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    )
    return {_torch_name(path): np.asarray(array).transpose(_TO_TORCH[np.ndim(array)]) for path, array in leaves}


def robustbench_entry(
    model: WideResNet,
    *,
    dataset: str,
    epsilon: float,
    clean_accuracy: float,
    autoattack_accuracy: float | None,
    reported_accuracy: float | None = None,
    name: str = "",
    authors: str = "",
    link: str = "",
    venue: str = "Unpublished",
    additional_data: bool = False,
) -> dict[str, Any]:
    """Make the fields of RobustBench's `model_info/DATASET/Linf/NAME.json` for an evaluated network.

    Args:
      model: The network.
      dataset: `cifar10` or `cifar100`, as in RobustBench.
      epsilon: Radius, on images in [0, 1].
      clean_accuracy: Fraction of correctly classified test images (RobustBench uses 10,000).
      autoattack_accuracy: Fraction robust to the standard version of AutoAttack; None if it was not run.
      reported_accuracy: The robust accuracy reported in the paper, as a fraction; None without one.
      name: Title of the paper.
      authors: Its authors, separated by commas.
      link: URL of the paper.
      venue: Venue and year, such as "NeurIPS 2019".
      additional_data: Whether training used other data than the data set.

    Returns:
      The fields, as JSON data.

    Example:
      >>> entry = robustbench_entry(WideResNet(28, 10), dataset="cifar10", epsilon=8 / 255, clean_accuracy=0.8998,
      ...                           autoattack_accuracy=0.3664, reported_accuracy=0.606)
      >>> entry["architecture"], entry["eps"], entry["clean_acc"], entry["reported"], entry["autoattack_acc"]
      ('WideResNet-28-10', '8/255', '89.98', '60.6', '36.64')

    Source: Croce et al., "RobustBench: a standardized adversarial robustness benchmark", NeurIPS Datasets 2021.
    """
    steps = round(epsilon * 255)

    def percent(accuracy):
        return None if accuracy is None else str(round(100 * accuracy, 2))

    return {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": venue,
        "architecture": f"WideResNet-{model.depth}-{model.width}",
        "eps": f"{steps}/255" if abs(epsilon * 255 - steps) < 1e-6 else f"{epsilon:g}",
        "clean_acc": percent(clean_accuracy),
        "reported": percent(reported_accuracy),
        "autoattack_acc": percent(autoattack_accuracy),
    }


# Transpositions by number of axes: convolution kernels [h, w, in, out], the classifier's kernel [in, out], vectors.
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_PATH = re.compile(
    r"(?:(block[123])_layer(\d+)/)?(?:(bn[12])/(scale|bias|mean|var)|(conv[12]|shortcut)/(kernel)|(fc)/(kernel|bias))"
)
_TORCH_WORDS = {
    "shortcut": "convShortcut",
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def _torch_name(path: tuple[Any, ...]) -> str:
    """PyTorch's name of the array at this path of the variables."""
    words = "/".join(key.key for key in path[1:])  # the first is the collection
    match = _PATH.fullmatch(words)
    if match is None:
        raise ValueError(f"variables: expected the variables of a Wide-ResNet; got {words!r}.")
    block, layer, *rest = match.groups()
    module, leaf = (word for word in rest if word is not None)
    return f"{block}.layer.{layer}." * (block is not None) + ".".join(_TORCH_WORDS.get(w, w) for w in (module, leaf))


# An array that every Wide-ResNet has and no other network. The text before it is the prefix.
_ANCHOR = re.compile(r"((?:.*\.)?)block1\.layer\.0\.conv1\.weight")


def _fit(state_dict: Mapping[str, np.ndarray]) -> tuple[WideResNet, dict[str, Any]]:
    """The Wide-ResNet that has exactly these arrays, and its variables."""
    prefixes = [match[1] for name in state_dict if (match := _ANCHOR.fullmatch(name))]
    prefix = min(prefixes, key=len, default="")

    def length(name, axis, default):
        shape = np.shape(state_dict.get(prefix + name, ()))
        return max(shape[axis], 1) if axis < len(shape) else default

    layer = re.compile(re.escape(prefix) + r"block[123]\.layer\.(\d+)\.")
    layers = {match[1] for name in state_dict if (match := layer.match(name))}
    model = WideResNet(
        depth=6 * max(len(layers), 1) + 4,
        width=max(length("block1.layer.0.conv1.weight", 0, 32) // 16, 1),
        num_classes=length("fc.weight", 0, 10),
    )
    images = jax.ShapeDtypeStruct((1, 32, 32, length("conv1.weight", 1, 3)), jnp.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    names = jax.tree_util.tree_map_with_path(lambda path, _: prefix + _torch_name(path), expected)
    _check_names(state_dict, set(jax.tree.leaves(names)), prefix, model)

    def convert(name, leaf):
        array, shape = np.asarray(state_dict[name]), tuple(leaf.shape[axis] for axis in _TO_TORCH[leaf.ndim])
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: expected floating point of shape {shape}; got {array.dtype} {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name}: expected finite values; got {np.sum(~np.isfinite(array))} that are NaN or infinite."
            )
        return array.transpose(_FROM_TORCH[array.ndim])

    return model, jax.tree.map(convert, names, expected)


def _check_names(found, expected, prefix, model):
    missing = sorted(expected - set(found))
    unexpected = [
        name
        for name in found
        if name not in expected
        and not name.endswith("num_batches_tracked")
        and not name.startswith(f"{prefix}sub_block1.")
    ]
    if missing or unexpected:
        counts = [
            f"{len(names)} {word}, the first {names[0]!r}"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"state_dict: expected the arrays of a Wide-ResNet (here of depth {model.depth}); got {'; '.join(counts)}."
        )


_BUFFERS = {"mu": "mean", "mean": "mean", "sigma": "std", "std": "std"}


def _take_normalisation(arrays: dict[str, np.ndarray]) -> tuple[PerChannel | None, PerChannel | None]:
    """Remove the normalisation's buffers from the arrays, and return its mean and std; None if unknown."""
    found = {}
    for name in list(arrays):
        buffer = _BUFFERS.get(name.rpartition(".")[2])
        if buffer is not None and buffer not in found:
            found[buffer] = _per_channel(arrays.pop(name))
    if len(found) == 1:
        raise ValueError(f"expected both buffers of the normalisation, or neither; got only {next(iter(found))}.")
    if not found and any("basic_net.block1." in name for name in arrays):
        return 0.5, 0.5
    return found.get("mean"), found.get("std")


def _per_channel(values: Any) -> PerChannel:
    """A single number if all channels have the same."""
    numbers = tuple(float(value) for value in np.ravel(values))
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays in a file, by name. Other content is not read."""
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(pathlib.Path(path).suffix, _read_torch)
    with open(path, "rb") as file:
        try:
            networks = read(file)
        except ImportError:
            raise
        except Exception as error:  # libraries raise all kinds of errors for damaged files
            raise ValueError(
                f"expected a file that contains only arrays; got an unreadable one ({type(error).__name__}). Code in "
                "the file was not executed."
            ) from error
    if len(networks) != 1:
        raise ValueError(f"expected the arrays of one network, by name; got {len(networks)} networks.")
    return networks[0]


def _read_safetensors(file: BinaryIO) -> list[dict[str, np.ndarray]]:
    require("safetensors")
    from safetensors.numpy import load_file

    return [load_file(file.name)]  # `load`, which reads bytes, does not support bfloat16


def _read_npz(file: BinaryIO) -> list[dict[str, np.ndarray]]:
    with np.load(file, allow_pickle=False) as arrays:
        return [dict(arrays)]


def _read_torch(file: BinaryIO) -> list[dict[str, np.ndarray]]:
    """The Wide-ResNets in a PyTorch file; without any, its largest network, so that an error can name its arrays."""
    torch = _import_torch()

    def to_numpy(tensor):
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)  # NumPy has no bfloat16
        return (tensor.float() if is_half else tensor).detach().numpy()

    content = torch.load(file, map_location="cpu", weights_only=True)
    networks = [
        {name: to_numpy(value) for name, value in found.items() if isinstance(value, torch.Tensor)}
        for found in _mappings(content)
    ]
    wide_resnets = [arrays for arrays in networks if any(map(_ANCHOR.fullmatch, arrays))]
    return wide_resnets or sorted(filter(None, networks), key=len)[-1:]


def _mappings(content: Any, depth: int = 3) -> Iterator[Mapping[str, Any]]:
    """A mapping, and the mappings nested in it up to a depth."""
    if isinstance(content, Mapping) and depth > 0:
        yield {name: value for name, value in content.items() if isinstance(name, str)}
        for value in content.values():
            yield from _mappings(value, depth - 1)


def _write_safetensors(file: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    require("safetensors")
    from safetensors.numpy import save

    file.write(save(arrays))


def _write_torch(file: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    torch = _import_torch()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, file)


_WRITERS = {
    ".safetensors": _write_safetensors,
    ".npz": lambda file, arrays: np.savez(file, **arrays),
    ".pt": _write_torch,
    ".pth": _write_torch,
}


def _import_torch():
    needed = "PyTorch files require PyTorch 2.10 or newer (pip install torch); .safetensors and .npz do not"
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{needed}. On a machine with PyTorch, load_weights and save_weights convert files."
        ) from error
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 10):  # older versions can be made to execute code: CVE-2025-32434, CVE-2026-24747
        raise ImportError(f"{needed}; got {torch.__version__}.")
    return torch
