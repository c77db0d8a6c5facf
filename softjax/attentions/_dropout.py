"""Dropout whose bits are computed again for the derivative, and never stored.

Random words and the place of a weight (sequence, head, query and key, in the order of memory)
decide alone whether it is dropped, so that the size of the tiles does not matter.
"""

from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softjax._tiles import Grid


def words_of(key: Array) -> Array:
    """Two random words from a key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_weight(
    words: Array, rate: Array, grid: Grid, i: Any, j: Any, dtype: DTypeLike
) -> Array:
    """0 where dropped, else 1 / (1 - rate), for the `[batch, head, query, key]` of a tile."""
    as_words = lambda x: x.astype(jnp.uint32)
    sequence = jnp.arange(grid.rows * grid.heads, dtype=jnp.uint32)
    sequence = sequence.reshape(grid.rows, grid.heads, 1, 1)
    query = as_words(grid.queries.order(i))[None, None, :, None]
    key = as_words(grid.keys.order(j))[None, None, None, :]
    shape = (grid.rows, grid.heads, grid.queries.block, grid.keys.block)
    # Each sequence and head has its own key, and each of its weights its own counter.
    counts = jnp.concatenate([sequence.reshape(-1), jnp.zeros_like(sequence).reshape(-1)])
    first, second = jnp.split(jex.random.threefry_2x32(words, counts), 2)
    return _kept(first, second, query, key, shape, rate, dtype)


def _kept(
    first: Array, second: Array, query: Array, key: Array, shape: Any, rate: Array, dtype: Any
) -> Array:
    spread = lambda x: jnp.broadcast_to(x, shape)
    by_head = lambda x: spread(x.reshape(shape[0], shape[1], 1, 1))
    bits, _ = jex.random.threefry2x32_p.bind(
        by_head(first), by_head(second), spread(query), spread(key)
    )
    uniform = (bits >> 8).astype(dtype) * 2.0**-24
    kept = uniform >= rate
    # A rate out of its range is NaN, which 0 * rate passes on.
    return jnp.where(kept, 1 / jnp.where(rate < 1, 1 - rate, 1), 0 * rate)
