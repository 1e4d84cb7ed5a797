"""Check Sinkhorn solvers against certified solutions: for 200 problems, about a minute per solver on two CPU cores.

A solver is a function `solve(cost, a, b, reg)` that returns a mapping with `plan`. Our solvers, ott-jax's and POT's are
built in. Results are saved at once in the workdir, in `findings.jsonl`, from which an interrupted run resumes. At the
end, it gets `report.md`, `report.json`, `findings.png`, and for each solver and failed check a script that reproduces
the failure on the simplest problem found. The exit status is 1 if a check failed; solvers may give up if they report
it.

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
    """Number of problems; the 15 kinds take turns."""
    derivatives_every: int = 26
    """Check derivatives, jit and vmap for one in this many problems. (Multiples of 3 or 5 skip some kinds.)"""
    workdir: pathlib.Path = pathlib.Path("runs/differential")
    """Folder of the findings and the report: a new one, or the one to resume."""
    list: bool = False
    """List the built-in solvers and the kinds of problems. Run nothing."""


def main(argv: list[str]) -> int:
    prog = "python -m experiments.differential"
    arguments = command_line.parse(Arguments, argv, prog=prog, **command_line.documented(__doc__))
    os.environ.setdefault("JAX_ENABLE_X64", "1")  # before JAX is loaded: a solver of float32 gets arrays of float32

    from fs_jax._utils.files import local_path, locked
    from fs_jax._utils.validation import check_number
    from fs_jax.ot import testing

    if arguments.list:
        print(listing())
        return 0
    check_number("count", arguments.count, at_least=1, integer=True)
    check_number("derivatives_every", arguments.derivatives_every, at_least=1, integer=True)
    solvers = [testing.load(name) for name in arguments.solvers]
    workdir = local_path("workdir", arguments.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
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
    for line in read_jsonl(path) if path.exists() else []:
        if (line["every"], line["of"]) == (arguments.derivatives_every, of_code.get(line["solver"])):
            found[line["solver"]][line["problem"]] = Seen(line["findings"], line["differentiated"])
    with open(path, "ab") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for solver in solvers:
            left = [index for index in range(arguments.count) if index not in found[solver.name]]
            for index in tqdm(left, solver.name, unit="problem", disable=not left):
                derivatives = index % arguments.derivatives_every == 0
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
    """Digest of what determines a solver's answers: its source, its claims, and the versions of libraries."""
    import hashlib
    import importlib.metadata
    import inspect
    import sys

    texts = [repr(solver.claims), solver.source, sys.version]
    with contextlib.suppress(OSError, TypeError):
        texts.append(inspect.getsource(inspect.getmodule(solver.solve) or solver.solve))
    for library in ("fs_jax", "jax", "ott-jax", "POT", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            texts.append(f"{library} {importlib.metadata.version(library)}")
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


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
    rows = [
        [name, judged[name], differentiated[name], *(of[check] or "" for check in checks)]
        for name, of in counts.items()
    ]
    parts = [
        f"# {arguments.count:,} transport problems",
        tabulate.tabulate(rows, headers=["solver", "problems", "derivatives", *checks], tablefmt="pipe"),
        "Number of problems for which each check fails, among the problems that a solver claims to solve. *Gave up*: "
        f"the solver reports it itself. For one problem in {arguments.derivatives_every}, jit and vmap are checked "
        "too, and derivatives if the claimed marginal error determines them; *derivatives* is the number of these "
        "problems.",
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
    write_files(workdir / "scripts", scripts)
    data = {"environment": environment, "count": arguments.count, "problems": judged,
            "differentiated": differentiated, "findings": counts}  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    write_files(workdir, {"report.md": text, "report.json": data})
    draw(found, workdir / "findings.png")
    print(text)


def draw(found: Found, path: pathlib.Path) -> None:
    """Draws each problem at its range of costs over reg, coloured by whether the solver has findings."""
    import numpy as np

    from fs_jax.ot import testing
    from fs_jax.report._canvas import GREY, PALETTE, new_figure, save

    with new_figure(figsize=(8.0, 1.2 + 0.42 * len(found))) as figure:
        axes = figure.add_subplot()
        for place, of in enumerate(found.values()):
            groups: dict[str, list[float]] = {"none": [], "gave up": [], "finding": []}
            for index, each in of.items():
                problem = testing.case(index)
                kinds = {check for check, *_ in each.findings}
                which = "none" if not kinds else "gave up" if kinds == {testing.GAVE_UP} else "finding"
                groups[which].append(max(problem.ratio, 1e-4))
            for (which, ratios), colour, size in zip(
                groups.items(), ("#CCCCCC", GREY, PALETTE[1]), (3, 8, 14), strict=True
            ):
                jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(ratios))
                axes.scatter(ratios, place + jitter, s=size, color=colour, lw=0, label=which if place == 0 else None)
        axes.set_xscale("log")
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set_xlabel("range of costs over reg")
        figure.legend(loc="outside upper center", ncols=3)
        save(figure, path)


def listing() -> str:
    from fs_jax.ot import testing

    lines = ["Solvers:", *(f"  {name}" for name in testing.BUILT_IN), "Kinds of problems:"]
    lines += [f"  {name:16} {make.__doc__}" for name, make in testing.FAMILIES.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
