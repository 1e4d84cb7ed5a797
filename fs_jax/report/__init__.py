"""Markdown tables and PNG figures from recorded results. Functions of data that return a string or write a file."""

from fs_jax._utils.extras import require
from fs_jax._utils.text import radius

require("matplotlib", "tabulate")

from fs_jax.report.examples import attack_examples
from fs_jax.report.figures import accuracy_bars, attack_strength, loss_surfaces, training_curves
from fs_jax.report.tables import accuracy_table, attack_table, caption

__all__ = [
    "accuracy_bars",
    "accuracy_table",
    "attack_examples",
    "attack_strength",
    "attack_table",
    "caption",
    "loss_surfaces",
    "radius",
    "training_curves",
]
