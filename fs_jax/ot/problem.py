"""The problem that a solver works on: one dtype, one set of mesh axes, and costs brought near zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fs_jax.ot import _sharding
from fs_jax.ot._numerics import log_weights
from fs_jax.ot._sharding import AxisName


class Problem(NamedTuple):
    """A transport problem whose arguments have been checked (`_checks`), in the precision that it is computed in.

    The minimum of each row, and of what is left of each column, is taken out of the costs: potentials take such
    constants up, and what is left is small where the mass is, so that float32 keeps its digits. A potential of the
    cost is `rows` plus one of the centred cost.

    Attributes:
        cost: what it costs to move a unit of mass, [n, m].
        a: mass of each row, [n]; NaN where a weight that could not be looked at is negative.
        b: mass of each column, [m].
        reg: weight of the entropic term, or of the proximal one.
        rows: what is taken out of each row, [n].
        columns: what is taken out of each column, [m].
    """

    cost: Float[Array, "n m"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    reg: Float[Array, ""]
    rows: Float[Array, " n"]
    columns: Float[Array, " m"]

    @property
    def scaled(self) -> Float[Array, "n m"]:
        """S = -(C_ij - rows_i - columns_j) / reg, rounded by one bit, which no compiler may skip; 0 at absent points.

        There the cost may be anything, as large as what stands for the logarithm of nothing.
        Where this is part of a fusion its own rounding is skipped, and K on the way back is then not K on the way
        there: they differ by the rounding of exponents of hundreds.
        """
        is_present = (self.a != 0)[:, None] & (self.b != 0)[None, :]
        # The larger constant first, which rounds nothing where it is most of the cost.
        rows, columns = self.rows[:, None], self.columns[None, :]
        is_row = jnp.abs(rows) > jnp.abs(columns)
        first, second = jnp.where(is_row, rows, columns), jnp.where(is_row, columns, rows)
        scaled = jnp.where(is_present, -((self.cost - first) - second) / self.reg, 0)
        bits = jnp.finfo(scaled.dtype)
        return lax.reduce_precision(scaled, bits.nexp, bits.nmant - 1)


def make_problem(
    cost, a, b, reg, *others, centred: bool = True, axis_name: AxisName | None = None
) -> tuple[Problem, tuple[jax.Array | None, ...]]:
    """The problem, and the other operands, all varying over the same mesh axes.

    Inside `shard_map` a loop refuses to carry what varies over a device axis together with what does not. So a
    replicated operand is made varying here, once; the transpose of that is the sum over devices that its gradient
    needs. With `axis_name`, rows are sharded over that axis, and all vary over it.
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
    """A problem as the iterations see it.

    `present_a` and `present_b` say which points have mass; of a weight that is NaN, yes: it should come out. Where the
    rows are this device's alone, `axis_name` is the axis that they are sharded over.
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
    """The weights, all zero where the other side has no mass: nothing can be moved then."""
    return jnp.where(jnp.any(b != 0), a, 0), jnp.where(_sharding.somewhere(jnp.any(a != 0), axis_name), b, 0)


def _minima(cost, a, b, axis_name):
    """Of each row and then of each column, over the points that have mass: others may have any cost."""
    rows = _minimum(cost, b, 1)
    return rows, _minimum(cost - rows[:, None], a[:, None], 0, axis_name)


def _minimum(cost, weights, axis, axis_name=None):
    smallest = _sharding.minimum(jnp.min(jnp.where(weights != 0, cost, jnp.inf), axis), axis_name)
    return jnp.where(jnp.isfinite(smallest), smallest, 0)
