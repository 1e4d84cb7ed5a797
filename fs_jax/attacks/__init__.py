"""Attacks in L-infinity on images in [0, 1]. They see a network only as `logits_fn: images -> logits`."""

from fs_jax.attacks.gradient import cw, fgsm, pgd, pgd_steps
from fs_jax.attacks.linf import project, random_start
from fs_jax.attacks.losses import cross_entropy, cw_margin, logit_margin
from fs_jax.attacks.packing import Finished, Look, packed
from fs_jax.attacks.scatter import Scatter, feature_scatter, scatter
from fs_jax.attacks.stepwise import Progress, Stepwise

__all__ = [
    "Finished",
    "Look",
    "Progress",
    "Scatter",
    "Stepwise",
    "cross_entropy",
    "cw",
    "cw_margin",
    "feature_scatter",
    "fgsm",
    "logit_margin",
    "packed",
    "pgd",
    "pgd_steps",
    "project",
    "random_start",
    "scatter",
]
