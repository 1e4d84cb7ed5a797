"""IPOT's β (the paper's table 4): `python -m experiments.paper.table4_ipot_beta --scale digits`."""

from experiments.paper.attacked import of_six, six_attacks
from experiments.paper.experiment import Row
from experiments.paper.runner import main
from experiments.paper.tables import table

PAPER = {1.0: of_six(89.9, 77.9, 69.9, 67.3, 59.6, 56.9), 0.5: of_six(90.1, 78.3, 70.7, 68.2, 60.5, 57.9)}

EXPERIMENT = table(
    name="table4_ipot_beta",
    title="IPOT, proximal weight β",
    source="table 4 of the paper's supplement",
    rows=[
        Row(f"β = {beta:g}", {"transport.solver": "ipot", "transport.beta": beta}, values)
        for beta, values in PAPER.items()
    ],
    attacks=six_attacks,
    reading="IPOT solves the transport without an entropy term, in place of Sinkhorn's algorithm. The paper calls its "
    "results stable in β.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
