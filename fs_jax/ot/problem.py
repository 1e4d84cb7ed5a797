"""The problem as the solvers see it: one dtype, one set of mesh axes, and a centred cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _sharding
from fs_jax.ot._numerics import log_weights
from fs_jax.ot._sharding import AxisName


class Problem(NamedTuple):
    """A transport problem with checked arguments (`_checks`), in the dtype of the computation.

    The solvers work on a centred cost: the minimum of each row is subtracted, then that of each column. Potentials
    absorb such constants. The centred cost is small where the mass is, so float32 represents it accurately. The row
    potentials of the cost are `rows` plus those of the centred cost; likewise for columns.

    Attributes:
        cost: cost of moving a unit of mass, [n, m].
        a: mass of each row, [n]; NaN for negative weights (of a tracer, which can't be checked).
        b: mass of each column, [m]; likewise.
        reg: weight of the entropic term, or of the proximal term.
        rows: constant subtracted from each row, [n].
        columns: constant subtracted from each column, [m].
    """

    cost: Float[Array, "n m"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    reg: Float[Array, ""]
    rows: Float[Array, " n"]
    columns: Float[Array, " m"]

    @property
    def scaled(self) -> Float[Array, "n m"]:
        """The matrix s = -(C_ij - rows_i - columns_j) / reg, rounded by one bit; 0 at points without mass.

        The cost at points without mass is arbitrary, and may be as large as `MASKED`.

        The explicit rounding can't be optimised away. Without it, a compiler that fuses this expression may skip its
        own rounding, and K in the backward pass would differ from K in the forward pass, by the rounding of exponents
        of hundreds.
        """
        is_present = (self.a != 0)[:, None] & (self.b != 0)[None, :]
        # The larger constant is subtracted first. If it is most of the cost, this difference is exact.
        rows, columns = self.rows[:, None], self.columns[None, :]
        is_row = jnp.abs(rows) > jnp.abs(columns)
        first, second = jnp.where(is_row, rows, columns), jnp.where(is_row, columns, rows)
        scaled = jnp.where(is_present, -((self.cost - first) - second) / self.reg, 0)
        bits = jnp.finfo(scaled.dtype)
        return lax.reduce_precision(scaled, bits.nexp, bits.nmant - 1)


def make_problem(
    cost, a, b, reg, *others, centred: bool = True, axis_name: AxisName | None = None
) -> tuple[Problem, tuple[jax.Array | None, ...]]:
    """The problem and the other operands, all varying over the same mesh axes.

    Inside `shard_map`, everything that a loop carries must vary over the same device axes. Replicated operands are
    therefore marked as varying here; the transpose of this is the sum over devices that their gradients need. With
    `axis_name`, rows are sharded over that axis, and all operands vary over it.
    """
    operands = (cost, a, b, reg, *others)
    nothing = sum(jnp.zeros_like(x, shape=(), dtype=cost.dtype) for x in operands if x is not None)
    if axis_name is not None:
        nothing += _sharding.varying_zero(axis_name, cost.dtype)
    cost, a, b, reg, *rest = (None if x is None else x.astype(cost.dtype) + nothing for x in operands)
    a, b = (jnp.where(w >= 0, w, jnp.nan) for w in (a, b))
    if centred:
        rows, columns = _minima(*lax.stop_gradient((cost, a, b)), axis_name)
    else:
        rows, columns = jnp.zeros_like(a), jnp.zeros_like(b)
    return Problem(cost, a, b, reg, rows, columns), tuple(rest)


class Points(NamedTuple):
    """A problem in the form that the iterations use.

    `present_a` and `present_b` mark points with mass, including those with a weight of NaN, which should propagate. If
    rows are sharded, the arrays hold this device's rows, and `axis_name` is the axis that they are sharded over.
    """

    scaled: jax.Array
    a: jax.Array
    b: jax.Array
    log_a: jax.Array
    log_b: jax.Array
    present_a: jax.Array
    present_b: jax.Array
    axis_name: AxisName | None

    @classmethod
    def of(cls, scaled, a, b, axis_name=None):
        a, b = _solvable(a, b, axis_name)
        return cls(scaled, a, b, log_weights(a), log_weights(b), a != 0, b != 0, axis_name)


def _solvable(a, b, axis_name):
    """The weights; all zero if the other side has no mass, since nothing can be moved then."""
    return jnp.where(jnp.any(b != 0), a, 0), jnp.where(_sharding.on_any_device(jnp.any(a != 0), axis_name), b, 0)


def _minima(cost, a, b, axis_name):
    """Minima of the rows and then of the columns, over points with mass; other points have an arbitrary cost."""
    rows = _minimum(cost, b, 1)
    return rows, _minimum(cost - rows[:, None], a[:, None], 0, axis_name)


def _minimum(cost, weights, axis, axis_name=None):
    smallest = _sharding.minimum(jnp.min(jnp.where(weights != 0, cost, jnp.inf), axis), axis_name)
    return jnp.where(jnp.isfinite(smallest), smallest, 0)
