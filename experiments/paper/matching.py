"""What the transport is worth: transport, identity and independent plans: `python -m experiments.paper.matching`."""

from experiments.paper.runner import main
from experiments.paper.sweep import Row, Sweep, and_autoattack, full_step

SWEEP = Sweep(
    name="matching",
    title="Matching of natural and scattered features",
    source="(the main paper's ablation of the matching; its numbers are not in the supplement)",
    rows=[
        Row("Sinkhorn, τ = 0.01"),
        Row("IPOT, β = 1", {"transport.solver": "ipot"}),
        Row("identity plan", {"transport.solver": "identity"}),
        Row("independent plan", {"transport.solver": "independent"}),
        Row("noise alone, Δ = 0.5", {"method": "noise", "smoothing": 0.5}),
        Row(
            "cross-entropy, 1 step, Δ = 0.5",
            {
                "method": "pgd",
                "attack.num_steps": 1,
                "attack.step_size": full_step,
                "smoothing": 0.5,
            },
        ),
    ],
    attacks=and_autoattack,
    reading="Each image with itself alone (identity), with all alike (independent), or no attack at all (noise).",
)

if __name__ == "__main__":
    main(SWEEP)
