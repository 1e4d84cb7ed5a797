"""What depends on the machine: compiler options and the persistent compilation cache. Everything else is portable."""

import functools
import os
import pathlib

import jax

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
def compiler_options(*, training: bool = False) -> dict[str, str] | None:
    """Options for `jax.jit(..., compiler_options=...)` that suit networks on the default backend.

    Args:
      training: Whether the program has BatchNorm take its batch's statistics.

    Returns:
      A dictionary, or None where the defaults are best: on GPU and TPU, and on a CPU whose XLA doesn't know them.

    Example:
      >>> double = jax.jit(lambda x: 2 * x, compiler_options=compiler_options())
      >>> int(double(21))
      42
    """
    if jax.default_backend() != "cpu":
        return None
    options = {_YNN: f"{_REDUCTIONS},{_DOTS}" if training else _DOTS}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0)
    except (jax.errors.JaxRuntimeError, ValueError):  # an XLA that has renamed the option
        return None
    return options


def batch_size() -> int:
    """How many images an evaluation has in a batch, if nobody says: 32 on a CPU, 256 on GPU and TPU.

    On a CPU what a pass over few images computes stays in the cache; an accelerator needs many to be busy.

    Example:
      >>> batch_size() in (32, 256)
      True
    """
    return 32 if jax.default_backend() == "cpu" else 256


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


def describe() -> dict[str, str | int]:
    """Hardware and library versions, for result files."""
    import platform
    from importlib.metadata import version

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count() or 1,
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")},
    }
