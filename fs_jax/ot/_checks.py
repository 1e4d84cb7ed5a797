"""Validation and conversion of the solvers' arguments.

Values are checked when they are concrete. Under `jit`, `vmap` and `grad` an argument is a tracer: its shape and dtype
are still checked here, and `Transport.status` reports invalid values.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fs_jax.ot import _sharding
from fs_jax.ot._numerics import result_type

_Name = TypeVar("_Name", bound=str)  # a `Literal`, or any string

# Largest relative difference between the total masses: well above the rounding of normalised weights in the caller's
# dtype, well below any difference that is intended.
_MASS_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


# Names of the same arguments, and of values of `method` and `grad`, in other libraries.
_OTHER_NAMES = {
    "epsilon": "reg",
    "reg": "reg",
    "max_iterations": "num_iters",
    "max_iters": "num_iters",
    "max_iter": "num_iters",
    "numItermax": "num_iters",
    "stopThr": "threshold",
    "tol": "threshold",
    "lse_mode": 'method ("log" or "kernel")',
    "implicit_diff": 'grad ("implicit" or "unroll")',
    "use_danskin": 'grad ("envelope")',
    "reg_m": "rho",
    "tau_a": "rho (tau is rho / (rho + reg))",
    "tau_b": "rho (tau is rho / (rho + reg))",
    "initializer": "init",
    "warmstart": "init",
    "lse": "'log'",
    "sinkhorn_log": "'log'",
    "sinkhorn": "'kernel'",
    "sinkhorn_stabilized": "'stabilized'",
    "auto": "'stabilized'",
    "autodiff": "'unroll'",
    "danskin": "'envelope'",
    "detach": "'none'",
}


def suggests_names(solver: Callable) -> Callable:
    """Wraps a solver: for an unknown keyword, such as another library's name, its error suggests the name used here."""
    signature = inspect.signature(solver)
    known = list(signature.parameters)
    by_position = [name for name, of in signature.parameters.items() if of.kind is of.POSITIONAL_OR_KEYWORD]

    @functools.wraps(solver)
    def checked(*args, **options):
        for name in options:
            if name not in known:
                expected = ", ".join(known)
                raise TypeError(f"{solver.__name__}: expected arguments {expected}; got {name}{_hint(name, known)}")
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            expected = f"{', '.join(by_position)} by position and all others by keyword"
            raise TypeError(f"{solver.__name__}: expected {expected}; got {error}") from None
        return solver(*args, **options)

    return checked


def _hint(name: str, options: Sequence[str]) -> str:
    if name in _OTHER_NAMES:
        ours = _OTHER_NAMES[name]
        return f", which is called {'beta' if ours == 'reg' and 'beta' in options else ours} here"
    nearest = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def problem(
    cost, a, b, axis_name=None, *, any_mass: bool = False, name: str = "cost"
) -> tuple[jax.Array, jax.Array, jax.Array, str]:
    """The cost and both marginals as arrays of one floating dtype, and the name of the result's dtype.

    With `axis_name`, `cost` and `a` hold this device's rows. With `any_mass`, the total masses may differ. Errors call
    the matrix by `name`.

    The result's dtype is the promotion of the three dtypes, or float32 if that is not a floating dtype. Narrower
    dtypes are computed in float32.

    Raises:
        TypeError: if an argument is not numeric, or complex.
        ValueError: if a shape is wrong, a side is empty, a value is not finite, a weight is negative, or the total
            masses differ.
    """
    seen, cost = _numeric(name, cost)
    if cost.ndim != 2:
        raise ValueError(
            f"{name}: expected one matrix of shape [n, m], got shape {cost.shape}; for a batch, use jax.vmap(solver)"
        )
    if 0 in cost.shape:
        raise ValueError(f"{name}: expected at least one point on each side, got shape {cost.shape}")
    if seen is not None and not np.isfinite(seen).all():
        raise ValueError(
            f"{name}: expected finite values, got NaN or infinity"
            + ("; to exclude a point, give it any finite cost and a marginal of zero" if name == "cost" else "")
        )
    narrow = cost.dtype if jnp.issubdtype(cost.dtype, jnp.floating) else jnp.dtype(jnp.float32)
    weights = (a, b)
    mass_a, a = _marginal("a", a, cost, axis=0)
    mass_b, b = _marginal("b", b, cost, axis=1)
    # Masks and lists of numbers take no part in the promotion: they have no floating dtype of their own.
    listed = [isinstance(w, list | tuple) for w in weights]
    given = [w.dtype for w, no in zip((a, b), listed, strict=True) if w is not None and w.dtype != bool and not no]
    narrow = result_type(narrow, *given)
    dtype = result_type(narrow, jnp.float32)
    if axis_name is not None and a is not None and mass_a is not None and a.dtype != bool:
        mass_a *= _sharding.num_shards(axis_name)  # a concrete value is the same on all devices
    tolerance = mass_tolerance(*given)
    differ = mass_a is not None and mass_b is not None and abs(mass_a - mass_b) > tolerance * max(mass_a, mass_b)
    if differ and not any_mass:
        raise ValueError(f"b: expected the total mass of a, {mass_a:.6g}, got {mass_b:.6g}; divide each by its sum")
    a, b = _weights(a, cost.shape[0], dtype, axis_name), _weights(b, cost.shape[1], dtype)
    return cost.astype(dtype), a, b, str(narrow)


def _weights(given, size, dtype, axis_name=None):
    """The weights; uniform by default, and uniform over the points of a mask."""
    if given is None:
        return jnp.full(size, 1 / (size * _sharding.num_shards(axis_name)), dtype)
    if given.dtype == bool:
        return given.astype(dtype) / jnp.maximum(_sharding.total(given.sum(), axis_name), 1).astype(dtype)
    return given.astype(dtype)


def axis(name):
    """None, or the name or names of axes that are mapped where this is called."""
    try:
        if not (name is None or isinstance(name, str | tuple)):
            raise TypeError
        _sharding.check_axis(name)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"axis_name: expected the name of an axis mapped by an enclosing jax.shard_map or jax.pmap, got {name!r}"
        ) from None
    return name


def positive(name: str, value, dtype, *, or_infinite: bool = False) -> jax.Array:
    """A scalar above zero as an array of `dtype`, finite unless `or_infinite`; NaN if a traced value is not above zero.

    The NaN propagates through the solver to `Status.NOT_FINITE`, so that a wrong sign never gives a wrong plan
    silently.
    """
    seen, value = _scalar(name, value)
    if seen is not None and not (seen > 0 and (or_infinite or np.isfinite(seen))):
        raise ValueError(f"{name}: expected a {'' if or_infinite else 'finite '}number above 0, got {seen}")
    value = value.astype(dtype)
    is_good = (value > 0) if or_infinite else (value > 0) & (value < jnp.inf)
    return jnp.where(is_good, value, jnp.nan)


def prices(name: str, value) -> tuple[jax.Array, jax.Array]:
    """A number above zero, infinity included, or a pair of them; as a pair of arrays."""
    is_pair = isinstance(value, tuple | list)
    if (is_pair and len(value) != 2) or (not is_pair and jnp.ndim(value) != 0):
        got = f"{len(value)} numbers" if is_pair else f"an array of shape {jnp.shape(value)}"
        raise ValueError(f"{name}: expected a number, or a pair (rows, columns) of numbers; got {got}")
    # At first in the widest dtype, as the cost's is not known yet.
    dtype = result_type(float, *(x for x in (value if is_pair else [value]) if hasattr(x, "dtype")))
    if not is_pair:
        price = positive(name, value, dtype, or_infinite=True)
        return price, price
    rows, columns = (positive(f"{name}[{i}]", x, dtype, or_infinite=True) for i, x in enumerate(value))
    return rows, columns


def is_infinite(value) -> bool:
    """Whether a number is concrete and infinite."""
    return not isinstance(value, jax.core.Tracer) and bool(value == jnp.inf)


def mass_tolerance(*dtypes) -> float:
    """Largest relative difference between the total masses of weights of these dtypes; None for weights by default."""
    return max(_MASS_TOLERANCE.get(str(of), 0) for of in (*dtypes, "float32"))


def masses_differ(a, b, dtype: str) -> jax.Array:
    """Whether the total masses differ by more than the rounding of weights in a dtype."""
    return jnp.abs(a.sum() - b.sum()) > _MASS_TOLERANCE[dtype] * jnp.maximum(a.sum(), b.sum())


def threshold(value, dtype) -> jax.Array | None:
    """None, or a number of at least zero as an array of `dtype`."""
    return None if value is None else at_least_zero("threshold", value, dtype)


def at_least_zero(name: str, value, dtype) -> jax.Array:
    """A scalar that is not negative, as an array of `dtype`."""
    seen, value = _scalar(name, value)
    if seen is not None and not seen >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {seen}")
    return value.astype(dtype)


def count(name: str, value) -> int:
    """A number of iterations, known at compile time."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name}: expected an int that is known at compile time (static under jit), got {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if value >= 2**31:
        raise ValueError(f"{name}: expected less than 2^31, got {value}")
    return int(value)


def choice(name: str, value: _Name, options: Sequence[str]) -> _Name:
    """One of a few names. The error suggests a name for a typo, and for another library's name."""
    if value in options:
        return value
    expected = ", ".join(map(repr, options))
    raise ValueError(f"{name}: expected one of {expected}, got {value!r}{_hint(str(value), options)}")


def potentials(init, n: int, m: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Starting potentials (f, g), in units of the cost."""
    if not isinstance(init, tuple | list) or len(init) != 2:
        raise TypeError(f"init: expected a pair (f, g) of potentials, got {type(init).__name__}")
    checked = []
    for i, size in enumerate((n, m)):
        seen, value = _numeric(f"init[{i}]", init[i])
        if value.shape != (size,):
            raise ValueError(f"init[{i}]: expected shape ({size},) for a cost [{n}, {m}], got {value.shape}")
        if seen is not None and not np.isfinite(seen).all():
            raise ValueError(f"init[{i}]: expected finite potentials, got NaN or infinity")
        checked.append(value.astype(dtype))
    f, g = checked
    return f, g


def points(x, y) -> tuple[jax.Array, jax.Array]:
    """Two point clouds [n, d] and [m, d] as arrays of one floating dtype."""
    (_, x), (_, y) = _numeric("x", x), _numeric("y", y)
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2:
            raise ValueError(f"{name}: expected one point per row, shape [n, d], got shape {value.shape}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected as many columns as x, {x.shape[1]}, got {y.shape[1]}")
    dtype = result_type(x, y, jnp.float32)
    return x.astype(dtype), y.astype(dtype)


def _marginal(name: str, weights, cost: jax.Array, axis: int) -> tuple[float | None, jax.Array | None]:
    """The total mass (None for a tracer), and the weights or the mask (None for uniform weights)."""
    size = cost.shape[axis]
    if weights is None:
        return 1.0, None
    seen, weights = _numeric(name, weights, or_boolean=True)
    if weights.shape != (size,):
        raise ValueError(
            f"{name}: expected one weight per {('row', 'column')[axis]} of cost, shape ({size},), got {weights.shape}"
        )
    if seen is not None:
        seen = seen.astype(np.float64)
        good = np.isfinite(seen) & (seen >= 0)
        if not good.all():
            worst = int(np.argmin(good))
            raise ValueError(f"{name}: expected finite weights of at least 0, got {seen[worst]} at index {worst}")
        if seen.sum() == 0:
            raise ValueError(f"{name}: expected at least one positive weight, got zeros only")
        smallest = float(jnp.finfo(result_type(weights.dtype, jnp.float32)).tiny)
        if weights.dtype != bool and seen.max() < smallest:
            raise ValueError(f"{name}: expected weights of at least {smallest:.2g}, got at most {seen.max():.2g}")
    if weights.dtype == bool:
        return None if seen is None else 1.0, weights
    return None if seen is None else float(seen.sum()), weights


def _scalar(name: str, value) -> tuple[np.ndarray | None, jax.Array]:
    seen, value = _numeric(name, value)
    if value.ndim != 0:
        raise ValueError(f"{name}: expected a scalar, got shape {value.shape}; for a batch of them, use jax.vmap")
    return seen, value


def _numeric(name: str, value, or_boolean: bool = False) -> tuple[np.ndarray | None, jax.Array]:
    """The value as a NumPy array (None for a tracer), and as a JAX array.

    Checks use the NumPy array: inside `jit`, JAX's operations are traced even if their arguments are concrete.
    """
    try:
        seen = None if isinstance(value, jax.core.Tracer) else np.asarray(value)
        # 64-bit integers would wrap around if JAX's 64-bit types are disabled.
        is_wide = seen is not None and seen.dtype.kind in "iu" and seen.dtype.itemsize > 4
        array = jnp.asarray(np.asarray(value, np.float64) if is_wide and not jax.config.jax_enable_x64 else value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}") from error
    kinds = (jnp.floating, jnp.integer, jnp.bool_) if or_boolean else (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return seen, array
