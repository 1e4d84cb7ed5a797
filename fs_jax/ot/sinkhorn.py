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
# The iterations under each `grad`; "envelope" and "none" use them without a derivative.
GRADS = {
    "unroll": _dispatch.unroll,
    "implicit": _implicit.solve,
    "envelope": _dispatch.solve,
    "none": _dispatch.solve,
}


@_checks.answers_other_names
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
    """Entropic optimal transport by Sinkhorn's alternating scalings.

        min over plans T with T 1 = a and Tᵀ 1 = b of ⟨T, C⟩ + reg·KL(T | a bᵀ)

    With K = exp(-C / reg), from u = 1: v = b / (Kᵀ u), u = a / (K v), and T = diag(u) K diag(v). Each iteration does
    the columns, then the rows.

    Args:
        cost: what it costs to move a unit of mass from row i to column j. Half precision is computed in float32 and
            returned in half precision, where a marginal error of 1e-3 (float16) or 1e-2 (bfloat16) is usual.
        a: mass of each row, 1/n by default; a zero takes the row out of the problem, exactly. Or a boolean mask: the
            rows that are True share a mass of one evenly.
        b: mass of each column, 1/m by default; the same total as `a`.
        reg: weight of the entropic term, in units of the cost (the paper's τ, ott-jax's epsilon).
        num_iters: iterations, at most (static under jit).
        threshold: stop when the marginal error (L1, in units of mass) of the plan that is returned is at most this;
            by default all iterations are done. In a batch each problem stops by its own error, and may have its own
            threshold. One below what the dtype can reach ends early, with `Status.STALLED`.
        method: "stabilized" goes at the speed of matrix-vector products and works at any reg: it keeps the scalings in
            range, and goes through the log domain where it can't. "log" goes there always, several times slower.
            "kernel" is Algorithm 1 to the letter and works while exp(-cost / reg) does not underflow (cost / reg up to
            about 80 in float32); beyond, the result's status is `Status.NOT_FINITE` or `Status.OUT_OF_RANGE`.
        grad: "unroll" differentiates the iterations (first derivatives, both modes); "implicit" the fixed point (of
            any order), which the iterations must have reached (see `status`; else the gradient is another one; its
            relative error is some 16 units in the last place over the gap between the two largest singular values of
            the plan scaled to unit marginals, so use float64 where reg is very small). Of f and g it holds the mean of
            f fixed, since a constant can move between them;
            "envelope" holds plan and potentials fixed, so that the gradient of `primal_cost` is the plan and that of
            `reg_cost` is exact at convergence (first derivatives); "none" gives zeros.
        init: potentials (f, g) to start from, such as those of a similar problem. The columns are updated first, so it
            is f that matters, up to a constant.
        reg_start: start with this larger regularisation, such as the mean cost, and halve it every ten iterations down
            to `reg`. Between sets of points of even weights, and at a `reg` below a hundredth of the costs, a marginal
            error of 1e-3 is then met in a fraction of the iterations. With uneven weights, smaller thresholds or a
            larger `reg` it may take more of them: try both. They come before the `num_iters` at `reg`, are included in
            the result's, and are not differentiated: "unroll" takes their potentials as it takes `init`.
        history: return the marginal error every ten iterations at `reg` too, as `errors`.
        fused: in programs for an NVIDIA GPU, do all iterations of a problem in one kernel: float32, up to 256 points
            on a side, `method` "stabilized". Elsewhere this changes nothing.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the mapped axis over which the rows are sharded. Then `cost`,
            `a` and the f of `init` have this device's rows, as many on each, and `b`, the g of `init` and the rest are
            the same on all. So are the result's costs, g, error, count and status; its plan and f are this device's
            rows. Iterations, stopping and derivatives are those of the whole problem, of which no device has more than
            its rows; each iteration sums one vector [m] over devices. A gradient is as of `jax.lax.psum`: that of the
            sum over devices of what each returns; under `shard_map` that checks what varies, a value that is the same
            on all devices is one value, and counts once. ("implicit" has no dense factorisation to fall back on: where
            conjugate gradients do not get there, its gradient is NaN.)

    Returns:
        A `Transport`.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: a shape or value is refused; the message says which, and what was expected.
        NotImplementedError: a second derivative is taken where `grad` has first ones only.

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

    Source: Cuturi, Sinkhorn Distances (NeurIPS 2013); Algorithm 1 of Zhang and Wang (NeurIPS 2019), which leaves the
    marginals 1/n out.
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
    # "kernel" is the algorithm to the letter, whose range is that of exp(-cost / reg) itself.
    centred, axis_name = options.method != "kernel", options.axis_name
    problem, (reg_start, threshold, f) = make_problem(
        cost, a, b, reg, reg_start, threshold, f, centred=centred, axis_name=axis_name
    )
    same = _sharding.agreed((problem.b, problem.reg, reg_start, threshold), axis_name)
    problem, (reg_start, threshold) = problem._replace(b=same[0], reg=same[1]), same[2:]
    done = 0
    if reg_start is not None:
        f, done = _decreasing(*lax.stop_gradient((problem, reg_start, f)), options)
    start = ((0 if f is None else f) - problem.rows) / problem.reg
    # A constant can move from f to g. The largest start is taken out here, and given back with the result: beside a
    # large constant float32 would lose what is left.
    constant = _largest(lax.stop_gradient(start), problem.a, axis_name)
    start -= constant
    arguments = (problem.scaled, problem.a, problem.b, start)
    if grad in ("envelope", "none"):
        arguments = lax.stop_gradient(arguments)
    outcome = GRADS[grad](*arguments, lax.stop_gradient(threshold), options)
    outcome = outcome._replace(done=outcome.done + done)
    gauge = constant * problem.reg
    if grad == "implicit":
        gauge = _held(gauge, outcome.phi, problem, axis_name)
    envelope = grad == "envelope"
    return transport(problem, outcome, threshold, options.dtype, gauge=gauge, envelope=envelope, axis_name=axis_name)


def _decreasing(problem, reg_start, f, options):
    """Potentials of the rows to start from, and the iterations that they took, from `reg_start` down to above reg."""
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
    """Of the points with mass; 0 where that is no number."""
    largest = _sharding.maximum(jnp.max(jnp.where(a != 0, start, -jnp.inf)), axis_name)
    return jnp.where(jnp.isfinite(largest), largest, 0)


def _held(gauge, phi, problem, axis_name):
    """The constant that moves from g to f, so that the mean of f over the rows has no derivative.

    The fixed point's equations don't say where the constant is.
    """
    there = problem.a != 0
    f = _sharding.total(jnp.sum(jnp.where(there, problem.reg * phi + problem.rows, 0)), axis_name)
    mean = f / jnp.maximum(_sharding.total(there.sum(), axis_name), 1).astype(phi.dtype)
    return lax.stop_gradient(mean + gauge) - mean
