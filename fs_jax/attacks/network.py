"""A network as compiled programs take it: its arrays are their arguments, and nothing outlives the function that it is.

`jax.jit` keeps a function, with all that it captures, for as long as the process lives, and knows it again by its
identity alone: a module that was trained in the meantime would be attacked as it was. Attacks are called with functions
of all kinds: `lambda x: model.apply(variables, x)`, an NNX module, a bound method, a partial. So each call traces the
function anew, takes the arrays out of the trace, and lowers its programs; that takes a fraction of a second. Compiling,
which takes long, is skipped if the same lowered program was compiled before, whatever function it came from; compiled
programs hold no weights.
"""

import collections
import functools
import hashlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.tree_util import Partial

from fs_jax._utils import backend


class Network:
    """A function from images to logits, or from images and keys, and its programs; made by `bind`."""

    def __init__(self, rebuilt: Callable, own: list[jax.Array], captured: list[Any], trusted: Any):
        self._rebuilt, self._num_own, self._captured = rebuilt, len(own), captured
        self.arrays = [*own, *(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in captured)]
        """All that it holds and captures."""
        self._programs = {} if trusted is None else _programs_of(trusted)

    def __call__(self, *inputs):
        return self._at(self.arrays)(*inputs)

    @property
    def platform(self) -> str:
        """Where its programs run: "cpu", "gpu" or "tpu"."""
        return backend.platform_of(self.arrays)

    def compiled(self, program: Callable, *, donate: bool = False, **static: Any) -> Callable:
        """`program(network, *arguments, **static)`, compiled, as a function of the arguments: pytrees of arrays.

        `donate` gives up the buffers of the first argument.
        """

        def run(*arguments):
            first, structure_of_first = jax.tree.flatten(arguments[:1])
            rest, structure = jax.tree.flatten(arguments[1:])
            shapes = tuple((jnp.shape(x), jax.dtypes.result_type(x), _weak(x)) for x in (*first, *rest))
            key = (program, donate, tuple(static.items()), structure_of_first, structure, shapes, _settings())
            if key not in self._programs:

                def flat(arrays, first, rest):
                    arguments = (*structure_of_first.unflatten(first), *structure.unflatten(rest))
                    return program(self._at(arrays), *arguments, **static)

                options = backend.compiler_options(self.platform)
                # Unused arguments too, so that equal programs take equal arguments.
                jitted = jax.jit(flat, donate_argnums=1 if donate else (), keep_unused=True)
                lowered = jitted.lower(self.arrays, first, rest)
                self._programs[key] = _compiled(lowered, options, self.arrays)
            return self._programs[key](self.arrays, first, rest)

        return run

    def _at(self, arrays):
        """The function with these in place of its own arrays and of those that it captured."""

        def logits(*inputs):
            own, captured = arrays[: self._num_own], arrays[self._num_own :]
            trace = _trace(self._rebuilt, own, inputs)
            consts = list(_constants(trace))
            if len(consts) == len(self._captured):
                # By position; but not what depends on the batch's size, which stays in the program.
                pairs = zip(consts, self._captured, captured, strict=True)
                consts = [new if _same(const, old) else const for const, old, new in pairs]
            (out,) = _evaluated(trace, iter(consts), jax.tree.leaves((own, inputs)))
            return out

        return logits


def bind(logits_fn: Callable, *inputs: jax.ShapeDtypeStruct) -> Network | None:
    """The function as a `Network`, traced at inputs of these shapes; None if it captures what is being traced itself.

    Example:
      >>> weights = jnp.ones((4, 2))
      >>> images = jax.ShapeDtypeStruct((2, 2, 2, 1), jnp.float32)
      >>> network = bind(lambda x: x.reshape(len(x), -1) @ weights, images)
      >>> network(jnp.ones((1, 2, 2, 1))).tolist(), len(network.arrays)
      ([[4.0, 4.0]], 1)
    """
    function, trusted = _opened(logits_fn)
    leaves, structure = jax.tree.flatten(function)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    own = [jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array]
    rest = [None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]

    def rebuilt(own):
        own = iter(own)
        return structure.unflatten([next(own) if a else leaf for a, leaf in zip(is_array, rest, strict=True)])

    captured = list(_constants(_trace(rebuilt, own, inputs)))
    if any(isinstance(array, jax.core.Tracer) for array in (*own, *captured)):
        return None
    if trusted:
        trusted = (structure, tuple(rest), tuple((x.shape, x.dtype) for x in own), tuple(map(_described, inputs)))
    return Network(rebuilt, own, captured, trusted if trusted and _hashable(trusted) else None)


def on_network(program: Callable, logits_fn: Callable, images: Any, *arguments: Any, **static: Any) -> Any:
    """`program(logits_fn, images, *arguments, **static)`, compiled once for each network, shape and static argument.

    Where it is being traced already, in jit or under a transformation, it is simply called.

    Example:
      >>> double = lambda logits_fn, images: 2 * logits_fn(images)
      >>> on_network(double, lambda x: x.sum((1, 2, 3)), jnp.ones((1, 2, 2, 1))).tolist()
      [8.0]
    """
    network = None
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((images, arguments))):
        network = bind(logits_fn, jax.ShapeDtypeStruct(images.shape, images.dtype))
    if network is None:
        return program(logits_fn, images, *arguments, **static)
    return network.compiled(program, **static)(images, *arguments)


def hashable(function: Callable) -> Callable:
    """The function for a static argument: a `functools.partial` equals another one of the same function and arguments.

    Example:
      >>> hashable(functools.partial(jnp.sum, axis=0)) == hashable(functools.partial(jnp.sum, axis=0))
      True
    """
    if not isinstance(function, functools.partial):
        return function
    bound = _Bound(hashable(function.func), function.args, tuple(sorted(function.keywords.items())))
    # A cast, because mypy doesn't see that a NamedTuple can be called.
    return cast(Callable, bound) if _hashable(bound) else function


class _Bound(NamedTuple):
    function: Callable
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *more):
        return self.function(*self.arguments, *more, **dict(self.keywords))


def _opened(logits_fn):
    """A partial as a pytree of what it binds; and whether it is of a function that can do nothing but what it is given.

    Such a function has no closure and no state, so that its programs are known by its identity, as to `jax.jit`.
    """
    if not isinstance(logits_fn, functools.partial):  # JAX's Partial is one too
        return logits_fn, False
    inner, trusted = _opened(logits_fn.func)
    if inner is logits_fn.func:
        trusted = isinstance(inner, types.FunctionType) and inner.__closure__ is None and "<" not in inner.__qualname__
    return Partial(inner, *logits_fn.args, **logits_fn.keywords), trusted


def _trace(rebuilt, own, inputs) -> ClosedJaxpr:
    # A new function each time: JAX remembers a function's trace, and with it the arrays of that time.
    return jax.make_jaxpr(lambda own, *inputs: rebuilt(own)(*inputs))(own, *inputs)


def _is_jit(equation):
    return equation.primitive.name in ("pjit", "jit") and isinstance(equation.params.get("jaxpr"), ClosedJaxpr)


def _constants(trace: ClosedJaxpr) -> Iterator[Any]:
    """The arrays that a trace captures, and those that jitted functions in it have captured."""
    yield from trace.consts
    for equation in trace.jaxpr.eqns:
        if _is_jit(equation):
            yield from _constants(equation.params["jaxpr"])


def _evaluated(trace: ClosedJaxpr, constants: Iterator[Any], arguments: list[Any]) -> list[Any]:
    """What a trace computes with these constants, in the order of `_constants`."""
    if not any(map(_is_jit, trace.jaxpr.eqns)):
        return jax.core.eval_jaxpr(trace.jaxpr, [next(constants) for _ in trace.consts], *arguments)
    values = dict(zip(trace.jaxpr.constvars, (next(constants) for _ in trace.consts), strict=True))
    values.update(zip(trace.jaxpr.invars, arguments, strict=True))

    def value(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in trace.jaxpr.eqns:
        given = [value(variable) for variable in equation.invars]
        if _is_jit(equation):
            results = _evaluated(equation.params["jaxpr"], constants, given)
        else:
            with equation.ctx.manager:
                results = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in trace.jaxpr.outvars]


def _same(one, other):
    if one is other:
        return True
    if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    if any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) for x in (one, other)):  # keys
        return False
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def _weak(value):
    return bool(getattr(value, "weak_type", isinstance(value, (int, float))))


def _described(struct):
    return tuple(struct.shape), struct.dtype


def _hashable(value):
    try:
        hash(value)
    except TypeError:  # an array in it, say
        return False
    return True


def _settings():
    """What the tracing depends on besides."""
    config = jax.config
    return (
        config.jax_enable_x64, config.jax_default_matmul_precision, config.jax_numpy_dtype_promotion,
        config.jax_debug_nans, str(config.jax_default_device),
    )  # fmt: skip


_LEAST_RECENT = 128
_executables: collections.OrderedDict[Any, Any] = collections.OrderedDict()
"""Compiled programs by what was lowered. They hold no arrays but those that a program has of its own."""
_trusted: collections.OrderedDict[Any, dict[Any, Any]] = collections.OrderedDict()
"""By what is bound to a function that can be trusted, its programs."""
_lock = threading.Lock()


def _kept(store, key, make, most):
    """What the store has under the key, or else what `make` gives; the least recently used are dropped."""
    with _lock:
        if key in store:
            store.move_to_end(key)
            return store[key]
    made = make()
    with _lock:
        store[key] = made
        while len(store) > most:
            store.popitem(last=False)
    return made


def _programs_of(trusted):
    return _kept(_trusted, trusted, dict, 16)


def _compiled(lowered, options, arrays):
    text = lowered.as_text()
    if "callback" in text:  # a Python function goes with it, which must not be kept alive
        return lowered.compile(compiler_options=options)
    devices = tuple(str(array.sharding) for array in arrays)
    key = (hashlib.sha256(text.encode()).digest(), str(options), devices, _settings())
    return _kept(_executables, key, lambda: lowered.compile(compiler_options=options), _LEAST_RECENT)
