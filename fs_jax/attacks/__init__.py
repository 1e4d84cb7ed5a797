"""L-infinity attacks on images in [0, 1]. A network is any function `logits_fn` from images to logits."""

from fs_jax.attacks.apgd import apgd, apgd_steps
from fs_jax.attacks.autoattack import AttackRecord, autoattack, autoattack_attacks
from fs_jax.attacks.fab import fab, fab_steps
from fs_jax.attacks.linf import project, random_start
from fs_jax.attacks.local_search import local_search, local_search_steps
from fs_jax.attacks.losses import cross_entropy, cw_margin, dlr, logit_margin, targeted_dlr
from fs_jax.attacks.mi_fgsm import mi_fgsm, mi_fgsm_steps
from fs_jax.attacks.packing import Finished, PackedReport, packed
from fs_jax.attacks.pgd import cw, fgsm, pgd, pgd_steps
from fs_jax.attacks.registry import REGISTRY, Attack, parse_attack
from fs_jax.attacks.sanity import sanity_warnings
from fs_jax.attacks.scatter import Scatter, feature_scatter, scatter
from fs_jax.attacks.specification import Setting, Specification, count, flag, length
from fs_jax.attacks.spsa import spsa, spsa_steps
from fs_jax.attacks.square import square, square_steps
from fs_jax.attacks.stepwise import Progress, Stepwise, adversaries, first_judged, judged
from fs_jax.attacks.transfer import transfer

__all__ = [
    "REGISTRY",
    "Attack",
    "AttackRecord",
    "Finished",
    "PackedReport",
    "Progress",
    "Scatter",
    "Setting",
    "Specification",
    "Stepwise",
    "adversaries",
    "apgd",
    "apgd_steps",
    "autoattack",
    "autoattack_attacks",
    "count",
    "cross_entropy",
    "cw",
    "cw_margin",
    "dlr",
    "fab",
    "fab_steps",
    "feature_scatter",
    "fgsm",
    "first_judged",
    "flag",
    "judged",
    "length",
    "local_search",
    "local_search_steps",
    "logit_margin",
    "mi_fgsm",
    "mi_fgsm_steps",
    "packed",
    "parse_attack",
    "pgd",
    "pgd_steps",
    "project",
    "random_start",
    "sanity_warnings",
    "scatter",
    "spsa",
    "spsa_steps",
    "square",
    "square_steps",
    "targeted_dlr",
    "transfer",
]
