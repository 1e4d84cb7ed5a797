"""Wide-ResNet weights to and from PyTorch's names, layouts and files. Nothing that a file holds is ever executed."""

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
    """The network in a file of weights: this project's, the paper's, or a Wide-ResNet of RobustBench.

    Depth, width and number of classes are read off the arrays. Prefixes (`module.`, `module.basic_net.`, `model.`) and
    wrappers (`{"net": ..., "epoch": ...}`) are taken off, whatever their names. `sub_block1`, a group of blocks that
    TRADES' network and its descendants hold and never use, is left out. Half-precision weights become float32.

    How images are normalised belongs to the network. The arguments say it, or else the file's buffers (`mu` and `sigma`
    as RobustBench has them, or `mean` and `std`), or else the prefix `basic_net.` of the paper's code, whose images are
    in [-1, 1]. It isn't guessed: a wrong one costs accuracy, and nothing would tell.

    Args:
      path: A file `.safetensors` or `.npz`. Any other is PyTorch's (`.pt`, `.pth`, no suffix at all, ...), and read by
        PyTorch, where it is installed, as tensors only.
      mean: The network takes (images - mean) / std of images in [0, 1]: a number, or one for each channel. 0 (and std
        1) for images as they are, as most Wide-ResNets of RobustBench take them; 0.5 and 0.5 for [-1, 1].
      std: As `mean`.

    Returns:
      The network, and its variables `{"params": ..., "batch_stats": ...}`.

    Raises:
      ValueError: for a file that isn't weights, or another network's, with the first missing and unexpected names; for
        an array of another shape or values that aren't finite; if nothing says how images are normalised.
      ImportError: for a PyTorch file where PyTorch 2.6 or newer isn't installed.

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
            f"mean, std: expected them, as {path} doesn't say how its network's images are normalised. "
            "Give 0 and 1 for images as they are (most of RobustBench's), 0.5 and 0.5 for [-1, 1] (the paper's); "
            "or make a file that says it, with save_weights of what this returns."
        )
    wide = jax.tree.map(lambda x: x.astype(np.promote_types(x.dtype, np.float32)), variables)
    return model.clone(mean=_per_channel(mean), std=_per_channel(std)), wide


def save_weights(path: str | os.PathLike, model: WideResNet, variables: Mapping[str, Any]) -> None:
    """Write a network as PyTorch's `state_dict`: whole or not at all, for `load_weights` and for PyTorch.

    The names are those of the paper's code and of RobustBench's `WideResNet`. Beside them are the normalisation's
    buffers `mu` and `sigma` [1, channels, 1, 1], as in RobustBench's networks that normalise; the paper's has none.

    Args:
      path: A file `.safetensors`, `.npz`, or, where PyTorch is installed, `.pt` or `.pth`.
      model: The network.
      variables: Its variables, `{"params": ..., "batch_stats": ...}`.

    Raises:
      ValueError: for another suffix, or variables that aren't a Wide-ResNet's.
      ImportError: for a PyTorch file where PyTorch isn't installed.

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
        # Transposed arrays are views, and a file has the bytes in order.
        _WRITERS[suffix](file, {name: np.ascontiguousarray(array) for name, array in arrays.items()})


def from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `fs_jax.models.WideResNet` from the arrays of the paper's PyTorch network.

    Convolution kernels go from [out, in, h, w] to [h, w, in, out], the classifier's from [out, in] to [in, out].

    Args:
      state_dict: Arrays by PyTorch name (`conv1.weight`, `block1.layer.0.bn1.running_mean`, `fc.bias`, ...), all with
        or all without one prefix. A tensor passes as `tensor.numpy()`. `num_batches_tracked` is passed over, and so is
        `sub_block1`.

    Returns:
      `{"params": ..., "batch_stats": ...}` in the arrays' own dtypes.

    Raises:
      ValueError: for arrays that aren't those of one Wide-ResNet, with the first missing and unexpected names, for one
        of another shape, or for values that aren't finite.

    Example:
      >>> variables = jax.jit(WideResNet(10, 1).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> again = from_torch(to_torch(variables))
      >>> all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), dict(variables), again)))
      True
    """
    return _fit(state_dict)[1]


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the paper's PyTorch network from variables of `fs_jax.models.WideResNet`: `from_torch` undone.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
      Arrays by PyTorch name, in PyTorch's layouts.

    Raises:
      ValueError: for variables that aren't a Wide-ResNet's.
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
    """The fields of RobustBench's `model_info/DATASET/Linf/NAME.json` for an evaluated network.

    Args:
      model: The network.
      dataset: `cifar10` or `cifar100`, as RobustBench has it.
      epsilon: Radius on [0, 1] images.
      clean_accuracy: Fraction of the test images, 10,000 for RobustBench.
      autoattack_accuracy: The same under the standard version of AutoAttack; None if it wasn't run.
      reported_accuracy: The robust accuracy that the paper reports; None if there is none.
      name: Title of the paper.
      authors: Its authors, separated by commas.
      link: Its address.
      venue: Where and when it appeared, "NeurIPS 2019".
      additional_data: Whether training used more than the data set.

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


# By number of axes: kernels of convolutions [h, w, in, out] and of the classifier [in, out], vectors.
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
    """PyTorch's name of the leaf at this path of the variables."""
    words = "/".join(key.key for key in path[1:])  # the first is the collection
    match = _PATH.fullmatch(words)
    if match is None:
        raise ValueError(f"variables: expected those of a Wide-ResNet; got {words!r}.")
    block, layer, *rest = match.groups()
    module, leaf = (word for word in rest if word is not None)
    return f"{block}.layer.{layer}." * (block is not None) + ".".join(_TORCH_WORDS.get(w, w) for w in (module, leaf))


# An array that every Wide-ResNet has and no other network; what stands before it is the prefix.
_ANCHOR = re.compile(r"((?:.*\.)?)block1\.layer\.0\.conv1\.weight")


def _fit(state_dict: Mapping[str, np.ndarray]) -> tuple[WideResNet, dict[str, Any]]:
    """The Wide-ResNet that has these arrays and no others, and its variables."""
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
            raise ValueError(f"{name}: expected finite values; {np.sum(~np.isfinite(array))} are NaN or infinite.")
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
            f"state_dict: expected the arrays of a Wide-ResNet (here of depth {model.depth}); {'; '.join(counts)}."
        )


_BUFFERS = {"mu": "mean", "mean": "mean", "sigma": "std", "std": "std"}


def _take_normalisation(arrays: dict[str, np.ndarray]) -> tuple[PerChannel | None, PerChannel | None]:
    """Mean and std by which a network's images are normalised, as its arrays say, with their buffers taken out."""
    found = {}
    for name in list(arrays):
        buffer = _BUFFERS.get(name.rpartition(".")[2])
        if buffer is not None and buffer not in found:
            found[buffer] = _per_channel(arrays.pop(name))
    if len(found) == 1:
        raise ValueError(f"expected both buffers of the normalisation, or neither; got only the {next(iter(found))}.")
    if not found and any("basic_net.block1." in name for name in arrays):
        return 0.5, 0.5
    return found.get("mean"), found.get("std")


def _per_channel(values: Any) -> PerChannel:
    """One number where all channels have the same."""
    numbers = tuple(float(value) for value in np.ravel(values))
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays in a file by name, and nothing else of what is in it."""
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(pathlib.Path(path).suffix, _read_torch)
    with open(path, "rb") as file:
        try:
            networks = read(file)
        except ImportError:
            raise
        except Exception as error:  # bytes that aren't what they should be fail inside a library, in ways of all kinds
            raise ValueError(
                f"expected a file of weights; got one that can't be read as arrays alone ({type(error).__name__}). "
                "Whatever else it holds is not executed."
            ) from error
    if len(networks) != 1:
        raise ValueError(f"expected the arrays of one network, by name; got {len(networks)} such.")
    return networks[0]


def _read_safetensors(file: BinaryIO) -> list[dict[str, np.ndarray]]:
    require("safetensors")
    from safetensors.numpy import load_file

    return [load_file(file.name)]  # `load`, of bytes, doesn't know bfloat16


def _read_npz(file: BinaryIO) -> list[dict[str, np.ndarray]]:
    with np.load(file, allow_pickle=False) as arrays:
        return [dict(arrays)]


def _read_torch(file: BinaryIO) -> list[dict[str, np.ndarray]]:
    """The Wide-ResNets that wrappers hold; without one the largest network, whose names then tell what it is."""
    torch = _import_torch()

    def to_numpy(tensor):
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)  # NumPy lacks the second
        return (tensor.float() if is_half else tensor).detach().numpy()

    content = torch.load(file, map_location="cpu", weights_only=True)
    networks = [
        {name: to_numpy(value) for name, value in found.items() if isinstance(value, torch.Tensor)}
        for found in _mappings(content)
    ]
    wide_resnets = [arrays for arrays in networks if any(map(_ANCHOR.fullmatch, arrays))]
    return wide_resnets or sorted(filter(None, networks), key=len)[-1:]


def _mappings(content: Any, depth: int = 3) -> Iterator[Mapping[str, Any]]:
    """A mapping and those inside it, by name, as deep as wrappers go."""
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
    needed = "PyTorch files need PyTorch 2.6 or newer (pip install torch); .safetensors and .npz need nothing more"
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{needed}. Where it is installed, load_weights and save_weights turn one into another."
        ) from error
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 6):  # older ones could be made to run code: CVE-2025-32434
        raise ImportError(f"{needed}; got {torch.__version__}.")
    return torch
