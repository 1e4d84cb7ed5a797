"""A 2D convolution that is fast on CPUs, as are its derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv2d(x: Float[Array, "n h w c"], kernel: Float[Array, "size size c d"], stride: int) -> Float[Array, "n h2 w2 d"]:
    """Cross-correlation of images with an odd square kernel, with PyTorch's padding.

    With p = size // 2 pixels of padding on all sides,

        y[n, i, j, d] = sum_{a, b, c} x[n, stride * i + a - p, stride * j + b - p, c] * kernel[a, b, c, d]

    (For stride 2, the padding "SAME" would pad one side only and give other values.)

    On CPUs, the derivatives are computed in another way. XLA's CPU backend is fast only for convolutions with channels
    last, and JAX's derivatives have another layout. Here they are written as convolutions with channels last, between
    optimization barriers that keep XLA from undoing the transpositions. The difference is largest inside a loop (jax
    issue 12868). Forward mode, reverse mode and derivatives of any order work.

    For images smaller than the kernel, such as the last feature maps for 8 x 8 images, XLA's CPU backend has no fast
    convolution at all. There, the convolution is a product of matrices on CPUs.

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
    if jax.sharding.get_abstract_mesh().manual_axes:  # in `shard_map`, both operands must vary over the same axes
        # A sum over no elements: 0, but it varies over the axes of the array.
        x, kernel = (
            a + jnp.sum(lax.stop_gradient(b).ravel()[:0]).astype(a.dtype) for a, b in ((x, kernel), (kernel, x))
        )
    return _differentiable(x, kernel, stride)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _differentiable(x, kernel, stride):
    if min(x.shape[1:3]) >= kernel.shape[0]:
        return _conv2d(x, kernel, stride)
    product, default = (functools.partial(f, stride=stride) for f in (_as_product, _conv2d))
    return lax.platform_dependent(x, kernel, cpu=product, default=default)


def _conv2d(x, kernel, stride):
    half = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=_LAYOUT)


def _as_product(x, kernel, stride):
    """The convolution as a product of matrices: of the pixels under the kernel, and its weights."""
    size, half = kernel.shape[0], kernel.shape[0] // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows, columns = (length - 2 * half for length in padded.shape[1:3])
    under = [padded[:, a : a + rows : stride, b : b + columns : stride] for a in range(size) for b in range(size)]
    return jnp.concatenate(under, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _jvp(stride, primals, tangents):
    """The tangent, as the transpose of the wanted reverse mode: JAX transposes it back to exactly that."""
    (x, kernel), y = primals, _differentiable(*primals, stride)
    transposes = (
        functools.partial(_image_cotangent, x, stride, kernel),
        functools.partial(_kernel_cotangent, kernel, stride, x),
    )
    terms = [
        jax.linear_transpose(transpose, y)(tangent)[0]
        for transpose, tangent in zip(transposes, tangents, strict=True)
        if not isinstance(tangent, SymbolicZero)
    ]
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _image_cotangent(like, stride, kernel, g):
    """The cotangent of the images, given the cotangent g of the output."""
    channels_last, default = (functools.partial(f, like, stride) for f in (_images_channels_last, _images_default))
    return lax.platform_dependent(kernel, g, cpu=channels_last, default=default)


def _kernel_cotangent(like, stride, x, g):
    """The cotangent of the kernel, given the cotangent g of the output."""
    channels_last, default = (functools.partial(f, like, stride) for f in (_kernel_channels_last, _kernel_default))
    return lax.platform_dependent(x, g, cpu=channels_last, default=default)


def _images_default(like, stride, kernel, g):
    return jax.linear_transpose(lambda x: _conv2d(x, kernel, stride), like)(g)[0]


def _kernel_default(like, stride, x, g):
    return jax.linear_transpose(lambda kernel: _conv2d(x, kernel, stride), like)(g)[0]


def _images_channels_last(like, stride, kernel, g):
    """A convolution of g, dilated by the stride, with the rotated kernel, its channels swapped; NHWC, HWIO, NHWC.

    For g smaller than the kernel, the transpose of a product of matrices is faster.
    """
    size, half = kernel.shape[0], kernel.shape[0] // 2
    if min(g.shape[1:3]) < size:
        return jax.linear_transpose(lambda x: _as_product(x, kernel, stride), like)(g)[0]
    turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    low = size - 1 - half
    high = [
        length + 2 * half - size - stride * (steps - 1) + low
        for length, steps in zip(like.shape[1:3], g.shape[1:3], strict=True)
    ]
    return lax.conv_general_dilated(
        g, turned, (1, 1), [(low, h) for h in high], lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )


def _kernel_channels_last(like, stride, x, g):
    """A convolution of x, with batch and channel axes swapped, with g, dilated by the stride; NHWC, HWIO, NHWC.

    For a 1 x 1 kernel, a matrix product is faster.
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
    """Transpose x in a separate pass over memory.

    Without the barriers, XLA would fuse the computation of x into this pass, where the order of memory access is slow.
    Without the reshape, it would first copy x in its old layout.
    """
    moved = lax.optimization_barrier(x).transpose(axes)
    return lax.optimization_barrier(moved.reshape(len(moved), -1)).reshape(moved.shape)
