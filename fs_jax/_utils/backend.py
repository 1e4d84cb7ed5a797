"""Settings that depend on the machine: compiler options, batch sizes, the compilation cache."""

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

# XLA's CPU backend uses YNNPACK for convolutions, dots and reductions. Its convolutions are slower than XLA's own for
# the small channel counts of a narrow network. Its reductions are faster over a batch, as in BatchNorm in training, but
# slower over the pixels of few images: with them, a forward pass of WRN-10-2 on 32 images takes twice as long.
_YNN, _DOTS, _REDUCTIONS = (
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "LIBRARY_FUSION_TYPE_REDUCE",
)


@functools.cache
def compiler_options(platform: str, *, training: bool = False) -> dict[str, str] | None:
    """Options for `jax.jit(..., compiler_options=...)` that suit networks on this platform.

    Args:
      platform: "cpu", "gpu" or "tpu": the platform that the program will run on.
      training: Whether BatchNorm uses the statistics of its batch in the program.

    Returns:
      A dictionary, or None for the defaults: on GPU and TPU, and on a CPU whose XLA doesn't have these options.

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
    """The default batch size of evaluations: 32 on a CPU, 256 on GPU and TPU.

    On a CPU, the activations of a small batch fit in the cache; an accelerator needs a large batch to be busy.

    Example:
      >>> batch_size("cpu"), batch_size("gpu")
      (32, 256)
    """
    return 32 if platform == "cpu" else 256


def full_float32(platform: str) -> contextlib.AbstractContextManager:
    """Products of float32 in full precision: JAX's default rounds factors to bfloat16 on TPUs and TF32 on some GPUs.

    Example:
      >>> with full_float32("tpu"):
      ...     jax.config.jax_default_matmul_precision
      'float32'
    """
    # A CPU always computes them in full precision.
    return contextlib.nullcontext() if platform == "cpu" else jax.default_matmul_precision("float32")


def platform_of(arrays: PyTree) -> str:
    """The platform of these arrays, on which programs with them run; without any, that of the default device.

    Example:
      >>> platform_of([]) in ("cpu", "gpu", "tpu")
      True
    """
    committed = [array for array in jax.tree.leaves(arrays) if isinstance(array, jax.Array)]
    array = committed[0] if committed else jnp.zeros(())
    platform = next(iter(array.devices())).platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def enable_compilation_cache(directory: str | os.PathLike | None = None) -> pathlib.Path:
    """Keep compiled programs on disk, for later processes: those that took a second or more to compile.

    Args:
      directory: The folder; by default `$JAX_COMPILATION_CACHE_DIR`, else `fs_jax/xla` in the user's cache folder.

    Returns:
      The folder in use.
    """
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_home() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    return pathlib.Path(chosen)


def describe(platform: str | None = None) -> dict[str, str | int]:
    """Hardware and versions, for result files.

    Args:
      platform: Platform of the devices that were used; by default that of the default device.

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
    """The commit of this file's git clone, with a plus sign if code was changed; empty if it isn't in a clone."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--", "fs_jax", "experiments/*.py")
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
