"""Rounding as another machine might have it: `DISTURB=SEED python -m pytest`.

Float32 sums come out otherwise on another CPU: its libraries add in another order, with other vectors. A test that
passes by the luck of one machine's rounding is found here by disturbing it on any. Every program that is compiled gets
the operands of its convolutions, products of matrices and sums multiplied, entry by entry, by 1 - u, 1 or 1 + 2u at
random, u = 2^-24 in float32 and 2^-53 in float64; and the values of exp, log, tanh and their like. That is a unit in
the last place, and about the error that a sum in any order has.

The factors are drawn from the seed, the program's name, and the operation and its shapes: the same program computes the
same numbers each time, in another process too, but another batch size, another number of devices or no `jit` may give
others. What is promised bit for bit must hold even so; all else must be compared with a tolerance, and not where a sign
or a maximum is in doubt. (A sum that every machine has exactly, of small integers say, is disturbed as well.)
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
    """Factors of 1, or a unit in the last place beside it, for an array; the same for the same key."""
    rng = np.random.default_rng(zlib.crc32(repr((*key, aval.shape)).encode()))
    unit = np.finfo(aval.dtype).eps
    return np.array([1 - unit / 2, 1, 1 + unit], aval.dtype)[rng.integers(3, size=aval.shape)]


def disturb(seed):
    """From now on, disturb every program that is compiled for a CPU."""

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
    """Disturb, if the environment variable DISTURB has a seed."""
    if "DISTURB" in os.environ:
        disturb(int(os.environ["DISTURB"]))
