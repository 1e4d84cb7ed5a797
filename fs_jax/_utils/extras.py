"""Optional libraries: those that a plain `pip install fs_jax` doesn't install."""

import importlib.util


def require(*modules: str) -> None:
    """Raise a `ModuleNotFoundError` that says what to install, unless all of these can be imported.

    Example:
      >>> require("numpy")
      >>> require("numpy", "flax_of_tomorrow")
      Traceback (most recent call last):
      ModuleNotFoundError: flax_of_tomorrow is not installed. This needs: pip install "PATH_OF_THE_CLONE[train]"
    """
    for name in modules:
        try:
            installed = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # its parent package isn't installed
            installed = False
        if not installed:
            # Not fs_jax[train], since fs_jax is not on PyPI.
            raise ModuleNotFoundError(
                f'{name} is not installed. This needs: pip install "PATH_OF_THE_CLONE[train]"', name=name
            )
