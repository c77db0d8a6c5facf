"""Loops over the tiles: every block of queries, and for each the blocks of keys.

The bounds of a tile alone decide whether it is visited. A single tile needs no loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._mesh import replicated_axes
from softjax._tiles import Grid
from softjax.attentions._operands import DiffOperands, TileIndex

Operands = tuple[DiffOperands, ...]
Visit = Callable[..., Any]  # of a `TileIndex`, and more


def only_tile(operands: Operands) -> Operands:
    """The operands of the one tile that there is."""
    first = lambda x: x if x is None else x[0]
    whole = lambda f: f._replace(
        queries=first(f.queries),
        keys=first(f.keys),
        values=first(f.values),
        bias=first(first(f.bias)),
    )
    return tuple(map(whole, operands))


def map_query_blocks(
    grid: Grid, body: Callable[..., Any], operands: Operands, *rows: Any, remember: bool = True
) -> Any:
    """body(i, operands of block i, *rows of block i) for all i, stacked.

    Without `remember`, the derivative computes each of them again.
    """
    cut, rest = zip(*(f.by_query(grid) for f in operands), strict=True)

    def one(rest: Operands, i: Any, cut: Operands, rows: Any) -> Any:
        parts = tuple(a.join(b) for a, b in zip(cut, rest, strict=True))
        return body(i, parts, *rows)

    run = one if remember else jax.checkpoint(one, prevent_cse=False)
    if grid.queries.num_blocks == 1:
        first = jax.tree.map(lambda x: x[0], (cut, rows))
        return jax.tree.map(lambda x: x[None], run(rest, jnp.array(0, jnp.int32), *first))
    numbers = jnp.arange(grid.queries.num_blocks, dtype=jnp.int32)
    return lax.map(lambda xs: run(rest, *xs), (numbers, cut, rows))


@jax.custom_batching.custom_vmap
def _shared(kinds: Array) -> Array:
    """The kinds of tiles, made the same for a whole batch under `vmap`.

    If they differed within a batch, `vmap` would turn every branch into a select, which skips
    nothing and has no transpose.
    """
    return kinds


@_shared.def_vmap
def _shared_by_batch(
    axis_size: int, in_batched: list[bool], kinds: Array
) -> tuple[Array, bool]:
    del axis_size
    if in_batched[0]:
        low, high = jnp.min(kinds, 0), jnp.max(kinds, 0)
        kinds = jnp.where(low == high, low, 1)
    return _shared(kinds), False


def _agreed(kinds: Array, operands: Operands) -> Array:
    """The kinds of tiles, made the same on all devices that share an array.

    Reverse mode sums the cotangents of a replicated array over the devices, inside the branch,
    and hangs if only some devices take it. Only arrays that a function captures can still be
    replicated here, because all others were made to vary before.
    """
    axes = replicated_axes(kinds, operands)
    if not axes:
        return kinds
    low, high = lax.pmin(kinds, axes), lax.pmax(kinds, axes)
    return jnp.where(low == high, low, 1)


def scan_key_blocks(
    grid: Grid, i: Any, visit: Visit, state: Any, kinds: Array, operands: DiffOperands
) -> Any:
    """The state after the blocks of keys whose tiles are not empty.

    A block is sliced inside the branch, so that an empty tile costs nothing. This is not for
    reverse mode, where each slice would become a whole array: `sum_over_keys` is.
    """
    cut, rest = operands.by_key(grid)

    def step(state: Any, xs: Any) -> tuple[Any, None]:
        j, kind = xs

        def branch(kind: int) -> Callable[[Any], Any]:
            def run(state: Any) -> Any:
                here = lambda x: lax.dynamic_index_in_dim(x, j, 0, keepdims=False)
                part = jax.tree.map(here, cut).join(rest)
                return visit(TileIndex(i, j, kind), state, part)

            return run

        return lax.switch(kind, [lambda state: state, branch(1), branch(2)], state), None

    numbers = jnp.arange(grid.keys.num_blocks, dtype=jnp.int32)
    return lax.scan(step, state, (numbers, _shared(kinds)))[0]


def sum_over_keys(
    grid: Grid, i: Any, term: Visit, start: Any, kinds: Array, operands: Operands, *rows: Any
) -> Any:
    """The sum of the start and of the terms of all tiles that are not empty.

    The derivative computes each term again.
    """
    cut, rest = zip(*(f.by_key(grid) for f in operands), strict=True)

    def step(total: Any, xs: Any) -> tuple[Any, None]:
        j, kind, cut = xs

        # The checkpoint is inside the branch, so that a skipped tile stores nothing. There is
        # one such branch only, because each stores its own copy of its operands.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def live(cut: Operands, rest: Operands, rows: Any) -> Any:
            parts = tuple(a.join(b) for a, b in zip(cut, rest, strict=True))
            return term(TileIndex(i, j, kind), *parts, *rows)

        def add(total: Any, cut: Operands, rest: Operands, rows: Any) -> Any:
            return jax.tree.map(jnp.add, total, live(cut, rest, rows))

        return lax.cond(kind > 0, add, lambda total, *_: total, total, cut, rest, rows), None

    numbers = jnp.arange(grid.keys.num_blocks, dtype=jnp.int32)
    return lax.scan(step, start, (numbers, _shared(_agreed(kinds, operands)), cut))[0]
