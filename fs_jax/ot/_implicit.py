"""grad="implicit": derivatives of any order by implicit differentiation at the fixed point."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fs_jax.ot import _dispatch, _sharding
from fs_jax.ot._iterations import Options
from fs_jax.ot._loops import value_if
from fs_jax.ot._numerics import inverse
from fs_jax.ot.result import live_plan


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def solve(scaled, a, b, start, threshold, options: Options):
    """`Outcome` of the iterations, whose potentials have the derivative of the fixed point.

    At the fixed point T = exp(φ_i + γ_j + s_ij) satisfies T 1 = a and Tᵀ 1 = b. Differentiating both gives

        [diag(T 1)   T       ] [dφ]   [da - (T∘ds) 1 ]
        [Tᵀ          diag(Tᵀ1)] [dγ] = [db - (T∘ds)ᵀ 1]
    """
    return _dispatch.solve(scaled, a, b, start, threshold, options)


@solve.defjvp
def _derivative(options, primals, tangents):
    scaled, *_ = primals
    d_scaled, d_a, d_b, *_ = tangents
    # The rule calls `solve` itself, so that its own derivative includes that of the potentials, and so of the plan.
    outcome = solve(*primals, options)
    plan = live_plan(lax.stop_gradient(outcome.plan), scaled, outcome.phi, outcome.gamma)
    d_plan = plan * d_scaled
    # This device's part of the columns' right side: the sum of the parts over devices is the right side.
    right_columns = _sharding.part(d_b, options.axis_name) - d_plan.sum(0)
    d_phi, d_gamma = solve_symmetric(plan, d_a - d_plan.sum(1), right_columns, axis_name=options.axis_name)
    d_outcome = jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)
    return outcome, d_outcome


def solve_symmetric(plan, right_rows, right_columns, damping=(0, 0), axis_name=None):
    """(dφ, dγ) of the system above, with its diagonal times 1 + damping for relaxed marginals.

    The right side is one vector, since JAX differentiates a linear system with respect to all of its right side or to
    none of it.

    If rows are sharded, the columns' entries of right sides and products are this device's part of a sum, and `solve`
    sums them over devices. The system is still symmetric, since the transpose of a sum over devices gives the sum to
    every device. (Sharded problems are never relaxed.)
    """
    n = plan.shape[0]
    rows, columns = (1 + damping[0]) * plan.sum(1), (1 + damping[1]) * plan.sum(0)

    def multiply(x):
        d_phi, d_gamma = x[:n], x[n:]
        return jnp.concatenate(
            [rows * d_phi + _matvec(plan, d_gamma), columns * d_gamma + _matvec(plan.T, d_phi)],
        )

    def solve(_, r):
        if axis_name is None:
            return _solve_fixed_point(plan, rows, columns, r[:n], r[n:], damping)
        return _solve_sharded(plan, rows, *_sharding.total((columns, rows.sum()), axis_name), r[:n], r[n:], axis_name)

    right = jnp.concatenate([right_rows, right_columns])
    return jnp.split(lax.custom_linear_solve(multiply, right, solve, symmetric=True), [n])


def _solve_sharded(plan, rows, columns, mass, right_rows, right_columns, axis_name):
    """The solution of `_solve_fixed_point`, but eliminating the rows: all devices solve the same system [m].

    As in that solution, the rows absorb the difference between the total masses of the right sides, and the mean of dφ,
    weighted by the rows' masses, is zero.
    """
    present_a, present_b = rows > 0, columns > 0
    right_mass = jnp.sum(jnp.where(present_a, right_rows, 0))
    right_mass, right_columns = _sharding.total((right_mass, right_columns), axis_name)
    excess = right_mass - jnp.sum(jnp.where(present_b, right_columns, 0))
    right_rows = right_rows - rows * (excess * inverse(mass))
    x = _solve_fixed_point(plan.T, columns, rows, right_columns, right_rows, axis_name=axis_name)
    d_gamma, d_phi = jnp.split(x, [columns.size])
    mean = _sharding.total(jnp.sum(rows * d_phi), axis_name) * inverse(mass)
    return jnp.concatenate([jnp.where(present_a, d_phi - mean, 0), jnp.where(present_b, d_gamma + mean, 0)])


def _solve_fixed_point(plan, rows, columns, right_rows, right_columns, damping=(0, 0), axis_name=None):
    """Least-norm solution of the system, after elimination of the columns.

    With x = √r dφ, y = √c dγ and A = diag(r)^-½ T diag(c)^-½, the system is x + A y = p, y + Aᵀ x = q, and so
    (I - A Aᵀ) x = p - A q. The singular values of A are at most 1. The singular vectors of the largest are (√r, √c):
    this direction is the constant that can move between the potentials. It is projected out of the right side, and the
    matrix is set to 1 on it, since the right side has only rounding errors there, which must not be divided by an
    eigenvalue of I - A Aᵀ that is itself rounding error. The component of x in this direction is known (`_constant`).
    If the plan is block-diagonal, it has one such constant per block; a ridge as large as the rounding of the products
    handles those.

    The method is conjugate gradients; if the residual is larger than rounding, a dense factorisation; if its residual
    is too large as well, the result is NaN. With columns that are sharded over devices (`axis_name`) there is no
    factorisation, since its matrix would not fit on one device.
    """
    epsilon = jnp.finfo(plan.dtype).eps
    root_rows, root_columns = _inverse_root(rows), _inverse_root(columns)
    scaled_plan = root_rows[:, None] * plan * root_columns[None, :]
    total = jnp.sum(rows)
    constant = jnp.sqrt(rows / jnp.where(total > 0, total, 1))
    p, q = root_rows * right_rows, root_columns * right_columns

    def along_constant(x):
        return constant * jnp.sum(constant * x)

    def to_rows(y):
        return _sharding.total(_matvec(scaled_plan, y), axis_name)

    def reduced(x):
        return (1 + 16 * epsilon) * x - to_rows(_matvec(scaled_plan.T, x)) + along_constant(x)

    right = p - to_rows(q)
    right = right - along_constant(right)
    size = jnp.max(jnp.abs(right))  # divided out, since conjugate gradients square the right side
    size = jnp.where(size > 0, size, 1)
    right = right / size
    x, _ = jax.scipy.sparse.linalg.cg(
        reduced, right, tol=8 * epsilon, maxiter=2 * min(_sharding.global_shape(plan.shape[::-1], axis_name))
    )

    def is_off(x):
        # The rounding of x and of the products, plus the relative error that a gradient may have.
        allowed = 64 * epsilon * jnp.linalg.norm(x) + jnp.sqrt(epsilon) * jnp.linalg.norm(right)
        return ~(jnp.linalg.norm(reduced(x) - right) <= allowed)

    def dense(matrix, right):
        system = (1 + 16 * epsilon) * jnp.eye(right.size, dtype=right.dtype)
        system += constant[:, None] * constant[None, :] - _matvec(matrix, matrix.T)
        return jax.scipy.linalg.solve(system, right, assume_a="pos")

    if axis_name is None:
        x = value_if(is_off(x), dense, x, scaled_plan, right)
    x = size * jnp.where(is_off(x), jnp.nan, x)
    x += _constant(damping, right_rows, right_columns) * jnp.sqrt(rows / jnp.where(total > 0, total * total, 1))
    y = q - _matvec(scaled_plan.T, x)
    return jnp.concatenate([root_rows * x, root_columns * y])


def _constant(damping, right_rows, right_columns):
    """The solution's component along the constant, times the mass: zero if neither marginal is relaxed.

    On that singular pair A is 1 / √((1 + ε_a)(1 + ε_b)), and (I - A Aᵀ) x = p - A q becomes

        (ε_a + ε_b + ε_a ε_b) x = (1 + ε_a) [Σ right_rows - Σ right_columns + ε_b Σ right_rows]
    """
    of_rows, of_columns = damping
    factor = of_rows + of_columns + of_rows * of_columns
    right = right_rows.sum() - right_columns.sum() + of_columns * right_rows.sum()
    return jnp.where(factor > 0, (1 + of_rows) * right / jnp.where(factor > 0, factor, 1), 0)


def _inverse_root(mass):
    return jnp.where(mass > 0, lax.rsqrt(jnp.where(mass > 0, mass, 1)), 0)


def _matvec(matrix, vector):
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)
