"""A network as compiled programs take it: its arrays are their arguments, and nothing outlives the function that it is.

`jax.jit` keeps a function, with all that it captures, for as long as the process lives, and knows it again by its
identity alone. Attacks are called with functions of all kinds: `lambda x: model.apply(variables, x)`, an NNX module, a
bound method, a `Partial`. So each call traces the function once, which takes milliseconds, and takes the arrays out of
the trace. Programs are kept with the function and dropped with it; they are used again as long as the trace stays the
same, with the arrays of the latest one: a module that has been trained in the meantime compiles nothing, and its new
weights count.
"""

import functools
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fs_jax._utils import backend


@jax.tree_util.register_pytree_node_class
class Network:
    """A function from images to logits, or from images and keys, as a pytree of its arrays; made by `bind`.

    Inside `with network:` it can be called, also by programs that take it as an argument.
    """

    def __init__(self, kept: "_Kept", arrays: list[Any], current: "_Current | None" = None):
        self._kept, self._arrays, self._current = kept, arrays, current

    def __call__(self, *inputs):
        return self._kept.call(self._arrays, inputs)

    def __enter__(self):
        self._kept.enter(self._current)
        return self

    def __exit__(self, *_):
        self._kept.leave(self._current)

    @property
    def platform(self) -> str:
        """Where its programs run: "cpu", "gpu" or "tpu"."""
        return backend.platform_of(self._arrays)

    def compiled(self, program: Callable, **options: Any) -> Callable:
        """`jax.jit(program, **options)` for where it is, of which the compiled code is kept with this network."""
        return self._kept.compiled(program, {**options, "compiler_options": backend.compiler_options(self.platform)})

    def tree_flatten(self):
        return (self._arrays,), self._kept

    @classmethod
    def tree_unflatten(cls, kept, children):
        return cls(kept, *children)


def bind(logits_fn: Callable, *inputs: jax.ShapeDtypeStruct) -> Network | None:
    """The function as a `Network`, traced at inputs of these shapes; None if it captures what is being traced itself.

    Example:
      >>> weights = jnp.ones((4, 2))
      >>> images = jax.ShapeDtypeStruct((2, 2, 2, 1), jnp.float32)
      >>> with bind(lambda x: x.reshape(len(x), -1) @ weights, images) as network:
      ...   network(jnp.ones((1, 2, 2, 1))).tolist()
      [[4.0, 4.0]]
    """
    leaves, structure = jax.tree.flatten(logits_fn)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    own = [jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array]
    rest = [None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]

    def rebuilt(own):
        own = iter(own)
        return structure.unflatten([next(own) if a else leaf for a, leaf in zip(is_array, rest, strict=True)])

    trace = _trace(rebuilt, own, inputs)
    arrays = [*own, *trace.consts]
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return None
    text = re.sub(r" at 0x[0-9a-f]+", "", str(trace.jaxpr))
    arrays = [array if isinstance(array, jax.Array) else jnp.asarray(array) for array in arrays]
    return Network(_kept_with(logits_fn, text), arrays, _Current(rebuilt, len(own), trace.consts))


def on_network(program: Callable, logits_fn: Callable, images: Any, *arguments: Any, **static: Any) -> Any:
    """`program(logits_fn, images, *arguments, **static)`, compiled once for each network, shape and static argument.

    Where it is being traced already, in jit or under a transformation, it is simply called.

    Example:
      >>> double = lambda logits_fn, images: 2 * logits_fn(images)
      >>> on_network(double, lambda x: x.sum((1, 2, 3)), jnp.ones((1, 2, 2, 1))).tolist()
      [8.0]
    """
    given = jax.tree.leaves((images, arguments))
    network = None
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in given):
        network = bind(logits_fn, jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype))
    if network is None:
        return program(logits_fn, images, *arguments, **static)
    with network:
        return network.compiled(program, static_argnames=tuple(static))(network, images, *arguments, **static)


def hashable(function: Callable) -> Callable:
    """The function for a static argument: a `functools.partial` equals another one of the same function and arguments.

    Example:
      >>> hashable(functools.partial(jnp.sum, axis=0)) == hashable(functools.partial(jnp.sum, axis=0))
      True
    """
    if not isinstance(function, functools.partial):
        return function
    bound = _Bound(hashable(function.func), function.args, tuple(sorted(function.keywords.items())))
    try:
        hash(bound)
    except TypeError:  # an array among the arguments, say
        return function
    return bound


class _Bound(NamedTuple):
    function: Callable
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *more):
        return self.function(*self.arguments, *more, **dict(self.keywords))


class _Current:
    """A function during a call: how to make it of its own arrays, and the arrays that it captures."""

    def __init__(self, rebuilt, num_own, captured):
        self.rebuilt, self.num_own, self.captured = rebuilt, num_own, captured


class _Kept:
    """What is kept of a function between calls. It holds neither the function nor its arrays."""

    def __init__(self, text: str):
        self.text = text
        self.reusable = True
        self._programs: dict[Any, Callable] = {}
        self._calls: list[_Current] = []
        self._lock = threading.Lock()

    def enter(self, current):
        with self._lock:
            self._calls.append(current)

    def leave(self, current):
        with self._lock:
            self._calls.remove(current)

    def compiled(self, program, options):
        key = (program, *sorted((name, str(value)) for name, value in options.items()))
        if key not in self._programs:

            def of_this_network(*arguments, **keywords):  # jit shares what it compiles among those of one function
                return program(*arguments, **keywords)

            self._programs[key] = jax.jit(of_this_network, **options)
        return self._programs[key]

    def call(self, arrays, inputs):
        """The function at these inputs, with these in place of its own arrays and of those that it captured."""
        if not self._calls:
            raise RuntimeError("logits_fn: expected a call within `with network:`; it has ended.")
        current = self._calls[-1]
        own, captured = arrays[: current.num_own], arrays[current.num_own :]
        trace = _trace(current.rebuilt, own, inputs)
        known = len(trace.consts) == len(captured)
        consts = list(trace.consts)
        for place, const in enumerate(trace.consts):
            if known and _same(const, current.captured[place]):
                consts[place] = captured[place]
            else:  # It depends on the batch's size, so it stays in the program, which may not be used again.
                self.reusable = False
        (logits,) = jax.core.eval_jaxpr(trace.jaxpr, consts, *jax.tree.leaves((own, inputs)))
        return logits


_kept: dict[int, list[_Kept]] = {}
"""By the id of a function that is alive, what is kept of it: of each trace that it has had."""


def _kept_with(logits_fn, text):
    owner = logits_fn
    while isinstance(owner, (Partial, functools.partial)):
        owner = owner.func
    if hasattr(owner, "__self__") and hasattr(owner, "__func__"):  # a bound method is made anew with each access
        text = f"{owner.__func__.__qualname__}\n{text}"
        owner = owner.__self__
    try:
        if id(owner) not in _kept:
            weakref.finalize(owner, _kept.pop, id(owner), None).atexit = False
    except TypeError:  # no weak reference to it can be had
        return _Kept(text)
    of_owner = _kept.setdefault(id(owner), [])
    of_owner[:] = [kept for kept in of_owner if kept.reusable]
    for kept in of_owner:
        if kept.text == text:
            return kept
    of_owner.append(_Kept(text))
    return of_owner[-1]


def _trace(rebuilt, own, inputs):
    # A new function each time: JAX remembers a function's trace, and with it the arrays of that time.
    return jax.make_jaxpr(lambda own, *inputs: rebuilt(own)(*inputs))(own, *inputs)


def _same(one, other):
    if one is other:
        return True
    if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    if any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) for x in (one, other)):  # keys
        return False
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
