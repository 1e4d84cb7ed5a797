"""Wide-ResNet (Zagoruyko & Komodakis, 2016), as the feature-scattering paper's code has it, in Flax Linen."""

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
    """Wide-ResNet of pre-activation blocks, from images in [0, 1] to logits and pooled features.

    `depth = 6n + 4` layers: a 3 x 3 convolution to 16 channels, three groups of n blocks with 16, 32 and 64 times
    `width` channels (the second and third halve the resolution), BatchNorm, ReLU, the mean over positions, and a linear
    classifier. Images are normalised inside, to (images - mean) / std.

    Args:
      depth: Number of layers, 6n + 4.
      width: Widening factor k of "WRN-depth-k".
      num_classes: Number of logits.
      mean: Subtracted from the images: a number, or a tuple with one for each channel. The paper's mean and std of 0.5
        make [-1, 1]; networks from elsewhere have others.
      std: Divides what is left, as `mean`.
      dtype: Precision of the convolutions' arithmetic. Parameters are float32; BatchNorm, ReLU, the pooled features
        and the classifier are computed in float32 or the wider type of `dtype`.
      axis_name: Mapped axis over whose devices train-mode BatchNorm takes its moments (None: each device's own).

    Returns:
      From `apply(variables, images, train=False)`: logits [N, num_classes] and features [N, 64 * width]. With
      `train=True` BatchNorm uses the batch's moments, and with `mutable=["batch_stats"]` moves the running ones.

    Raises:
      ValueError: if depth isn't 6n + 4, a size or `std` isn't positive, or the images aren't [N, H, W, C].

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
        ModelConfig(depth=self.depth, width=self.width)  # the one place that knows which sizes exist
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
        for name, value in (("mean", self.mean), ("std", self.std)):
            if np.size(value) not in (1, images.shape[-1]):
                raise ValueError(f"{name}: expected one number, or {images.shape[-1]}, one per channel; got {value}.")
        dtype = images.dtype if jnp.issubdtype(images.dtype, jnp.floating) else jnp.result_type(float)
        mean, std = (_per_channel(jnp.asarray(value, dtype), images.ndim) for value in (self.mean, self.std))
        normalised = (images.astype(dtype) - mean) / std
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
            self.num_classes, dtype=features.dtype, precision="highest", kernel_init=_dense_init, name="fc"
        )(features)
        return logits, features


class _Block(nn.Module):
    """Pre-activation residual block: two 3 x 3 convolutions; a 1 x 1 shortcut where the number of channels changes."""

    channels: int
    stride: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train: bool):
        activated = nn.relu(BatchNorm(self.axis_name, name="bn1")(_wide(x), train=train))
        if x.shape[-1] == self.channels:
            shortcut = x
        else:  # the shortcut, too, starts after the activation
            shortcut = _Conv(self.channels, 1, self.stride, self.dtype, name="shortcut")(activated)
        y = _Conv(self.channels, 3, self.stride, self.dtype, name="conv1")(activated)
        y = nn.relu(BatchNorm(self.axis_name, name="bn2")(_wide(y), train=train))
        return shortcut + _Conv(self.channels, 3, 1, self.dtype, name="conv2")(y)


class _Conv(nn.Module):
    """`conv2d` with its kernel, without a bias."""

    channels: int
    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", _conv_init, shape)
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    In train mode, with the batch's mean m and biased variance v over n values per channel,
    y = scale (x - m) / sqrt(v + 1e-5) + bias, and the running statistics move by a tenth towards m and towards the
    *unbiased* v n / (n - 1), as PyTorch's do and `flax.linen.BatchNorm`'s don't. Otherwise the running ones are used.

    Args:
      axis_name: Mapped axis over whose devices the moments are taken; None for each device's own.

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
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

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

        The variance is E[(x - shift)^2] - E[x - shift]^2: one pass, and a shift near the mean (the running one, held
        constant) takes away the cancellation that E[x^2] - E[x]^2 suffers from.
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
    """Values of the last axis, of a rank to compute with `ndim` axes."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def _wide(x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
    """`x` in float32 at least, for what is no convolution.

    Rounding commutes with a ReLU, so that one before the next convolution's rounding gives the same values as one
    after it. But XLA's CPU backend (jaxlib 0.12.0) gives NaN for a reduction whose fusion has two ReLUs in bfloat16:
    `jnp.sum(relu(relu(x) * y - 1).astype(float32))` is enough. In float32 the same is right.
    """
    return x.astype(np.promote_types(x.dtype, np.float32))


def as_logits_fn(model: Any, variables: PyTree) -> Callable[[Float[Array, "n h w c"]], Float[Array, "n classes"]]:
    """A network as attacks see it: `logits_fn(images)`, in inference mode. Of other variables it compiles nothing anew.

    Args:
      model: Flax module whose `apply(variables, images, train=False)` gives logits, or a tuple that begins with them.
      variables: Its variables; they are put on the device once.

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
