"""Time divergences, unbalanced and exact transport against ott-jax and POT: about three minutes on two CPU cores.

Solves a batch of problems between sets of points in 10 dimensions, with squared distances divided by their mean, in
float32. Each time is the median over rounds in which every solver runs once, in one process.

- Divergence: 50 iterations of each of its three problems, and the gradient with respect to the points.
- Unbalanced: each solver runs until it reports convergence at the given setting. The table has the relative excess of
  the plan's objective over the minimum, which is certified by a duality gap of 1e-9 in float64.
- Exact: proximal point methods with equal numbers of steps. The table has the relative excess of the cost of the plan,
  rounded to the marginals (`round_to_feasible`), over the exact cost from POT's network simplex. The proximal method of
  POT 0.9.7 has a wrong sign in the term of the previous plan. After an odd number of steps, as here, it returns
  Sinkhorn's plan at `inner_reg`; after an even number, the independent coupling.

The entropic term of ott-jax for an unbalanced plan is KL(T | 1 1ᵀ); its costs are changed so that it becomes
KL(T | a bᵀ). POT computes in NumPy: batches with `ot.solve_batch`; unbalanced problems and the network simplex one
after the other, in float64.

Writes transport.json and transport.md to the results folder.

Examples:
    python -m experiments.benchmarks.transport
    python -m experiments.benchmarks.transport --rounds 1 --problems 8 --results results/bench
"""

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
from ott.geometry.geometry import Geometry
from ott.geometry.pointcloud import PointCloud
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.sinkhorn import Sinkhorn
from ott.tools import sinkhorn_divergence as ott_divergence
from tabulate import tabulate

from experiments import command_line
from experiments.benchmarks.timing import seconds_in_turn
from experiments.output import made_on, write_files
from fs_jax._utils import backend
from fs_jax.ot import ipot, round_to_feasible, sinkhorn_divergence, sqeuclidean_cost, unbalanced_sinkhorn

ITERATIONS = 50
LIMIT = 5000
REG = 0.05
RHOS = (1.0, 100.0)
BETA, STEPS = 0.2, 201


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    results: Path = Path("experiments/results/bench_transport_cpu")
    """Folder for the results."""
    rounds: int = 5
    """Timed runs of each solver; times are medians."""
    problems: int = 64
    """Problems in a batch."""
    points: int = 60
    """Points in each set."""


def batched(function: Callable, *inputs) -> Callable:
    """The function compiled for a batch and bound to it: a function without arguments."""
    compiled = jax.jit(jax.vmap(function)).lower(*inputs).compile()
    return partial(compiled, *inputs)


def our_divergence(x, y):
    costs = sqeuclidean_cost(x, y), sqeuclidean_cost(x, x), sqeuclidean_cost(y, y)
    return sinkhorn_divergence(*costs, reg=REG * x.shape[1], num_iters=ITERATIONS).value


def otts_divergence(x, y):
    options = {"threshold": -1.0, "max_iterations": ITERATIONS}
    epsilon = REG * x.shape[1]
    return ott_divergence.sinkhorn_divergence(PointCloud, x, y, epsilon=epsilon, solve_kwargs=options)[0]


def pots_divergences(x, y):
    options = {"numIterMax": ITERATIONS, "stopThr": 0, "warn": False}
    return [
        pot.bregman.empirical_sinkhorn_divergence(*pair, REG * x.shape[2], **options) for pair in zip(x, y, strict=True)
    ]


def divergence_rows(x, y, rounds):
    functions = {"fs_jax": our_divergence, "ott-jax": otts_divergence}
    programs = {(name, "value"): batched(of, x, y) for name, of in functions.items()}
    programs |= {(name, "gradient"): batched(jax.grad(of), x, y) for name, of in functions.items()}
    programs["POT", "value"] = partial(pots_divergences, *(np.asarray(of, np.float64) for of in (x, y)))
    times = milliseconds(programs, rounds)
    return [
        {"solver": name, "value, ms": times[name, "value"], "gradient, ms": times.get((name, "gradient"))}
        for name in ("fs_jax", "ott-jax", "POT")
    ]


def ours_unbalanced(rho, threshold, cost, a, b):
    result = unbalanced_sinkhorn(cost, a, b, reg=REG, rho=rho, num_iters=LIMIT, threshold=threshold, grad="none")
    return result.plan, result.num_iters


def otts_unbalanced(rho, threshold, cost, a, b):
    tau = rho / (rho + REG)
    weighted = cost - REG * (jnp.log(a)[:, None] + jnp.log(b)[None, :])
    problem = LinearProblem(Geometry(cost_matrix=weighted, epsilon=REG), a, b, tau_a=tau, tau_b=tau)
    result = Sinkhorn(threshold=threshold, max_iterations=LIMIT)(problem)
    return result.matrix, result.n_iters


def pots_unbalanced(rho, costs, a, b):
    options = {"reg_type": "kl", "numItermax": LIMIT, "stopThr": 1e-6, "warn": False}
    solve = pot.unbalanced.sinkhorn_unbalanced
    plans = [solve(*weights, cost, REG, rho, **options) for cost, *weights in zip(costs, a, b, strict=True)]
    return np.stack(plans), None


def objective(plan, cost, a, b, rho):
    def kl(x, y):
        return np.sum(np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / y), 0) - x + y)

    penalty = kl(plan.sum(1), a) + kl(plan.sum(0), b)
    return np.sum(plan * cost) + REG * kl(plan, np.outer(a, b)) + rho * penalty


def unbalanced_rows(costs, a, b, rounds):
    rows = []
    wide = [np.asarray(of, np.float64) for of in (costs, a, b)]
    for rho in RHOS:
        with jax.enable_x64(True):
            solve = partial(unbalanced_sinkhorn, reg=REG, rho=rho, num_iters=20 * LIMIT, threshold=1e-9, grad="none")
            exact = jax.jit(jax.vmap(solve))(*map(jnp.asarray, wide))
            minimum = np.asarray(exact.reg_cost)
            assert np.all(exact.gap <= 1e-9)
        programs = {
            ("fs_jax", "gap 1e-3"): batched(partial(ours_unbalanced, rho, 1e-3), costs, a, b),
            ("fs_jax", "gap 1e-5"): batched(partial(ours_unbalanced, rho, 1e-5), costs, a, b),
            ("ott-jax", "threshold 1e-3"): batched(partial(otts_unbalanced, rho, 1e-3), costs, a, b),
            ("ott-jax", "threshold 1e-5"): batched(partial(otts_unbalanced, rho, 1e-5), costs, a, b),
            ("POT", "stopThr 1e-6"): partial(pots_unbalanced, rho, *wide),
        }
        times = milliseconds(programs, rounds)
        for (name, setting), program in programs.items():
            plans, iterations = program()
            values = [objective(*of, rho) for of in zip(np.asarray(plans, np.float64), *wide, strict=True)]
            rows.append(
                {
                    "ρ": rho,
                    "solver": name,
                    "stops at": setting,
                    "ms": times[name, setting],
                    "iterations (mean)": None if iterations is None else float(np.mean(np.asarray(iterations))),
                    "objective above the minimum (worst)": float(np.max((np.array(values) - minimum) / minimum)),
                }
            )
    return rows


def pots_proximal_plans(costs, beta):
    return pot.solve_batch(costs, method="proximal", inner_reg=beta, max_iter=STEPS, tol=0, grad="detach").plan


def exact_rows(costs, rounds):
    n = costs.shape[1]
    weights = np.full(n, 1 / n)
    wide = np.asarray(costs, np.float64)
    single = np.asarray(costs)
    programs = {
        f"fs_jax, ipot, beta={BETA:g}": batched(
            lambda cost: ipot(cost, beta=BETA, num_iters=STEPS, grad="none").plan, costs
        ),
        **{
            f"POT, solve_batch, proximal, inner_reg={beta:g}": partial(pots_proximal_plans, single, beta)
            for beta in (BETA, 1e-3)
        },
        "POT, emd": lambda: np.stack([pot.emd(weights, weights, cost) for cost in wide]),
    }
    times = milliseconds(programs, rounds)
    exact = np.array([pot.emd2(weights, weights, cost) for cost in wide])
    rows = []
    for name, program in programs.items():
        plans = np.asarray(program(), np.float64)
        with jax.enable_x64(True):
            rounded = np.stack([round_to_feasible(plan, weights, weights) for plan in plans])
        errors = abs(plans.sum(1) - weights).sum(1) + abs(plans.sum(2) - weights).sum(1)
        cost = np.sum(rounded * wide, (1, 2))
        rows.append(
            {
                "solver": name,
                "ms": times[name],
                "marginal error (worst)": float(np.max(errors)),
                "cost above the exact (mean)": float(np.mean(cost / exact - 1)),
            }
        )
    return rows


def milliseconds(programs, rounds):
    return {name: 1e3 * statistics.median(of) for name, of in seconds_in_turn(programs, rounds).items()}


def main(arguments: list[str]) -> None:
    prog = "python -m experiments.benchmarks.transport"
    options = command_line.parse(Options, arguments, prog=prog, **command_line.documented(__doc__))
    for name in ("rounds", "problems", "points"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    rng = np.random.default_rng(0)
    shape = (options.problems, options.points, 10)
    x, y = jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.normal(size=shape) + 0.5, jnp.float32)
    costs = jax.vmap(sqeuclidean_cost)(x, y)
    costs = costs / costs.mean((1, 2), keepdims=True)
    a = jnp.asarray(rng.uniform(0.5, 1.5, shape[:2]) / options.points, jnp.float32)
    b = jnp.asarray(rng.uniform(0.3, 0.9, shape[:2]) / options.points, jnp.float32)
    result = {
        "environment": {**backend.describe(), "ott-jax": metadata.version("ott-jax"), "POT": metadata.version("pot")},
        "divergence": divergence_rows(x, y, options.rounds),
        "unbalanced": unbalanced_rows(costs, a, b, options.rounds),
        "exact": exact_rows(costs, options.rounds),
    }
    size = f"{options.problems} problems of {options.points} x {options.points}"
    text = [
        "# Divergence, unbalanced and exact transport",
        f"`python -m experiments.benchmarks.transport` on {made_on(result['environment'])}; {size}. "
        "The script's docstring describes the method.",
        f"## Divergence: {ITERATIONS} iterations of each of its three problems",
        table(result["divergence"]),
        f"## Unbalanced, masses 1 and 0.6, reg {REG:g} of the mean cost, ρ in units of the mean cost",
        table(result["unbalanced"]),
        f"## Exact: {STEPS} proximal steps, beta in units of the mean cost",
        table(result["exact"]),
    ]
    write_files(options.results, {"transport.json": result, "transport.md": "\n\n".join(text) + "\n"})
    print("\n\n".join(text))


def table(rows):
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g")


if __name__ == "__main__":
    command_line.run(main)
