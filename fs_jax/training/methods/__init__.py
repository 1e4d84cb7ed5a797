"""Training methods: feature scattering and those that it is compared with. Each method is one file."""

from fs_jax.training.methods.averaging import averaged
from fs_jax.training.methods.feature_scatter import feature_scatter
from fs_jax.training.methods.method import Context, Entry, Method, accuracy, infer
from fs_jax.training.methods.noise import noise
from fs_jax.training.methods.pgd import pgd
from fs_jax.training.methods.registry import METHODS
from fs_jax.training.methods.standard import standard
from fs_jax.training.methods.trades import trades

__all__ = [
    "METHODS",
    "Context",
    "Entry",
    "Method",
    "accuracy",
    "averaged",
    "feature_scatter",
    "infer",
    "noise",
    "pgd",
    "standard",
    "trades",
]
