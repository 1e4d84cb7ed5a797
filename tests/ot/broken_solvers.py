"""A correct solver, and solvers that are each broken in one way. The checks have to find the defect and name it."""

import numpy as np
from scipy.special import logsumexp

from fs_jax.ot.testing import Claims


def log(weights):
    with np.errstate(divide="ignore"):
        return np.log(weights)


def potentials(cost, a, b, reg, iterations=20_000, threshold=1e-8):
    """Potentials by Sinkhorn in the log domain, in NumPy."""
    f, g, error = np.zeros(len(a)), np.zeros(len(b)), np.inf
    present = np.ix_(a > 0, b > 0)
    for number in range(iterations):
        g = np.where(b > 0, reg * (log(b) - logsumexp((f[a > 0, None] - cost[a > 0]) / reg, axis=0)), 0)
        f = np.where(a > 0, reg * (log(a) - logsumexp((g[b > 0] - cost[:, b > 0]) / reg, axis=1)), 0)
        if number % 20 == 0:
            plan = np.exp((f[:, None] + g - cost)[present] / reg)
            error = np.abs(plan.sum(0) - b[b > 0]).sum()
            if error <= threshold:
                break
    return f, g, bool(error <= threshold)


def plan_of(cost, a, b, reg, f, g):
    there = (a > 0)[:, None] & (b > 0)
    return np.where(there, np.exp(np.where(there, (f[:, None] + g - cost) / reg, 0)), 0)


def right(cost, a, b, reg):
    f, g, converged = potentials(cost, a, b, reg)
    plan = plan_of(cost, a, b, reg, f, g)
    primal_cost = np.sum(plan * np.where((a > 0)[:, None] & (b > 0), cost, 0))
    ratio = np.log(np.where(plan > 0, plan, 1) / np.where(plan > 0, np.outer(a, b), 1))
    reg_cost = primal_cost + reg * (np.sum(plan * ratio) - plan.sum() + a.sum() * b.sum())
    costs = {"primal_cost": primal_cost, "reg_cost": reg_cost}
    return {"plan": plan, "f": f, "g": g, "converged": converged, **costs}


def stopped_early(cost, a, b, reg):
    """Returns the plan after three iterations, and reports that it has converged."""
    f, g, _ = potentials(cost, a, b, reg, iterations=3)
    return {"plan": plan_of(cost, a, b, reg, f, g), "converged": True}


def flag_before_the_plan(cost, a, b, reg):
    """Converges, but then rounds the plan to half precision."""
    answer = right(cost, a, b, reg)
    return {"plan": answer["plan"].astype(np.float16).astype(float), "converged": answer["converged"]}


def dropped_mask(cost, a, b, reg):
    """Gives points without mass a small mass, to avoid the logarithm of zero."""
    a, b = (np.maximum(weights, 1e-6 * weights.sum()) for weights in (a, b))
    return {"plan": right(cost, a, b * (a.sum() / b.sum()), reg)["plan"]}


def flushed_kernel(cost, a, b, reg):
    """Algorithm 1 as printed, with a kernel in float32."""
    kernel = np.exp((-cost / reg).astype(np.float32)).astype(float)
    u = np.ones(len(a))
    with np.errstate(all="ignore"):
        for _ in range(2000):
            v = np.where(b > 0, b / (kernel.T @ u), 0)
            u = np.where(a > 0, a / (kernel @ v), 0)
        return {"plan": u[:, None] * kernel * v}


def cost_of_a_shifted_matrix(cost, a, b, reg):
    """Subtracts the smallest cost, and forgets to add it again."""
    answer = right(cost, a, b, reg)
    return {**answer, "primal_cost": answer["primal_cost"] - cost.min() * answer["plan"].sum()}


def entropy_of_another_sign(cost, a, b, reg):
    """Subtracts the entropic term instead of adding it."""
    answer = right(cost, a, b, reg)
    return {**answer, "reg_cost": 2 * answer["primal_cost"] - answer["reg_cost"]}


def potentials_of_another_gauge(cost, a, b, reg):
    """Returns f without reg log a, as if the plan were a b exp(...)."""
    answer = right(cost, a, b, reg)
    return {**answer, "f": answer["f"] - reg * np.where(a > 0, log(np.where(a > 0, a, 1)), 0)}


def too_good(cost, a, b, reg):
    """Reports that its marginals are exact."""
    answer = right(cost, a, b, reg)
    return {"plan": answer["plan"] * 1.0001, "marginal_error": 0.0}


def swapped_weights(cost, a, b, reg):
    """Takes a for b, and b for a, where there are as many rows as columns."""
    return right(cost, b, a, reg) if len(a) == len(b) else right(cost, a, b, reg)


def dropped_square_mask(cost, a, b, reg):
    """Drops the mask where there are as many rows as columns."""
    return dropped_mask(cost, a, b, reg) if len(a) == len(b) else right(cost, a, b, reg)


def shifting_in_place(cost, a, b, reg):
    """Subtracts the smallest cost from the caller's array."""
    cost -= cost.min()
    return right(cost, a, b, reg)


def words(cost, a, b, reg):
    """Returns a plan of strings."""
    return {"plan": [["none"] * len(b)] * len(a)}


def raising(cost, a, b, reg):
    """Raises an error if there are more columns than rows."""
    if cost.shape[0] < cost.shape[1]:
        raise IndexError("index 5 is out of bounds")
    return right(cost, a, b, reg)


def raising_in_a_callback(cost, a, b, reg):
    """Raises an error whose message has the traceback of another one, as JAX does for errors in callbacks."""
    raise RuntimeError("INTERNAL: failed: Traceback (most recent call last):\n  File x\nOSError: no disk\nNote: wait")


def narrow(cost, a, b, reg):
    """Computes in float32, although it claims nothing."""
    return {"plan": np.asarray(right(cost, a, b, reg)["plan"], np.float32)}


def admitting(cost, a, b, reg):
    """Stops early, and reports it."""
    return {**stopped_early(cost, a, b, reg), "converged": False}


def constant_potentials(cost, a, b, reg):
    """Differentiates the plan as if the potentials were constants."""
    import jax
    import jax.numpy as jnp

    from fs_jax.ot import sinkhorn

    result = jax.lax.stop_gradient(sinkhorn(cost, a, b, reg=reg, num_iters=5000, threshold=1e-8, grad="none"))
    there = (a > 0)[:, None] & (b > 0)
    exponents = jnp.where(there, (result.f[:, None] + result.g[None, :] - cost) / reg, 0)
    return {"plan": jnp.where(there, jnp.exp(exponents), 0)}


constant_potentials.claims = Claims(marginal_error=1e-6, gradients=("cost",))


def constant_plan(cost, a, b, reg):
    """Differentiates the plan correctly, but treats it as a constant in the primal cost."""
    import jax

    from fs_jax.ot import sinkhorn

    plan = sinkhorn(cost, a, b, reg=reg, num_iters=5000, threshold=1e-8).plan
    return {"plan": plan, "primal_cost": (jax.lax.stop_gradient(plan) * cost).sum()}


constant_plan.claims = Claims(marginal_error=1e-6, gradients=("cost",), zeros=False)


def constant_in_second_order(cost, a, b, reg):
    """First derivatives are right; second derivatives treat the linear system of the first as a constant."""
    import functools

    import jax
    import jax.numpy as jnp

    from fs_jax.ot import sinkhorn

    solve = functools.partial(sinkhorn, reg=reg, num_iters=5000, threshold=1e-8, grad="implicit")

    @jax.custom_jvp
    def plan(cost):
        return solve(cost, a, b).plan

    @plan.defjvp
    def _(primals, tangents):
        held = jax.lax.stop_gradient(primals[0])
        _, linear = jax.linearize(lambda c: solve(c, a, b).plan, held)
        return plan(primals[0]), linear(tangents[0])

    return {"plan": plan(jnp.asarray(cost))}


constant_in_second_order.claims = Claims(marginal_error=1e-6, gradients=("cost",), second_order=True)


def scaled_gradient(cost, a, b, reg, factor=1.0):
    """The gradient by `a` is multiplied by a factor."""
    import jax

    from fs_jax.ot import sinkhorn

    a = factor * a + jax.lax.stop_gradient((1 - factor) * a)
    out = sinkhorn(cost, a, b, reg=reg, num_iters=5000, threshold=1e-10, grad="implicit")
    return {"plan": out.plan, "converged": out.converged}


def half_gradient(cost, a, b, reg):
    """The gradient with respect to `a` is half of the right one."""
    return scaled_gradient(cost, a, b, reg, 0.5)


half_gradient.claims = Claims(gradients=("cost", "a", "b"), batched=True)


def claims_a_dictionary(cost, a, b, reg):
    """Its `claims` are a dictionary instead of `Claims`."""


claims_a_dictionary.claims = {"dtype": "float32"}

for solver in (
    right, stopped_early, flag_before_the_plan, dropped_mask, flushed_kernel, cost_of_a_shifted_matrix,
    entropy_of_another_sign, potentials_of_another_gauge, too_good, raising, words, swapped_weights,
    dropped_square_mask, shifting_in_place,
):  # fmt: skip
    solver.claims = Claims(marginal_error=1e-6)
