"""Simulate the rounding of other machines: `DISTURB=SEED python -m pytest`.

On another CPU, float32 sums are rounded differently, since libraries add in another order and with other vectors. A
test may pass on one machine only because of how that machine rounds. To find such tests on any machine, this module
disturbs every compiled program: it multiplies each entry of the operands of convolutions, matrix products and sums by
1 - u, 1 or 1 + 2u at random, with u = 2^-24 in float32 and 2^-53 in float64. It does the same to the values of exp,
log, tanh and similar functions. This is a unit in the last place, about as large as the rounding error of a sum.

The factors depend on the seed, the program's name, the operation and its shapes. So the same program computes the same
numbers each time, also in another process; with another batch size, another number of devices or without `jit`, numbers
may differ. Results that are promised to be equal bit for bit must be equal here too. Tests must compare all others with
a tolerance, and avoid cases where rounding decides a sign or a maximum. (Sums that are exact on every machine, such as
those of small integers, are disturbed as well.)
"""

import os
import zlib

import numpy as np
from jax.extend.core import primitives
from jax.interpreters import mlir
from jaxlib.mlir.dialects import stablehlo

SUMS = ("conv_general_dilated_p", "dot_general_p", "reduce_sum_p")
FUNCTIONS = (
    "cos_p", "erf_p", "erf_inv_p", "exp_p", "exp2_p", "expm1_p", "log_p", "log1p_p", "logistic_p", "pow_p", "rsqrt_p",
    "sin_p", "tanh_p",
)  # fmt: skip


def factors(aval, *key):
    """An array of random factors: 1, or one of the two floats next to 1. The same key gives the same factors."""
    rng = np.random.default_rng(zlib.crc32(repr((*key, aval.shape)).encode()))
    unit = np.finfo(aval.dtype).eps
    return np.array([1 - unit / 2, 1, 1 + unit], aval.dtype)[rng.integers(3, size=aval.shape)]


def disturb(seed):
    """Disturb every program that is compiled for a CPU after this call."""

    def register(name, of_operands):
        primitive = getattr(primitives, name)
        known = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]

        def lower(context, *operands, **parameters):
            module = context.module_context.module.operation.attributes["sym_name"]

            def disturbed(value, aval, number):
                if aval.dtype not in (np.float32, np.float64):
                    return value
                key = seed, str(module), name, str(context.avals_in), number
                return stablehlo.multiply(value, mlir.ir_constant(factors(aval, *key)))

            if of_operands:
                avals = context.avals_in
                operands = [disturbed(*each) for each in zip(operands, avals, range(len(avals)), strict=True)]
                return known.rule(context, *operands, **parameters)
            (value,) = known.rule(context, *operands, **parameters)
            return [disturbed(value, context.avals_out[0], 0)]

        mlir.register_lowering(primitive, lower, platform="cpu")

    for name in SUMS:
        register(name, True)
    for name in FUNCTIONS:
        register(name, False)


def if_asked():
    """Call `disturb` if the environment variable DISTURB is set to a seed."""
    if "DISTURB" in os.environ:
        disturb(int(os.environ["DISTURB"]))
