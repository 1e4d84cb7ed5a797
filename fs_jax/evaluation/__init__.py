"""Evaluation under attack: accuracies with intervals, the worst case over attacks, and a record of every image."""

from fs_jax._utils.fingerprints import fingerprint
from fs_jax._utils.images import as_float
from fs_jax.attacks.registry import Attack, parse_attack
from fs_jax.evaluation.driver import Evaluation, check_evaluation, evaluate
from fs_jax.evaluation.journal import Journal
from fs_jax.evaluation.statistics import accuracy
from fs_jax.evaluation.suites import SUITES, suite

__all__ = [
    "SUITES",
    "Attack",
    "Evaluation",
    "Journal",
    "accuracy",
    "as_float",
    "check_evaluation",
    "evaluate",
    "fingerprint",
    "parse_attack",
    "suite",
]
