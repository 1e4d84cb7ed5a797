"""Check Sinkhorn solvers against certified solutions: for 1,000 problems, five minutes per solver on two CPU cores.

A solver is a function `solve(cost, a, b, reg)` that returns a mapping with `plan`. Our solvers, ott-jax's and POT's are
built in. Your own package has to be importable: run this in a clone of this project, with
PYTHONPATH=path/to/your/project.

Each result is saved at once in the workdir, in `findings.jsonl`. If interrupted, rerun the command: it resumes. Earlier
results are reused as long as the solver's package, these checks and the libraries are the same. At the end, the workdir
gets `report.md`, `report.json`, `findings.png`, and for each solver and failed check a script that reproduces the
failure on the simplest problem found. The exit status is 1 if a check failed. Solvers may give up if they report it.

Examples:
    python -m experiments.differential --list
    python -m experiments.differential --count 200
    python -m experiments.differential --solvers ott-log-float32 mypackage.module:solve --count 500
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

from experiments import command_line


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    solvers: tuple[str, ...] = ("fs_jax-stabilized-float32", "fs_jax-stabilized-float64", "fs_jax-implicit-float64")
    """Built-in solvers (see --list), or package.module:function."""
    count: int = 1000
    """Number of problems, the first ones; the 15 kinds take turns."""
    derivatives_every: int = 10
    """Check derivatives, jit and vmap for one problem in this many, drawn at random."""
    workdir: pathlib.Path = pathlib.Path("runs/differential")
    """A new folder, or the one to resume."""
    fresh: bool = False
    """Remove the results of earlier runs, and compute all of them again."""
    list: bool = False
    """List the built-in solvers with their claims and the kinds of problems, and run nothing."""


def main(argv: list[str]) -> int:
    prog = "python -m experiments.differential"
    arguments = command_line.parse(Arguments, argv, prog=prog, **command_line.documented(__doc__))
    os.environ.setdefault("JAX_ENABLE_X64", "1")  # before JAX is loaded; float32 solvers still get float32 arrays

    from fs_jax._utils.files import local_path, locked
    from fs_jax._utils.validation import check_number
    from fs_jax.ot import testing

    if arguments.list:
        print(listing())
        return 0
    check_number("count", arguments.count, at_least=1, integer=True)
    check_number("derivatives_every", arguments.derivatives_every, at_least=1, integer=True)
    if not arguments.solvers:
        raise ValueError("solvers: expected at least one name; got none (--list has those that are built in)")
    solvers = [testing.load(name) for name in dict.fromkeys(arguments.solvers)]
    workdir = local_path("workdir", arguments.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in workdir.iterdir() if path.name != ".findings.jsonl.lock"]
    if others and not (workdir / "findings.jsonl").exists():
        raise ValueError(
            f"workdir: expected a new or empty folder, or one with findings.jsonl of an earlier run; got {workdir}, "
            f"which has {min(others)}"
        )
    lock = locked(workdir / "findings.jsonl")
    try:
        found = run(solvers, arguments, workdir / "findings.jsonl")
        report(solvers, found, arguments, workdir)
    finally:
        lock.release()
    return int(
        any(check != testing.GAVE_UP for of in found.values() for each in of.values() for check, *_ in each.findings)
    )


Found = dict[str, dict[int, "Seen"]]
"""Results by solver and problem number."""


class Seen(NamedTuple):
    """The result of checking an answer."""

    findings: list[list[Any]]
    """Check, text, error and allowed error of each finding."""
    differentiated: bool
    """Whether its derivatives were checked."""


def run(solvers, arguments: Arguments, path: pathlib.Path) -> Found:
    """Runs the solvers on the problems that are not in the file yet, and appends each result to it at once."""
    import warnings

    from tqdm import tqdm

    from fs_jax._utils.files import read_jsonl
    from fs_jax.ot import testing

    found: Found = {solver.name: {} for solver in solvers}
    of_code = {solver.name: code(solver) for solver in solvers}
    if arguments.fresh:
        path.unlink(missing_ok=True)
    for line in read_jsonl(path) if path.exists() else []:
        if (line["every"], line["of"]) == (arguments.derivatives_every, of_code.get(line["solver"])):
            found[line["solver"]][line["problem"]] = Seen(line["findings"], line["differentiated"])
    earlier = sum(index < arguments.count for of in found.values() for index in of)
    if earlier:
        print(f"{earlier:,} answers are from an earlier run of the same code; --fresh computes them again.")
    with open(path, "ab") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for solver in solvers:
            left = [index for index in range(arguments.count) if index not in found[solver.name]]
            for index in tqdm(left, solver.name, unit="problem", disable=not left):
                derivatives = testing.has_derivatives_checked(index, arguments.derivatives_every)
                verdict = testing.judged(solver, testing.case(index), derivatives=derivatives)
                seen = Seen([list(finding) for finding in verdict.findings], verdict.differentiated)
                found[solver.name][index] = seen
                line = {
                    "solver": solver.name, "of": of_code[solver.name], "every": arguments.derivatives_every,
                    "problem": index, **seen._asdict(),
                }  # fmt: skip
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
    return {name: {index: of[index] for index in range(arguments.count)} for name, of in found.items()}


def code(solver) -> str:
    """A hash of what the results depend on: the solver's package, its claims, these checks, and library versions."""
    import hashlib
    import importlib.metadata
    import sys

    import fs_jax.ot

    texts = [repr(solver.claims), solver.source, sys.version]
    for library in ("jax", "ott-jax", "POT", "numpy", "scipy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            texts.append(f"{library} {importlib.metadata.version(library)}")
    files = {*pathlib.Path(fs_jax.ot.__file__).parent.rglob("*.py"), *own_files(solver)}
    texts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def own_files(solver) -> set[pathlib.Path]:
    """All files of the solver's top-level package; of a single module, the loaded ones that lie next to it."""
    import sys

    from fs_jax.ot import testing

    if solver.name in testing.BUILT_IN:
        return set()
    top = sys.modules[solver.name.partition(":")[0].partition(".")[0]]
    if hasattr(top, "__path__"):
        return {path for folder in top.__path__ for path in pathlib.Path(folder).rglob("*.py")}
    loaded = {
        pathlib.Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))
    }
    return {path for path in loaded if path.suffix == ".py" and path.parent == pathlib.Path(top.__file__ or "").parent}


def report(solvers, found: Found, arguments: Arguments, workdir: pathlib.Path) -> None:
    """Writes the table, the figure, the JSON, and a script with the simplest problem for each solver and check."""
    import tabulate

    from experiments.output import made_on, write_files
    from fs_jax._utils import backend
    from fs_jax.ot import testing

    counts = {
        name: collections.Counter(check for each in of.values() for check, *_ in each.findings)
        for name, of in found.items()
    }
    checks = sorted(
        {check for of in counts.values() for check in of}, key=lambda check: (check == testing.GAVE_UP, check)
    )
    judged = {
        solver.name: sum(testing.is_claimed(solver, testing.case(index)) for index in range(arguments.count))
        for solver in solvers
    }
    differentiated = {name: sum(each.differentiated for each in of.values()) for name, of in found.items()}
    claimed = {solver.name: bool(solver.claims.gradients) for solver in solvers}
    rows = [
        [
            name, judged[name], differentiated[name] if claimed[name] else "none claimed",
            *(_share(of[check], judged[name]) if check == testing.GAVE_UP else of[check] or "" for check in checks),
        ]
        for name, of in counts.items()
    ]  # fmt: skip
    parts = [
        f"# {arguments.count:,} transport problems",
        tabulate.tabulate(rows, headers=["solver", "problems", "derivatives", *checks], tablefmt="pipe"),
        "*Problems*: the number of problems that a solver claims to solve. Each check's column has the number of these "
        "for which it fails. *Gave up*: the solver reports it, by `converged` or by NaN in all entries. This is not a "
        f"finding. For one problem in {arguments.derivatives_every}, jit, vmap and derivatives are checked too. "
        "*Derivatives*: the number of these whose plan is so exact that an error of a quarter in a derivative would be "
        "found.",
        "![The ratio of cost to reg of each problem, and whether it has findings](findings.png)",
    ]
    scripts: dict[str, str] = {}
    for solver in solvers:
        for check in checks:
            if check == testing.GAVE_UP or not counts[solver.name][check]:
                continue
            index, finding = next(
                (index, testing.Finding(*each))
                for index, of in found[solver.name].items() for each in of.findings if each[0] == check
            )  # fmt: skip
            simplest = testing.shrunk(solver, testing.as_seen(solver, testing.case(index)), finding)
            name = f"{solver.name}-{check}".replace(":", "_").replace(" ", "_").replace(".", "_") + ".py"
            scripts[name] = testing.script(solver, simplest, finding)
            kind = testing.case(index).family
            parts += [
                f"**{solver.name}: {check}**, first for problem {index} ({kind}): {finding.text}. The simplest problem "
                f"found is {' x '.join(map(str, simplest.cost.shape))}: [{name}](scripts/{name}).",
            ]
    environment = backend.describe()
    parts += [f"On {made_on(environment)}: `python -m experiments.differential --solvers {' '.join(arguments.solvers)} "
              f"--count {arguments.count} --derivatives-every {arguments.derivatives_every}`"]  # fmt: skip
    remove_scripts(workdir, scripts)
    write_files(workdir / "scripts", scripts)
    data = {"environment": environment, "count": arguments.count, "problems": judged,
            "differentiated": differentiated, "findings": counts, "scripts": list(scripts)}  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    write_files(workdir, {"report.md": text, "report.json": data})
    draw(found, workdir / "findings.png")
    print(text)


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if count else ""


def remove_scripts(workdir: pathlib.Path, kept) -> None:
    """Remove the scripts of an earlier report whose findings are gone."""
    earlier = workdir / "report.json"
    for name in json.loads(earlier.read_text(encoding="utf-8")).get("scripts", []) if earlier.exists() else []:
        if name not in kept:
            (workdir / "scripts" / name).unlink(missing_ok=True)


def draw(found: Found, path: pathlib.Path) -> None:
    """Draws each problem at its range of costs over reg, coloured by whether the solver has findings."""
    import numpy as np

    from fs_jax.ot import testing
    from fs_jax.report._canvas import GREY, PALETTE, new_figure, save

    lowest = 1e-4  # in place of 0, which a logarithmic axis cannot show: the ratio of a single row or column
    with new_figure(figsize=(8.0, 1.2 + 0.42 * len(found))) as figure:
        axes = figure.add_subplot()
        for place, of in enumerate(found.values()):
            groups: dict[str, list[float]] = {"none": [], "gave up": [], "finding": []}
            for index, each in of.items():
                problem = testing.case(index)
                kinds = {check for check, *_ in each.findings}
                which = "none" if not kinds else "gave up" if kinds == {testing.GAVE_UP} else "finding"
                groups[which].append(max(problem.ratio, lowest))
            for (which, ratios), colour, size in zip(
                groups.items(), ("#CCCCCC", GREY, PALETTE[1]), (3, 8, 14), strict=True
            ):
                jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(ratios))
                axes.scatter(ratios, place + jitter, s=size, color=colour, lw=0, label=which if place == 0 else None)
        axes.set_xscale("log")
        axes.set_xticks([lowest, 1e-2, 1, 1e2, 1e4], ["0", "0.01", "1", "100", "10,000"])
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set_xlabel("largest cost / reg, rows' and columns' minima subtracted (0: below 0.0001)")
        figure.legend(loc="outside upper center", ncols=3)
        save(figure, path)


def listing() -> str:
    from fs_jax.ot import testing

    lines = ["Solvers, and what they claim:"]
    lines += [f"  {name:28} {_differences(solver.claims)}" for name, solver in testing.BUILT_IN.items()]
    lines += ["Kinds of problems:"]
    lines += [f"  {name:16} {make.__doc__}" for name, make in testing.FAMILIES.items()]
    return "\n".join(lines)


def _differences(claims) -> str:
    """The claims that differ from the defaults, and always the dtype and the marginal error."""
    fields = dataclasses.fields(claims)
    return ", ".join(
        f"{field.name}={getattr(claims, field.name)!r}"
        for field in fields
        if field.name in ("dtype", "marginal_error") or getattr(claims, field.name) != field.default
    )


if __name__ == "__main__":
    command_line.run(main)
