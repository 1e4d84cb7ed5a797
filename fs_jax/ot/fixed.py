"""A transport with a given plan: a baseline that shows what solving the problem contributes."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _checks
from fs_jax.ot.result import Status, Transport, marginal_error, narrowed


def fixed_plan(cost: Float[Array, "n m"], plan: Float[Array, "n m"]) -> Transport:
    """The transport of a given plan T between uniform marginals: its cost is ⟨T, C⟩, with derivative T.

    The identity T = I / n matches point i with point i. The independent coupling T = 1 / (n m) matches each point with
    all points equally; it is the limit of Sinkhorn's plan for large `reg`.

    Args:
      cost: Cost matrix [n, m].
      plan: The plan [n, m], held fixed.

    Returns:
      A `Transport`. A given plan has no potentials: f and g are zero, and `reg_cost` equals `primal_cost`.

    Raises:
      TypeError, ValueError: if the cost is not a matrix of finite numbers, or the plan's shape is not the cost's.

    Example:
      >>> fixed_plan(jnp.array([[0.0, 2.0], [4.0, 0.0]]), jnp.full((2, 2), 0.25)).primal_cost.item()
      1.5
    """
    cost, a, b, dtype = _checks.problem(cost, None, None)
    if jnp.shape(plan) != cost.shape:
        raise ValueError(f"plan: expected the shape of cost, {cost.shape}; got {jnp.shape(plan)}.")
    plan = narrowed(lax.stop_gradient(jnp.asarray(plan).astype(cost.dtype)), dtype)
    primal_cost = narrowed(jnp.sum(plan.astype(cost.dtype) * cost), dtype)
    finite = jnp.all(jnp.isfinite(plan)) & jnp.isfinite(primal_cost)
    return Transport(
        plan=plan,
        primal_cost=primal_cost,
        reg_cost=primal_cost,
        f=jnp.zeros_like(a, dtype),
        g=jnp.zeros_like(b, dtype),
        marginal_error=marginal_error(plan, a, b),
        num_iters=jnp.zeros((), jnp.int32),
        status=jnp.where(finite, Status.LIMIT, Status.NOT_FINITE).astype(jnp.int32),
    )
