"""Tiles: where blocks of queries meet blocks of keys.

Attention forms its scores tile by tile, and never all of them. A `Grid` holds the tiles: how
the tokens of either side are cut into blocks, and at which positions they stand, which need
not be their order in memory.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._inputs import to_integers

FARTHEST = 2**31 - 2  # Positions and distances beyond it are taken for it.


class ScoreIndex(NamedTuple):
    """The places of a tile's scores: int32, broadcastable to `[batch, head, query, key]`."""

    batch: Array
    head: Array
    query: Array  # positions
    key: Array  # positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """The tokens of one side, queries or keys, in blocks; the last may be short."""

    size: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    positions: Array | None = None  # [batch or 1, size]; None: 0, 1, 2, ...

    @property
    def num_blocks(self) -> int:
        return max(1, -(-self.size // self.block))

    @property
    def padding(self) -> int:
        """How many tokens the last block lacks."""
        return self.num_blocks * self.block - self.size

    def take(self, x: Array, number: Any, axis: int = -1) -> Array:
        """Block `number` of x along the axis of the tokens; where it lacks some, any others."""
        if self.num_blocks == 1 and not self.padding:
            return x
        if not self.padding:
            return lax.dynamic_slice_in_dim(x, number * self.block, self.block, axis)
        return jnp.take(x, self.order(number), axis, mode="clip")

    def order(self, number: Any) -> Array:
        """The order in memory of the tokens of a block."""
        return number * self.block + jnp.arange(self.block, dtype=jnp.int32)

    def places(self, number: Any) -> Array:
        """The positions of the tokens of a block, `[batch or 1, block]`."""
        if self.positions is None:
            return self.order(number)[None]
        return self.take(self.positions, number)

    def extent(self, x: Array | None = None) -> tuple[Array, Array]:
        """Least and largest of each block of x, or of positions: `[batch or 1, blocks]`."""
        x = self.positions if x is None else x
        if x is None:
            low = jnp.arange(self.num_blocks, dtype=jnp.int32)[None] * self.block
            return low, jnp.minimum(low + self.block, self.size) - 1
        cut = self.cut(x, 1, mode="edge")
        return jnp.min(cut, 2).T, jnp.max(cut, 2).T

    def cut(self, x: Array, axis: int, mode: str = "constant") -> Array:
        """All blocks of x, on a new first axis."""
        if self.padding:
            widths = [(0, self.padding if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths, mode=mode)
        x = x.reshape(*x.shape[:axis], self.num_blocks, self.block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def join(self, blocks: Array, axis: int) -> Array:
        """What `cut` was given, from the blocks."""
        x = jnp.moveaxis(blocks, 0, axis)
        x = x.reshape(*x.shape[:axis], self.num_blocks * self.block, *x.shape[axis + 2 :])
        return lax.slice_in_dim(x, 0, self.size, axis=axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """All tiles of an attention over `[batch, heads, queries, keys]`."""

    batch: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    heads: int = dataclasses.field(metadata={"static": True})
    queries: Side
    keys: Side

    @property
    def empty(self) -> bool:
        """Whether there is no score at all."""
        return 0 in (self.rows, self.heads, self.queries.size, self.keys.size)

    @property
    def rows(self) -> int:
        """How many sequences there are: all axes of the batch in one."""
        return math.prod(self.batch)

    def index(self, i: Any, j: Any) -> ScoreIndex:
        """The places of the scores where query block i meets key block j."""
        return ScoreIndex(
            jnp.arange(self.rows, dtype=jnp.int32)[:, None, None, None],
            jnp.arange(self.heads, dtype=jnp.int32)[None, :, None, None],
            self.queries.places(i)[:, None, :, None],
            self.keys.places(j)[:, None, None, :],
        )


class Tile(NamedTuple):
    """One tile, as masks see it."""

    grid: Grid
    i: Any  # the block of queries
    j: Any  # the block of keys
    places: ScoreIndex

    def queries(self, x: Array, axis: int = -1) -> Array:
        """The part that belongs to this tile of an array over all queries along `axis`."""
        return self.grid.queries.take(x, self.i, axis)

    def keys(self, x: Array, axis: int = -1) -> Array:
        """The part that belongs to this tile of an array over all keys along `axis`."""
        return self.grid.keys.take(x, self.j, axis)


class Bounds(NamedTuple):
    """Least and largest of all blocks, as they meet: `[batch or 1, 1, i, 1]`, `[..., 1, j]`."""

    query_low: Array
    query_high: Array
    key_low: Array
    key_high: Array


def meet(queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Bounds:
    """The extents of both sides, over the tiles."""
    query_low, query_high = (x[:, None, :, None] for x in queries)
    key_low, key_high = (x[:, None, None, :] for x in keys)
    return Bounds(query_low, query_high, key_low, key_high)


def positions_met(grid: Grid) -> Bounds:
    """The least and largest positions of every tile."""
    return meet(grid.queries.extent(), grid.keys.extent())


def shift_positions(places: Array, by: Array) -> Array:
    """The sum, clipped to the ends of int32, where no position lies."""
    there = places + by
    ends = jnp.iinfo(there.dtype)
    around = (there < places) != (by < 0)
    return jnp.where(around, jnp.where(by < 0, ends.min, ends.max), there)


def grid_of(
    batch: tuple[int, ...],
    heads: int,
    num_queries: int,
    num_keys: int,
    *,
    blocks: tuple[int, int] | None = None,
    positions: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
) -> Grid:
    """The tiles for these sizes; one tile of all if no blocks are given."""
    query_block, key_block = blocks or (max(1, num_queries), max(1, num_keys))
    sides = Side(num_queries, query_block), Side(num_keys, key_block)
    placed = [
        side
        if at is None
        else dataclasses.replace(side, positions=per_token(at, batch, side, "positions"))
        for side, at in zip(sides, positions, strict=True)
    ]
    return Grid(batch, heads, *placed)


def per_score(x: Array, grid: Grid, name: str) -> Array:
    """An array that broadcasts to `[*batch, N, T, S]`, as `[batch or 1, N or 1, ...]`."""
    shape = (*grid.batch, grid.heads, grid.queries.size, grid.keys.size)
    full = (1,) * (len(shape) - x.ndim) + x.shape
    if len(full) != len(shape) or any(
        n not in (1, m) for n, m in zip(full, shape, strict=True)
    ):
        per_key = x.ndim > 1 and x.shape == (*grid.batch, grid.keys.size)
        hint = f" (One entry per key is `{name}[..., None, None, :]`.)" if per_key else ""
        if x.ndim > 2 and x.shape == (*grid.batch, *shape[-2:]):
            wanted = (*grid.batch, 1, *shape[-2:])
            hint = f" (One array per sequence is `{name}[..., None, :, :]`, {wanted}.)"
        raise ValueError(
            f"`{name}` of shape {x.shape} does not broadcast to [..., N, T, S], {shape}.{hint}"
        )
    if x.ndim == 3 and x.shape[0] == grid.heads > 1 and grid.heads in grid.batch:
        raise ValueError(
            f"`{name}` of shape {x.shape} may be per head or per sequence, of which there are"
            f" {grid.heads} each: give it the shape {(1, *x.shape)} or"
            f" {(x.shape[0], 1, *x.shape[1:])}."
        )
    rest = full[-3:]
    if all(n == 1 for n in full[:-3]):
        return x.reshape(1, *rest)
    return jnp.broadcast_to(x.reshape(full), (*grid.batch, *rest)).reshape(grid.rows, *rest)


def per_sequence(x: ArrayLike, grid: Grid, name: str) -> Array:
    """One int per sequence, `[batch or 1, 1, 1, 1]`."""
    x = _clipped_integers(x, name)
    if x.ndim == 0:
        return x.reshape(1, 1, 1, 1)
    try:
        x = jnp.broadcast_to(x, grid.batch)
    except ValueError:
        raise ValueError(
            f"`{name}` must be one int or one per sequence, {grid.batch}, got the shape"
            f" {x.shape}."
        ) from None
    return x.reshape(grid.rows, 1, 1, 1)


def per_token(
    x: ArrayLike, batch: tuple[int, ...], side: Side, name: str, *, limited: bool = True
) -> Array:
    """One int per token, `[batch or 1, size]`; int32 if they are to be added to."""
    x = _clipped_integers(x, name, limited=limited)
    wanted = (*batch, side.size)
    if x.ndim < 1 or x.shape[-1] != side.size:
        raise ValueError(
            f"`{name}` must be one int per token, {wanted}, got the shape {x.shape}."
        )
    if all(n == 1 for n in x.shape[:-1]):
        return x.reshape(1, side.size)
    try:
        x = jnp.broadcast_to(x, wanted)
    except ValueError:
        raise ValueError(
            f"`{name}` must be one int per token, {wanted}, got the shape {x.shape}."
        ) from None
    return x.reshape(math.prod(batch), side.size)


def _clipped_integers(x: ArrayLike, name: str, *, limited: bool = True) -> Array:
    if isinstance(x, int) and not isinstance(x, bool):
        return jnp.asarray(max(-FARTHEST, min(FARTHEST, x)), jnp.int32)
    x = to_integers(x, name=name)
    if not limited:
        return x
    low = 0 if x.dtype.kind == "u" else -FARTHEST
    return jnp.clip(x, jnp.asarray(low, x.dtype), FARTHEST).astype(jnp.int32)
