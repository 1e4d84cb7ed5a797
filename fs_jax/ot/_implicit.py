"""grad="implicit": the derivative that the equations of the solution give, of any order."""

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
    """`Outcome` of the iterations; its potentials have the derivative of the fixed point.

    At the fixed point T 1 = a and Tᵀ 1 = b for T = exp(φ_i + γ_j + s_ij). Differentiating both,

        [diag(T 1)   T       ] [dφ]   [da - (T∘ds) 1 ]
        [Tᵀ          diag(Tᵀ1)] [dγ] = [db - (T∘ds)ᵀ 1]
    """
    return _dispatch.solve(scaled, a, b, start, threshold, options)


@solve.defjvp
def _derivative(options, primals, tangents):
    scaled, *_ = primals
    d_scaled, d_a, d_b, *_ = tangents
    # By itself: in the derivative of this rule the potentials, and so the plan, have theirs.
    outcome = solve(*primals, options)
    plan = live_plan(lax.stop_gradient(outcome.plan), scaled, outcome.phi, outcome.gamma)
    d_plan = plan * d_scaled
    # Of the columns' equations this device's part: the sum over devices is the equation.
    right_columns = _sharding.part(d_b, options.axis_name) - d_plan.sum(0)
    d_phi, d_gamma = solve_symmetric(plan, d_a - d_plan.sum(1), right_columns, axis_name=options.axis_name)
    d_outcome = jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)
    return outcome, d_outcome


def solve_symmetric(plan, right_rows, right_columns, damping=(0, 0), axis_name=None):
    """(dφ, dγ) of the system above, its diagonal times 1 + damping, for marginals that are relaxed.

    As one vector, since JAX differentiates all of a linear system's right side or nothing.

    Where rows are sharded, right sides and products have a device's part of what belongs to the columns, and `solve`
    adds the parts up. It is its own transpose still: that of adding up is to give each device the sum. (They are not
    relaxed there.)
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
    """The same solution as below, but by elimination of the rows: what is left is one system [m], on all devices alike.

    As there, it is the rows that take up what differs between the masses of the right sides, and the mean of dφ by the
    rows' masses is zero.
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
    """Least-norm solution of the system, on what is left after the columns' elimination.

    With x = √r dφ, y = √c dγ and A = diag(r)^-½ T diag(c)^-½ it reads x + A y = p, y + Aᵀ x = q, so (I - A Aᵀ) x =
    p - A q. A's singular values are at most 1, and (√r, √c) is its singular pair of the largest: the constant that can
    move between the potentials. It is projected out of the right side, and the matrix is made 1 on it, for what is
    left of the right side there is rounding and must not be divided by rounding; what x has of it is known
    (`_constant`). A ridge of as much as the products' rounding does the same for the other constants that the plan has
    when it falls into blocks.

    By conjugate gradients; where they leave more than rounding, by a dense factorisation; where that does, NaN. Columns
    that are sharded over devices have no factorisation, whose matrix no device could hold.
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
    size = jnp.max(jnp.abs(right))  # taken out, since conjugate gradients square it
    size = jnp.where(size > 0, size, 1)
    right = right / size
    x, _ = jax.scipy.sparse.linalg.cg(
        reduced, right, tol=8 * epsilon, maxiter=2 * min(_sharding.whole(plan.shape[::-1], axis_name))
    )

    def is_off(x):
        # What rounding x and the products may leave; and of the right side, what a gradient may be off.
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
    """What the solution has of the constant, times the mass: zero where neither marginal is relaxed.

    On that singular pair A is 1 / √((1 + ε_a)(1 + ε_b)), and (I - A Aᵀ) x = p - A q reads

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
