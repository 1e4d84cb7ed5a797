"""A network for compiled programs: its arrays are arguments of the programs, so that they keep no weights in memory.

`jax.jit` keeps a function, and everything that it captures, until the process ends, and recognises a function by its
identity alone: a module that you train between two calls would be attacked with its old weights. Attacks are called
with functions of all kinds: `lambda x: model.apply(variables, x)`, an NNX module, a bound method, a partial. So each
call traces the function again, takes the arrays out of the trace, and lowers its programs, which takes a fraction of a
second. Compilation takes much longer; it is skipped if the same lowered program was compiled before, even for another
function. Compiled programs hold no weights.
"""

import collections
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.tree_util import Partial

from fs_jax._utils import backend


class Network:
    """A function from images (or from images and keys) to logits, with its compiled programs; made by `bind`."""

    def __init__(self, rebuilt: Callable, own: list[jax.Array], captured: list[Any]):
        self._rebuilt, self._num_own, self._captured = rebuilt, len(own), captured
        self.arrays = [*own, *(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in captured)]
        """All arrays that the function holds or captures."""
        self._programs: dict[Any, Any] = {}

    def __call__(self, *inputs):
        return self._at(self.arrays)(*inputs)

    @property
    def platform(self) -> str:
        """The platform that the programs run on: "cpu", "gpu" or "tpu"."""
        return backend.platform_of(self.arrays)

    def compiled(self, program: Callable, *, donate: bool = False, **static: Any) -> Callable:
        """`program(network, *arguments, **static)` as a compiled function of `arguments`, which are pytrees of arrays.

        With `donate`, the buffers of the first argument are donated.
        """

        def run(*arguments):
            first, structure_of_first = jax.tree.flatten(arguments[:1])
            rest, structure = jax.tree.flatten(arguments[1:])
            kinds = tuple((jnp.shape(x), jax.dtypes.result_type(x), _weak(x), _placed(x)) for x in (*first, *rest))
            key = (program, donate, tuple(static.items()), structure_of_first, structure, kinds, _settings())
            if key not in self._programs:

                def flat(arrays, first, rest):
                    arguments = (*structure_of_first.unflatten(first), *structure.unflatten(rest))
                    return program(self._at(arrays), *arguments, **static)

                options = backend.compiler_options(self.platform)
                # Unused arguments are kept, so that equal programs take equal arguments.
                jitted = jax.jit(flat, donate_argnums=1 if donate else (), keep_unused=True)
                lowered = jitted.lower(self.arrays, first, rest)
                self._programs[key] = _compiled(lowered, options, [*self.arrays, *first, *rest])
            return self._programs[key](self.arrays, first, rest)

        return run

    def _at(self, arrays):
        """The function with these arrays in place of those that it holds and captures."""

        def logits(*inputs):
            own, captured = arrays[: self._num_own], arrays[self._num_own :]
            trace = _trace(self._rebuilt, own, inputs)
            consts = list(_constants(trace))
            if len(consts) == len(self._captured):
                # Matched by position. Constants that depend on the batch size stay in the program.
                pairs = zip(consts, self._captured, captured, strict=True)
                consts = [new if _same(const, old) else const for const, old, new in pairs]
            (out,) = _evaluated(trace, iter(consts), jax.tree.leaves((own, inputs)))
            return out

        return logits


def bind(logits_fn: Callable, *inputs: jax.ShapeDtypeStruct) -> Network | None:
    """Trace a function at inputs of these shapes and make it a `Network`; None if it captures values that are traced.

    Example:
      >>> weights = jnp.ones((4, 2))
      >>> images = jax.ShapeDtypeStruct((2, 2, 2, 1), jnp.float32)
      >>> network = bind(lambda x: x.reshape(len(x), -1) @ weights, images)
      >>> network(jnp.ones((1, 2, 2, 1))).tolist(), len(network.arrays)
      ([[4.0, 4.0]], 1)
    """
    leaves, structure = jax.tree.flatten(_opened(logits_fn))
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    own = [jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array]
    rest = [None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]

    def rebuilt(own):
        own = iter(own)
        return structure.unflatten([next(own) if a else leaf for a, leaf in zip(is_array, rest, strict=True)])

    captured = list(_constants(_trace(rebuilt, own, inputs)))
    if any(isinstance(array, jax.core.Tracer) for array in (*own, *captured)):
        return None
    return Network(rebuilt, own, captured)


def on_network(program: Callable, logits_fn: Callable, images: Any, *arguments: Any, **static: Any) -> Any:
    """`program(logits_fn, images, *arguments, **static)`, compiled once for each network, shape and static argument.

    Inside `jit` or another transformation the program is called without compiling it separately.

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


def _opened(logits_fn):
    """A partial as a pytree of its bound arguments; any other function as it is."""
    if not isinstance(logits_fn, functools.partial):  # JAX's Partial is one too
        return logits_fn
    return Partial(_opened(logits_fn.func), *logits_fn.args, **logits_fn.keywords)


def _trace(rebuilt, own, inputs) -> ClosedJaxpr:
    # A new function each time, because JAX caches the trace of a function, with the arrays that it had then.
    return jax.make_jaxpr(lambda own, *inputs: rebuilt(own)(*inputs))(own, *inputs)


def _is_jit(equation):
    return equation.primitive.name in ("pjit", "jit") and isinstance(equation.params.get("jaxpr"), ClosedJaxpr)


def _constants(trace: ClosedJaxpr) -> Iterator[Any]:
    """The arrays that a trace captures, and those that jitted functions in it capture."""
    yield from trace.consts
    for equation in trace.jaxpr.eqns:
        if _is_jit(equation):
            yield from _constants(equation.params["jaxpr"])


def _evaluated(trace: ClosedJaxpr, constants: Iterator[Any], arguments: list[Any]) -> list[Any]:
    """The outputs of a trace with these constants, which are in the order of `_constants`."""
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


def _placed(value):
    """Where an array is: its sharding over several devices, or its device. Others go to the default device."""
    if not isinstance(value, jax.Array):
        return jax.config.jax_default_device or jax.local_devices()[0]
    devices = value.devices()
    return value.sharding if len(devices) > 1 else next(iter(devices))


def _settings():
    """The settings of JAX that tracing depends on."""
    config = jax.config
    return (
        config.jax_enable_x64, config.jax_default_matmul_precision, config.jax_numpy_dtype_promotion,
        config.jax_debug_nans, str(config.jax_default_device),
    )  # fmt: skip


_LEAST_RECENT = 128
_executables: collections.OrderedDict[Any, Any] = collections.OrderedDict()
"""Compiled programs by a hash of the lowered program. They hold no arrays except a program's own constants."""
_lock = threading.Lock()


def _compiled(lowered, options, arguments):
    """The compiled program, or one that was compiled before for an equal program and arguments in the same places."""
    text = lowered.as_text()
    if "callback" in text:  # the program refers to a Python function, which must not be kept alive
        return lowered.compile(compiler_options=options)
    # The types of the results, such as the NamedTuples of an attack's state, are not in the text.
    key = (
        hashlib.sha256(text.encode()).digest(), lowered.out_tree, str(options), tuple(map(_placed, arguments)),
        _settings(),
    )  # fmt: skip
    with _lock:
        if key in _executables:
            _executables.move_to_end(key)
            return _executables[key]
    compiled = lowered.compile(compiler_options=options)
    with _lock:
        _executables[key] = compiled
        while len(_executables) > _LEAST_RECENT:
            _executables.popitem(last=False)
    return compiled
