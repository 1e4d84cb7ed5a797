"""Which program runs where: on an NVIDIA GPU the kernels of `_triton`, elsewhere the plain iterations.

Decided by the platform that a program is compiled for, and by what is known when it is traced; never by what this
process has.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

from fs_jax.ot import _iterations, _triton, _unroll
from fs_jax.ot._iterations import Options

KERNELS = {"cuda": False}  # platforms that have them, and whether they are interpreted there


def solve(scaled, a, b, start, threshold, options: Options):
    """`Outcome` of the iterations, without a derivative."""
    return _by_platform(
        _has_kernel(scaled, options),
        lambda *problem: _iterations.walk(options, False)(*problem)[0],
        lambda interpret: partial(_triton.solve, options=options, interpret=interpret),
        (scaled, a, b, start, threshold),
    )


def unroll(scaled, a, b, start, threshold, options: Options):
    """The same, with the derivative of the iterations that were done.

    A kernel keeps a path of fixed length, so with a threshold the plain iterations are taken.
    """
    return _by_platform(
        _has_kernel(scaled, options) and threshold is None,
        lambda *problem: _unroll.solve(*problem, options),
        lambda interpret: lambda *problem: _triton.unroll(*problem, options, interpret),
        (scaled, a, b, start, threshold),
    )


def _has_kernel(scaled, options):
    fits = scaled.dtype == jnp.float32 and max(scaled.shape) <= _triton.LARGEST
    fits = fits and options.axis_name is None and not options.history  # a kernel has all rows, and no looks
    return fits and options.fused and options.method == "stabilized" and _triton.IS_HERE


def _by_platform(has_kernel, plain, kernel, problem):
    if not has_kernel:
        return plain(*problem)
    branches = {platform: kernel(interpret) for platform, interpret in KERNELS.items()}
    return lax.platform_dependent(*problem, default=plain, **branches)
