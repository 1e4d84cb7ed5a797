"""Write the page of results: `python -m experiments.report`.

Collects `experiments/results/paper` into `report.md`, which shows the PNG figures there, and `report.html`, a single
file that can be read offline. No experiment is run; the figures in `report.html` are drawn from the JSON files.
"""

import dataclasses
import html
import json
import pathlib
import re
import tempfile

from experiments import command_line
from experiments.output import write_files
from experiments.paper import findings, summary, writing
from experiments.paper.experiment import Data
from experiments.paper.jobs import experiment
from experiments.paper.scales import EXPERIMENTS, SCALES
from fs_jax._utils.files import local_path
from fs_jax._utils.text import radius


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Collect the results of the paper's experiments on one page, in a few seconds. No experiment is run."""

    results: pathlib.Path = pathlib.Path("experiments/results/paper")
    """Folder of the tables and figures, with one folder per scale. The page is written to it."""


ORDER = ("paper", "short", "medium", "small", "digits")  # the closest to the paper first; without trials

METHOD = """\
Adversarial training perturbs each training image within a small ball so that the network misclassifies it, and trains
on the perturbed images. **Feature scattering** (Zhang & Wang, NeurIPS 2019) perturbs the images of a batch together,
without their labels: it maximises the optimal-transport distance between the network's outputs for the natural and for
the perturbed batch. It takes one attack step; PGD training takes seven. The network is then trained on the perturbed
images, with the cross-entropy and smoothed labels. The paper reports 70.5% accuracy on CIFAR-10 under PGD-20 and 60.6%
under CW-100. Under AutoAttack, a stronger evaluation of 2020, the released network has
[36.64%](https://robustbench.github.io)."""

WORDS = {
    "scale": "data set, network, length of training, radius and number of attacked images of a group of results",
    "WRN-10-1, WRN-10-2": "wide residual networks with 10 layers and 1 or 2 times the usual width; the paper's is "
    "WRN-28-10",
    "fold": "a fifth of the images. Each fold is the test set of a network that is trained on the other four",
    "radius": "the largest change of each pixel (L∞); pixels are in [0, 1]",
    "pass": "a computation with the network: forward, or backward to its input or to its weights",
    "FGSM, PGD-20, CW-100": "attacks with 1, 20 and 100 steps by the network's gradients (white-box) on a loss: the "
    "cross-entropy or, for CW (Carlini & Wagner), the margin between the true class and the next one; x5: from 5 "
    "random starts",
    "AutoAttack": "four attacks in turn, each on the images that are robust to the ones before: APGD-CE (PGD with "
    "adaptive steps), APGD-T (towards each of 9 classes), FAB-T (the nearest decision boundary) and, without "
    "gradients, Square. Robust accuracy counts the images that are robust to all four",
    "RobustBench": "a public list of published networks with their accuracy under AutoAttack",
    "DLR": "APGD-T's loss: the margin divided by a difference of logits, which does not depend on their scale",
    "logits x 0.1": "PGD-20 on the cross-entropy of the logits times 0.1 (or 10). This changes the gradients, not the "
    "classification",
    "marginal error": "how much the sums of the plan's rows and columns differ from what they should be",
    "penultimate features": "the outputs of the layer before the last",
    "simultaneous intervals": "wider intervals (Bonferroni), so that all of them together hold with 95%",
    "masked gradients": "gradients that are zero or misleading, so that attacks by gradients miss adversarial examples",
    "SPSA": "a gradient-free attack: descent with gradients estimated along random directions",
    "local search": "a gradient-free attack: a greedy search over single pixels; each round ends with a projection on "
    "the ball",
    "released network": "the network that the authors published; *released Sinkhorn* is the solver in their code",
    "standard": "training on clean images",
    "PGD-7": "adversarial training with PGD: 7 gradient steps on the cross-entropy per training step",
    "TRADES": "adversarial training on the clean cross-entropy plus the divergence of attacked from clean outputs. Its "
    "training's attack takes 10 steps on this divergence",
    "equal passes": "PGD-7 is trained for fewer epochs, so that its training takes as many passes through the network "
    "as that of feature scattering",
    "transport plan": "the matching between the outputs (logits) for the natural and for the perturbed batch, with the "
    "cosine distance as cost; *identity* matches each image with itself, *independent* with all images equally",
    "Sinkhorn, IPOT": "two algorithms for the transport plan: with an entropy term, and by proximal steps without one",
    "τ, β": "the entropic weight of Sinkhorn's algorithm, the proximal weight of IPOT; larger values blur the plan",
    "Δ": "label smoothing: the true class has the probability 1 - Δ; the rest is shared equally by the other classes. "
    "The paper's method has Δ = 0.5; standard, PGD-7 and TRADES have none",
}


def main(argv: list[str]) -> None:
    prog = "python -m experiments.report"
    arguments = command_line.parse(Arguments, argv, prog=prog, examples=f"  {prog}\n  {prog} --results results/mine\n")
    folder = local_path("results", arguments.results)
    results = read(folder)
    if not any(results.values()):
        raise FileNotFoundError(
            f"results: expected a folder with results, such as {folder / 'digits'}; got none (trials are ignored). "
            "Make some with: python -m experiments.paper --scale digits"
        )
    text = page(results)
    write_files(folder, {"report.md": text, "report.html": as_html(text, results)})
    print(f"Written: {folder / 'report.md'}, {folder / 'report.html'}")


def read(folder: pathlib.Path) -> dict[str, dict[str, Data]]:
    """Read the results, by scale and file name, in the order of the page."""
    found: dict[str, dict[str, Data]] = {}
    for path in sorted(folder.glob("*/*.json"), key=place):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("experiment") in EXPERIMENTS and data["scale"] in ORDER:
            writing.check_version(data, path)
            found.setdefault(path.parent.name, {})[path.stem] = data
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(next(iter(item[1].values()))["scale"]), item[0])))


def place(path: pathlib.Path) -> tuple[int, str]:
    """Sort key of a file: experiments in their order, and those with other seeds after them."""
    matches = [index for index, name in enumerate(EXPERIMENTS) if path.stem.startswith(name)]
    return (matches[0] if matches else len(EXPERIMENTS), path.stem)


def page(results: dict[str, dict[str, Data]]) -> str:
    """The page in Markdown."""
    import tabulate

    words = tabulate.tabulate(WORDS.items(), headers=["term", "meaning"], tablefmt="pipe")
    parts = [f"# {title(results)}", *so_far(results), METHOD]
    if in_short := summary.summary({headline(next(iter(of.values()))): best(of) for of in results.values()}):
        parts += ["## In short", "The next section explains the terms.", in_short, IN_SHORT_ENDS]
    parts += ["## Terms", words, "## Findings", HOW_CERTAIN]
    for of in results.values():
        first = next(iter(of.values()))
        design = (
            SCALES[first["scale"]].summary if first["dataset"] is None else f"The settings of scale {first['scale']}."
        )
        parts += [f"### {headline(first)}", f"{design} {training(first['config'])}", *unfinished(of), claims(of)]
    for scale, of in results.items():
        parts += [f"## Results: {headline(next(iter(of.values())))}"]
        for name, data in of.items():
            about = experiment(data["experiment"])
            figure = None if about.draw is None else f"{scale}/{name}.png"
            parts += [deeper(writing.as_markdown(about, data, figure))]
    parts += [
        "## Times",
        overview(results),
        "The times of networks that several experiments share are included in each.",
    ]
    return "\n\n".join(parts) + "\n"


def title(results: dict[str, dict[str, Data]]) -> str:
    """The title, with the data sets of the results."""
    return f"Feature scattering: the paper's claims, checked on {' and '.join(datasets(results))}"


def so_far(results: dict[str, dict[str, Data]]) -> list[str]:
    """A warning if there are results on digits only."""
    only_digits = datasets(results) == [NAMES["digits"]]
    text = f"**So far, this page has results on {NAMES['digits']} only, and none on CIFAR-10.**"
    return [text] if only_digits else []


def datasets(results: dict[str, dict[str, Data]]) -> list[str]:
    """The names of the data sets, in the order of the page.

    Example:
      >>> datasets({"small": {"main_table": {"config": {"dataset": "cifar10_16x16"}}}})
      ['CIFAR-10']
    """
    return list(dict.fromkeys(dataset_name(next(iter(of.values()))) for of in results.values()))


IN_SHORT_ENDS = """\
*Disagrees* rejects a claim as it is worded. The claims about accuracy under PGD, plateaus and gradient-free attacks are
arguments, which can fail for any network: *Findings* have the numbers of others. For gradient-free attacks, *disagrees*
does not mean that gradients are masked.

The intervals are 95% intervals over test images. Those of differences on digits include the variation between the
networks of the five folds. Otherwise, the variation between seeds is not included: each network is trained once, unless
its table names more seeds. So a verdict whose interval barely excludes 0 could change with other seeds. (Where the main
table has several seeds, other tables compare with the network of the first seed.)

At the scales `digits`, `small` and `medium`, networks, images and radius differ from the paper's: compare the order of
the rows with the paper's, not the numbers. Scale `short` has the paper's network and radius, but trains for 10 instead
of 200 epochs."""

HOW_CERTAIN = """\
These are the paper's claims, and questions that they raise, checked on our networks. Each scale states the size, data
and training of its networks. A finding holds at its scale only, and the accuracies are not those of the released
network. Intervals are 95% intervals over test images, and differences are between networks on the same images. If a row
has several networks (five folds on digits, or several seeds), the interval of a difference includes the variation
between them (Student's t). The training sets of the folds overlap, which the intervals ignore.
With one network for each row, as in most tables at the scales `small` and `medium`, a difference is one between two
networks: how much it varies with their seeds is known only where a table has several seeds. The paper's own accuracies
of its method differ slightly between its tables.

The wording of the claims is ours. The verdict depends on the kind of claim:

| claim | agrees if | disagrees if |
| :-- | :-- | :-- |
| the method is better than another row | the other row is *lower* | the other row is *higher* or *equal* |
| a clean accuracy is worth it | a row with one attack step on the cross-entropy, at any radius, is at most 2 points \
less accurate on clean images (the whole simultaneous interval), and all rows for which this is possible are *lower* \
under attack | such a row is also at most 2 points lower under attack (the whole simultaneous interval) |
| rows are stable, under PGD-20 as in the paper | all simultaneous 95% intervals of the differences (Bonferroni) are \
within ±2 points | one of them excludes 0, and not all are within ±2 |
| PGD shows robustness | of all images, at most 2% are robust to PGD-20 but not to AutoAttack (the whole interval) | \
more than 2% are (the whole interval) |
| a plateau of the loss shows robustness | of the images that are robust to PGD-20, at most 2% are not robust to \
APGD-T (the whole interval; this takes at least 189 such images) | more than 2% are not (the whole interval) |
| gradient-free attacks show robustness | never, since a stronger attack could exist | SPSA with strong settings finds \
more than with weak ones (the intervals do not overlap) |
| clusters hold under attack | the standard network loses more of their purity | it loses less (the interval of \
the difference excludes 0) |

Otherwise it is *undetermined*: the results do not suffice for a verdict. Rows are *equal* if the whole interval of
their difference is within ±2 points; otherwise, a row is *higher* or *lower* than the first if the interval excludes 0.
*Undetermined* means that neither a difference nor equality is proved; the interval still bounds the difference. A scale
*detects* effects of a size if it usually finds a true difference of that size."""


def headline(data: Data) -> str:
    """Data set, resolution, radius and scale.

    Example:
      >>> config = {"dataset": "digits", "attack": {"epsilon": 0.1}}
      >>> headline({"config": config, "pixels": [8, 8], "scale": "digits"})
      "scikit-learn's digits, 8 x 8, radius 0.1 (scale digits)"
    """
    size = " x ".join(map(str, data["pixels"]))
    epsilon = radius(data["config"]["attack"]["epsilon"])
    return f"{dataset_name(data)}, {size}, radius {epsilon} (scale {data['scale']})"


def dataset_name(data: Data) -> str:
    """Name of the data set, without resolution and fold."""
    name = pathlib.Path(data["config"]["dataset"]).stem.split("_")[0]
    return NAMES.get(name, name)


NAMES = {"digits": "scikit-learn's digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}


def unfinished(of: dict[str, Data]) -> list[str]:
    """A sentence with the experiments of a scale that are not complete, if there are any."""
    there = best(of)
    titles = [experiment(name).title for name in EXPERIMENTS if name not in there or there[name]["missing"]]
    return [f"**Not run, or not all rows:** {'; '.join(titles)}."] if titles else []


def training(config: Data) -> str:
    """The training of all rows, in a sentence."""
    decays = "".join(f", times {config['decay_factor']:g} after epoch {epoch}" for epoch in config["decay_epochs"])
    return (
        f"Training, where a row does not change it: {config['epochs']} epochs of SGD with batches of "
        f"{config['batch_size']}, momentum {config['momentum']:g}, weight decay {config['weight_decay']:g} and "
        f"learning rate {config['learning_rate']:g}{decays}; random starts in the attacks."
    )


def claims(of: dict[str, Data]) -> str:
    """The paper's claims, with the verdicts of these results."""
    found = findings.findings(best(of))
    if not found:
        return "These results are not sufficient to check a claim of the paper."
    return "\n".join(
        f"- *{each.claim}* **{each.verdict.capitalize()} at this scale.** {each.evidence}" for each in found
    )


def best(of: dict[str, Data]) -> dict[str, Data]:
    """The results by experiment. For one with several files, that with the most rows, and of these the most seeds."""
    ascending = sorted(of.values(), key=lambda data: (-len(data["missing"]), len(data["seeds"])))
    return {data["experiment"]: data for data in ascending}


def overview(results: dict[str, dict[str, Data]]) -> str:
    """Time, summed over networks, machine and command of all experiments on the page."""
    import tabulate

    rows = []
    for of in results.values():
        for data in of.values():
            rows.append([
                experiment(data["experiment"]).title, writing.duration(3600 * sum(data["hours"].values())),
                writing.machines(data), f"`{writing.command(data)}`",
            ])  # fmt: skip
    return tabulate.tabulate(
        rows, headers=["experiment", "time, summed over networks", "machine", "command"], tablefmt="pipe"
    )


def deeper(markdown: str) -> str:
    """Move headings two levels down."""
    return re.sub(r"^#", "###", markdown, flags=re.MULTILINE)


def as_html(markdown: str, results: dict[str, dict[str, Data]]) -> str:
    """The page as a single HTML file, with the figures as SVG."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for scale, of in results.items():
        for name, data in of.items():
            if experiment(data["experiment"]).draw is not None:
                image = re.compile(rf'<img src="{re.escape(f"{scale}/{name}.png")}" alt="([^"]*)" ?/?>')
                svg = vectors(scale, name, data).replace("\\", r"\\")
                body = image.sub(rf'<span class="figure" role="img" aria-label="\1">{svg}</span>', body)
    for verdict in ("Agrees", "Disagrees", "Undetermined"):
        body = body.replace(f"<strong>{verdict} ", f'<strong class="{verdict.lower()}">{verdict} ')
    body = body.replace("<table>", TABLE).replace("</table>", "</table></div>")
    return PAGE.format(title=html.escape(title(results)), style=STYLE, body=body)


def vectors(scale: str, name: str, data: Data) -> str:
    """The figure of an experiment as an <svg> element."""
    draw = experiment(data["experiment"]).draw
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"{scale}-{name}.svg"
        draw(data, path)  # type: ignore[misc]  # not None
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


# A table that is wider than the window can be scrolled with the keyboard.
TABLE = '<div class="table" tabindex="0" role="region" aria-label="table"><table>'

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
<main>
{body}
</main>
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
th { border-bottom: 2px solid #999; }
th, td { min-width: 5.5rem; }
td:first-child { min-width: 10rem; }
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
