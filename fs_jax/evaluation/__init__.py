"""Evaluation under attack: a record of every image, accuracies with intervals, the worst case over attacks."""

from fs_jax._utils.images import as_float
from fs_jax.evaluation.attack import Attack, Kind, parse_attack
from fs_jax.evaluation.driver import Evaluation, check_evaluation, evaluate
from fs_jax.evaluation.network import as_logits_fn
from fs_jax.evaluation.statistics import accuracy
from fs_jax.evaluation.suites import SUITES, suite

__all__ = [
    "SUITES",
    "Attack",
    "Evaluation",
    "Kind",
    "accuracy",
    "as_float",
    "as_logits_fn",
    "check_evaluation",
    "evaluate",
    "parse_attack",
    "suite",
]
