"""Plot how fast the solvers converge: `python -m experiments.solver_convergence`, two minutes on two CPU cores.

Plots the marginal error and the relative distance to the exact cost (POT's `emd`) against the iteration, for Sinkhorn
with the paper's tau and two others, and for IPOT with the released code's two betas. The problems are cosine costs
between two batches of 60 of scikit-learn's digits, as pixels. Lines are medians over the problems, bands are quartiles.
Computed in float64, so that rounding is negligible.
"""

import dataclasses
import pathlib

from experiments import command_line
from experiments.output import write_files


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plot the convergence of Sinkhorn and IPOT: two minutes on two CPU cores."""

    results: pathlib.Path = pathlib.Path("experiments/results/solver_convergence")
    """Folder of the figure and the JSON file."""
    problems: int = 20
    """Number of problems."""
    points: int = 60
    """Digits in each batch; 60 is the paper's batch size."""
    largest: int = 2000
    """Largest number of iterations."""
    seed: int = 0
    """Seed of the problems."""


EXAMPLES = """\
  python -m experiments.solver_convergence
  python -m experiments.solver_convergence --problems 5 --largest 500 --results results/convergence
"""

TAUS, BETAS = (0.05, 0.01, 0.001), (1.0, 0.5)


def main(argv: list[str]) -> None:
    arguments = command_line.parse(Arguments, argv, prog="python -m experiments.solver_convergence", examples=EXAMPLES)

    import jax
    import jax.numpy as jnp
    import numpy as np
    import ot as pot
    from tqdm import tqdm

    from fs_jax._utils import backend
    from fs_jax._utils.validation import check_number
    from fs_jax.data import load
    from fs_jax.ot import cosine_cost, ipot, sinkhorn

    for name in ("problems", "points", "largest"):
        check_number(name, getattr(arguments, name), at_least=1, integer=True)
    backend.enable_compilation_cache()
    images = load("digits").train_images
    images = images.reshape(len(images), -1) / 255
    rng = np.random.default_rng(arguments.seed)
    sides = [rng.permutation(len(images))[: 2 * arguments.points] for _ in range(arguments.problems)]
    iterations = np.unique(np.geomspace(1, arguments.largest, 20).astype(int))
    with jax.enable_x64(True):
        costs = jax.vmap(cosine_cost)(*jnp.split(np.stack([images[side] for side in sides]), 2, axis=1))
        weights = np.full(arguments.points, 1 / arguments.points)
        exact = np.array([pot.emd2(weights, weights, cost) for cost in np.asarray(costs)])

        def solve(solver, number, num_iters):
            option = {"reg" if solver is sinkhorn else "beta": number, "grad": "none"}
            result = jax.vmap(lambda cost: solver(cost, num_iters=num_iters, **option))(costs)
            return result.marginal_error, abs(result.primal_cost - exact) / exact

        solvers = {f"Sinkhorn, τ = {tau:g}": (sinkhorn, tau) for tau in TAUS}
        solvers |= {f"IPOT, β = {beta:g}": (ipot, beta) for beta in BETAS}
        curves: dict[str, dict[str, list]] = {name: {"marginal_error": [], "cost_error": []} for name in solvers}
        for num_iters in tqdm(iterations.tolist(), desc="iterations"):
            for name, chosen in solvers.items():
                for errors, error in zip(curves[name].values(), solve(*chosen, num_iters), strict=True):
                    errors.append(np.quantile(error, (0.25, 0.5, 0.75)).tolist())

    result = {
        "problems": arguments.problems,
        "points": arguments.points,
        "seed": arguments.seed,
        "iterations": iterations.tolist(),
        "quartiles": curves,
        "environment": backend.describe(),
    }
    write_files(arguments.results, {"convergence.json": result})
    draw(result, arguments.results / "convergence.png")
    print(f"Written: {arguments.results}")


def draw(result: dict, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    titles = {"marginal_error": "marginal error (L1)", "cost_error": "relative distance to the exact cost"}
    blues, oranges = ("#9ecae1", "#4292c6", "#084594"), ("#fdae6b", "#d94801")
    for axis, (what, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for (name, curve), color in zip(result["quartiles"].items(), (*blues, *oranges), strict=True):
            low, median, high = zip(*curve[what], strict=True)
            axis.fill_between(result["iterations"], low, high, color=color, alpha=0.25, lw=0)
            axis.plot(result["iterations"], median, color=color, label=name)
        axis.set(xscale="log", yscale="log", xlabel="iterations", title=title)
        axis.set_ylim(bottom=max(1e-10, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
    figure.axes[1].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    command_line.run(main)
