"""Sinkhorn iterations with relaxed marginals, and their duality gap.

With s = -C / reg, T = exp(φ_i + γ_j + s_ij) and ε = reg / ρ, the optimal F = φ - log a and G = γ - log b satisfy
T 1 = a exp(-ε_a F) and Tᵀ 1 = b exp(-ε_b G). An iteration solves these equations in turn:

    G_j = -LSE_i(s_ij + φ_i) / (1 + ε_b)        F_i = -LSE_j(s_ij + γ_j) / (1 + ε_a)

A constant moved from G to F does not change the plan, but it changes the dual objective, and these updates alone would
need about ρ / reg iterations to find its optimum. The optimum is known in closed form: both sides' target marginals
then have the same mass. So the constant is set after each iteration (Séjourné, Vialard and Peyré 2022). It is stored
separately as k: the potentials are F + k and G - k. The iterations then converge as fast as the balanced ones, which
are the case ε = 0.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fs_jax.ot._batching import in_chunks
from fs_jax.ot._iterations import matrix
from fs_jax.ot._loops import RUN, lengths, once_if, scan_until
from fs_jax.ot._numerics import MASKED, inverse, largest, log_sum_exp, log_weights, product, within
from fs_jax.ot.result import Status, has_stalled


class Marginal(NamedTuple):
    """One side of the problem.

    Attributes:
        weights: mass of each point.
        damping: ε = reg / ρ; zero if the marginal is not relaxed.
        shift: the constants subtracted from the cost, over reg: F + shift is the potential of the uncentred cost.
    """

    weights: jax.Array
    damping: jax.Array
    shift: jax.Array


class State(NamedTuple):
    """Potentials as a reference and corrections, φ = f + du and γ = g + dv.

    `kernel` is exp(s + f + g), and `k` the constant that moves between the potentials.
    """

    f: jax.Array
    g: jax.Array
    du: jax.Array
    dv: jax.Array
    k: jax.Array
    kernel: jax.Array


class Progress(NamedTuple):
    """Progress across runs: iterations done, whether to stop, the smallest gap, and the runs since that gap."""

    done: jax.Array
    converged: jax.Array
    stalled: jax.Array
    best: jax.Array
    since_best: jax.Array


class Outcome(NamedTuple):
    """Result of the iterations: plan, φ + k, γ - k, gap / reg, iterations, and the status if the threshold is not met.

    Counts are floating, since a derivative rule has no tangent for integers that vary over mesh axes.
    """

    plan: jax.Array
    phi: jax.Array
    gamma: jax.Array
    gap: jax.Array
    done: jax.Array
    status: jax.Array


@cache
def make_iterations(num_iters: int):
    """The iterations as a function of (scaled, rows, columns, start, threshold), with a threshold for gap / reg."""

    @in_chunks
    def iterations(scaled, rows: Marginal, columns: Marginal, start, threshold):
        state = _start(scaled, rows, columns, start)

        false, zero = jnp.zeros_like(scaled, bool, shape=()), jnp.zeros_like(scaled, shape=())
        progress = Progress(zero, false, false, jnp.full_like(zero, jnp.inf), zero)
        full, rest = divmod(num_iters, RUN)  # the number of full runs, and the length of a last one

        def run(state, length):
            return _run(scaled, rows, columns, length, state), None

        def advance(length, carry):
            state, _ = run(carry[0], length)
            return state, _next_progress(scaled, rows, columns, threshold, length, state, carry[1])

        def has_stopped(carry):
            return carry[1].converged | carry[1].stalled

        def is_done(carry):
            return has_stopped(carry) | (carry[1].done >= full * RUN)

        def step(carry, length):
            return once_if(~is_done(carry), partial(advance, length), carry), None

        if threshold is None:
            state, _ = lax.scan(run, state, lengths(num_iters, None))
            progress = progress._replace(done=zero + num_iters)
        else:
            carry = scan_until(is_done, step, (state, progress), RUN, full)
            carry = once_if(~has_stopped(carry), partial(advance, jnp.int32(rest)), carry) if rest else carry
            state, progress = carry
        status = jnp.where(progress.stalled, Status.STALLED, zero + Status.LIMIT)
        phi = jnp.where(rows.weights != 0, state.f + state.du + state.k, MASKED)
        gamma = jnp.where(columns.weights != 0, state.g + state.dv - state.k, MASKED)
        return Outcome(_plan(state), phi, gamma, gap(scaled, rows, columns, state)[0], progress.done, status)

    return iterations


def _next_progress(scaled, rows, columns, threshold, length, state, progress):
    """Progress after a run. The result's gap is computed by another program: 1% allows for its different rounding."""
    value, floor = gap(scaled, rows, columns, state)
    converged = value <= 0.99 * threshold
    done = progress.done + length.astype(progress.done.dtype)
    since_best = jnp.where(value < progress.best, 0, progress.since_best + 1)
    stalled = ~converged & has_stalled(value, since_best, done // RUN, floor)
    return Progress(done, converged, stalled, jnp.minimum(value, progress.best), since_best)


def _start(scaled, rows, columns, start):
    """The state at φ = start. Its reference makes the largest entry of each row and column of K equal to one.

    The largest start is moved to k. Next to a large constant, φ would lose digits.
    """
    is_row, is_column = rows.weights != 0, columns.weights != 0
    k = jnp.max(jnp.where(is_row, start, -jnp.inf))
    k = jnp.where(jnp.isfinite(k), k, 0)
    phi = jnp.where(is_row, start - k, MASKED)
    g = jnp.where(is_column, -jnp.max(scaled + phi[:, None], 0), MASKED)
    f = jnp.where(is_row, -jnp.max(scaled + g[None, :], 1), MASKED)
    du = jnp.where(is_row, phi - f, 0)
    state = State(f, g, du, jnp.zeros_like(g), k, jnp.exp(matrix(scaled, f, g)))
    # If the start is far from the reference, the first iteration is done in the log domain.
    return once_if(~_in_range(0.37, state.du), lambda s: _log_run(scaled, rows, columns, 1, s), state)


def _run(scaled, rows, columns, length, state):
    """A run by products with K, repeated in the log domain if the scalings leave its range.

    K loses entries below 1e-38 (in float32): at most 4e-10 of the plan's mass each, if the scalings are at most 2e14.
    """
    state = once_if(~_in_range(0.18, state.du, state.dv), lambda s: _absorbed(scaled, s), state)

    is_absent = [(side.weights == 0).astype(scaled.dtype) for side in (rows, columns)]

    def over_rows(du):
        return jnp.log(product("ij,i->j", state.kernel, jnp.exp(du)) + is_absent[1])

    def over_columns(dv):
        return jnp.log(product("ij,j->i", state.kernel, jnp.exp(dv)) + is_absent[0])

    end = _iterate(rows, columns, length, state, over_rows, over_columns)
    in_range = _in_range(0.37, end.du, end.dv)
    start_or_end = jax.tree.map(lambda x, y: jnp.where(in_range, y, x), state, end)
    return once_if(~in_range, lambda s: _log_run(scaled, rows, columns, length, s), start_or_end)


def _log_run(scaled, rows, columns, length, state):
    """The same iterations by sums of exponentials. Then the corrections are absorbed into the reference."""
    reference = matrix(scaled, state.f, state.g)
    end = _iterate(
        rows, columns, length, state,
        lambda du: log_sum_exp(reference + du[:, None], 0),
        lambda dv: log_sum_exp(reference + dv[None, :], 1),
    )  # fmt: skip
    return _absorbed(scaled, end)


def _iterate(rows, columns, length, state, over_rows, over_columns):
    """Updates the columns, the rows and the constant, `length` times."""
    origin_rows, origin_columns = _origin(rows, state.f), _origin(columns, state.g)

    def iteration(_, carry):
        du, dv, k = carry
        dv = _updated(columns, over_rows(du), origin_columns + k)
        du = _updated(rows, over_columns(dv), origin_rows - k)
        return du, dv, _constant(rows, columns, du - origin_rows, dv - origin_columns)

    du, dv, k = lax.fori_loop(0, length, iteration, (state.du, state.dv, state.k))
    return state._replace(du=du, dv=dv, k=k)


def _origin(side, reference):
    """The correction at which the potential F + shift is zero."""
    return jnp.where(side.weights != 0, log_weights(side.weights) - reference - side.shift, 0)


def _updated(side, sums, origin):
    """The correction that solves a side's equation: a weighted mean of the balanced update and of the origin."""
    update = (log_weights(side.weights) - sums + side.damping * origin) / (1 + side.damping)
    return jnp.where(side.weights != 0, update, 0)


def _constant(rows, columns, potential_rows, potential_columns):
    """The k with Σ a exp(-ε_a (F + k)) = Σ b exp(-ε_b (G - k)); zero if both sides are balanced."""
    damping = rows.damping + columns.damping
    mass_rows, mass_columns = (
        log_sum_exp(log_weights(side.weights) - side.damping * potential, 0)
        for side, potential in ((rows, potential_rows), (columns, potential_columns))
    )
    return jnp.where(damping > 0, (mass_rows - mass_columns) / jnp.where(damping > 0, damping, 1), 0)


def gap(scaled, rows, columns, state):
    """An upper bound of (primal - dual) / reg for the dual objective of the potentials, and the size of its rounding.

    With the target marginals of these potentials, x = a exp(-ε_a F) and y = b exp(-ε_b G), any plan P has

        (primal(P) - dual) / reg = KL(P | T) + KL(P 1 | x) / ε_a + KL(Pᵀ 1 | y) / ε_b

    The bound is the smaller of its values for two plans. For P = T the first term is zero. For T rounded to the
    marginals x and y the other two are zero; this plan is the better one if ρ is large. The rounded plan is Q + e dᵀ /
    δ: Q <= T is T with rows and columns of too much mass scaled down, e and d are the mass that its rows and columns
    lack, and δ is the sum of either. By the log-sum inequality

        KL(P | T) <= |P| H(δ / |P|) + Σ e_i d_j / δ log(e_i d_j / (δ T_ij)) - |P| + |T|

    with the binary entropy H. This takes three matrix-vector products. x and y have the same mass, by the choice of k;
    if both marginals are hard constraints, by assumption. The rounding error of the dual objective is added. It is that
    of a sum of the terms a (1 - exp(-ε_a F)) / ε_a, the same terms for b, |a| |b| and |T|, at rounded potentials.
    """
    plan = _plan(state)
    eps = jnp.finfo(plan.dtype).eps
    sides = ((rows, state.f, state.du, state.k, 1), (columns, state.g, state.dv, -state.k, 0))
    targets, sums, errors, potentials, gap_of_plan = [], [], [], [], 0
    size = rows.weights.sum() * columns.weights.sum() + plan.sum()  # of the dual objective's terms, over reg
    for side, reference, correction, k, axis in sides:
        free = correction - _origin(side, reference) + k
        exponent = side.damping * free
        log_target = jnp.where(side.weights != 0, log_weights(side.weights) - exponent, MASKED)
        total = plan.sum(axis)
        # Worst-case relative error: of a sum of this many positive terms, and of an exponential.
        error = (plan.shape[axis] / 2 + 4 + 4 * jnp.abs(exponent)) * eps
        gap_of_plan += _divided(_kl_upper(total, log_target, error).sum(), side.damping)
        target = jnp.exp(log_target)
        # w (1 - exp(-ε F)) / ε, within a factor of two.
        far_term = _divided(jnp.abs(side.weights - target), side.damping)
        term = jnp.where(jnp.abs(exponent) < 1, jnp.abs(free) * side.weights, far_term)
        parts = jnp.abs(reference + correction) + jnp.abs(log_weights(side.weights)) + jnp.abs(side.shift) + jnp.abs(k)
        size += jnp.sum(jnp.where(side.weights != 0, term + target * parts, 0))
        targets.append(target)
        sums.append(total)
        errors.append(error)
        potentials.append(reference + correction)

    rounding = 4 * eps * size  # potentials are sums of four parts, each rounded
    # Well above the rounding of the bound, which sums n·m terms as large as log T and n + m masses.
    floor = 2 * rounding + 64 * eps * (jnp.abs(scaled).max() + sum(scaled.shape)) * sums[0].sum()
    gap_of_rounded = _gap_of_rounded(scaled, plan, targets, sums, errors, potentials)
    return jnp.maximum(jnp.minimum(gap_of_plan, gap_of_rounded), 0) + rounding, floor


def _gap_of_rounded(scaled, plan, targets, sums, errors, potentials):
    """The bound of KL(P | T) for T rounded to the target marginals, by the log-sum inequality of `gap`."""
    (x, y), (error_rows, error_columns) = targets, errors
    mass = x.sum()
    y = y * (mass * inverse(y.sum()))
    kept = plan * jnp.minimum(1, x * inverse(sums[0]))[:, None]
    kept = kept * jnp.minimum(1, y * inverse(kept.sum(0)))[None, :]
    deficits = [
        jnp.maximum(target - kept.sum(axis), 0) + error * target
        for target, axis, error in ((x, 1, error_rows), (y, 0, error_columns))
    ]
    moved = jnp.maximum(deficits[0].sum(), deficits[1].sum())
    e, d = (deficit * (moved * inverse(deficit.sum())) for deficit in deficits)
    logs = _sum_log(e, potentials[0]) + _sum_log(d, potentials[1]) - moved * jnp.log(jnp.where(moved > 0, moved, 1))
    logs -= jnp.sum(e * product("ij,j->i", scaled, d)) * inverse(moved)
    share = jnp.minimum(moved * inverse(mass), 0.5)
    entropy = -share * jnp.log(jnp.where(share > 0, share, 1)) - (1 - share) * jnp.log1p(-share)
    return mass * entropy + logs + (sums[0].sum() - mass) + jnp.max(error_rows) * mass


def _kl_upper(total, log_target, error):
    """An upper bound of KL(total | target) of each entry, if total / target has a relative error of at most `error`."""
    target, bits = jnp.exp(log_target), jnp.finfo(total.dtype)
    # Far apart: total log(total / target) - total + target, by the target's logarithm, since the target may underflow.
    log_total = jnp.log(jnp.where(total > 0, total, 1))
    ratio = jnp.where(total > 0, log_total - log_target, 0)
    log_error = error + 4 * bits.eps * (jnp.abs(log_total) + jnp.abs(jnp.where(total > 0, log_target, 0)))
    far = total * ratio - total + target + (total * (1 + jnp.abs(ratio)) + target) * log_error
    # Near: target ((1 + z) log(1 + z) - z) by its series, since the terms cancel. It is convex: largest at an end.
    is_near = (jnp.abs(ratio) < 0.03) & (total > 0) & (target > bits.tiny / bits.eps)
    z = jnp.where(is_near, total / jnp.where(is_near, target, 1) - 1, 0)
    near = [end * end * (0.5 - end / 6 + end * end / 12) for end in (z - 1.1 * error, z + 1.1 * error)]
    return jnp.where(is_near, target * jnp.maximum(*near) * (1 + 1e-5), far)  # the next term is 3e-6 of the first


def _divided(value, damping):
    """Value / damping; infinity if the damping is zero, since that marginal is a hard constraint."""
    return jnp.where(damping > 0, value / jnp.where(damping > 0, damping, 1), jnp.inf)


def _sum_log(mass, potential):
    """Σ m (log m - φ) over points with mass."""
    return jnp.sum(jnp.where(mass > 0, mass * (jnp.log(jnp.where(mass > 0, mass, 1)) - potential), 0))


def _in_range(power, *corrections):
    """Whether all corrections are small. Scalings above the limit overflow, and large corrections are rounded."""
    limit = jnp.log(largest(corrections[0], power))
    return within(limit, *map(jnp.abs, corrections))


def _absorbed(scaled, state):
    """The same potentials with zero corrections. The largest f is moved to k: next to it, others would lose digits."""
    f, g = state.f + state.du, state.g + state.dv
    constant = jnp.max(f)
    f, g = f - constant, g + constant
    zeros = jnp.zeros_like(state.du), jnp.zeros_like(state.dv)
    return State(f, g, *zeros, state.k + constant, jnp.exp(matrix(scaled, f, g)))


def _plan(state):
    return state.kernel * jnp.exp(state.du)[:, None] * jnp.exp(state.dv)[None, :]
