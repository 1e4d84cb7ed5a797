"""The convolution's derivatives, which are written for CPUs, equal those of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from fs_jax.models.convolution import conv2d
from tests.parameters import mostly_slow


def reference(x, kernel, stride):
    half = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# Height and width have different remainders for each stride. The others are smaller than the kernel, or become so.
PIXELS = ((7, 10), (2, 2), (1, 4), (6, 3))
CASES = [(size, stride, pixels) for size in (1, 3, 5) for stride in (1, 2, 3) for pixels in PIXELS]


@pytest.mark.parametrize(
    ("size", "stride", "pixels"),
    mostly_slow(CASES, (3, 1, (2, 2)), (3, 2, (6, 3)), *(case for case in CASES if case[2] == PIXELS[0])),
)
@pytest.mark.usefixtures("float64")
def test_values_and_derivatives_equal_those_of_jax(size, stride, pixels):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *pixels, 3)), rng.normal(size=(size, size, 3, 4))
    shape = jax.eval_shape(lambda: reference(x, kernel, stride)).shape
    g = rng.normal(size=shape)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_derivatives(convolution, x, kernel, g):
        y, pullback = jax.vjp(lambda x, kernel: convolution(x, kernel, stride), x, kernel)
        return y, *pullback(g)

    both = [value_and_derivatives(convolution, x, kernel, g) for convolution in (conv2d, reference)]
    for ours, theirs in zip(*both, strict=True):
        # The same products summed in another order, in float64.
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("length", mostly_slow([4, 2], 4))  # 2 is smaller than the kernel
@pytest.mark.usefixtures("float64")
def test_second_derivatives_and_vmap(length):
    rng = np.random.default_rng(1)
    x, kernel = jnp.asarray(rng.normal(size=(1, length, length, 2))), jnp.asarray(rng.normal(size=(3, 3, 2, 2)))
    check_grads(jax.jit(lambda x, kernel: conv2d(jnp.tanh(x), kernel, 2)), (x, kernel), order=2, modes=["fwd", "rev"])
    many = jnp.stack([x, 2 * x])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(conv2d(x, kernel, 1)))))
    np.testing.assert_allclose(jax.vmap(gradient)(many), jnp.stack([gradient(one) for one in many]), atol=1e-12)
    of_kernel = jax.jit(jax.grad(lambda kernel, x: jnp.sum(jnp.square(conv2d(x, kernel, 2)))))
    one_by_one = jnp.stack([of_kernel(kernel, one) for one in many])
    np.testing.assert_allclose(jax.vmap(of_kernel, (None, 0))(kernel, many), one_by_one, atol=1e-12)


def test_gradients_can_be_exported():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    gradient = jax.jit(jax.grad(lambda kernel, x: jnp.sum(conv2d(x, kernel, 1) ** 2), argnums=(0, 1)))
    exported = jax.export.export(gradient)(kernel, x)
    for ours, theirs in zip(exported.call(kernel, x), gradient(kernel, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the same program in float32


@pytest.mark.parametrize(
    "product",
    [
        lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
        lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
        lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
        lambda f, x, v: jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (jnp.eye(x.size)[0].reshape(x.shape),))[1],
    ],
    ids=["forward over reverse", "reverse over forward", "reverse over reverse", "forward over forward"],
)
@pytest.mark.parametrize("of", mostly_slow(["images", "kernel"], "kernel"))
@pytest.mark.parametrize("height", mostly_slow([5, 2], 5))  # 2 is smaller than the kernel
@pytest.mark.usefixtures("float64")
def test_hessian_products_equal_those_of_jaxs_convolution(product, of, height):
    rng = np.random.default_rng(2)
    x, kernel = jnp.asarray(rng.normal(size=(2, height, 4, 2))), jnp.asarray(rng.normal(size=(3, 3, 2, 3)))
    at = x if of == "images" else kernel
    v = jnp.asarray(rng.normal(size=at.shape))

    def total(convolution, at):
        inputs = (at, kernel) if of == "images" else (x, at)
        return jnp.sum(jnp.tanh(convolution(*inputs, 2)))

    ours, theirs = (
        jax.jit(functools.partial(product, functools.partial(total, convolution)))(at, v)
        for convolution in (conv2d, reference)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-12)  # the same products summed in another order, in float64


@pytest.mark.usefixtures("float64")
def test_an_unused_derivative_is_not_computed():
    x, kernel = jnp.ones((2, 4, 4, 1)), jnp.ones((3, 3, 1, 2))

    def convolutions(of):
        gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv2d(x, kernel, 1))), of)
        return str(jax.make_jaxpr(gradient)(x, kernel)).count("conv_general_dilated[")

    both = convolutions((0, 1))
    assert convolutions(0) < both
    assert convolutions(1) < both


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("length", [3, 2])  # 2 is smaller than the kernel
def test_the_gradient_of_a_shared_kernel_under_shard_map_is_the_sum_over_devices(length):
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()), ("d",)), jax.sharding.PartitionSpec
    rng = np.random.default_rng(3)
    x, kernel = jnp.asarray(rng.normal(size=(4, length, length, 2))), jnp.asarray(rng.normal(size=(3, 3, 2, 2)))

    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.square(conv2d(x, kernel, 1))))(kernel)

    parts = jax.shard_map(gradient, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec())
    np.testing.assert_allclose(jax.jit(parts)(x, kernel), jax.jit(gradient)(x, kernel), atol=1e-12)  # as above
