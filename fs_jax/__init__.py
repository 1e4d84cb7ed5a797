"""Feature-scattering adversarial training in JAX: solvers, attacks, training and evaluation as pure functions.

- `fs_jax.ot`: optimal transport between small sets of points, by Sinkhorn and IPOT;
- `fs_jax.attacks`: feature scattering, PGD, CW, AutoAttack and others, for any network;
- `fs_jax.evaluation`: accuracy under attack, image by image, resumable;
- `fs_jax.training`: training methods, training steps, checkpoints and the training loop;
- `fs_jax.models`: Wide-ResNets, and their weights from and to PyTorch;
- `fs_jax.data`: CIFAR, SVHN, digits, or your own data, as arrays in memory;
- `fs_jax.config`: configurations of training runs, and presets;
- `fs_jax.report`: tables and figures of evaluations.

Subpackages are imported when they are first used:

>>> import fs_jax
>>> fs_jax.ot.sinkhorn
<function sinkhorn at ...>
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "attacks",
    "config",
    "data",
    "evaluation",
    "models",
    "ot",
    "report",
    "training",
]


def __getattr__(name: str):
    # Lazy imports: `import fs_jax` is fast, and `fs_jax.ot` loads neither Flax nor Orbax.
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return [*__all__, "__version__"]
