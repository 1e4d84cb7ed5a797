"""Label smoothing (the paper's table 2): `python -m experiments.paper.table2_label_smoothing --scale digits`."""

from experiments.paper.attacked import of_six, six_attacks
from experiments.paper.experiment import Row
from experiments.paper.runner import main
from experiments.paper.tables import table

PAPER = {
    0.3: of_six(90.3, 77.1, 66.0, 61.8, 62.4, 59.4),
    0.4: of_six(90.3, 77.0, 64.0, 58.9, 61.2, 58.0),
    0.5: of_six(90.1, 78.2, 70.7, 68.4, 62.8, 60.0),
    0.6: of_six(89.8, 78.0, 71.7, 70.1, 62.5, 60.5),
    0.7: of_six(90.3, 77.3, 72.4, 71.2, 67.4, 65.7),
    0.8: of_six(90.5, 74.0, 70.3, 69.7, 66.5, 65.6),
}

EXPERIMENT = table(
    name="table2_label_smoothing",
    title="Label smoothing Δ",
    source="table 2 of the paper's supplement",
    rows=[
        *(
            Row(f"Δ = {delta:g}", {"smoothing": delta}, PAPER.get(delta, {}))
            for delta in (0.5, 0.0, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
        ),
        *(
            Row(f"{label}, Δ = {delta:g}", {"method": method, "smoothing": delta})
            for method, label in (("pgd", "PGD-7 training"), ("standard", "standard training"))
            for delta in (0.0, 0.5)
        ),
    ],
    attacks=six_attacks,
    reading="The first row is the paper's method. The paper calls label smoothing necessary but has no row without it. "
    "At Δ = 0.9 the labels are uniform.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
