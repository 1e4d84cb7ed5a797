"""The methods that configurations can name. A new one is a file, and a line here."""

from fs_jax.training.methods.feature_scatter import FEATURE_SCATTER
from fs_jax.training.methods.method import Entry
from fs_jax.training.methods.noise import NOISE
from fs_jax.training.methods.pgd import PGD
from fs_jax.training.methods.standard import STANDARD
from fs_jax.training.methods.trades import TRADES

METHODS: dict[str, Entry] = {entry.name: entry for entry in (FEATURE_SCATTER, PGD, TRADES, NOISE, STANDARD)}
