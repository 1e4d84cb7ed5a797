"""Chooses the implementation: the kernels of `_triton` on an NVIDIA GPU, the plain iterations elsewhere.

The choice depends on the platform that a program is compiled for and on static properties of the problem. It never
depends on the devices of the process that traces the program.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

from fs_jax.ot import _iterations, _triton, _unroll
from fs_jax.ot._iterations import Options

KERNELS = {"cuda": False}  # platforms with kernels, and whether to interpret them there


def solve(scaled, a, b, start, threshold, options: Options):
    """`Outcome` of the iterations, without a derivative."""
    return _by_platform(
        _has_kernel(scaled, options),
        lambda *problem: _iterations.make_iterations(options, False)(*problem)[0],
        lambda interpret: partial(_triton.solve, options=options, interpret=interpret),
        (scaled, a, b, start, threshold),
    )


def unroll(scaled, a, b, start, threshold, options: Options):
    """`Outcome` of the iterations, with the derivative of the iterations done.

    The kernel stores a path of fixed length, so the plain iterations are used if there is a threshold.
    """
    return _by_platform(
        _has_kernel(scaled, options) and threshold is None,
        lambda *problem: _unroll.solve(*problem, options),
        lambda interpret: lambda *problem: _triton.unroll(*problem, options, interpret),
        (scaled, a, b, start, threshold),
    )


def _has_kernel(scaled, options):
    fits = scaled.dtype == jnp.float32 and max(scaled.shape) <= _triton.LARGEST
    fits = fits and options.axis_name is None and not options.history  # it needs all rows, and records no history
    return fits and options.fused and options.method == "stabilized" and _triton.IS_AVAILABLE


def _by_platform(has_kernel, plain, kernel, problem):
    if not has_kernel:
        return plain(*problem)
    branches = {platform: kernel(interpret) for platform, interpret in KERNELS.items()}
    return lax.platform_dependent(*problem, default=plain, **branches)
