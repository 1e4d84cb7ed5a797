"""Attacks in L-infinity on images in [0, 1]. They see a network only as `logits_fn: images -> logits`."""

from fs_jax.attacks.gradient import cw, fgsm, pgd
from fs_jax.attacks.linf import project, random_start
from fs_jax.attacks.losses import cross_entropy, cw_margin
from fs_jax.attacks.scatter import Scatter, feature_scatter, scatter

__all__ = [
    "Scatter",
    "cross_entropy",
    "cw",
    "cw_margin",
    "feature_scatter",
    "fgsm",
    "pgd",
    "project",
    "random_start",
    "scatter",
]
