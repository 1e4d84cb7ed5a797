"""What depends on the machine: compiler options, batch sizes, the compilation cache. Everything else is portable."""

import contextlib
import functools
import os
import pathlib
import platform as machine
import subprocess

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fs_jax._utils.files import cache_home

# XLA's CPU backend hands convolutions, dots and reductions to YNNPACK. For the small channel counts of a narrow
# network its convolutions are slower than XLA's own. Its reductions are faster over a batch, as BatchNorm's in
# training, but slower over the pixels of few images: they make a forward pass of WRN-10-2 on 32 of them half as fast.
_YNN, _DOTS, _REDUCTIONS = (
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "LIBRARY_FUSION_TYPE_REDUCE",
)


@functools.cache
def compiler_options(platform: str, *, training: bool = False) -> dict[str, str] | None:
    """Options for `jax.jit(..., compiler_options=...)` that suit networks on this platform.

    Args:
      platform: "cpu", "gpu" or "tpu": where the program will run.
      training: Whether the program has BatchNorm take its batch's statistics.

    Returns:
      A dictionary, or None where the defaults are best: on GPU and TPU, and on a CPU whose XLA doesn't know them.

    Example:
      >>> double = jax.jit(lambda x: 2 * x, compiler_options=compiler_options(platform_of(jnp.ones(3))))
      >>> int(double(21))
      42
    """
    if platform != "cpu":
        return None
    options = {_YNN: f"{_REDUCTIONS},{_DOTS}" if training else _DOTS}
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda x: x + 1, compiler_options=options)(0)
    except (jax.errors.JaxRuntimeError, ValueError):  # an XLA that has renamed the option
        return None
    return options


def batch_size(platform: str) -> int:
    """How many images an evaluation has in a batch, if nobody says: 32 on a CPU, 256 on GPU and TPU.

    On a CPU what a pass over few images computes stays in the cache; an accelerator needs many to be busy.

    Example:
      >>> batch_size("cpu"), batch_size("gpu")
      (32, 256)
    """
    return 32 if platform == "cpu" else 256


def platform_of(arrays: PyTree) -> str:
    """Where programs of these arrays run: where they are, or else on the default device.

    Example:
      >>> platform_of([]) in ("cpu", "gpu", "tpu")
      True
    """
    committed = [array for array in jax.tree.leaves(arrays) if isinstance(array, jax.Array)]
    array = committed[0] if committed else jnp.zeros(())
    platform = next(iter(array.devices())).platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def enable_compilation_cache(directory: str | os.PathLike | None = None) -> pathlib.Path:
    """Keep compiled programs on disk, so that the next run starts at once: those that took JAX's threshold of a second.

    Args:
      directory: Where to; by default `$JAX_COMPILATION_CACHE_DIR`, else `fs_jax/xla` in the user's cache folder.

    Returns:
      The folder in use.
    """
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_home() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    return pathlib.Path(chosen)


def describe(platform: str | None = None) -> dict[str, str | int]:
    """Hardware and versions, for result files.

    Args:
      platform: Of the devices that were used; by default the default device's.

    Example:
      >>> describe()["fs_jax"]
      '0.1.0'
    """
    from importlib import metadata

    from fs_jax import __version__

    devices = jax.devices(platform or platform_of([]))
    libraries = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    return {
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu_count": os.cpu_count() or 1,
        "machine": machine.machine(),
        "python": machine.python_version(),
        "fs_jax": __version__,
        "commit": _commit(),
        **libraries,
    }


@functools.cache
def _commit() -> str:
    """Of the clone that this file is in, with a plus sign if files differ from it; empty elsewhere."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "fs_jax"))
    except (OSError, subprocess.CalledProcessError):
        return ""
