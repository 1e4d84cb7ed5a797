"""Sinkhorn's algorithm for entropic optimal transport (Algorithm 1)."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fs_jax.ot import _checks, _dispatch, _implicit, _sharding
from fs_jax.ot._iterations import Options
from fs_jax.ot._loops import RUN
from fs_jax.ot._sharding import AxisName
from fs_jax.ot.problem import make_problem
from fs_jax.ot.result import Transport, transport

METHODS = ("stabilized", "kernel", "log")
# The iterations for each `grad`; "envelope" and "none" use them without a derivative.
GRADS = {
    "unroll": _dispatch.unroll,
    "implicit": _implicit.solve,
    "envelope": _dispatch.solve,
    "none": _dispatch.solve,
}


@_checks.suggests_names
def sinkhorn(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | Bool[Array, " n"] | None = None,
    b: Float[Array, " m"] | Bool[Array, " m"] | None = None,
    *,
    reg: float | Float[Array, ""],
    num_iters: int = 100,
    threshold: float | Float[Array, ""] | None = None,
    method: Literal["stabilized", "kernel", "log"] = "stabilized",
    grad: Literal["unroll", "implicit", "envelope", "none"] = "unroll",
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    reg_start: float | Float[Array, ""] | None = None,
    history: bool = False,
    fused: bool = True,
    axis_name: AxisName | None = None,
) -> Transport:
    """Entropic optimal transport by the Sinkhorn algorithm.

        min over plans T with T 1 = a and Tᵀ 1 = b of ⟨T, C⟩ + reg·KL(T | a bᵀ)

    With K = exp(-C / reg) and u = 1 at the start, an iteration updates the columns and then the rows: v = b / (Kᵀ u),
    u = a / (K v). The plan is T = diag(u) K diag(v).

    Args:
        cost: cost of moving a unit of mass from row i to column j, [n, m]. Half precision is computed in float32 and
            returned in half precision, where a marginal error of 1e-3 (float16) or 1e-2 (bfloat16) is usual.
        a: mass of each row, 1/n by default. A weight of zero excludes the row from the problem exactly. Or a boolean
            mask: the rows that are True share a mass of one evenly.
        b: mass of each column, 1/m by default; the same total as `a`.
        reg: weight of the entropic term, in units of the cost (the paper's τ, ott-jax's epsilon).
        num_iters: maximum number of iterations (static under jit).
        threshold: stop when the marginal error (L1, in units of mass) of the returned plan is at most this. By
            default, all iterations are done. In a batch, each problem stops by its own error, and may have its own
            threshold. With a threshold below what the dtype can reach, the solver stops early with `Status.STALLED`.
        method: "stabilized" has the speed of matrix-vector products and works at any `reg`: it keeps the scalings in
            range, and uses the log domain when it can't. "log" always uses the log domain, and is several times slower.
            "kernel" is exactly Algorithm 1. It works while exp(-cost / reg) does not underflow (cost / reg up to about
            80 in float32); beyond that, the status is `Status.NOT_FINITE` or `Status.OUT_OF_RANGE`.
        grad: how to differentiate.
            "unroll" differentiates through the iterations (first derivatives, forward and reverse mode).
            "implicit" differentiates the fixed point (derivatives of any order). The iterations must have converged,
            otherwise the gradient is wrong (see `status`). If `reg` is very small, use float64: the relative error of
            the gradient is about 16 units in the last place, divided by the gap between the two largest singular values
            of the plan scaled to unit marginals. The potentials are determined up to a constant; their derivatives
            hold the mean of f fixed.
            "envelope" holds plan and potentials fixed: the gradient of `primal_cost` is the plan, and that of
            `reg_cost` is exact at convergence (first derivatives).
            "none" gives zero gradients.
        init: initial potentials (f, g), such as those of a similar problem. Since columns are updated first, only f
            matters, up to a constant.
        reg_start: start with this larger regularisation, such as the mean cost, and halve it every ten iterations down
            to `reg`. For sets of points with even weights and a `reg` below a hundredth of the costs, this reaches a
            marginal error of 1e-3 in a fraction of the iterations. With uneven weights, smaller thresholds or a larger
            `reg` it may need more iterations, so try both. These iterations are done before the `num_iters` at `reg`
            and counted in the result's `num_iters`. They are not differentiated: "unroll" treats their potentials like
            `init`. A value of at most `reg` changes nothing.
        history: also return the marginal error every ten iterations at `reg`, as `errors`.
        fused: in programs for an NVIDIA GPU, do all iterations of a problem in one kernel. This applies to float32, up
            to 256 points on a side, and `method` "stabilized"; otherwise the option has no effect.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the mapped axis over which the rows are sharded. `cost`, `a`
            and the f of `init` hold this device's rows, equally many on each device; `b`, the g of `init` and all
            other arguments are the same on all devices. In the result, `plan` and `f` hold this device's rows, and
            everything else is the same on all devices. Iterations, stopping and derivatives are those of the whole
            problem, but no device stores more than its rows; each iteration sums one vector [m] over devices.
            As with `jax.lax.psum`, JAX differentiates the sum of all devices' values; under `shard_map` with
            `check_vma` (the default), a value that is the same on all devices counts once. With "implicit", the
            gradient is NaN if conjugate gradients don't converge, as there is no dense solver to fall back on.

    Returns:
        A `Transport`.

    Raises:
        TypeError: if an argument is not as described.
        ValueError: if a shape or value is invalid; the message says which, and what is expected.
        NotImplementedError: if a second derivative is taken and `grad` has first derivatives only.

    Example:
        >>> import jax, jax.numpy as jnp, fs_jax.ot
        >>> from fs_jax.ot import sinkhorn
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> result = sinkhorn(cost, reg=0.1)
        >>> print(result.plan.round(3))
        [[0.5 0. ]
         [0.  0.5]]
        >>> batch = jax.vmap(lambda c: sinkhorn(c, reg=0.1, threshold=1e-3))(jnp.stack([cost, 2 * cost]))
        >>> batch.converged
        Array([ True,  True], dtype=bool)

    Source: Cuturi, Sinkhorn Distances (NeurIPS 2013); Algorithm 1 of Zhang and Wang (NeurIPS 2019), which omits the
    factors 1/n of the marginals.
    """
    axis_name = _checks.axis(axis_name)
    cost, a, b, dtype = _checks.problem(cost, a, b, axis_name)
    reg = _checks.positive("reg", reg, cost.dtype)
    num_iters = _checks.count("num_iters", num_iters)
    threshold = _checks.threshold(threshold, cost.dtype)
    method = _checks.choice("method", method, METHODS)
    grad = _checks.choice("grad", grad, tuple(GRADS))
    n, m = cost.shape
    f = None if init is None else _checks.potentials(init, n, m, cost.dtype)[0]
    reg_start = None if reg_start is None else _checks.positive("reg_start", reg_start, cost.dtype)
    options = Options(num_iters, method, bool(fused), dtype, bool(history), axis_name)
    return _solve(cost, a, b, reg, reg_start, threshold, f, options, grad)


@partial(jax.jit, static_argnames=("options", "grad"))
def _solve(cost, a, b, reg, reg_start, threshold, f, options, grad):
    if grad == "none":
        cost, a, b, reg, f = lax.stop_gradient((cost, a, b, reg, f))
    # "kernel" is exactly Algorithm 1, whose range is that of exp(-cost / reg): it doesn't centre the cost.
    centred, axis_name = options.method != "kernel", options.axis_name
    problem, (reg_start, threshold, f) = make_problem(
        cost, a, b, reg, reg_start, threshold, f, centred=centred, axis_name=axis_name
    )
    same = _sharding.same_or_nan((problem.b, problem.reg, reg_start, threshold), axis_name)
    problem, (reg_start, threshold) = problem._replace(b=same[0], reg=same[1]), same[2:]
    done = 0
    if reg_start is not None:
        problem = problem._replace(reg=jnp.where(reg_start > 0, problem.reg, jnp.nan))  # invalid start: NOT_FINITE
        f, done = _decreasing(*lax.stop_gradient((problem, reg_start, f)), options)
    start = ((0 if f is None else f) - problem.rows) / problem.reg
    # A constant can move from f to g. The largest start is subtracted here and added to the result again, since float32
    # loses the digits of numbers next to a large constant.
    constant = _largest(lax.stop_gradient(start), problem.a, axis_name)
    start -= constant
    arguments = (problem.scaled, problem.a, problem.b, start)
    if grad in ("envelope", "none"):
        arguments = lax.stop_gradient(arguments)
    outcome = GRADS[grad](*arguments, lax.stop_gradient(threshold), options)
    outcome = outcome._replace(done=outcome.done + done)
    gauge = constant * problem.reg
    if grad == "implicit":
        gauge = _with_mean_fixed(gauge, outcome.phi, problem, axis_name)
    envelope = grad == "envelope"
    return transport(problem, outcome, threshold, options.dtype, gauge=gauge, envelope=envelope, axis_name=axis_name)


def _decreasing(problem, reg_start, f, options):
    """Initial row potentials from solving at `reg_start` and its halves above reg, and the number of iterations."""
    options = options._replace(num_iters=RUN, history=False)
    f = jnp.zeros_like(problem.a) if f is None else f

    def halve(carry):
        reg, f, done = carry
        start = (f - problem.rows) / reg
        start -= _largest(start, problem.a, options.axis_name)
        outcome = _dispatch.solve(problem._replace(reg=reg).scaled, problem.a, problem.b, start, None, options)
        return reg / 2, reg * outcome.phi + problem.rows, done + RUN

    carry = (reg_start, f, jnp.zeros_like(reg_start))
    _, f, done = lax.while_loop(lambda carry: carry[0] > problem.reg, halve, carry)
    return jnp.where(problem.a != 0, f, 0), done


def _largest(start, a, axis_name):
    """The largest start of the points with mass; 0 if it is not finite."""
    largest = _sharding.maximum(jnp.max(jnp.where(a != 0, start, -jnp.inf)), axis_name)
    return jnp.where(jnp.isfinite(largest), largest, 0)


def _with_mean_fixed(gauge, phi, problem, axis_name):
    """The gauge, with a derivative that makes the mean of f over the rows constant.

    The equations of the fixed point don't determine the constant.
    """
    present = problem.a != 0
    f = _sharding.total(jnp.sum(jnp.where(present, problem.reg * phi + problem.rows, 0)), axis_name)
    mean = f / jnp.maximum(_sharding.total(present.sum(), axis_name), 1).astype(phi.dtype)
    return lax.stop_gradient(mean + gauge) - mean
