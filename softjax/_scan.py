"""A loop over whole blocks of the first axis, and a shorter block at the end."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def scan_blocks(
    visit: Callable[[Any, Array, Any], tuple[Any, Any]], state: Any, arrays: Any, size: int
) -> tuple[Any, Any]:
    """`lax.scan` over blocks of the first axis: the last state, and all outputs joined.

    `visit(state, first, block)` gets the index of the block's first entry, and the block of
    every array; the last block may be smaller. Its outputs have one entry per entry of the
    block.
    """
    length = jax.tree.leaves(arrays)[0].shape[0]
    whole = length - length % size
    outs = []
    if whole == size:
        head = jax.tree.map(lambda x: x[:whole], arrays)
        state, out = visit(state, jnp.array(0), head)
        outs.append(out)
    elif whole:
        head = jax.tree.map(
            lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), arrays
        )
        step = lambda state, xs: visit(state, *xs)
        state, out = lax.scan(step, state, (jnp.arange(0, whole, size), head))
        outs.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out))
    if whole < length:
        tail = jax.tree.map(lambda x: x[whole:], arrays)
        state, out = visit(state, jnp.array(whole), tail)
        outs.append(out)
    if len(outs) < 2:
        return state, outs[0] if outs else None
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
