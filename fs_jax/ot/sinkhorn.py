"""Sinkhorn's algorithm for entropic optimal transport (Algorithm 1)."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import checks, iterations, transport
from fs_jax.ot.fused import potentials
from fs_jax.ot.logspace import MASKED, log_weights
from fs_jax.ot.transport import Status, Transport

METHODS = ("auto", "stabilized", "kernel", "log")
GRADS = ("unroll", "implicit", "envelope", "none")


def sinkhorn(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    *,
    reg: float | Float[Array, ""],
    num_iters: int = 100,
    threshold: float | Float[Array, ""] | None = None,
    method: Literal["auto", "stabilized", "kernel", "log"] = "auto",
    grad: Literal["unroll", "implicit", "envelope", "none"] = "unroll",
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    fused: bool = True,
) -> Transport:
    """Entropic optimal transport by Sinkhorn's alternating scalings.

        min over plans T with T 1 = a and Tᵀ 1 = b of ⟨T, C⟩ + reg·KL(T | a bᵀ)

    With K = exp(-C / reg), from u = 1: v = b / (Kᵀ u), u = a / (K v), and T = diag(u) K diag(v). Each iteration does
    the columns, then the rows.

    Args:
        cost: what it costs to move a unit of mass from row i to column j.
        a: mass of each row, 1/n by default; a zero takes the row out of the problem, exactly.
        b: mass of each column, 1/m by default; the same total as `a`.
        reg: weight of the entropic term, in units of the cost (the paper's τ, ott-jax's epsilon).
        num_iters: iterations, at most (static under jit).
        threshold: stop when the marginal error (L1, in units of mass) is at most this; by default all iterations are
            done. In a batch each problem stops by its own error, and may have its own threshold.
        method: "stabilized" (which "auto" means) goes at the speed of matrix-vector products and works at any reg: it
            keeps the scalings in range, and goes through the log domain where it can't. "log" goes there always,
            several times slower. "kernel" is Algorithm 1 to the letter and works while exp(-cost / reg) does not
            underflow (cost / reg up to about 80 in float32); beyond, the result's status is `Status.NOT_FINITE`.
        grad: "unroll" differentiates the iterations (first derivatives, both modes); "implicit" the fixed point, which
            the iterations must have reached (see `status`; else the gradient is another one); "envelope" holds plan
            and potentials fixed, so that the gradient of `primal_cost` is the plan and that of `reg_cost` is exact at
            convergence; "none" gives zeros.
        init: potentials (f, g) to start from, such as those of a similar problem. The columns are updated first, so it
            is f that matters.
        fused: on an NVIDIA GPU, do all iterations of a problem in one kernel, where there is one: float32, up to 256
            points on a side, `method` "stabilized" or "auto". Each size is tried once, and declined with a warning
            where its results aren't those of the other way. Elsewhere this changes nothing.

    Returns:
        A `Transport`.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: a shape or value is refused; the message says which, and what was expected.

    Example:
        >>> import jax, jax.numpy as jnp, fs_jax.ot
        >>> from fs_jax.ot import sinkhorn
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> result = sinkhorn(cost, reg=0.1)
        >>> print(result.plan.round(3))
        [[0.5 0. ]
         [0.  0.5]]
        >>> batch = jax.vmap(lambda c: sinkhorn(c, reg=0.1, threshold=1e-3))(jnp.stack([cost, 2 * cost]))
        >>> batch.status == fs_jax.ot.Status.CONVERGED
        Array([ True,  True], dtype=bool)

    Source: Cuturi, Sinkhorn Distances (NeurIPS 2013); Algorithm 1 of Zhang and Wang (NeurIPS 2019), which leaves the
    marginals 1/n out.
    """
    cost, a, b = checks.problem(cost, a, b)
    reg = checks.positive("reg", reg, cost.dtype)
    num_iters = checks.count("num_iters", num_iters)
    threshold = checks.threshold(threshold, cost.dtype)
    method = checks.choice("method", method, METHODS)
    grad = checks.choice("grad", grad, GRADS)
    start = jnp.zeros_like(a) if init is None else checks.potentials(init, *cost.shape, cost.dtype)[0] / reg
    return _solve(cost, a, b, reg, threshold, start, num_iters, method, grad, bool(fused))


@partial(jax.jit, static_argnames=("num_iters", "method", "grad", "fused"))
def _solve(cost, a, b, reg, threshold, start, num_iters, method, grad, fused):
    start = jnp.where(a != 0, start, MASKED)
    if grad == "none":
        cost, a, b, reg, start = lax.stop_gradient((cost, a, b, reg, start))
    scaled = iterations.rounded(-cost / reg)
    problem = (scaled, log_weights(a), log_weights(b), start)
    if grad != "unroll":
        problem = lax.stop_gradient(problem)
    method = "stabilized" if method == "auto" else method
    phi, gamma, done, converged = potentials(*problem, threshold, num_iters, method, fused)
    if grad == "implicit":
        phi, gamma = _attach_implicit_derivative(phi, gamma, scaled, a, b)

    result = transport.from_potentials(phi, gamma, scaled, cost, a, b, reg, done, converged)
    if threshold is not None:
        # An iteration looks at the error that the one before has left; at that of the last one nobody has looked yet.
        met = (result.status == Status.LIMIT) & (result.marginal_error <= threshold)
        result = result._replace(status=jnp.where(met, Status.CONVERGED, result.status))
    if grad == "envelope":
        plan, f, g, error = lax.stop_gradient((result.plan, result.f, result.g, result.marginal_error))
        result = result._replace(plan=plan, f=f, g=g, marginal_error=error, primal_cost=jnp.sum(plan * cost))
    return result


def _attach_implicit_derivative(phi, gamma, scaled, a, b):
    """The same potentials, with the derivative that the fixed point's equations give them.

    At the fixed point T 1 = a and Tᵀ 1 = b for T = exp(φ_i + γ_j + s_ij). Differentiating both,

        [diag(T 1)   T       ] [dφ]   [da - (T∘ds) 1 ]
        [Tᵀ          diag(Tᵀ1)] [dγ] = [db - (T∘ds)ᵀ 1]

    The right side is the derivative of `a - T 1` and `b - Tᵀ 1` at fixed potentials; the matrix is symmetric, so that
    one solver serves forward and reverse mode.
    """
    live_plan = jnp.exp(phi[:, None] + gamma[None, :] + scaled)
    plan = lax.stop_gradient(live_plan)
    rows, columns = plan.sum(1), plan.sum(0)

    def multiply(x):
        d_phi, d_gamma = x
        return rows * d_phi + _matvec(plan, d_gamma), columns * d_gamma + _matvec(plan.T, d_phi)

    residual = (a - live_plan.sum(1), b - live_plan.sum(0))
    residual = jax.tree.map(lambda r: r - lax.stop_gradient(r), residual)
    d_phi, d_gamma = lax.custom_linear_solve(
        multiply, residual, lambda _, right: _solve_fixed_point(plan, rows, columns, *right), symmetric=True
    )
    return phi + d_phi, gamma + d_gamma


def _solve_fixed_point(plan, rows, columns, right_rows, right_columns):
    """Least-norm solution of the system above, by conjugate gradients on what is left after the columns' elimination.

    With x = √r dφ, y = √c dγ and A = diag(r)^-½ T diag(c)^-½ it reads x + A y = p, y + Aᵀ x = q, so (I - A Aᵀ) x =
    p - A q. A's singular values are at most 1, and (√r, √c) is its singular pair at exactly 1: the constant that can
    move between the potentials. It is projected out of the right side, and the matrix is made 1 on it, for what is
    left of the right side there is rounding and must not be divided by rounding. A ridge of as much as the products'
    rounding does the same for the other constants that the plan has when it falls into blocks.
    """

    def inverse_root(mass):
        return jnp.where(mass > 0, lax.rsqrt(jnp.where(mass > 0, mass, 1)), 0)

    root_rows, root_columns = inverse_root(rows), inverse_root(columns)
    scaled_plan = root_rows[:, None] * plan * root_columns[None, :]
    constant = jnp.sqrt(rows) / jnp.sqrt(jnp.sum(rows))
    p, q = root_rows * right_rows, root_columns * right_columns

    epsilon = jnp.finfo(plan.dtype).eps

    def along_constant(x):
        return constant * jnp.sum(constant * x)

    def reduced(x):
        return (1 + 16 * epsilon) * x - _matvec(scaled_plan, _matvec(scaled_plan.T, x)) + along_constant(x)

    right = p - _matvec(scaled_plan, q)
    right = right - along_constant(right)
    size = jnp.max(jnp.abs(right))  # taken out, since conjugate gradients square it
    size = jnp.where(size > 0, size, 1)
    x, _ = jax.scipy.sparse.linalg.cg(reduced, right / size, tol=8 * epsilon, maxiter=2 * min(plan.shape))
    x = size * x
    y = q - _matvec(scaled_plan.T, x)
    return root_rows * x, root_columns * y


def _matvec(matrix, vector):
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)
