"""Deprecation warnings of JAX are errors in the tests, by the filters in pyproject.toml."""

import sys
import warnings

import jax  # noqa: F401
import pytest


def test_using_a_deprecated_name_of_jax_is_an_error():
    # JAX's modules have tables of deprecated names: old name to (message, value, or None if it was removed).
    for name, module in sorted(sys.modules.items()):
        if name.startswith("jax."):
            for old, (_, value) in getattr(module, "_deprecations", {}).items():
                if value is not None:
                    with pytest.raises(DeprecationWarning, match="deprecated"):
                        getattr(module, old)
                    return
    pytest.skip("this JAX has no deprecated names")


@pytest.mark.parametrize(
    ("message", "module"),
    [
        ("xla_computation is deprecated", "fs_jax.attacks.linf"),  # attributed to the caller
        ("xla_computation is deprecated", "tests.test_data"),
        ("xla_computation is deprecated", "jax._src.api"),  # attributed to JAX
        ("Note:\njax.xla_computation is deprecated", "flax.core.lift"),  # a call of JAX in another library
    ],
)
def test_deprecations_of_jax_are_errors_for_any_module(message, module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit(message, DeprecationWarning, "file.py", 1, module)


def test_deprecations_between_other_libraries_are_warnings():
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("xla_computation is deprecated", DeprecationWarning, "file.py", 1, "jaxtyping.x")
    assert len(seen) == 1
