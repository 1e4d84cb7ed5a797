"""The Sinkhorn divergence: entropic transport without its bias, so that equal sets are at distance zero."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Bool, Float, Int

from fs_jax.ot import _checks
from fs_jax.ot.result import Status, Transport
from fs_jax.ot.sinkhorn import sinkhorn


class Divergence(NamedTuple):
    """The result of `sinkhorn_divergence`: the value, and the three transports that it is computed from.

    Attributes:
        value: OT(a, b) - (OT(a, a) + OT(b, b)) / 2, where each term is the `reg_cost` of its transport.
        xy: the transport from the first set to the second.
        xx: the transport from the first set to itself.
        yy: the transport from the second set to itself.
    """

    value: Float[Array, ""]
    xy: Transport
    xx: Transport
    yy: Transport

    @property
    def status(self) -> Int[Array, ""]:
        """The worst `Status` of the three: NOT_FINITE if one of them is, else the largest value."""
        each = jnp.stack([self.xy.status, self.xx.status, self.yy.status])
        return jnp.where(jnp.any(each == Status.NOT_FINITE), Status.NOT_FINITE, jnp.max(each))

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether all three have converged."""
        return self.status == Status.CONVERGED


export.register_namedtuple_serialization(Divergence, serialized_name="fs_jax.ot.Divergence")


@_checks.suggests_names
def sinkhorn_divergence(
    cost_xy: Float[Array, "n m"],
    cost_xx: Float[Array, "n n"],
    cost_yy: Float[Array, "m m"],
    a: Float[Array, " n"] | Bool[Array, " n"] | None = None,
    b: Float[Array, " m"] | Bool[Array, " m"] | None = None,
    *,
    reg: float | Float[Array, ""],
    num_iters: int = 100,
    threshold: float | Float[Array, ""] | None = None,
    method: Literal["stabilized", "kernel", "log"] = "stabilized",
    grad: Literal["unroll", "implicit", "envelope", "none"] = "envelope",
) -> Divergence:
    """Debiased entropic transport between two sets.

        S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2,    OT(a, b) = min over plans T of ⟨T, C⟩ + reg·KL(T | a bᵀ)

    OT alone is biased: it is not zero between equal sets, and it is minimal for a set that has shrunk. S is zero for
    equal sets and positive for others if exp(-C / reg) is positive definite (squared and plain Euclidean costs), and it
    tends to the exact cost as reg tends to zero. The entropic term here is the KL divergence from the product a bᵀ. The
    divergence with the entropy -Σ T log T instead has the same value only if both sets have the same weights.

    Args:
        cost_xy: cost of moving a unit of mass from point i of the first set to point j of the second, [n, m].
        cost_xx: cost matrix of the first set, [n, n]; symmetric.
        cost_yy: cost matrix of the second set, [m, m]; symmetric.
        a: mass of the first set's points, 1/n by default; a weight of zero excludes the point. Or a boolean mask.
        b: mass of the second set's points, 1/m by default; the same total.
        reg: weight of the entropic term, in units of the cost.
        num_iters: maximum number of iterations of each of the three problems (static under jit).
        threshold: marginal error at which each problem stops; see `sinkhorn`.
        method: as in `sinkhorn`.
        grad: as in `sinkhorn`. The default, "envelope", is exact at convergence and costs nothing: at a solution, the
            derivative of the cost is the derivative at fixed plans. If both sets are the same array, the gradient is
            zero up to rounding, however early the iterations stop; if they are equal but one is held fixed, it is zero
            at convergence. It has first derivatives only; "implicit" has derivatives of any order.

    Returns:
        A `Divergence`: the value, and the three transports with their marginal errors and statuses. The value is a
        difference, so its rounding error is a few units in the last place of OT, or of reg times the mass if this is
        larger, not of the value.

    Raises:
        TypeError: if an argument is not as described.
        ValueError: if a shape or value is invalid; the message says which, and what is expected.

    Example:
        >>> from fs_jax.ot import sinkhorn_divergence, sqeuclidean_cost
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [3.0]])
        >>> costs = sqeuclidean_cost(x, y), sqeuclidean_cost(x, x), sqeuclidean_cost(y, y)
        >>> float(sinkhorn_divergence(*costs, reg=0.1).value.round(3))  # moved by 2
        4.0
        >>> float(sinkhorn_divergence(costs[1], costs[1], costs[1], reg=0.1).value)
        0.0

    Source: Genevay, Peyré and Cuturi (AISTATS 2018); Feydy et al. (AISTATS 2019).
    """
    n, m = _square("cost_xx", cost_xx), _square("cost_yy", cost_yy)
    if jnp.shape(cost_xy) != (n, m):
        raise ValueError(
            f"cost_xy: expected shape [n, m] for cost_xx [n, n] and cost_yy [m, m], here {(n, m)}; got "
            f"{jnp.shape(cost_xy)}"
        )
    options = {"reg": reg, "num_iters": num_iters, "threshold": threshold, "method": method, "grad": grad}
    xy = sinkhorn(cost_xy, a, b, **options)  # type: ignore[arg-type]
    xx = sinkhorn(cost_xx, a, a, **options)  # type: ignore[arg-type]
    yy = sinkhorn(cost_yy, b, b, **options)  # type: ignore[arg-type]
    return Divergence(xy.reg_cost - (xx.reg_cost + yy.reg_cost) / 2, xy, xx, yy)


def _square(name, cost):
    shape = jnp.shape(cost)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{name}: expected a square matrix, the cost from a set to itself; got shape {shape}")
    return shape[0]
