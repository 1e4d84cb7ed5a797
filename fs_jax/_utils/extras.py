"""Libraries that a part of the package needs, and that a plain `pip install fs_jax` leaves out."""

import importlib.util


def require(*modules: str) -> None:
    """Raise a `ModuleNotFoundError` that says what to install, if one of these can't be imported.

    Example:
      >>> require("numpy")
      >>> require("numpy", "flax_of_tomorrow")
      Traceback (most recent call last):
      ModuleNotFoundError: flax_of_tomorrow is not installed. This needs: pip install "fs_jax[train]"
    """
    for name in modules:
        try:
            there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of the package that it would be in
            there = False
        if not there:
            raise ModuleNotFoundError(f'{name} is not installed. This needs: pip install "fs_jax[train]"', name=name)
