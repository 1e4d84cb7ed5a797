"""Feature-scattering adversarial training in JAX: solvers, attacks, training and evaluation as pure functions.

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
