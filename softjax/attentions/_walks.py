"""Walks over the tiles: every block of queries, and for each the blocks of keys.

Only what is known of a tile from its bounds decides whether it is visited. A single tile
is visited without a loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._tiles import Grid
from softjax.attentions._operands import Floats, Place

Parts = tuple[Floats, ...]
Visit = Callable[..., Any]  # of (place, state, *parts): the new state


def only_tile(floats: Parts) -> Parts:
    """The operands of the one tile that there is."""
    first = lambda x: x if x is None else x[0]
    whole = lambda f: f._replace(
        queries=first(f.queries),
        keys=first(f.keys),
        values=first(f.values),
        bias=first(first(f.bias)),
    )
    return tuple(map(whole, floats))


def over_queries(
    grid: Grid, body: Callable[..., Any], floats: Parts, *rows: Any, remember: bool = True
) -> Any:
    """body(i, floats of block i, *rows of block i) for all i, stacked.

    Unless it may be remembered, each is found again for the derivative.
    """
    cut, rest = zip(*(f.by_query(grid) for f in floats), strict=True)

    def one(rest: Parts, i: Any, cut: Parts, rows: Any) -> Any:
        parts = tuple(a.join(b) for a, b in zip(cut, rest, strict=True))
        return body(i, parts, *rows)

    run = one if remember else jax.checkpoint(one, prevent_cse=False)
    if grid.queries.num_blocks == 1:
        first = jax.tree.map(lambda x: x[0], (cut, rows))
        return jax.tree.map(lambda x: x[None], run(rest, jnp.array(0, jnp.int32), *first))
    numbers = jnp.arange(grid.queries.num_blocks, dtype=jnp.int32)
    return lax.map(lambda xs: run(rest, *xs), (numbers, cut, rows))


def over_keys(grid: Grid, i: Any, visit: Visit, state: Any, kinds: Array, floats: Parts) -> Any:
    """The state after all blocks of keys, of which `kinds` says how each is to be visited."""
    cut, rest = zip(*(f.by_key(grid) for f in floats), strict=True)

    def step(state: Any, xs: Any) -> tuple[Any, None]:
        j, kind, cut = xs

        def branch(masked: bool) -> Callable[..., Any]:
            # (The checkpoint lies inside of the branch: what is skipped keeps nothing.)
            def run(state: Any, j: Any, cut: Parts, rest: Parts) -> Any:
                parts = tuple(a.join(b) for a, b in zip(cut, rest, strict=True))
                return visit(Place(i, j, masked), state, *parts)

            return run

        branches = [lambda state, *_: state, branch(True), branch(False)]
        return lax.switch(kind, branches, state, j, cut, rest), None

    numbers = jnp.arange(grid.keys.num_blocks, dtype=jnp.int32)
    return lax.scan(step, state, (numbers, kinds, cut))[0]
