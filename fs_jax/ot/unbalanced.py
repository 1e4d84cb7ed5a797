"""Unbalanced entropic transport: relaxed marginals, for sets of different mass and for outliers."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Bool, Float, Int

from fs_jax.ot import _checks, _relaxed
from fs_jax.ot._implicit import solve_symmetric
from fs_jax.ot._numerics import MASKED, inverse, log_weights
from fs_jax.ot._relaxed import Marginal
from fs_jax.ot.problem import Problem, make_problem
from fs_jax.ot.result import ENVELOPE, Status, first_order_only, live_plan, narrowed

GRADS = ("implicit", "envelope", "none")


class Unbalanced(NamedTuple):
    """The result of `unbalanced_sinkhorn`: a plan, its costs, its duality gap and a status.

    Attributes:
        plan: mass moved from row i to column j, [n, m]: exp((f_i + g_j - cost_ij) / reg).
        primal_cost: ⟨plan, cost⟩, the cost of the mass that is moved.
        reg_cost: the objective at the solution, up to `gap`: it is the dual objective at these potentials.
        f: potential of each row in units of the cost, [n]; a large negative number where a is zero. It includes
            reg·log a, as in `Transport`. With f' = f - reg·log a, the solution has plan 1 = a exp(-f' / ρ_a).
        g: potential of each column, [m]; likewise.
        gap: upper bound of |minimum - reg_cost|, in units of cost times mass, rounding included. It also bounds the
            error of the plan: reg·KL(optimal plan | plan) <= gap. (In half precision, `reg_cost` is rounded too, and
            the plan's bound holds before it is rounded.) The objective evaluated at the plan may be further from the
            minimum if ρ is large, since a rounding error in a marginal is then expensive.
        num_iters: number of iterations done.
        status: a `Status` as an integer: 0 CONVERGED, gap <= threshold; 1 LIMIT; 2 NOT_FINITE; 3 STALLED.
    """

    plan: Float[Array, "n m"]
    primal_cost: Float[Array, ""]
    reg_cost: Float[Array, ""]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    gap: Float[Array, ""]
    num_iters: Int[Array, ""]
    status: Int[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether `status` is CONVERGED."""
        return self.status == Status.CONVERGED


export.register_namedtuple_serialization(Unbalanced, serialized_name="fs_jax.ot.Unbalanced")


class Options(NamedTuple):
    """Static options, known at compile time."""

    num_iters: int
    dtype: str


@_checks.suggests_names
def unbalanced_sinkhorn(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | Bool[Array, " n"] | None = None,
    b: Float[Array, " m"] | Bool[Array, " m"] | None = None,
    *,
    reg: float | Float[Array, ""],
    rho: float | Float[Array, ""] | tuple[float | Float[Array, ""], float | Float[Array, ""]],
    num_iters: int = 100,
    threshold: float | Float[Array, ""] | None = None,
    grad: Literal["implicit", "envelope", "none"] = "implicit",
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
) -> Unbalanced:
    """Entropic optimal transport with relaxed marginals.

        min over T >= 0 of ⟨T, C⟩ + reg·KL(T | a bᵀ) + ρ_a·KL(T 1 | a) + ρ_b·KL(Tᵀ 1 | b)

    with KL(x | y) = Σ x log(x / y) - x + y. Mass is not moved if that would cost more than about ρ_a + ρ_b per unit. If
    both ρ are infinite, this is the problem of `sinkhorn`; if one of them is, it is semi-relaxed transport. Convergence
    does not slow down as ρ grows.

    Args:
        cost: cost of moving a unit of mass from row i to column j, [n, m]. Half precision is computed in float32 and
            returned in half precision.
        a: mass of each row, 1/n by default. A weight of zero excludes the row from the problem exactly. Or a boolean
            mask: the rows that are True share a mass of one evenly.
        b: mass of each column, 1/m by default. Its total may differ from that of `a`, unless both `rho` are infinite.
        reg: weight of the entropic term, in units of the cost.
        rho: weight of the marginals' KL terms, in units of the cost: one number, or a pair for rows and columns.
            `jnp.inf` makes a marginal a hard constraint. It may be traced and differentiated. (ott-jax's tau is
            ρ / (ρ + reg).)
        num_iters: maximum number of iterations (static under jit).
        threshold: stop when the duality gap (in units of cost times mass) is at most this; checked every ten
            iterations. By default, all iterations are done. With a threshold below what the dtype can reach, the solver
            stops early with `Status.STALLED`. In a batch, each problem stops by its own gap.
        grad: how to differentiate.
            "implicit" differentiates the optimality conditions (derivatives of any order); the iterations must have
            converged.
            "envelope" holds plan and potentials fixed: the gradient of `reg_cost` is exact at convergence, also with
            respect to a, b, reg and rho (first derivatives).
            "none" gives zero gradients.
        init: initial potentials (f, g), such as those of a similar problem. Only f matters.

    Returns:
        An `Unbalanced`.

    Raises:
        TypeError: if an argument is not as described.
        ValueError: if a shape or value is invalid; the message says which, and what is expected.
        NotImplementedError: if a second derivative is taken with grad="envelope".

    Example:
        >>> from fs_jax.ot import sqeuclidean_cost, unbalanced_sinkhorn
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [1.0], [9.0]])  # an outlier
        >>> result = unbalanced_sinkhorn(sqeuclidean_cost(x, y), jnp.ones(2), jnp.ones(3), reg=0.1, rho=1.0)
        >>> print(result.plan.round(1))
        [[1. 0. 0.]
         [0. 1. 0.]]

    Source: Chizat et al. (Mathematics of Computation 2018); for the constant between the potentials, Séjourné, Vialard
    and Peyré (AISTATS 2022). The gap is derived in `_relaxed.gap`.
    """
    prices = _checks.prices("rho", rho)
    cost, a, b, dtype = _checks.problem(cost, a, b, any_mass=not all(_checks.is_infinite(price) for price in prices))
    reg = _checks.positive("reg", reg, cost.dtype)
    num_iters = _checks.count("num_iters", num_iters)
    threshold = _checks.threshold(threshold, cost.dtype)
    grad = _checks.choice("grad", grad, GRADS)
    n, m = cost.shape
    f = None if init is None else _checks.potentials(init, n, m, cost.dtype)[0]
    rho_a, rho_b = (price.astype(cost.dtype) for price in prices)
    return _solve(cost, a, b, reg, (rho_a, rho_b), threshold, f, Options(num_iters, dtype), grad)


@partial(jax.jit, static_argnames=("options", "grad"))
def _solve(cost, a, b, reg, rho, threshold, f, options, grad):
    if grad == "none":
        cost, a, b, reg, rho, f = lax.stop_gradient((cost, a, b, reg, rho, f))
    problem, (rho_a, rho_b, threshold, f) = make_problem(cost, a, b, reg, *rho, threshold, f)
    inverse_rho = (1 / rho_a, 1 / rho_b)
    rows, columns = _marginals(problem, inverse_rho)
    start = (log_weights(problem.a) if f is None else f / problem.reg) - problem.rows / problem.reg
    arguments = (problem.scaled, rows, columns)
    if grad in ("envelope", "none"):
        arguments = lax.stop_gradient(arguments)
    limit = None if threshold is None else threshold / problem.reg
    outcome = _implicit(*arguments, *lax.stop_gradient((start, limit)), options.num_iters)
    if grad == "envelope":
        primal_cost, reg_cost = _envelope_costs(problem, inverse_rho, lax.stop_gradient(outcome))
        plan = outcome.plan
    else:
        primal_cost, reg_cost, plan = _costs(problem, inverse_rho, outcome)
    is_infeasible = (rho_a == jnp.inf) & (rho_b == jnp.inf) & _checks.masses_differ(problem.a, problem.b, options.dtype)
    outcome = outcome._replace(gap=jnp.where(is_infeasible, jnp.inf, outcome.gap))
    return _result(problem, outcome, plan, primal_cost, reg_cost, threshold, options.dtype, grad)


def _marginals(problem: Problem, inverse_rho):
    (a, b), (r_a, r_b) = (problem.a, problem.b), inverse_rho
    return (
        Marginal(a, problem.reg * r_a, problem.rows / problem.reg),
        Marginal(b, problem.reg * r_b, problem.columns / problem.reg),
    )


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _implicit(scaled, rows: Marginal, columns: Marginal, start, limit, num_iters: int) -> _relaxed.Outcome:
    """`Outcome` of the iterations, whose potentials have the derivative of the solution.

    Let T = exp(φ_i + γ_j + s_ij) with s = `scaled`, φ = F + log a - shift, and let ε_a = reg / ρ_a be the damping of
    the rows; likewise G and ε_b for the columns. Differentiating T 1 = a exp(-ε_a F) = x and Tᵀ 1 = y gives

        [(1 + ε_a) diag(x)   T                 ] [dφ]   [x (dlog a + ...) - (T∘ds) 1 ]
        [Tᵀ                  (1 + ε_b) diag(y) ] [dγ] = [y (dlog b + ...) - (T∘ds)ᵀ 1]

    where "..." is ε_a (dlog a - dshift) - F dε_a for the rows, and likewise for the columns.
    """
    return _relaxed.make_iterations(num_iters)(scaled, rows, columns, start, limit)


@_implicit.defjvp
def _derivative(num_iters, primals, tangents):
    scaled, rows, columns, *_ = primals
    d_scaled, d_rows, d_columns, *_ = tangents
    outcome = _implicit(*primals, num_iters)  # calls itself, so that derivatives of any order are right
    plan = live_plan(lax.stop_gradient(outcome.plan), scaled, outcome.phi, outcome.gamma)
    d_plan = plan * d_scaled

    def right(side, d_side, potential, d_sum, axis):
        weights, damping, shift = side
        d_log = d_side.weights * inverse(weights)
        potential = jnp.where(weights != 0, potential - log_weights(weights) + shift, 0)
        d_log_target = (1 + damping) * d_log - damping * d_side.shift - d_side.damping * potential
        return plan.sum(axis) * d_log_target - d_sum

    right_rows = right(rows, d_rows, outcome.phi, d_plan.sum(1), 1)
    right_columns = right(columns, d_columns, outcome.gamma, d_plan.sum(0), 0)
    d_phi, d_gamma = solve_symmetric(plan, right_rows, right_columns, (rows.damping, columns.damping))
    return outcome, jax.tree.map(jnp.zeros_like, outcome)._replace(phi=d_phi, gamma=d_gamma)


def _costs(problem, inverse_rho, outcome):
    """⟨T, C⟩, the dual objective, and the plan T, all as functions of the problem and the potentials.

    The dual objective is Σ a ρ_a (1 - exp(-F reg / ρ_a)) + Σ b ρ_b (1 - exp(-G reg / ρ_b)) - reg (|T| - |a| |b|).
    """
    plan = live_plan(lax.stop_gradient(outcome.plan), problem.scaled, outcome.phi, outcome.gamma)
    dual = problem.reg * (problem.a.sum() * problem.b.sum() - plan.sum())
    sides = zip(_marginals(problem, inverse_rho), (outcome.phi, outcome.gamma), inverse_rho, strict=True)
    for side, potential, r in sides:
        potential = jnp.where(side.weights != 0, potential - log_weights(side.weights) + side.shift, 0)
        dual += jnp.sum(side.weights * _saturated(problem.reg * potential, r))
    return jnp.sum(plan * problem.cost), dual, plan


def _saturated(f, r):
    """(1 - exp(-r f)) / r, which is f at r = 0; by its series for small r f, where the quotient loses digits."""
    small = jnp.abs(r * f) < 1e-3  # the series is then off by (r f)^5 / 720, relative: less than float64 rounds
    divisor = jnp.where(small, 1, r)
    # Zero where the series is not used: at potentials of 1e30, of a side without mass, it would overflow, and the
    # derivative would be NaN.
    s = jnp.where(small, f, 0)
    series = s * (1 - r * s / 2 * (1 - r * s / 3 * (1 - r * s / 4 * (1 - r * s / 5))))
    return jnp.where(small, series, -jnp.expm1(-divisor * jnp.where(small, 0, f)) / divisor)


@jax.custom_jvp
def _envelope_costs(problem, inverse_rho, outcome):
    return _costs(problem, inverse_rho, outcome)[:2]


@_envelope_costs.defjvp
def _envelope_derivative(primals, tangents):
    problem, inverse_rho, outcome = primals

    def at_fixed_potentials(problem, inverse_rho):
        _, dual, _ = _costs(problem, inverse_rho, outcome)
        return jnp.sum(lax.stop_gradient(outcome.plan) * problem.cost), dual

    return jax.jvp(at_fixed_potentials, first_order_only((problem, inverse_rho), ENVELOPE), tangents[:2])


def _result(problem, outcome, plan, primal_cost, reg_cost, threshold, dtype, grad):
    f = jnp.where(problem.a != 0, problem.reg * outcome.phi + problem.rows, MASKED)
    g = jnp.where(problem.b != 0, problem.reg * outcome.gamma + problem.columns, MASKED)
    if grad == "envelope":
        f, g = lax.stop_gradient((f, g))
    objective = reg_cost
    plan, primal_cost, reg_cost, f, g = (narrowed(x, dtype) for x in (plan, primal_cost, reg_cost, f, g))
    gap = outcome.gap * problem.reg + jnp.abs(reg_cost.astype(objective.dtype) - objective)
    gap = lax.stop_gradient(gap)
    gap, done, status = lax.stop_gradient((gap, outcome.done, outcome.status))
    finite = ~jnp.isnan(gap) & jnp.isfinite(primal_cost) & jnp.isfinite(reg_cost)
    finite &= jnp.all(jnp.isfinite(f)) & jnp.all(jnp.isfinite(g))
    status = jnp.where(finite, status, Status.NOT_FINITE)
    if threshold is not None:
        status = jnp.where(threshold >= 0, status, Status.NOT_FINITE)
        # The iterations stop before the result is rounded to half precision, which can be coarser than the threshold.
        rounded = finite & (outcome.gap * problem.reg <= threshold)
        status = jnp.where(rounded, jnp.where(gap <= threshold, Status.CONVERGED, Status.STALLED), status)
    return Unbalanced(plan, primal_cost, reg_cost, f, g, gap, done.astype(jnp.int32), status.astype(jnp.int32))
