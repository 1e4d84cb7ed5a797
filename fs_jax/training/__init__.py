"""Training: a pure step, the one file that maps it over devices, checkpoints, and the loop that wires them."""

from fs_jax.training.checkpoint import Checkpoints
from fs_jax.training.loop import train
from fs_jax.training.parallel import pmap_train_step, pmap_train_steps, replicate, unreplicate
from fs_jax.training.state import TrainState, create_state, make_model, make_optimizer
from fs_jax.training.step import make_transport, smooth_labels, smoothed_cross_entropy, train_step

__all__ = [
    "Checkpoints",
    "TrainState",
    "create_state",
    "make_model",
    "make_optimizer",
    "make_transport",
    "pmap_train_step",
    "pmap_train_steps",
    "replicate",
    "smooth_labels",
    "smoothed_cross_entropy",
    "train",
    "train_step",
    "unreplicate",
]
