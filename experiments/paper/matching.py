"""Compare transport with identity and independent plans: `python -m experiments.paper.matching`."""

from experiments.paper.attacked import and_autoattack
from experiments.paper.experiment import METHOD_PLAN, Row
from experiments.paper.runner import main
from experiments.paper.tables import table

IDENTITY = Row("identity plan", {"transport.solver": "identity"})
INDEPENDENT = Row("independent plan", {"transport.solver": "independent"})
IPOT = Row("IPOT, β = 1", {"transport.solver": "ipot"})

EXPERIMENT = table(
    name="matching",
    title="Matching of natural and scattered features",
    source="the paper's ablation of the matching, whose numbers are not in the supplement",
    rows=[Row(METHOD_PLAN), IPOT, IDENTITY, INDEPENDENT],
    attacks=and_autoattack,
    columns=("clean", "pgd-20", "cw-100", "apgd-t", "square"),
    reading="The first row is the paper's method. Two rows have a fixed plan instead of a transport: identity matches "
    "each image with itself only, independent matches it with all images equally.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
