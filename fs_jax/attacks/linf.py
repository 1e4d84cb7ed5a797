"""The L-infinity ball around images in [0, 1]: projection, random starts, and the checks that all attacks share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.images import check_classes, check_images, check_labels, known
from fs_jax._utils.keys import image_keys

LogitsFn = Callable[[Float[Array, "n h w c"]], Float[Array, "n classes"]]
Scalar = float | Float[Array, ""]  # a number; under `jit` perhaps a traced one


def project(
    images: Float[Array, "n h w c"], center: Float[Array, "n h w c"], epsilon: Scalar
) -> Float[Array, "n h w c"]:
    """Project images onto the ball around `center` and onto [0, 1].

    clip(clip(x, c - epsilon, c + epsilon), 0, 1), which is also the Euclidean projection onto the intersection.

    Args:
      images: Images [N, H, W, C] to project.
      center: Images in [0, 1], the centres of the balls.
      epsilon: Radius, in units of the [0, 1] range.

    Returns:
      Images [N, H, W, C].

    Example:
      >>> float(project(jnp.array(0.9), jnp.array(0.5), 0.1).round(3))
      0.6
    """
    return jnp.clip(jnp.clip(images, center - epsilon, center + epsilon), 0, 1)


def random_start(
    rng: Key[Array, ""] | Key[Array, "n"], images: Float[Array, "n h w c"], epsilon: Scalar
) -> Float[Array, "n h w c"]:
    """Images plus noise uniform in [-epsilon, epsilon]. As in the released code, the sum isn't clipped to [0, 1].

    Args:
      rng: A key, of which image i uses `fold_in(rng, i)`; or one key for each image. With one key each, the noise of
        an image doesn't depend on its batch.
      images: Images [N, H, W, C].
      epsilon: Radius, in units of the [0, 1] range.

    Returns:
      Images [N, H, W, C], each pixel within epsilon of the image's.

    Example:
      >>> start = random_start(jax.random.key(0), jnp.ones((1, 2, 2, 1)), 0.1)
      >>> bool((abs(start - 1) <= 0.1).all())
      True
    """

    def noise(key):
        return jax.random.uniform(key, images.shape[1:], images.dtype, -epsilon, epsilon)

    return images + jax.vmap(noise)(image_keys(rng, len(images)))


def held_fixed(logits_fn: LogitsFn, images: Float[Array, "n h w c"]) -> LogitsFn:
    """The same function of images of this shape, with everything that it captures held constant.

    Gradients don't flow through an attack into the network's weights, and no second derivatives are traced.

    Example:
      >>> total = lambda scale: held_fixed(lambda x: scale * x, jnp.ones(2))(jnp.ones(2)).sum()
      >>> float(jax.grad(total)(3.0))
      0.0
    """
    # (`jax.closure_convert` does this too, but keeps the function alive, and with it everything that it captures.)
    trace = jax.make_jaxpr(lambda x: logits_fn(x))(images)
    captured = jax.lax.stop_gradient(trace.consts)
    return lambda x: jax.core.eval_jaxpr(trace.jaxpr, captured, x)[0]


def check_attack(
    logits_fn: LogitsFn,
    images: Float[Array, "n h w c"],
    labels: Int[Array, "n"] | None,
    *,
    epsilon: Scalar,
    num_steps: int,
    step_size: Scalar | None = None,
    start: Float[Array, "n h w c"] | None = None,
) -> int:
    """Check the arguments of an attack. Under `jit`, shapes and types are checked, but values can't be.

    Attacks that choose their step size pass none, and some take no `start`.

    Returns:
      The number of classes of the network.

    Raises:
      TypeError, ValueError: with the argument, what was expected, what was given, and what to do.
    """
    check_images(images)
    if start is not None and start.shape != images.shape:
        raise ValueError(f"start: expected the images' shape {images.shape}; got {start.shape}.")
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
        raise TypeError(f"num_steps: expected an integer; got {num_steps!r}.")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1; got {num_steps}.")
    for name, value in (("epsilon", epsilon), ("step_size", 0 if step_size is None else step_size)):
        number = known(value)
        if number is not None and not 0 <= number <= 1:  # NaN is in no range
            raise ValueError(f"{name}: expected a number in [0, 1], the range of the images; got {value}. Try 8/255.")
    num_classes = check_logits_fn(logits_fn, images)
    if labels is not None:
        check_labels(labels, images)
        check_classes(labels, num_classes)
    return num_classes


def check_finite(*results: Array) -> None:
    """Raise an error if the results of an attack aren't finite. Under `jit`, values can't be checked.

    NaN logits would otherwise be read as class 0, which `argmax` returns for them.

    Raises:
      FloatingPointError: with what to do.

    Example:
      >>> check_finite(jnp.array([jnp.nan]))
      Traceback (most recent call last):
      FloatingPointError: logits_fn: expected finite logits and gradients; got others under attack. Look for...
    """
    for result in results:
        if not isinstance(result, jax.core.Tracer) and not jnp.isfinite(result).all():
            raise FloatingPointError(
                "logits_fn: expected finite logits and gradients; got others under attack. Look for overflow in the "
                "network, or use float32."
            )


def check_logits_fn(logits_fn: Callable, *inputs: Array | jax.ShapeDtypeStruct) -> int:
    """Check that a network takes these inputs, and that its output is logits [N, classes].

    Args:
      logits_fn: Network, from images to logits; a randomised one, from images and keys.
      inputs: Images [N, H, W, C], and keys [N] for a randomised network, or their shapes.

    Returns:
      The number of classes of the network.

    Raises:
      ValueError: if the network fails, or its output isn't logits; with what to do.

    Example:
      >>> check_logits_fn(lambda x: (x.sum((1, 2)), x), jnp.ones((2, 4, 4, 3)))
      Traceback (most recent call last):
      ValueError: logits_fn: expected logits of shape [N, classes]; got a tuple of 2. Take the logits, for example...
    """
    images, *keys = inputs
    try:
        # A new function, because JAX caches the result for a function that it has seen, whatever it captures now.
        logits = jax.eval_shape(lambda *arguments: logits_fn(*arguments), *inputs)
    except Exception as error:  # whatever the network raises
        if isinstance(error, _CONVERSIONS) or "Tracer" in str(error):  # the latter in PyTorch's errors
            raise ValueError(
                f"logits_fn: expected a function that JAX can trace; it raised {type(error).__name__}: "
                f"{str(error).splitlines()[0].rstrip('.')}. Don't convert the input to NumPy, to a Python number or to "
                "a tensor of another framework: use jax.numpy in place of numpy, and rewrite a PyTorch network in JAX."
            ) from error
        shape = ", ".join(map(str, images.shape[1:]))
        raise ValueError(
            f"logits_fn: expected a function that takes images (N, {shape}){' and one key for each' if keys else ''}, "
            f"in inference mode (an NNX module after `eval()`); it raised {type(error).__name__}: {error}"
        ) from error
    expected = "logits_fn: expected logits of shape [N, classes]; got"
    if isinstance(logits, (tuple, list)):
        raise ValueError(
            f"{expected} a {type(logits).__name__} of {len(logits)}. Take the logits, for example by "
            "logits_fn = lambda x: model(x)[0]."
        )
    if not hasattr(logits, "shape"):
        raise ValueError(f"{expected} a {type(logits).__name__}. Let logits_fn return the logits alone.")
    if len(logits.shape) != 2 or logits.shape[0] != images.shape[0]:
        raise ValueError(f"{expected} {logits.shape} for {images.shape[0]} images.")
    return logits.shape[1]


_CONVERSIONS = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.ConcretizationTypeError,
)
