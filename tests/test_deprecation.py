"""What JAX deprecates fails the tests, so that it is seen long before it is gone: by the filters in pyproject.toml."""

import sys
import warnings

import jax  # noqa: F401
import pytest


def test_a_name_that_the_installed_jax_deprecates_is_an_error():
    # Each of JAX's modules keeps a table of them: old name to (message, what it stands for, or None if it is gone).
    for name, module in sorted(sys.modules.items()):
        if name.startswith("jax."):
            for old, (_, value) in getattr(module, "_deprecations", {}).items():
                if value is not None:
                    with pytest.raises(DeprecationWarning, match="deprecated"):
                        getattr(module, old)
                    return
    pytest.skip("this JAX deprecates no name")


@pytest.mark.parametrize(
    ("message", "module"),
    [
        ("xla_computation is deprecated", "fs_jax.attacks.linf"),  # said to whom calls it
        ("xla_computation is deprecated", "tests.test_data"),
        ("xla_computation is deprecated", "jax._src.api"),  # a warning that doesn't look for its caller
        ("Note:\njax.xla_computation is deprecated", "flax.core.lift"),  # a library's call on our behalf
    ],
)
def test_a_deprecation_is_an_error_whichever_module_it_is_raised_for(message, module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit(message, DeprecationWarning, "file.py", 1, module)


def test_what_others_deprecate_among_themselves_is_a_warning():
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("xla_computation is deprecated", DeprecationWarning, "file.py", 1, "jaxtyping.x")
    assert len(seen) == 1
