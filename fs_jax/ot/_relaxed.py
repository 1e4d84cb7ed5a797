"""Sinkhorn's iterations where the marginals are relaxed, and the duality gap of what they reach.

With s = -C / reg, T = exp(φ_i + γ_j + s_ij) and ε = reg / ρ, the optimal F = φ - log a and G = γ - log b satisfy
T 1 = a exp(-ε_a F) and Tᵀ 1 = b exp(-ε_b G). Each is solved for in turn:

    G_j = -LSE_i(s_ij + φ_i) / (1 + ε_b)        F_i = -LSE_j(s_ij + γ_j) / (1 + ε_a)

A constant that moves from G to F changes no plan, but the dual objective, and these updates would find it only in
ρ / reg iterations. Its best value is known: the one at which both sides ask for the same mass. So it is set after each
iteration (Séjourné, Vialard and Peyré 2022), and kept as a number of its own, k: F + k and G - k are the potentials.
With it the iterations converge as fast as the balanced ones, which are those at ε = 0.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fs_jax.ot._batching import in_chunks
from fs_jax.ot._loops import RUN, lengths, once_if
from fs_jax.ot._numerics import MASKED, inverse, largest, log_sum_exp, log_weights, product, within
from fs_jax.ot.result import Status, has_stalled


class Marginal(NamedTuple):
    """One side of the problem.

    Attributes:
        weights: mass of each point.
        damping: ε = reg / ρ; zero where the marginal is not relaxed.
        shift: what the centred cost leaves out, over reg: the potential of the cost is F + shift.
    """

    weights: jax.Array
    damping: jax.Array
    shift: jax.Array


class State(NamedTuple):
    """φ = f + du and γ = g + dv, a reference and corrections to it; `kernel` is exp(s + f + g), `k` the constant."""

    f: jax.Array
    g: jax.Array
    du: jax.Array
    dv: jax.Array
    k: jax.Array
    kernel: jax.Array


class Progress(NamedTuple):
    """Across runs: iterations done, whether to stop, the smallest gap, and the runs since then."""

    done: jax.Array
    converged: jax.Array
    stalled: jax.Array
    best: jax.Array
    waited: jax.Array


class Outcome(NamedTuple):
    """Where the iterations ended: plan, φ + k, γ - k, gap over reg, iterations, and status if the threshold is not met.

    Counts are floating numbers, since a derivative rule has no tangent for integers that vary over mesh axes.
    """

    plan: jax.Array
    phi: jax.Array
    gamma: jax.Array
    gap: jax.Array
    done: jax.Array
    status: jax.Array


@cache
def walk(num_iters: int):
    """The iterations as a function of (scaled, rows, columns, start, threshold); `threshold` is of the gap over reg."""

    @in_chunks
    def iterations(scaled, rows: Marginal, columns: Marginal, start, threshold):
        state = _start(scaled, rows, columns, start)

        def step(carry, length):
            def advance(carry):
                state = _run(scaled, rows, columns, length, carry[0])
                return state, _judge(scaled, rows, columns, threshold, length, state, carry[1])

            if threshold is None:
                return (_run(scaled, rows, columns, length, carry[0]), carry[1]), None
            return once_if(~(carry[1].converged | carry[1].stalled), advance, carry), None

        no, zero = jnp.zeros_like(scaled, bool, shape=()), jnp.zeros_like(scaled, shape=())
        progress = Progress(zero, no, no, jnp.full_like(zero, jnp.inf), zero)
        (state, progress), _ = lax.scan(step, (state, progress), lengths(num_iters, None))
        done = zero + num_iters if threshold is None else progress.done
        status = jnp.where(progress.stalled, Status.STALLED, zero + Status.LIMIT)
        phi = jnp.where(rows.weights != 0, state.f + state.du + state.k, MASKED)
        gamma = jnp.where(columns.weights != 0, state.g + state.dv - state.k, MASKED)
        return Outcome(_plan(state), phi, gamma, gap(scaled, rows, columns, state), done, status)

    return iterations


def _judge(scaled, rows, columns, threshold, length, state, progress):
    """Progress after a run. The result's gap is computed in another program: 1% allows for its rounding."""
    value = gap(scaled, rows, columns, state)
    converged = value <= 0.99 * threshold
    done = progress.done + length.astype(progress.done.dtype)
    waited = jnp.where(value < progress.best, 0, progress.waited + 1)
    eps = jnp.finfo(scaled.dtype).eps
    # Far above the rounding of the gap: a sum of n·m terms as large as log T, and of n + m masses.
    floor = 64 * eps * (jnp.abs(scaled).max() + sum(scaled.shape)) * _plan(state).sum()
    stalled = ~converged & has_stalled(value, waited, done // RUN, floor)
    return Progress(done, converged, stalled, jnp.minimum(value, progress.best), waited)


def _start(scaled, rows, columns, start):
    """From φ = start, with a reference in which the largest entry of each row and column of K is one."""
    is_row, is_column = rows.weights != 0, columns.weights != 0
    phi = jnp.where(is_row, start, MASKED)
    g = jnp.where(is_column, -jnp.max(scaled + phi[:, None], 0), MASKED)
    f = jnp.where(is_row, -jnp.max(scaled + g[None, :], 1), MASKED)
    du = jnp.where(is_row, phi - f, 0)
    state = State(f, g, du, jnp.zeros_like(g), jnp.zeros_like(scaled, shape=()), jnp.exp(_matrix(scaled, f, g)))
    # The start may be far from the reference, where K is of no use.
    return once_if(~_in_range(0.37, state.du), lambda s: _log_run(scaled, rows, columns, 1, s), state)


def _run(scaled, rows, columns, length, state):
    """Some iterations by products with K; again in the log domain where the scalings left its range.

    K loses entries below 1e-38 (in float32): at most 1e-10 of a plan whose scalings are at most 2e14.
    """
    state = once_if(~_in_range(0.18, state.du, state.dv), lambda s: _absorbed(scaled, s), state)

    is_absent = [(side.weights == 0).astype(scaled.dtype) for side in (rows, columns)]

    def over_rows(du):
        return jnp.log(product("ij,i->j", state.kernel, jnp.exp(du)) + is_absent[1])

    def over_columns(dv):
        return jnp.log(product("ij,j->i", state.kernel, jnp.exp(dv)) + is_absent[0])

    end = _iterate(rows, columns, length, state, over_rows, over_columns)
    start_or_end = jax.tree.map(lambda x, y: jnp.where(_in_range(0.37, end.du, end.dv), y, x), state, end)
    return once_if(~_in_range(0.37, end.du, end.dv), lambda s: _log_run(scaled, rows, columns, length, s), start_or_end)


def _log_run(scaled, rows, columns, length, state):
    """The same iterations with sums of exponentials, after which the reference takes the corrections up."""
    matrix = _matrix(scaled, state.f, state.g)
    end = _iterate(
        rows, columns, length, state,
        lambda du: log_sum_exp(matrix + du[:, None], 0),
        lambda dv: log_sum_exp(matrix + dv[None, :], 1),
    )  # fmt: skip
    return _absorbed(scaled, end)


def _iterate(rows, columns, length, state, over_rows, over_columns):
    """Columns, rows, and the constant, `length` times."""
    from_rows, from_columns = _origin(rows, state.f), _origin(columns, state.g)

    def iteration(_, carry):
        du, dv, k = carry
        dv = _updated(columns, over_rows(du), from_columns + k)
        du = _updated(rows, over_columns(dv), from_rows - k)
        return du, dv, _constant(rows, columns, du - from_rows, dv - from_columns)

    du, dv, k = lax.fori_loop(0, length, iteration, (state.du, state.dv, state.k))
    return state._replace(du=du, dv=dv, k=k)


def _origin(side, reference):
    """The correction at which the potential F + shift is zero."""
    return jnp.where(side.weights != 0, log_weights(side.weights) - reference - side.shift, 0)


def _updated(side, sums, origin):
    """The correction that satisfies a side's equation: a mean of the balanced update and of the origin."""
    update = (log_weights(side.weights) - sums + side.damping * origin) / (1 + side.damping)
    return jnp.where(side.weights != 0, update, 0)


def _constant(rows, columns, potential_rows, potential_columns):
    """k, at which Σ a exp(-ε_a (F + k)) = Σ b exp(-ε_b (G - k)); zero where both sides are balanced."""
    damping = rows.damping + columns.damping
    asked_rows, asked_columns = (
        log_sum_exp(log_weights(side.weights) - side.damping * potential, 0)
        for side, potential in ((rows, potential_rows), (columns, potential_columns))
    )
    return jnp.where(damping > 0, (asked_rows - asked_columns) / jnp.where(damping > 0, damping, 1), 0)


def gap(scaled, rows, columns, state):
    """An upper bound of (primal - dual objective) / reg, rounded up; the dual is that of the state's potentials.

    With the marginals that the potentials ask for, x = a exp(-ε_a F) and y = b exp(-ε_b G), any plan P has

        (primal(P) - dual) / reg = KL(P | T) + KL(P 1 | x) / ε_a + KL(Pᵀ 1 | y) / ε_b

    Two plans are tried: T itself, whose first term is zero; and T rounded to the marginals x and y, where the others
    are: the better one where ρ is large. The rounded plan is Q + e dᵀ / δ, with Q <= T what is left of T where rows and
    columns have too much, e and d what they lack, and δ the mass of either. By the log-sum inequality

        KL(P | T) <= |P| H(δ / |P|) + Σ e_i d_j / δ log(e_i d_j / (δ T_ij)) - |P| + |T|

    with H the binary entropy: three products with a vector.
    """
    plan = _plan(state)
    eps = jnp.finfo(plan.dtype).eps
    sides = ((rows, state.f, state.du, state.k, 1), (columns, state.g, state.dv, -state.k, 0))
    asked, sums, rounding, potentials = [], [], [], []
    for side, reference, correction, k, axis in sides:
        exponent = side.damping * (correction - _origin(side, reference) + k)
        asked.append(jnp.where(side.weights != 0, side.weights * jnp.exp(-exponent), 0))
        sums.append(plan.sum(axis))
        # Relative, by worst case: of a sum of as many positive terms, and of an exponential.
        rounding.append((plan.shape[axis] / 2 + 4 + 4 * jnp.abs(exponent)) * eps)
        potentials.append(reference + correction)
    of_plan = sum(
        _over(_bregman(total, goal, off).sum(), side.damping)
        for total, goal, off, (side, *_) in zip(sums, asked, rounding, sides, strict=True)
    )

    (x, y), (off_rows, off_columns) = asked, rounding
    mass = x.sum()
    differ = jnp.abs(mass - y.sum()) > 1e-3 * mass  # only where neither side may give way
    y = y * (mass * inverse(y.sum()))
    kept = plan * jnp.minimum(1, x * inverse(sums[0]))[:, None]
    kept = kept * jnp.minimum(1, y * inverse(kept.sum(0)))[None, :]
    lacking = [
        jnp.maximum(goal - kept.sum(axis), 0) + off * goal
        for goal, axis, off in ((x, 1, off_rows), (y, 0, off_columns))
    ]
    moved = jnp.maximum(lacking[0].sum(), lacking[1].sum())
    e, d = (lack * (moved * inverse(lack.sum())) for lack in lacking)
    logs = _sum_log(e, potentials[0]) + _sum_log(d, potentials[1]) - moved * jnp.log(jnp.where(moved > 0, moved, 1))
    logs -= jnp.sum(e * product("ij,j->i", scaled, d)) * inverse(moved)
    share = jnp.minimum(moved * inverse(mass), 0.5)
    entropy = -share * jnp.log(jnp.where(share > 0, share, 1)) - (1 - share) * jnp.log1p(-share)
    of_rounded = mass * entropy + logs + (sums[0].sum() - mass) + jnp.max(off_rows) * mass
    return jnp.maximum(jnp.minimum(of_plan, jnp.where(differ, jnp.inf, of_rounded)), 0)


def _bregman(total, goal, off):
    """KL(total | goal) of each entry, at most, where total / goal is known to a relative error `off`."""
    excess = total * inverse(goal) - 1

    def of(z):
        z = jnp.maximum(z, -1)
        inside = jnp.where(z > -1, z, 0)
        # (1 + z) log(1 + z) - z, whose terms cancel where z is small
        exact = (1 + inside) * jnp.log1p(inside) - inside
        return jnp.where(z > -1, jnp.where(jnp.abs(z) < 0.03, z * z * (0.5 - z / 6 + z * z / 12), exact), 1)

    reach = off * (1 + jnp.abs(excess))
    return goal * jnp.maximum(of(excess - reach), of(excess + reach)) * (1 + 1e-5)


def _over(value, damping):
    return jnp.where(damping > 0, value / jnp.where(damping > 0, damping, 1), jnp.inf)


def _sum_log(mass, potential):
    """Σ m (log m - φ) over the points with mass."""
    return jnp.sum(jnp.where(mass > 0, mass * (jnp.log(jnp.where(mass > 0, mass, 1)) - potential), 0))


def _in_range(power, *corrections):
    limit = jnp.log(largest(corrections[0], power))
    return within(limit, *corrections)


def _absorbed(scaled, state):
    f, g = state.f + state.du, state.g + state.dv
    zeros = jnp.zeros_like(state.du), jnp.zeros_like(state.dv)
    return State(f, g, *zeros, state.k, jnp.exp(_matrix(scaled, f, g)))


def _plan(state):
    return state.kernel * jnp.exp(state.du)[:, None] * jnp.exp(state.dv)[None, :]


def _matrix(scaled, f, g):
    return (scaled + f[:, None]) + g[None, :]
