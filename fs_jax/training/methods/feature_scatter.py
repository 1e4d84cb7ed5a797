"""Feature-scattering adversarial training, the paper's method."""

import functools
import inspect
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from fs_jax import attacks, ot
from fs_jax._utils.validation import check_choice, check_number
from fs_jax.attacks.scatter import TransportFn
from fs_jax.training.losses import smoothed_cross_entropy
from fs_jax.training.methods.method import Entry, Method, accuracy, check_settings, infer

Scope = Literal["device", "global"]

# Algorithm 1 with the paper's entropic weight and number of iterations.
_paper_transport = functools.partial(ot.sinkhorn, reg=0.01, num_iters=50)


# Up to this number of images, each device solves the whole problem: on a GPU, one kernel does all its iterations,
# whereas with sharded rows the devices wait for each other in every iteration.
MOST_GATHERED = 256


def feature_scatter(
    *,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    num_steps: int = 1,
    smoothing: float = 0.5,
    transport: TransportFn = _paper_transport,
    scope: Scope = "global",
    penultimate: int = 0,
    clean_weight: float = 0.0,
) -> Method:
    """Feature-scattering adversarial training.

    The attack perturbs the images x of a batch together, without their labels. It maximises the transport cost between
    the network's logits f for the natural and for the attacked images,

        max <T, C>    over x' with |x' - x| <= epsilon,    C_ij = 1 - cos(f(x_i), f(x'_j))

    where T is the transport plan for the cost C. The loss is the smoothed cross-entropy of the attacked images.

    The attack uses the network in inference mode. The training pass, on the attacked images (and with `clean_weight` on
    the natural ones too), updates BatchNorm's running statistics.

    Args:
      epsilon: Radius, in units of [0, 1].
      step_size: Size of an attack step, in units of [0, 1]; by default epsilon.
      num_steps: Number of attack steps.
      smoothing: The paper's Delta: the true class has 1 - smoothing.
      transport: Function from a cost matrix to a `fs_jax.ot.Transport`; by default Algorithm 1 (Sinkhorn) with reg 0.01
        and 50 iterations.
      scope: "global" for one transport problem over the images of all devices, "device" for one per device. For the
        global problem over N > 256 images on D devices, a transport with an `axis_name` argument, such as
        `fs_jax.ot.sinkhorn`, has N/D rows per device; any other, such as `fs_jax.ot.ipot`, is solved whole, [N, N],
        on each.
      penultimate: 0 to scatter the logits, as the released code does; 1 to scatter the network's second output, the
        features before the last layer.
      clean_weight: Weight w of the loss on natural images, in [0, 1). The loss on attacked images has weight 1 - w. By
        default 0, as in the paper.

    Returns:
      The method. Its metrics are `accuracy` on the attacked images, `transport_cost` ⟨T, C⟩, the plan's
      `marginal_error` (L1) and, with penultimate=0, `natural_accuracy` (in inference mode).

    Raises:
      TypeError, ValueError: for a setting outside its range.

    Example:
      >>> method = feature_scatter(transport=functools.partial(ot.ipot, beta=1.0))

    Source: Zhang & Wang, NeurIPS 2019, algorithm 1.
    """
    step_size = epsilon if step_size is None else step_size
    check_settings(smoothing=smoothing, epsilon=epsilon, step_size=step_size, num_steps=num_steps)
    check_choice("scope", scope, get_args(Scope))
    if penultimate not in (0, 1):  # 1.0 too: numbers of the command line are floats
        raise ValueError(f"penultimate: expected 0 or 1; got {penultimate!r}.")
    check_number("clean_weight", clean_weight, at_least=0, below=1)

    def loss(apply, variables, batch, context):
        images, labels = batch["images"], batch["labels"]
        cost, solve = _over_devices(transport, len(images), context.axis_name if scope == "global" else None)
        scattered, natural, solved = attacks.scatter(
            infer(apply, variables, features=bool(penultimate)), context.keys, images,
            epsilon=epsilon, step_size=step_size, num_steps=num_steps, start=batch.get("start"),
            cost=cost, transport=solve,
        )  # fmt: skip
        trained_on = jnp.concatenate([scattered, images]) if clean_weight else scattered
        logits, variables = apply(variables, trained_on, train=True)
        attacked, clean = logits[: len(labels)], logits[len(labels) :]
        value = (1 - clean_weight) * jnp.mean(smoothed_cross_entropy(attacked, labels, smoothing))
        if clean_weight:
            value += clean_weight * jnp.mean(smoothed_cross_entropy(clean, labels, smoothing))
        metrics = {
            "accuracy": accuracy(attacked, labels),
            "transport_cost": solved.primal_cost,
            "marginal_error": solved.marginal_error,
        }
        if not penultimate:  # the natural features are logits
            metrics["natural_accuracy"] = accuracy(natural, labels)
        return value, (variables, metrics)

    return Method(loss)


def _over_devices(transport, batch_size, axis_name):
    """The cost between natural and attacked logits, and the transport, of one problem over the devices of an axis.

    A device has the rows of its own natural images; or all rows, if they are few, or if no argument of the transport is
    named `axis_name`. The result is the same on every device, and the transpose of the gathering sums the devices'
    gradients. So the gradient with respect to a device's images is multiplied by the number of devices. Its sign is
    unchanged, and the attack uses only the sign.
    """
    if axis_name is None:
        return ot.cosine_cost, transport
    is_sharded = batch_size * jax.lax.axis_size(axis_name) > MOST_GATHERED
    is_sharded = is_sharded and "axis_name" in inspect.signature(transport).parameters
    cost = functools.partial(_gathered_cost, gathers_rows=not is_sharded, axis_name=axis_name)
    return cost, functools.partial(transport, axis_name=axis_name) if is_sharded else transport


def _gathered_cost(x, y, gathers_rows, axis_name):
    """Cosine cost from this device's x, or those of all devices, to the y of all devices."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, tiled=True)
    x, y = gather(x) if gathers_rows else x, gather(y)
    return ot.cosine_cost(x, y)


FEATURE_SCATTER = Entry(
    "feature_scatter",
    "the paper's method: attacks that scatter the features of a batch; 1 step by default",
    feature_scatter,
)
