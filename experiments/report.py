"""The page of results: `python -m experiments.report`.

Collects `experiments/results/paper` into `report.md`, with PNGs, and `report.html`, one file that needs no network, for
a screen, a phone or paper. Nothing is computed anew: figures are drawn again from the JSON files.
"""

import dataclasses
import html
import json
import pathlib
import re
import tempfile

import tyro

from experiments import command_line
from experiments.output import made_on, write_files
from experiments.paper import findings, writing
from experiments.paper.experiment import Data
from experiments.paper.jobs import EXPERIMENTS, experiment
from experiments.paper.scales import SCALES
from fs_jax._utils.files import local_path
from fs_jax._utils.text import radius


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Collect the results of the paper's experiments on one page."""

    results: pathlib.Path = pathlib.Path("experiments/results/paper")
    """Folder of the tables and figures, with a folder for each scale; the page is written into it."""


TITLE = "Feature scattering, regenerated"
ORDER = ("paper", "short", "medium", "small", "digits")  # what is nearest to the paper first; trials are left out

METHOD = """\
Adversarial training moves each training image, within a small ball, to where the network errs, and trains on that.
**Feature scattering** (Zhang & Wang, NeurIPS 2019) moves a whole batch instead, without labels: it ascends the
optimal-transport distance between the network's outputs for the batch as it is and as moved. It takes one step where
PGD training takes seven, trains on smoothed labels, and is reported to keep 70.5% of CIFAR-10's test images under
PGD-20 and 60.6% under CW-100; AutoAttack, a stronger evaluation of 2020, leaves the released network
[36.64%](https://robustbench.github.io)."""

WORDS = {
    "radius": "how far each pixel of an image, in [0, 1], may be moved",
    "FGSM, PGD-20, CW-100": "attacks that follow a loss's gradient for 1, 20 and 100 steps: the cross-entropy's, and "
    "(CW) that of the margin between the true class and the next",
    "AutoAttack": "four attacks, each on what those before it left: APGD-CE, APGD-T, FAB-T and, without gradients, "
    "Square; a network is as robust as what is left at the end",
    "transport plan": "how the outputs of the batch are matched with those of the moved batch; *identity*: each image "
    "with itself, *independent*: each with all alike",
    "τ, β": "how blurred that matching is in Sinkhorn's algorithm, and in IPOT's",
    "Δ": "label smoothing: the true class has 1 - Δ of the probability",
}


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.report")
    folder = local_path("results", arguments.results)
    results = read(folder)
    if not any(results.values()):
        raise FileNotFoundError(
            f"results: expected folders of the paper's experiments, such as {folder / 'digits'}; there are none "
            "(trials are left out). Make some: python -m experiments.paper --scale digits"
        )
    text = page(results)
    write_files(folder, {"report.md": text, "report.html": as_html(text, results)})
    print(f"Written: {folder / 'report.md'}, {folder / 'report.html'}")


def read(folder: pathlib.Path) -> dict[str, dict[str, Data]]:
    """Results by scale and file name, in the order of the page."""
    found: dict[str, dict[str, Data]] = {}
    for path in sorted(folder.glob("*/*.json"), key=place):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("experiment") in EXPERIMENTS and data["scale"] in ORDER:
            found.setdefault(path.parent.name, {})[path.stem] = data
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(next(iter(item[1].values()))["scale"]), item[0])))


def place(path: pathlib.Path) -> tuple[int, str]:
    """Experiments in their order; those of other seeds behind."""
    matches = [index for index, name in enumerate(EXPERIMENTS) if path.stem.startswith(name)]
    return (matches[0] if matches else len(EXPERIMENTS), path.stem)


def page(results: dict[str, dict[str, Data]]) -> str:
    """The whole page in Markdown."""
    import tabulate

    words = tabulate.tabulate(WORDS.items(), headers=["word", "meaning"], tablefmt="pipe")
    parts = [f"# {TITLE}", METHOD, words, "## What we find", HOW_CERTAIN]
    for of in results.values():
        first = next(iter(of.values()))
        design = SCALES[first["scale"]].summary if first["dataset"] is None else f"As scale {first['scale']} has it."
        parts += [f"### {headline(first)}", design, claims(of)]
    for scale, of in results.items():
        parts += [f"## Results: {headline(next(iter(of.values())))}"]
        for name, data in of.items():
            about = experiment(data["experiment"])
            figure = None if about.draw is None else f"{scale}/{name}.png"
            parts += [deeper(writing.as_markdown(about, data, figure))]
    parts += ["## What was run", overview(results), "Networks that several experiments share are counted in each."]
    return "\n\n".join(parts) + "\n"


HOW_CERTAIN = """\
Claims of the paper, and what our networks say of them. Their size, data and training are said with each scale: what
they show of the *method's parts* and of *how it is judged* holds there, and their accuracies are not those of the
released network. Intervals are of 95%, over test images; differences are of the same images, for these networks: that
other seeds would give others isn't in them. *Agrees* and *disagrees* mean that the whole interval says so,
*undetermined* that it doesn't."""


def headline(data: Data) -> str:
    """Data, resolution and radius of a scale.

    Example:
      >>> config = {"dataset": "digits", "attack": {"epsilon": 0.1}}
      >>> headline({"config": config, "pixels": [8, 8]})
      "scikit-learn's digits, 8 x 8, radius 0.1"
    """
    name, size = pathlib.Path(data["config"]["dataset"]).stem.split("_")[0], " x ".join(map(str, data["pixels"]))
    return f"{NAMES.get(name, name)}, {size}, radius {radius(data['config']['attack']['epsilon'])}"


NAMES = {"digits": "scikit-learn's digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}


def claims(of: dict[str, Data]) -> str:
    """The paper's claims, and what these results say of them."""
    # Of several files of an experiment, that of most seeds.
    best = {data["experiment"]: data for data in sorted(of.values(), key=lambda data: len(data["seeds"]))}
    found = findings.findings(best)
    if not found:
        return "These results check none of the paper's claims yet."
    return "\n".join(f"- *{each.claim}* **{each.verdict.capitalize()}.** {each.evidence}" for each in found)


def overview(results: dict[str, dict[str, Data]]) -> str:
    """Time, machine and command of everything on the page."""
    import tabulate

    rows = []
    for of in results.values():
        for data in of.values():
            rows.append([
                experiment(data["experiment"]).title, f"{sum(data['hours'].values()):.2f}",
                made_on(data["environment"]), f"`{writing.command(data)}`",
            ])  # fmt: skip
    return tabulate.tabulate(rows, headers=["experiment", "hours", "machine", "command"], tablefmt="pipe")


def deeper(markdown: str) -> str:
    """Its headings two levels further down."""
    return re.sub(r"^#", "###", markdown, flags=re.MULTILINE)


def as_html(markdown: str, results: dict[str, dict[str, Data]]) -> str:
    """The page as one file: figures are vectors inside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for scale, of in results.items():
        for name, data in of.items():
            if experiment(data["experiment"]).draw is not None:
                image = re.compile(rf'<img src="{re.escape(f"{scale}/{name}.png")}" alt="([^"]*)" ?/?>')
                svg = vectors(scale, name, data).replace("\\", r"\\")
                body = image.sub(rf'<span class="figure" role="img" aria-label="\1">{svg}</span>', body)
    for verdict in ("Agrees", "Disagrees", "Undetermined"):
        body = body.replace(f"<strong>{verdict}.</strong>", f'<strong class="{verdict.lower()}">{verdict}</strong>')
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return PAGE.format(title=html.escape(TITLE), style=STYLE, body=body)


def vectors(scale: str, name: str, data: Data) -> str:
    """The figure of a result as an <svg> element."""
    draw = experiment(data["experiment"]).draw
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"{scale}-{name}.svg"
        draw(data, path)  # type: ignore[misc]  # there is one
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; }
body { max-width: 62rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; color: #1c1c1c; background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0 1rem; }
h2 { font-size: 1.4rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1.12rem; margin: 2rem 0 .6rem; }
a { color: #0072b2; }
code { font-size: .88em; background: #f3f4f6; padding: .1em .3em; border-radius: 3px; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; white-space: nowrap; }
td:first-child { min-width: 7rem; }
li { margin: .6rem 0; }
li strong { padding: .05em .45em; border-radius: 3px; font-size: .85em; color: #fff; background: #666; }
li strong.agrees { background: #00724f; }
li strong.disagrees { background: #b34400; }
.figure { display: block; overflow-x: auto; margin: 1rem 0; }
.figure svg { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { .figure svg { min-width: 34rem; } body { padding: .6rem .8rem 3rem; } }
@media print { body { max-width: none; font-size: 10pt; } .table, .figure { overflow: visible; }
  table { font-size: 7.5pt; } .figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""

if __name__ == "__main__":
    command_line.run(main)
