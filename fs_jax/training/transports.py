"""The registry of transport solvers that configurations can name. To add one, add a line here."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from fs_jax import ot
from fs_jax._utils.validation import check_choice
from fs_jax.config import TransportConfig

Solve = Callable[[Array], ot.Transport]

TRANSPORTS: dict[str, Callable[[TransportConfig], Solve]] = {
    "sinkhorn": lambda c: functools.partial(ot.sinkhorn, reg=c.reg, num_iters=c.num_iters),
    "ipot": lambda c: functools.partial(ot.ipot, beta=c.beta, num_iters=c.num_iters),
    "released_sinkhorn": lambda c: functools.partial(ot.released_sinkhorn, reg=c.reg),
    # Baselines: match each image with itself only, or with all images equally.
    "identity": lambda c: lambda cost: ot.fixed_plan(cost, jnp.eye(len(cost)) / len(cost)),
    "independent": lambda c: lambda cost: ot.fixed_plan(cost, jnp.full(cost.shape, 1 / cost.size)),
}


def make_transport(config: TransportConfig) -> Solve:
    """Build a configuration's transport solver: a function from a cost matrix [n, n] to a `fs_jax.ot.Transport`.

    Raises:
      ValueError: for a solver that is not in `TRANSPORTS`; the message suggests the nearest name.

    Example:
      >>> import jax.numpy as jnp
      >>> make_transport(TransportConfig())(jnp.ones((2, 2))).plan.tolist()
      [[0.25, 0.25], [0.25, 0.25]]
    """
    check_choice("transport.solver", config.solver, TRANSPORTS)
    return TRANSPORTS[config.solver](config)
