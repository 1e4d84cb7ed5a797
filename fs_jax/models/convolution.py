"""Convolution whose derivatives run at speed on a CPU as well."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(x: Float[Array, "n h w c"], kernel: Float[Array, "size size c d"], stride: int) -> Float[Array, "n h2 w2 d"]:
    """Cross-correlation of images with an odd square kernel, padded by half its size on all sides, as PyTorch pads.

    y[n, i, j, d] = sum_{a, b, c} x[n, stride i + a - p, stride j + b - p, c] kernel[a, b, c, d] with p = size // 2. (A
    stride-2 convolution padded "SAME" would pad on one side only, and give other values.)

    The derivative is the same on every platform; how it is computed is not. XLA's CPU backend is fast on convolutions
    of one layout only, channels last, which the derivatives that JAX writes down don't have: there they are written
    as convolutions of that layout, between barriers that keep XLA from folding the transpositions in again. It matters
    most inside a loop, where the others are far slower (jax issue 12868). Being a
    `custom_vjp` it has no forward-mode derivative.

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
    return _conv2d(x, kernel, stride)


def _conv2d(x, kernel, stride):
    half = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=_LAYOUT)


def _forward(x, kernel, stride):
    return conv2d(x, kernel, stride), (x, kernel)


def _backward(stride, saved, g):
    return lax.platform_dependent(
        *saved,
        g,
        cpu=functools.partial(_channels_last_derivatives, stride),
        default=functools.partial(_derivatives, stride),
    )


conv2d.defvjp(_forward, _backward)


def _derivatives(stride, x, kernel, g):
    """The derivatives as JAX writes them down."""
    _, pullback = jax.vjp(lambda x, kernel: _conv2d(x, kernel, stride), x, kernel)
    return pullback(g)


def _channels_last_derivatives(stride, x, kernel, g):
    """The derivatives as convolutions of layout NHWC, HWIO, NHWC."""
    size, half = kernel.shape[0], kernel.shape[0] // 2
    # With respect to the input: g, dilated by the stride, with the kernel turned and its channels exchanged.
    turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    low = size - 1 - half
    high = [
        length + 2 * half - size - stride * (steps - 1) + low
        for length, steps in zip(x.shape[1:3], g.shape[1:3], strict=True)
    ]
    dx = lax.conv_general_dilated(
        g, turned, (1, 1), [(low, h) for h in high], lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )
    # With respect to the kernel: images and channels change places, and g, dilated by the stride, is the kernel.
    images = lax.optimization_barrier(x.transpose(3, 1, 2, 0))
    weights = lax.optimization_barrier(g.transpose(1, 2, 0, 3))
    high = [
        (steps - 1) * stride + size - length - half for length, steps in zip(x.shape[1:3], g.shape[1:3], strict=True)
    ]
    dkernel = lax.conv_general_dilated(
        images, weights, (1, 1), [(half, h) for h in high], rhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )
    return dx, lax.optimization_barrier(dkernel).transpose(1, 2, 0, 3)
