"""Training: methods, a pure training step for any network, several devices, checkpoints, and the training loop."""

from fs_jax._utils.extras import require

require("flax", "optax", "orbax.checkpoint", "tensorboardX")

from fs_jax.training.checkpoint import Checkpoints
from fs_jax.training.configured import (
    create_state,
    make_method,
    make_model,
    make_optimizer,
    pmap_train_step,
    train_step,
)
from fs_jax.training.loop import train
from fs_jax.training.losses import smooth_labels, smoothed_cross_entropy
from fs_jax.training.parallel import AXIS, pmapped, replicate, unreplicate
from fs_jax.training.state import TrainState, init_state
from fs_jax.training.step import make_train_step
from fs_jax.training.transports import make_transport

__all__ = [
    "AXIS",
    "Checkpoints",
    "TrainState",
    "create_state",
    "init_state",
    "make_method",
    "make_model",
    "make_optimizer",
    "make_train_step",
    "make_transport",
    "pmap_train_step",
    "pmapped",
    "replicate",
    "smooth_labels",
    "smoothed_cross_entropy",
    "train",
    "train_step",
    "unreplicate",
]
