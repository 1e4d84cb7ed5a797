"""Wide-ResNets in Flax Linen, and their weights from and to PyTorch."""

from fs_jax._utils.extras import require

require("flax")

from fs_jax.models.wide_resnet import BatchNorm, WideResNet, as_logits_fn

__all__ = ["BatchNorm", "WideResNet", "as_logits_fn"]
