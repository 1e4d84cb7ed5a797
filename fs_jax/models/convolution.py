"""Convolution whose derivatives run at speed on a CPU as well."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv2d(x: Float[Array, "n h w c"], kernel: Float[Array, "size size c d"], stride: int) -> Float[Array, "n h2 w2 d"]:
    """Cross-correlation of images with an odd square kernel, padded by half its size on all sides, as PyTorch pads.

    y[n, i, j, d] = sum_{a, b, c} x[n, stride i + a - p, stride j + b - p, c] kernel[a, b, c, d] with p = size // 2. (A
    stride-2 convolution padded "SAME" would pad on one side only, and give other values.)

    The derivative is the same on every platform; how it is computed is not. XLA's CPU backend is fast on convolutions
    of one layout only, channels last, which the derivatives that JAX writes down don't have: there they are written
    as convolutions of that layout, between barriers that keep XLA from folding the transpositions in again. It matters
    most inside a loop, where the others are far slower (jax issue 12868). Both modes and all orders work.

    Args:
      x: Images or feature maps [N, H, W, C].
      kernel: [size, size, C, D], size odd.
      stride: Step between the positions, in pixels.

    Returns:
      Feature maps [N, ceil(H / stride), ceil(W / stride), D].

    Example:
      >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), 2).shape
      (1, 2, 2, 2)
    """
    if jax.sharding.get_abstract_mesh().manual_axes:  # in `shard_map` operands vary over the same axes
        # The sum of nothing is 0, and varies as the array does.
        x, kernel = (
            a + jnp.sum(lax.stop_gradient(b).ravel()[:0]).astype(a.dtype) for a, b in ((x, kernel), (kernel, x))
        )
    return _differentiable(x, kernel, stride)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _differentiable(x, kernel, stride):
    return _conv2d(x, kernel, stride)


def _conv2d(x, kernel, stride):
    half = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=_LAYOUT)


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _jvp(stride, primals, tangents):
    """The tangent, written as the transpose of what reverse mode shall compute, which JAX's own transposition gives."""
    (x, kernel), y = primals, _differentiable(*primals, stride)
    transposes = (
        functools.partial(_of_images, x, stride, kernel),
        functools.partial(_of_kernel, kernel, stride, x),
    )
    terms = [
        jax.linear_transpose(transpose, y)(tangent)[0]
        for transpose, tangent in zip(transposes, tangents, strict=True)
        if not isinstance(tangent, SymbolicZero)
    ]
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _of_images(like, stride, kernel, g):
    """The transpose in the images: of y's cotangent g."""
    own, jaxs = (functools.partial(way, like, stride) for way in (_channels_last_of_images, _jaxs_of_images))
    return lax.platform_dependent(kernel, g, cpu=own, default=jaxs)


def _of_kernel(like, stride, x, g):
    """The transpose in the kernel."""
    own, jaxs = (functools.partial(way, like, stride) for way in (_channels_last_of_kernel, _jaxs_of_kernel))
    return lax.platform_dependent(x, g, cpu=own, default=jaxs)


def _jaxs_of_images(like, stride, kernel, g):
    return jax.linear_transpose(lambda x: _conv2d(x, kernel, stride), like)(g)[0]


def _jaxs_of_kernel(like, stride, x, g):
    return jax.linear_transpose(lambda kernel: _conv2d(x, kernel, stride), like)(g)[0]


def _channels_last_of_images(like, stride, kernel, g):
    """g, dilated by the stride, with the kernel turned and its channels exchanged; NHWC, HWIO, NHWC."""
    size, half = kernel.shape[0], kernel.shape[0] // 2
    turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    low = size - 1 - half
    high = [
        length + 2 * half - size - stride * (steps - 1) + low
        for length, steps in zip(like.shape[1:3], g.shape[1:3], strict=True)
    ]
    return lax.conv_general_dilated(
        g, turned, (1, 1), [(low, h) for h in high], lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )


def _channels_last_of_kernel(like, stride, x, g):
    """Images and channels change places, and g, dilated by the stride, is the kernel; NHWC, HWIO, NHWC.

    Of a kernel of one pixel it is a product, and faster as one.
    """
    size, half = like.shape[0], like.shape[0] // 2
    if size == 1:
        pixels = lax.optimization_barrier(x[:, ::stride, ::stride]).reshape(-1, x.shape[-1])
        return (pixels.T @ g.reshape(-1, g.shape[-1]))[None, None]
    images, weights = _transposed(x, (3, 1, 2, 0)), _transposed(g, (1, 2, 0, 3))
    high = [
        (steps - 1) * stride + size - length - half for length, steps in zip(x.shape[1:3], g.shape[1:3], strict=True)
    ]
    dkernel = lax.conv_general_dilated(
        images, weights, (1, 1), [(half, h) for h in high], rhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )
    return lax.optimization_barrier(dkernel).transpose(1, 2, 0, 3)


def _transposed(x, axes):
    """The transposition as one pass over memory, and nothing else in it.

    XLA would compute what it is of inside of that pass, whose order suits nothing else; and without the reshaping copy
    it as it lies first.
    """
    moved = lax.optimization_barrier(x).transpose(axes)
    return lax.optimization_barrier(moved.reshape(len(moved), -1)).reshape(moved.shape)
