"""Time Sinkhorn solvers: ours, ott-jax's and POT's, on the same costs: about five minutes on two CPU cores.

There are two tables. At equal iterations (50, as in a training step): milliseconds for the value ⟨T, C⟩ of all
problems, and for value and gradient by unrolling, and the seconds to compile each. At equal marginal error (1e-3 in
L1): milliseconds until every problem has reached it. Costs are uniform on [0, 1], in float32. Each time is the median
over rounds in which every solver runs once, in one process. Errors are relative to the same iterations in float64 in
the log domain, on the first problems of the batch.

ott-jax is used as its documentation recommends for vmap: min_iterations = max_iterations makes its loop a scan. Its
gradient is computed with an unreachable threshold instead, since the backward pass of the scan (ott-jax 0.6) goes
through the wrong iterations. POT computes in NumPy, in float64, one problem after the other.

Writes solvers.json, solvers.md and solvers.png to the results folder.

Examples:
    python -m experiments.benchmarks.solvers
    python -m experiments.benchmarks.solvers --rounds 1 --shapes 64x60 --results results/bench
    python -m experiments.benchmarks.solvers --shapes 64x60 1024x60 64x256 64x1024 --results results/gpu

POT is timed on a CPU only, as it solves a batch one problem after the other. Seconds to compile are not given if JAX's
compilation cache is on, since programs may then be loaded from it.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear import implicit_differentiation
from ott.solvers.linear.sinkhorn import Sinkhorn

from experiments import command_line
from experiments.benchmarks.timing import Name, seconds_in_turn
from experiments.output import made_on, write_files
from fs_jax._utils import backend
from fs_jax.ot import sinkhorn

ITERATIONS = 50
THRESHOLD = 1e-3
LIMIT = 5000  # maximum number of iterations with the threshold
REGS = (0.05, 0.01, 0.001)
PRODUCTS = "the products alone"
POT_PROBLEMS = 64  # largest batch for POT, which solves one problem after the other


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    results: Path = Path("experiments/results/bench_solvers_cpu")
    """Folder for the results."""
    rounds: int = 5
    """Timed runs of each solver; times are medians."""
    shapes: tuple[str, ...] = ("1x60", "1x128", "1x256", "1x1024", "64x60", "64x128", "1024x60")
    """Shapes [B, n, n] of the costs, as BxN."""


def ours(method: str) -> Callable:
    def value(cost, reg):
        return sinkhorn(cost, reg=reg, num_iters=ITERATIONS, method=method).primal_cost

    return value


def ott(lse_mode: bool, gradient: bool) -> Callable:
    solver = Sinkhorn(
        lse_mode=lse_mode,
        min_iterations=0 if gradient else ITERATIONS,
        max_iterations=ITERATIONS,
        threshold=-1.0,
        implicit_diff=None,
    )

    def value(cost, reg):
        return solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=reg))).primal_cost

    return value


def products(cost, reg):
    """Only the two matrix-vector products of each iteration, which every Sinkhorn solver needs."""

    def iteration(u, _):
        v = 1 / jnp.einsum("ij,i->j", cost, u, precision="highest")
        return 1 / jnp.einsum("ij,j->i", cost, v, precision="highest"), None

    u, _ = jax.lax.scan(iteration, jnp.full(cost.shape[0], reg), length=ITERATIONS)
    return u.sum()


OURS = {method: ours(method) for method in ("stabilized", "log", "kernel")}
OTT = {choice: ott(*choice) for choice in ((True, False), (True, True), (False, False), (False, True))}


def pot_value(costs: np.ndarray, reg: float) -> list[float]:
    import ot as pot  # here, as it is only timed on a CPU

    weights = np.full(costs.shape[1], 1 / costs.shape[1])
    options = {"numItermax": ITERATIONS, "stopThr": 0, "warn": False}
    return [np.sum(pot.sinkhorn(weights, weights, cost, reg, **options) * cost) for cost in costs]


def ours_to_threshold(cost, reg) -> tuple:
    result = sinkhorn(cost, reg=reg, num_iters=LIMIT, threshold=THRESHOLD, grad="implicit")
    return result.primal_cost, (result.num_iters, result.marginal_error)


def ott_to_threshold(cost, reg) -> tuple:
    implicit = implicit_differentiation.ImplicitDiff()
    solver = Sinkhorn(max_iterations=LIMIT, threshold=THRESHOLD, implicit_diff=implicit)
    result = solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=reg)))
    rows, columns = (jnp.abs(result.matrix.sum(axis) - 1 / cost.shape[0]).sum() for axis in (1, 0))
    return result.primal_cost, (result.n_iters, rows + columns)


def milliseconds(programs: Mapping[Name, Callable], rounds: int) -> dict[Name, float]:
    """Medians over the rounds, by program."""
    return {name: 1e3 * statistics.median(of) for name, of in seconds_in_turn(programs, rounds).items()}


@lru_cache
def batched(
    function: Callable, gradient: bool, has_aux: bool, shape: tuple[int, int, int]
) -> tuple[Callable, float, float | None]:
    """The compiled function of a batch and reg (or its value and gradient), its working memory, and its compile time.

    Memory is in megabytes. The time is in seconds, for tracing and compiling; None if there is a compilation cache.
    """
    function = jax.value_and_grad(function, has_aux=has_aux) if gradient else function
    jax.clear_caches()
    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(function, in_axes=(0, None))).lower(jnp.zeros(shape), 0.1).compile()
    seconds = None if jax.config.jax_compilation_cache_dir else time.perf_counter() - began
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6  # type: ignore[union-attr]  # never None here
    return compiled, megabytes, seconds


def equal_iterations(costs: jax.Array, reg: float, rounds: int) -> list[dict]:
    """A row per solver: times of value and gradient, their errors, and the gradient's memory."""
    with jax.enable_x64(True):
        few = jnp.asarray(np.asarray(costs[:4]), jnp.float64)
        exact = jax.jit(jax.vmap(jax.value_and_grad(ours("log")), in_axes=(0, None)))(few, reg)
        exact = jax.tree.map(np.asarray, exact)
    values = {
        "fs_jax stabilized": OURS["stabilized"],
        "fs_jax log": OURS["log"],
        "ott-jax log": OTT[True, False],
    }
    gradients = values | {"ott-jax log": OTT[True, True]}
    if reg >= 0.05:  # for smaller reg, K underflows
        values |= {"fs_jax kernel": OURS["kernel"], "ott-jax kernel": OTT[False, False]}
        gradients |= {"fs_jax kernel": OURS["kernel"], "ott-jax kernel": OTT[False, True]}
    forward = {name: batched(function, False, False, costs.shape) for name, function in values.items()}
    both = {name: batched(function, True, False, costs.shape) for name, function in gradients.items()}
    programs = {("value", name): partial(program, costs, reg) for name, (program, *_) in forward.items()}
    programs |= {("gradient", name): partial(program, costs, reg) for name, (program, *_) in both.items()}
    if costs.shape[0] <= POT_PROBLEMS and reg >= 0.01 and backend.platform_of(costs) == "cpu":
        programs["value", "POT"] = partial(pot_value, np.asarray(costs, np.float64), reg)
    programs["value", PRODUCTS] = partial(batched(products, False, False, costs.shape)[0], costs, reg)
    times = milliseconds(programs, rounds)

    rows = []
    for name in [*values, "POT", PRODUCTS]:
        if ("value", name) not in times:
            continue
        row = {"solver": name, "value_ms": times["value", name]}
        if name in forward:
            row["value_compile_s"] = forward[name][2]
        if name == PRODUCTS:
            rows.append(row)
            continue
        value = np.asarray(programs["value", name]())[:4]
        row["value_error"] = float(np.max(np.abs(value - exact[0]) / exact[0]))
        if name in both:
            gradient = np.asarray(programs["gradient", name]()[1])[:4]
            scale = np.abs(exact[1]).max((1, 2), keepdims=True)
            row["gradient_ms"] = times["gradient", name]
            row["gradient_error"] = float(np.max(np.abs(gradient - exact[1]) / scale))
            row["gradient_megabytes"], row["gradient_compile_s"] = both[name][1:]
        rows.append(row)
    return rows


def equal_error(costs: jax.Array, reg: float, rounds: int) -> list[dict]:
    """A row per solver: times of value and implicit gradient until the marginal error is below the threshold."""
    solvers = {"fs_jax stabilized": ours_to_threshold, "ott-jax log": ott_to_threshold}
    programs = {
        (what, name): partial(batched(solver, what == "gradient", True, costs.shape)[0], costs, reg)
        for name, solver in solvers.items()
        for what in ("value", "gradient")
    }
    times = milliseconds(programs, rounds)
    rows = []
    for name in solvers:
        iterations, error = programs["value", name]()[1]
        rows.append(
            {
                "solver": name,
                "value_ms": times["value", name],
                "gradient_ms": times["gradient", name],
                "iterations": float(jnp.mean(iterations)),
                "marginal_error": float(jnp.max(error)),
            }
        )
    return rows


def table(rows: list[dict], columns: dict[str, str]) -> str:
    def cell(row, column):
        value = row.get(column)
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        return f"{value:.1e}" if "error" in column else f"{value:.4g}"

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def ratios(rows: list[dict], against: str = "ott-jax log", of: str = "fs_jax stabilized") -> list[dict]:
    """Speed relative to another solver, for each shape and reg."""
    times = {(row["shape"], row["reg"], row["solver"]): row for row in rows}
    return [
        {
            "shape": shape,
            "reg": reg,
            "value": times[shape, reg, against]["value_ms"] / row["value_ms"],
            "gradient": times[shape, reg, against]["gradient_ms"] / row["gradient_ms"],
            "gradient / value": row["gradient_ms"] / row["value_ms"],
            "products": times[shape, reg, PRODUCTS]["value_ms"] / row["value_ms"],
        }
        for (shape, reg, solver), row in times.items()
        if solver == of
    ]


def figure(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, what in zip(fig.subplots(1, 2, sharey=True), ("value", "gradient"), strict=True):
        for reg, shade in zip(REGS, ("#9ecae1", "#4292c6", "#084594"), strict=True):
            chosen = [row for row in result["ratios"] if row["reg"] == reg]
            offset = (REGS.index(reg) - 1) * 0.27
            axis.bar(
                np.arange(len(chosen)) + offset, [row[what] for row in chosen], 0.25, color=shade, label=f"τ = {reg}"
            )
        axis.set_xticks(range(len(chosen)), [row["shape"] for row in chosen], rotation=30, ha="right")
        axis.axhline(1, color="black", lw=0.8)
        axis.set_title(f"{what}, {ITERATIONS} iterations")
    fig.axes[0].set_ylabel("times faster than ott-jax (log domain)")
    fig.axes[0].legend(frameon=False)
    fig.savefig(path, dpi=150)


HOW_TO_READ = """\
Each iteration takes two matrix-vector products. *Products' share* is the time of these 100 products alone, with a
precomputed matrix, over the time of the whole value. The rest is the exponentials before and after the iterations, and
the range checks. The backward pass takes as many products again, and the matrix product that accumulates the cost's
gradient. """
SHARE = (
    "If the share is near 1, only faster products would make the value faster. (A share above 1 is noise, since the "
    "two are timed separately.)"
)
SHARE_ON_GPU = (
    "Here, the products are separate operations, while a value of up to 256 points is one kernel. So the share can be "
    "above 1."
)


def write(result: dict, folder: Path) -> None:
    times = {
        "shape": "[B, n, n]",
        "reg": "τ",
        "solver": "solver",
        "value_ms": "value, ms",
        "gradient_ms": "gradient, ms",
    }
    accuracy = {"value_error": "value error", "gradient_error": "gradient error", "gradient_megabytes": "MB"}
    accuracy |= {"value_compile_s": "value, compile s", "gradient_compile_s": "gradient, compile s"}
    converged = {"iterations": "iterations (mean)", "marginal_error": "marginal error (worst)"}
    speed = {"shape": "[B, n, n]", "reg": "τ"} | {k: k for k in ("value", "gradient", "gradient / value")}
    speed |= {"products": "products' share of the value"}
    text = [
        "# Sinkhorn solvers",
        f"`python -m experiments.benchmarks.solvers` on {made_on(result['environment'])}. The script's docstring "
        "describes the method.",
        "## How many times faster than ott-jax in the log domain",
        table(result["ratios"], speed),
        HOW_TO_READ + (SHARE_ON_GPU if result["environment"]["platform"] == "gpu" else SHARE),
        "![ratios](solvers.png)",
        f"## {ITERATIONS} iterations",
        table(result["equal_iterations"], times | accuracy),
        f"## Until the marginal error is below {THRESHOLD:g}, with the implicit gradient",
        table(result["equal_error"], times | converged),
    ]
    write_files(folder, {"solvers.json": result, "solvers.md": "\n\n".join(text) + "\n"})
    figure(result, folder / "solvers.png")


def parse_shape(shape: str) -> tuple[int, int]:
    """(B, n) of a shape such as 64x60."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise ValueError(f"--shapes: expected BxN, such as 64x60; got {shape!r}")
    return int(found[1]), int(found[2])


def versions() -> dict[str, str]:
    """Versions of the peers; POT's on a CPU only."""
    found = {"ott-jax": metadata.version("ott-jax")}
    return found | ({"POT": metadata.version("pot")} if backend.platform_of([]) == "cpu" else {})


def main(arguments: list[str]) -> None:
    prog = "python -m experiments.benchmarks.solvers"
    options = command_line.parse(Options, arguments, prog=prog, **command_line.documented(__doc__))
    if options.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {options.rounds}")
    shapes = [parse_shape(shape) for shape in options.shapes]
    if not shapes:
        raise ValueError("--shapes: expected at least one, such as 64x60; got none.")
    result: dict[str, Any] = {
        "environment": {**backend.describe(), **versions()},
        "equal_iterations": [],
        "equal_error": [],
    }
    for b, n in shapes:
        costs = jax.random.uniform(jax.random.key(0), (b, n, n))
        for reg in REGS:
            place = {"shape": f"[{b}, {n}, {n}]", "reg": reg}
            rows = [place | row for row in equal_iterations(costs, reg, options.rounds)]
            result["equal_iterations"] += rows
            if reg == 0.01 and b <= 64:
                result["equal_error"] += [place | row for row in equal_error(costs, reg, options.rounds)]
            print(table(rows, {k: k for k in rows[0]}), flush=True)
        result["ratios"] = ratios(result["equal_iterations"])
        write(result, options.results)  # after each shape, so that an interrupted run keeps its results


if __name__ == "__main__":
    command_line.run(main)
