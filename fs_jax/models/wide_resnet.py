"""Wide-ResNet (Zagoruyko & Komodakis, 2016) in Flax Linen, as in the code of the feature-scattering paper."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from fs_jax.config import ModelConfig
from fs_jax.models.convolution import conv2d

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_DECAY = 0.9  # PyTorch's momentum of 0.1 is the weight of the new value

# Convolutions: normal with variance 2 / (height * width * channels out).
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Classifier: uniform in +-1 / sqrt(channels in), PyTorch's default for a linear layer.
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class WideResNet(nn.Module):
    """Wide-ResNet with pre-activation blocks, from images in [0, 1] to logits and pooled features.

    The `depth = 6n + 4` layers are

    - the normalisation (images - mean) / std;
    - a 3 x 3 convolution to 16 channels;
    - three groups of n blocks with 16, 32 and 64 times `width` channels, of which the second and third halve the
      resolution;
    - BatchNorm, ReLU, the mean over positions (the features), and a linear classifier (the logits).

    Args:
      depth: Number of layers, 6n + 4.
      width: Widening factor k of "WRN-depth-k".
      num_classes: Number of logits.
      mean: Mean of the normalisation: a number, or a tuple with one number per channel. The paper's mean and std of 0.5
        map images to [-1, 1]. Other networks have other values.
      std: Standard deviation of the normalisation, in the same form as `mean`.
      dtype: Precision of the convolutions. Parameters are float32, and BatchNorm, ReLU, features and logits are
        computed in float32; if `dtype` is wider, all of them have it. float32 convolutions have XLA's default
        precision: on NVIDIA GPUs, this is TF32 unless `jax_default_matmul_precision` is set.
      axis_name: Mapped axis over which BatchNorm synchronises its moments in training mode, or None.

    Returns:
      `apply(variables, images, train=False)` returns logits [N, num_classes] and features [N, 64 * width]. With
      `train=True`, BatchNorm uses the moments of the batch, and with `mutable=["batch_stats"]` it also updates the
      running statistics.

    Raises:
      ValueError: if depth is not 6n + 4, a size or `std` is not positive, or the images are not [N, H, W, C].
      TypeError: for images that are not floating point.

    Example:
      >>> model = WideResNet(depth=10, width=1)
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> logits, features = jax.jit(model.apply)(variables, images)
      >>> logits.shape, features.shape
      ((2, 10), (2, 64))

    Source: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016; Zhang & Wang, NeurIPS 2019, section 5.
    """

    depth: int = 28
    width: int = 10
    num_classes: int = 10
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        ModelConfig(depth=self.depth, width=self.width)  # checks the sizes
        if self.num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1; got {self.num_classes}.")
        if not np.isfinite(self.mean).all():
            raise ValueError(f"mean: expected finite numbers; got {self.mean}.")
        if not (np.isfinite(self.std).all() and np.min(self.std) > 0):
            raise ValueError(f"std: expected finite numbers above 0; got {self.std}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w c"], *, train: bool = False
    ) -> tuple[Float[Array, "n classes"], Float[Array, "n features"]]:
        if images.ndim != 4:
            raise ValueError(f"images: expected shape [N, height, width, channels]; got {images.shape}.")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"images: expected floating point in [0, 1]; got {images.dtype}. Divide uint8 images by 255."
            )
        for name, value in (("mean", self.mean), ("std", self.std)):
            if np.size(value) not in (1, images.shape[-1]):
                raise ValueError(f"{name}: expected one number, or {images.shape[-1]}, one per channel; got {value}.")
        mean, std = (_per_channel(jnp.asarray(value, images.dtype), images.ndim) for value in (self.mean, self.std))
        normalised = (images - mean) / std
        x = _Conv(16, 3, 1, self.dtype, name="conv1")(normalised)
        for group, stride in ((1, 1), (2, 2), (3, 2)):
            channels = 16 * self.width * 2 ** (group - 1)
            for layer in range((self.depth - 4) // 6):
                block = _Block(
                    channels, stride if layer == 0 else 1, self.dtype, self.axis_name, name=f"block{group}_layer{layer}"
                )
                x = block(x, train=train)
        x = nn.relu(BatchNorm(self.axis_name, name="bn1")(_wide(x), train=train))
        features = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(
            self.num_classes, dtype=features.dtype, param_dtype=features.dtype, precision="highest",
            kernel_init=_dense_init, name="fc",
        )(features)  # fmt: skip
        return logits, features


class _Block(nn.Module):
    """Pre-activation block of two 3 x 3 convolutions, with a 1 x 1 shortcut if the number of channels changes."""

    channels: int
    stride: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train: bool):
        activated = nn.relu(BatchNorm(self.axis_name, name="bn1")(_wide(x), train=train))
        if x.shape[-1] == self.channels:
            shortcut = x
        else:  # this shortcut also starts after the activation
            shortcut = _Conv(self.channels, 1, self.stride, self.dtype, name="shortcut")(activated)
        y = _Conv(self.channels, 3, self.stride, self.dtype, name="conv1")(activated)
        y = nn.relu(BatchNorm(self.axis_name, name="bn2")(_wide(y), train=train))
        return shortcut + _Conv(self.channels, 3, 1, self.dtype, name="conv2")(y)


class _Conv(nn.Module):
    """A convolution without a bias."""

    channels: int
    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", _conv_init, shape, np.promote_types(np.float32, self.dtype))
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with the running statistics of PyTorch.

    In training mode, for a batch with mean m and biased variance v over n values per channel,

        y = scale * (x - m) / sqrt(v + 1e-5) + bias
        running_mean <- 0.9 * running_mean + 0.1 * m
        running_var <- 0.9 * running_var + 0.1 * v * n / (n - 1)

    Otherwise m and v are the running statistics. The running variance is unbiased, as in PyTorch and unlike in
    `flax.linen.BatchNorm`.

    Args:
      axis_name: Mapped axis over which the moments are taken; None for those of each device.

    Example:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> norm = BatchNorm()
      >>> y, moved = norm.apply(norm.init(jax.random.key(0), x), x, train=True, mutable=["batch_stats"])
      >>> y.round(3).tolist(), moved["batch_stats"]["var"].round(3).tolist()
      ([[-1.0], [1.0]], [1.1])

    Source: Ioffe & Szegedy, ICML 2015.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], *, train: bool = False) -> Float[Array, "*batch c"]:
        shape, dtype = x.shape[-1:], _wide(x).dtype  # not JAX's default, which is float64 in 64-bit mode
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)

        wide = x.astype(np.promote_types(_wide(x).dtype, scale.dtype))
        if train:
            mean, var, count = self._moments(wide, running_mean.value)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                unbiased = var * (count / max(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    moved = BATCH_NORM_DECAY * running.value + (1 - BATCH_NORM_DECAY) * new
                    running.value = moved.astype(running.value.dtype)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        factor, shift = (_per_channel(value, x.ndim) for value in (factor, bias - mean * factor))
        return (wide * factor + shift).astype(x.dtype)

    def _moments(self, x, shift):
        """Mean, biased variance and number of values per channel, in one pass over the batch.

        The variance is E[(x - shift)^2] - E[x - shift]^2. The shift, the running mean, avoids most of the cancellation
        in E[x^2] - E[x]^2.
        """
        axes = tuple(range(x.ndim - 1))
        count = math.prod(x.shape[:-1])
        centred = x - _per_channel(jax.lax.stop_gradient(shift), x.ndim)
        first, second = jnp.mean(centred, axes), jnp.mean(jnp.square(centred), axes)
        if self.axis_name is not None:
            first, second = jax.lax.pmean((first, second), self.axis_name)
            count = count * jax.lax.axis_size(self.axis_name)
        return shift + first, jnp.maximum(second - jnp.square(first), 0), count


def _per_channel(values, ndim):
    """Reshape values of the last axis to broadcast with an array of `ndim` axes."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def _wide(x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
    """`x` in at least float32, for all operations but convolutions.

    A ReLU before the rounding to bfloat16 gives the same values as one after it. But XLA's CPU backend (jaxlib 0.12.0)
    returns NaN for a reduction fused with two ReLUs in bfloat16, such as
    `jnp.sum(relu(relu(x) * y - 1).astype(float32))`. In float32 the result is correct.
    """
    return x.astype(np.promote_types(x.dtype, np.float32))


def as_logits_fn(model: Any, variables: PyTree) -> Callable[[Float[Array, "n h w c"]], Float[Array, "n classes"]]:
    """The network in inference mode as a function of images, for attacks and `evaluate`.

    Attacks do not recompile for the same network with other variables.

    Args:
      model: Flax module. `model.apply(variables, images, train=False)` returns logits, or a tuple whose first element
        is the logits.
      variables: Its variables. They are copied to the device once.

    Returns:
      A function from images [N, H, W, C] to logits [N, classes].

    Example:
      >>> variables = jax.eval_shape(WideResNet(10, 1).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> logits_fn = functools.partial(_logits, WideResNet(10, 1), variables)
      >>> as_logits_fn(WideResNet(10, 1), {}).func == logits_fn.func
      True
    """
    return functools.partial(_logits, model, jax.device_put(variables))


def _logits(model, variables, images):
    outputs = model.apply(variables, images, train=False)
    return outputs[0] if isinstance(outputs, tuple) else outputs
