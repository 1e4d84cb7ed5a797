"""Transport problems with certified solutions, in one file for any test suite: `python -m experiments.transport_cases`.

Writes `cases.npz` and a page that says what is in it and how it is checked, with NumPy alone.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tyro

from experiments import command_line

VERSION = 1
"""Of the fields and of the problems. Another number: another file."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write transport problems with certified solutions."""

    out: pathlib.Path = pathlib.Path("experiments/results/transport_cases")
    """Folder for cases.npz and README.md."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.transport_cases")
    from experiments.output import write_files
    from fs_jax._utils.files import local_path

    out = local_path("out", arguments.out)
    arrays = cases()
    write_files(out, {"README.md": page(arrays)})
    np.savez_compressed(out / "cases.npz", **arrays)
    print(f"wrote {len(arrays['names'])} problems, {(out / 'cases.npz').stat().st_size:,} bytes")
    return 0


def cases() -> dict[str, Any]:
    """The file's arrays: of each kind of problem the first `PER_KIND` whose solution can be certified."""
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
"""In an entry's logarithm. Above are those that costs of 1e7 times reg leave few digits, or loose parts."""


ERRORS = '''\
import numpy as np


def errors(cost, a, b, reg, plan, f, g):
    """Bounds on |log plan - log solution|, of entries above 1e-290, and on the sum of |plan - solution| over the mass.

    Q = exp((f + g - cost) / reg) has marginals r, c and is the solution of the problem with these. From it the solution
    is Q exp(x_i + y_j), where x, y minimise the convex function sum(Q exp(x_i + y_j)) - sum(a x) - sum(b y). Its
    gradient at 0 is (r - a, c - b), of norm `off` in the metric of 1 / (r, c); its Hessian there is at least `gap` in
    that of (r, c), constants between x and y aside, and changes by at most exp(t) where |x_i + y_j| <= t. If
    2 exp(0.1) off / gap sqrt(1 / min r + 1 / min c) <= 0.1, the minimum has sum(r x^2) + sum(c y^2) at most
    (exp(0.1) off / gap)^2. All is rounded up: sums of n numbers by n eps, exponents by eps of each of their parts.
    """
    eps = np.finfo(float).eps
    rows, columns = a > 0, b > 0
    cost, plan = cost[np.ix_(rows, columns)], plan[np.ix_(rows, columns)]
    a, b, f, g = a[rows], b[columns] * (a.sum() / b.sum()), f[rows], g[columns]
    exponents = (f[:, None] + g - cost) / reg
    q = np.exp(exponents)
    parts = np.abs(f)[:, None] + np.abs(g) + np.abs(cost)
    seen = q > 1e-290  # smaller ones have lost digits
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
    stored = np.abs(np.log(plan[seen]) - exponents[seen]).max() + rounding  # of the plan from Q
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
    # Up to the last digits of exponentials and of singular values, which another processor rounds otherwise.
    assert log_plan_error <= 1.5 * arrays[f"{name}/log_plan_error"] <= 1.5e-6, name
    assert plan_error <= 1.5 * arrays[f"{name}/plan_error"], name
    # The gradient by the cost has the form that it must have, and keeps the marginals.
    slope, x, y = (arrays[f"{name}/gradient_{of}"] for of in ("cost", "a", "b"))
    weights = arrays[f"{name}/weights"]
    size = plan * (np.abs(weights) + np.abs(x)[:, None] + np.abs(y)) / reg
    assert np.all(np.abs(slope + plan * (weights - x[:, None] - y) / reg) <= 1e-14 * size), name
    for axis in (0, 1):
        assert np.all(np.abs(slope.sum(axis)) <= 1e-9 * size.sum(axis)), name
print(f"version {arrays['version']}: {len(arrays['names'])} problems are certified")
"""


def page(arrays: dict[str, Any]) -> str:
    """What is in the file, and the program that checks it."""
    largest = max(float(arrays[f"{name}/log_plan_error"]) for name in arrays["names"])
    return f"""\
# Transport problems with certified solutions

`cases.npz`, version {VERSION}, has {len(arrays["names"])} problems of entropic optimal transport,
min over plans T with T 1 = a and Tᵀ 1 = b of ⟨T, C⟩ + reg·KL(T | a bᵀ), and their solutions in float64, for tests of
any solver. `python -m experiments.transport_cases` writes it.

| array | shape | what |
| --- | --- | --- |
| `version` | | {VERSION}; another number would be other fields or problems |
| `names` | [k] | names of the problems: the kind, and the number that `fs_jax.ot.testing.case` takes |

and for each name, `<name>/<field>`:

| field | shape | what |
| --- | --- | --- |
| `cost`, `a`, `b`, `reg` | [n, m], [n], [m], | the problem; a weight of zero takes a point out |
| `plan` | [n, m] | the solution |
| `f`, `g` | [n], [m] | potentials, up to a constant: plan = exp((f + g - cost) / reg) |
| `log_plan_error` | | bound on the error of log plan, of entries above 1e-290: at most {largest:.1g} here |
| `plan_error` | | bound on Σ of plan - solution, in absolute values, over the mass |
| `weights` | [n, m] | W, integers from -2 to 2 |
| `gradient_cost` | [n, m] | derivative of Σ W · plan by the cost |
| `gradient_a`, `gradient_b` | [n], [m] | by the weights, but for a constant: the mass is held |

The bounds are proven by the program below, which needs NumPy alone. Where the masses of a and b differ in the last
digit, b is scaled to that of a. Potentials are -inf at points without mass. Gradients are checked by what characterises
them: that by the cost is -plan (W - x - y) / reg, where x and y are those by a and b, and its rows and columns sum to
zero.

```python
{ERRORS}

{CHECKS}```
"""


if __name__ == "__main__":
    command_line.run(main)
