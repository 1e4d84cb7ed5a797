"""How `jax.vmap` computes a batch of problems."""

from collections.abc import Callable

import jax
from jax import lax
from jax.custom_batching import custom_vmap

# Size of a core's cache. The matrices of a larger batch would be read from main memory in every iteration.
CACHE = 2**20  # bytes


def in_chunks(function: Callable) -> Callable:
    """Wraps a function of one problem so that `vmap` processes a batch in chunks. Its first argument is the matrix.

    On a CPU, the matrices of a chunk fit in the cache together. On other platforms, the chunk is the whole batch.
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
        is_known = isinstance(size, int) and isinstance(matrix.size, int)  # unknown in an export for any size
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
    """Problems per chunk: as many as fit, or a somewhat smaller divisor (a remainder would need a second program)."""
    most = max(1, min(size, CACHE // matrix_bytes))
    divisor = max(d for d in range(1, most + 1) if size % d == 0)
    return divisor if 2 * divisor >= most else most
