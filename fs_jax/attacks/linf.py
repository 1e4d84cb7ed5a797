"""The L-infinity ball on images in [0, 1]: projection, random starts, and the checks that all attacks share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fs_jax._utils.images import check_classes, check_images, check_labels, known
from fs_jax._utils.keys import image_keys

LogitsFn = Callable[[Float[Array, "n h w c"]], Float[Array, "n classes"]]
Scalar = float | Float[Array, ""]  # a number, or one that a program is traced with


def project(
    images: Float[Array, "n h w c"], center: Float[Array, "n h w c"], epsilon: Scalar
) -> Float[Array, "n h w c"]:
    """The nearest images in the ball around `center` and in [0, 1].

    clip(clip(x, c - epsilon, c + epsilon), 0, 1), which is the Euclidean projection on the intersection too.

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
    """Images plus noise uniform in [-epsilon, epsilon]; not clipped to [0, 1], as the released code starts.

    Args:
      rng: A key, from which image i takes `fold_in(rng, i)`; or a key for each image. With keys of their own,
        the images' noise doesn't depend on how they are split in batches.
      images: Images [N, H, W, C].
      epsilon: Radius, in units of the [0, 1] range.

    Returns:
      Images [N, H, W, C], each pixel within epsilon of its own.

    Example:
      >>> start = random_start(jax.random.key(0), jnp.ones((1, 2, 2, 1)), 0.1)
      >>> bool((abs(start - 1) <= 0.1).all())
      True
    """

    def noise(key):
        return jax.random.uniform(key, images.shape[1:], images.dtype, -epsilon, epsilon)

    return images + jax.vmap(noise)(image_keys(rng, len(images)))


def held_fixed(logits_fn: LogitsFn, images: Float[Array, "n h w c"]) -> LogitsFn:
    """The same function of images of this shape, with all that it closes over held constant.

    Derivatives through an attack are zero, and no second derivatives are traced.

    Example:
      >>> total = lambda scale: held_fixed(lambda x: scale * x, jnp.ones(2))(jnp.ones(2)).sum()
      >>> float(jax.grad(total)(3.0))
      0.0
    """
    # (`jax.closure_convert` does this too, but keeps the function alive, and with it all that it captures.)
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
) -> None:
    """Reject what no attack can work on. Values are looked at where they are known, so not under jit.

    Attacks that choose their step size have none to check, and some take no `start`.

    Raises:
      TypeError, ValueError: naming the argument, what was expected, what was given, and what to do.
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
    if labels is not None:
        check_labels(labels, images)
        check_classes(labels, jax.eval_shape(logits_fn, images).shape[-1])
