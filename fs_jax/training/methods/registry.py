"""The registry of methods that configurations can name. To add one, write a file like the others and list it here."""

from fs_jax.training.methods.feature_scatter import FEATURE_SCATTER
from fs_jax.training.methods.method import Entry
from fs_jax.training.methods.noise import NOISE
from fs_jax.training.methods.pgd import PGD
from fs_jax.training.methods.standard import STANDARD
from fs_jax.training.methods.trades import TRADES

METHODS: dict[str, Entry] = {entry.name: entry for entry in (FEATURE_SCATTER, PGD, TRADES, NOISE, STANDARD)}
