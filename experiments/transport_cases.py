"""Write transport problems with certified solutions, for tests of any solver: under a minute on two CPU cores.

Writes `cases.npz`, which NumPy can load, and `README.md`, which describes the file and has a program that certifies the
solutions with NumPy only.

Examples:
    python -m experiments.transport_cases
    python -m experiments.transport_cases --results results/transport_cases
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import command_line

VERSION = 1
"""Version of the file. It changes with the fields and the problems."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    results: pathlib.Path = pathlib.Path("experiments/results/transport_cases")
    """Folder for cases.npz and README.md."""


def main(argv: list[str]) -> int:
    prog = "python -m experiments.transport_cases"
    arguments = command_line.parse(Arguments, argv, prog=prog, **command_line.documented(__doc__))
    from experiments.output import write_files
    from fs_jax._utils.files import local_path, replacing

    folder = local_path("results", arguments.results)
    arrays = cases()
    write_files(folder, {"README.md": page(arrays)})
    with replacing(folder / "cases.npz") as file:
        np.savez_compressed(file, **arrays)
    size = (folder / "cases.npz").stat().st_size
    print(f"Written: {folder / 'cases.npz'}, {len(arrays['names'])} problems, {size:,} bytes; {folder / 'README.md'}")
    return 0


def cases() -> dict[str, Any]:
    """The arrays of the file: for each kind, the first `PER_KIND` problems whose solutions can be certified."""
    from fs_jax.ot import testing
    from fs_jax.ot.testing.reference import gradients

    found: dict[str, dict[str, Any]] = {}
    for place, family in enumerate(testing.FAMILIES):
        of_kind = 0
        for number in range(place, 40 * len(testing.FAMILIES), len(testing.FAMILIES)):
            problem = testing.case(number)
            if of_kind == PER_KIND or (reference := testing.solve_exactly(problem)) is None:
                continue
            answer = {"plan": reference.plan, "f": reference.f, "g": reference.g}
            of = {"cost": problem.cost, "a": problem.a, "b": problem.b, "reg": np.float64(problem.reg), **answer}
            errors = CHECK["errors"](*of.values())
            if not errors[0] <= LARGEST_ERROR:
                continue
            weights = np.random.default_rng(number).integers(-2, 3, problem.cost.shape).astype(np.int8)
            slopes = gradients(problem, reference, weights)
            found[f"{family}-{number}"] = {
                **of, "log_plan_error": errors[0], "plan_error": errors[1], "weights": weights,
                **{f"gradient_{name}": slope for name, slope in slopes.items()},
            }  # fmt: skip
            of_kind += 1
    arrays = {f"{name}/{field}": value for name, of in found.items() for field, value in of.items()}
    return {"version": np.int64(VERSION), "names": np.array(list(found)), **arrays}


PER_KIND = 6
LARGEST_ERROR = 1e-6
"""Largest error of log plan. It is exceeded for costs of 1e7 times reg, or if parts of the plan hardly connect."""


ERRORS = '''\
import numpy as np


def errors(cost, a, b, reg, plan, f, g):
    """Bounds on |log plan - log solution|, of entries above 1e-290, and on the sum of |plan - solution| over the mass.

    Q = exp((f + g - cost) / reg) has marginals r, c and is the solution of the problem with these. From it the solution
    is Q exp(x_i + y_j), where x, y minimise the convex function sum(Q exp(x_i + y_j)) - sum(a x) - sum(b y). Its
    gradient at 0 is (r - a, c - b), of norm `off` in the metric of 1 / (r, c); its Hessian there is at least `gap` in
    that of (r, c), up to constants between x and y, and changes by a factor of at most exp(t) where |x_i + y_j| <= t.
    If 2 exp(0.1) off / gap sqrt(1 / min r + 1 / min c) <= 0.1, the minimum has sum(r x^2) + sum(c y^2) at most
    (exp(0.1) off / gap)^2. Rounding is added: n eps for sums of n numbers, eps of each term for exponents.
    """
    eps = np.finfo(float).eps
    rows, columns = a > 0, b > 0
    cost, plan = cost[np.ix_(rows, columns)], plan[np.ix_(rows, columns)]
    a, b, f, g = a[rows], b[columns] * (a.sum() / b.sum()), f[rows], g[columns]
    exponents = (f[:, None] + g - cost) / reg
    q = np.exp(exponents)
    parts = np.abs(f)[:, None] + np.abs(g) + np.abs(cost)
    seen = q > 1e-290  # smaller entries underflow
    rounding = eps * (4 + np.max((parts / reg + np.abs(exponents))[seen])) + eps * sum(cost.shape)
    r, c = q.sum(1), q.sum(0)
    off_rows, off_columns = (np.abs(x - y) + rounding * x + eps * sum(cost.shape) * y for x, y in ((r, a), (c, b)))
    off = np.sqrt(np.sum(off_rows**2 / r) + np.sum(off_columns**2 / c))
    values = np.linalg.svd(q / np.sqrt(np.outer(r, c)), compute_uv=False)
    gap = 1 - (values[1] if len(values) > 1 else 0) - 100 * sum(cost.shape) * eps - 2 * rounding
    spread = np.sqrt(1 / r.min() + 1 / c.min())
    if not (gap > 0 and 2 * np.exp(0.1) * off / gap * spread <= 0.1):
        return np.inf, np.inf
    size = 1.01 * np.exp(0.1) * off / gap
    stored = np.abs(np.log(plan[seen]) - exponents[seen]).max() + rounding  # error of log plan with respect to log Q
    in_sum = np.exp(0.1) * size * np.sqrt(r.sum() + c.sum()) + 1.01 * stored * r.sum()
    return size * spread + stored, in_sum / a.sum()
'''
CHECK: dict[str, Any] = {}
exec(ERRORS, CHECK)

CHECKS = """\
with np.load("cases.npz") as file:
    arrays = dict(file)
for name in arrays["names"]:
    fields = ("cost", "a", "b", "reg", "plan", "f", "g")
    cost, a, b, reg, plan, f, g = of = [arrays[f"{name}/{field}"] for field in fields]
    log_plan_error, plan_error = errors(*of)
    # Factor 1.5: other processors round exponentials and singular values differently.
    assert log_plan_error <= 1.5 * arrays[f"{name}/log_plan_error"] <= 1.5e-6, name
    assert plan_error <= 1.5 * arrays[f"{name}/plan_error"], name
    # The gradient with respect to the cost has the form below, and its rows and columns sum to zero.
    slope, x, y = (arrays[f"{name}/gradient_{of}"] for of in ("cost", "a", "b"))
    weights = arrays[f"{name}/weights"]
    size = plan * (np.abs(weights) + np.abs(x)[:, None] + np.abs(y)) / reg
    assert np.all(np.abs(slope + plan * (weights - x[:, None] - y) / reg) <= 1e-14 * size), name
    for axis in (0, 1):
        assert np.all(np.abs(slope.sum(axis)) <= 1e-9 * size.sum(axis)), name
print(f"version {arrays['version']}: {len(arrays['names'])} problems are certified")
"""


def page(arrays: dict[str, Any]) -> str:
    """The description of the file, and the program that certifies it."""
    largest = max(float(arrays[f"{name}/log_plan_error"]) for name in arrays["names"])
    return f"""\
# Transport problems with certified solutions

`cases.npz`, version {VERSION}, has {len(arrays["names"])} problems of entropic optimal transport,
min over plans T with T 1 = a and Tᵀ 1 = b of ⟨T, C⟩ + reg·KL(T | a bᵀ), and their solutions in float64, for tests of
any solver. It is written by `python -m experiments.transport_cases`.

| array | shape | meaning |
| --- | --- | --- |
| `version` | | {VERSION}; it changes with the fields and the problems |
| `names` | [k] | names of the problems: the kind, and the number for `fs_jax.ot.testing.case` |

For each name, there are arrays `<name>/<field>`:

| field | shape | meaning |
| --- | --- | --- |
| `cost`, `a`, `b`, `reg` | [n, m], [n], [m], | the problem; points with weight zero have no mass |
| `plan` | [n, m] | the solution |
| `f`, `g` | [n], [m] | potentials, up to a constant: plan = exp((f + g - cost) / reg); -inf at points without mass |
| `log_plan_error` | | bound on the error of log plan, for entries above 1e-290; at most {largest:.1g} |
| `plan_error` | | bound on Σ abs(plan - solution), relative to the mass |
| `weights` | [n, m] | W, integers from -2 to 2 |
| `gradient_cost` | [n, m] | derivative of Σ W · plan with respect to the cost |
| `gradient_a`, `gradient_b` | [n], [m] | derivatives with respect to a and b, up to a constant |

The program below proves the bounds, with NumPy only. If the masses of a and b differ in the last digit, b is scaled to
the mass of a. The gradient with respect to the cost must be -plan (W - x - y) / reg, where x and y are the gradients
with respect to a and b, and its rows and columns must sum to zero. This determines all three, up to the constant.

```python
{ERRORS}

{CHECKS}```
"""


if __name__ == "__main__":
    command_line.run(main)
