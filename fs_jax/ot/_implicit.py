"""grad="implicit": the derivative that the equations of the solution give, of any order."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fs_jax.ot import _dispatch
from fs_jax.ot._iterations import Options
from fs_jax.ot._loops import value_if
from fs_jax.ot.result import live_plan


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def solve(scaled, a, b, start, threshold, options: Options):
    """`Outcome` of the iterations; its potentials have the derivative of the fixed point.

    At the fixed point T 1 = a and Tᵀ 1 = b for T = exp(φ_i + γ_j + s_ij). Differentiating both,

        [diag(T 1)   T       ] [dφ]   [da - (T∘ds) 1 ]
        [Tᵀ          diag(Tᵀ1)] [dγ] = [db - (T∘ds)ᵀ 1]
    """
    return _dispatch.solve(scaled, a, b, start, threshold, options)


@solve.defjvp
def _derivative(options, primals, tangents):
    scaled, a, *_ = primals
    d_scaled, d_a, d_b, *_ = tangents
    # By itself: in the derivative of this rule the potentials, and so the plan, have theirs.
    outcome = solve(*primals, options)
    plan = live_plan(lax.stop_gradient(outcome.plan), scaled, outcome.phi, outcome.gamma)
    d_plan = plan * d_scaled
    right = jnp.concatenate([d_a - d_plan.sum(1), d_b - d_plan.sum(0)])
    d_phi, d_gamma = jnp.split(_solve_symmetric(plan, right), [a.size])
    d_outcome = jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)
    return outcome, d_outcome


def _solve_symmetric(plan, right):
    """(dφ, dγ) as one vector, since JAX differentiates all of a linear system's right side or nothing."""
    n = plan.shape[0]
    rows, columns = plan.sum(1), plan.sum(0)

    def multiply(x):
        d_phi, d_gamma = x[:n], x[n:]
        return jnp.concatenate(
            [rows * d_phi + _matvec(plan, d_gamma), columns * d_gamma + _matvec(plan.T, d_phi)],
        )

    return lax.custom_linear_solve(
        multiply, right, lambda _, r: _solve_fixed_point(plan, rows, columns, r[:n], r[n:]), symmetric=True
    )


def _solve_fixed_point(plan, rows, columns, right_rows, right_columns):
    """Least-norm solution of the system above, on what is left after the columns' elimination.

    With x = √r dφ, y = √c dγ and A = diag(r)^-½ T diag(c)^-½ it reads x + A y = p, y + Aᵀ x = q, so (I - A Aᵀ) x =
    p - A q. A's singular values are at most 1, and (√r, √c) is its singular pair at exactly 1: the constant that can
    move between the potentials. It is projected out of the right side, and the matrix is made 1 on it, for what is
    left of the right side there is rounding and must not be divided by rounding. A ridge of as much as the products'
    rounding does the same for the other constants that the plan has when it falls into blocks.

    By conjugate gradients; where they leave more than rounding, by a dense factorisation; where that does, NaN.
    """
    epsilon = jnp.finfo(plan.dtype).eps
    root_rows, root_columns = _inverse_root(rows), _inverse_root(columns)
    scaled_plan = root_rows[:, None] * plan * root_columns[None, :]
    total = jnp.sum(rows)
    constant = jnp.sqrt(rows / jnp.where(total > 0, total, 1))
    p, q = root_rows * right_rows, root_columns * right_columns

    def along_constant(x):
        return constant * jnp.sum(constant * x)

    def reduced(x):
        return (1 + 16 * epsilon) * x - _matvec(scaled_plan, _matvec(scaled_plan.T, x)) + along_constant(x)

    right = p - _matvec(scaled_plan, q)
    right = right - along_constant(right)
    size = jnp.max(jnp.abs(right))  # taken out, since conjugate gradients square it
    size = jnp.where(size > 0, size, 1)
    right = right / size
    x, _ = jax.scipy.sparse.linalg.cg(reduced, right, tol=8 * epsilon, maxiter=2 * min(plan.shape))

    def is_off(x):
        # What rounding x and the products may leave; and of the right side, what a gradient may be off.
        allowed = 64 * epsilon * jnp.linalg.norm(x) + jnp.sqrt(epsilon) * jnp.linalg.norm(right)
        return ~(jnp.linalg.norm(reduced(x) - right) <= allowed)

    def dense(matrix, right):
        system = (1 + 16 * epsilon) * jnp.eye(right.size, dtype=right.dtype)
        system += constant[:, None] * constant[None, :] - _matvec(matrix, matrix.T)
        return jax.scipy.linalg.solve(system, right, assume_a="pos")

    x = value_if(is_off(x), dense, x, scaled_plan, right)
    x = size * jnp.where(is_off(x), jnp.nan, x)
    y = q - _matvec(scaled_plan.T, x)
    return jnp.concatenate([root_rows * x, root_columns * y])


def _inverse_root(mass):
    return jnp.where(mass > 0, lax.rsqrt(jnp.where(mass > 0, mass, 1)), 0)


def _matvec(matrix, vector):
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)
