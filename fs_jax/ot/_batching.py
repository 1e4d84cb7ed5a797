"""How a batch of problems is computed when `jax.vmap` makes one of a function of one."""

from collections.abc import Callable

import jax
from jax import lax
from jax.custom_batching import custom_vmap

# What a core keeps close to itself: of a larger batch the matrices would come from memory in every iteration.
CACHE = 2**20  # bytes


def in_chunks(function: Callable) -> Callable:
    """The same function of a problem, whose first argument is its matrix; a batch of them is done piece by piece.

    On a CPU `vmap` takes as many problems at a time as have their matrices in the cache. Elsewhere it takes all.
    """
    chunked = custom_vmap(function)

    @chunked.def_vmap
    def rule(size, in_batched, *args):
        leaves, tree = jax.tree.flatten(args)
        is_batched = jax.tree.leaves(in_batched)

        def one(batched):
            batched = iter(batched)
            return function(*tree.unflatten(next(batched) if b else x for x, b in zip(leaves, is_batched, strict=True)))

        batched = [x for x, b in zip(leaves, is_batched, strict=True) if b]
        matrix = args[0][0] if in_batched[0] else args[0]
        is_known = isinstance(size, int) and isinstance(matrix.size, int)  # not where a program is exported for any
        chunk = _chunk(size, matrix.size * matrix.dtype.itemsize) if is_known else size
        if chunk == size:
            results = jax.vmap(one)(batched)
        else:
            results = lax.platform_dependent(
                batched, cpu=lambda batched: lax.map(one, batched, batch_size=chunk), default=jax.vmap(one)
            )
        return results, jax.tree.map(lambda _: True, results)

    return chunked


def _chunk(size: int, matrix_bytes: int) -> int:
    """Problems at a time: those that fit, or somewhat fewer that divide the batch (a remainder is a second program)."""
    most = max(1, min(size, CACHE // matrix_bytes))
    divisor = max(d for d in range(1, most + 1) if size % d == 0)
    return divisor if 2 * divisor >= most else most
