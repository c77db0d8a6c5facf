"""Masks of attention: which query may see which key.

    Causal(offset=0)          keys up to the query's own position
    Window(left, right=0)     keys around the query's position
    Prefix(length)            keys below a length
    Lengths(query_lengths)    queries and keys below the length of their sequence
    Lengths(key_lengths=n)    keys below a length
    Segments(query_ids)       keys of the query's own document
    Dense(keep)               a bool array
    Function(keep)            a function of one index, with batch, head, query and key

A mask is an object, not an array. It answers for one tile of scores at a time, and says from
the bounds of a tile alone whether the tile is empty, partial or full, so that empty tiles can
be skipped and full ones need no masking, although nothing of the size queries x keys is ever
built. Masks combine by `&`, `|` and `~`, and hold arrays that may be traced. They are equal,
and hash equal, when their parts are: an equal mask as a static argument compiles nothing anew.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax._closures import check_takes, hoist
from softjax._inputs import to_array
from softjax._tiles import (
    Grid,
    Tile,
    grid_of,
    meet,
    per_score,
    per_sequence,
    per_token,
    positions_met,
    shift_positions,
)

__all__ = ["Causal", "Dense", "Function", "Lengths", "Mask", "Prefix", "Segments", "Window"]

Node = TypeVar("Node")


class Mask:
    """The base of all masks; one of your own needs `bind`, `tile` and `bounds`."""

    def bind(self, grid: Grid) -> Mask:
        """The same mask, checked against the shapes, its arrays `[batch or 1, ...]`."""
        raise NotImplementedError

    def tile(self, tile: Tile) -> Array:
        """True where a query sees a key; broadcasts to `[batch, head, query, key]`."""
        raise NotImplementedError

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        """Whether any score of a tile may be kept, and whether surely all are.

        Two arrays that broadcast to `[batch, head, query block, key block]`.
        """
        raise NotImplementedError

    def array(
        self,
        num_queries: int,
        num_keys: int | None = None,
        *,
        num_heads: int = 1,
        batch: Sequence[int] = (),
        positions: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    ) -> Array:
        """The mask as a bool array `[*batch, num_heads, num_queries, num_keys]`, to look at."""
        num_keys = num_queries if num_keys is None else num_keys
        grid = grid_of(tuple(batch), num_heads, num_queries, num_keys, positions=positions)
        shape = (grid.rows, num_heads, num_queries, num_keys)
        try:
            bound = self.bind(grid)
        except ValueError as error:
            if batch:
                raise
            raise ValueError(f"{error} (`batch` is the shape of the batch.)") from None
        kept = bound.tile(Tile(grid, 0, 0, grid.index(0, 0)))
        return jnp.broadcast_to(kept, shape).reshape(*batch, *shape[1:])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        """The parts, arrays by what they hold. A mask without fields equals itself alone."""
        if not hasattr(self, "__dataclass_fields__"):
            return (id(self),)
        return (type(self), *(_comparable(part) for part in self._parts().values()))

    def __repr__(self) -> str:
        parts = self._parts().items()
        shown = [f"{name}={_shown(part)}" for name, part in parts if part is not None]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _parts(self) -> dict[str, Any]:
        names = getattr(self, "__dataclass_fields__", ())
        return {name: getattr(self, name) for name in names}

    __array_ufunc__ = None  # NumPy leaves `array & mask` to the mask.

    def __and__(self, other: Mask | ArrayLike) -> Mask:
        return _Both(self, _mask(other))

    def __or__(self, other: Mask | ArrayLike) -> Mask:
        return _Either(self, _mask(other))

    def __rand__(self, other: ArrayLike) -> Mask:
        return _Both(_mask(other), self)

    def __ror__(self, other: ArrayLike) -> Mask:
        return _Either(_mask(other), self)

    def __invert__(self) -> Mask:
        return _Not(self)

    def __bool__(self) -> bool:
        raise TypeError("masks combine with &, | and ~, not with `and`, `or` and `not`.")


@dataclass_transform(frozen_default=True, eq_default=False)
def _node(cls: type[Node]) -> type[Node]:
    made = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    names, init = [*inspect.signature(made).parameters], made.__init__

    @functools.wraps(init)
    def init_by_name(self: Node, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise TypeError(
                    f"{cls.__name__}() got an unexpected keyword argument {name!r}; it takes"
                    f" {', '.join(names)}."
                )
        init(self, *args, **kwargs)

    made.__init__ = init_by_name  # type: ignore[assignment]
    return jax.tree_util.register_dataclass(made)


@_node
class Causal(Mask):
    """A query at position t sees the keys at positions up to t + offset.

    The offset is one int or one per sequence. 0 aligns the first tokens; the number of keys
    less that of queries aligns the last ones, as in decoding with a cache.
    """

    offset: Any = 0

    def bind(self, grid: Grid) -> Causal:
        return Causal(per_sequence(self.offset, grid, "Causal.offset"))

    def tile(self, tile: Tile) -> Array:
        return tile.places.key <= shift_positions(tile.places.query, self.offset)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        at = positions_met(grid)
        some = at.key_low <= shift_positions(at.query_high, self.offset)
        return some, at.key_high <= shift_positions(at.query_low, self.offset)


@_node
class Window(Mask):
    """A query at position t sees the keys at positions t - left to t + right.

    Either is one int, one per sequence, or None for no limit. Without `right` nothing ahead is
    seen: `Window(256)` is causal, and sees the query's own place and 256 before it.
    """

    left: Any
    right: Any = 0

    def __post_init__(self) -> None:
        ints = isinstance(self.left, int) and isinstance(self.right, int)
        if ints and self.left + self.right < 0:
            raise ValueError(f"`Window({self.left}, {self.right})` sees nothing.")

    def bind(self, grid: Grid) -> Window:
        limits = ((self.left, "Window.left"), (self.right, "Window.right"))
        return Window(*(_limit(x, grid, name) for x, name in limits))

    def tile(self, tile: Tile) -> Array:
        at = tile.places
        return self._reaches((at.query, at.query), (at.key, at.key))

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        at = positions_met(grid)
        low_first = (at.query_low, at.query_high), (at.key_high, at.key_low)
        high_first = (at.query_high, at.query_low), (at.key_low, at.key_high)
        return self._reaches(*high_first), self._reaches(*low_first)

    def _reaches(self, queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Array:
        """Whether the first pair is within reach to the right, the second to the left."""
        inside = _everywhere(True)
        if self.right is not None:
            inside &= keys[0] <= shift_positions(queries[0], self.right)
        if self.left is not None:
            inside &= keys[1] >= shift_positions(queries[1], -self.left)
        return inside


@_node
class Segments(Mask):
    """Packed documents: a query sees the keys of the same id.

    Ids are ints, `[..., T]` and `[..., S]`, token by token whatever their positions; those of
    the keys are those of the queries if they are not given. A token of a negative id is
    padding: it sees nothing, and nothing sees it.
    """

    query_ids: Any
    key_ids: Any = None

    def bind(self, grid: Grid) -> Segments:
        keys = self.query_ids if self.key_ids is None else self.key_ids
        ids = functools.partial(per_token, limited=False)  # Any number may name a document.
        query_ids = ids(self.query_ids, grid.batch, grid.queries, "Segments.query_ids")
        key_ids = ids(keys, grid.batch, grid.keys, "Segments.key_ids")
        common = np.promote_types(query_ids.dtype, key_ids.dtype)
        common = jax.dtypes.canonicalize_dtype(common if common.kind in "iu" else np.int64)
        return Segments(query_ids.astype(common), key_ids.astype(common))

    def tile(self, tile: Tile) -> Array:
        query = tile.queries(self.query_ids)[:, None, :, None]
        key = tile.keys(self.key_ids)[:, None, None, :]
        return (query == key) & (query >= 0)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        at = meet(grid.queries.extent(self.query_ids), grid.keys.extent(self.key_ids))
        some = (at.key_low <= at.query_high) & (at.query_low <= at.key_high)
        some &= at.query_high >= 0
        one = (at.query_low == at.query_high) & (at.key_low == at.key_high)
        return some, one & (at.query_low == at.key_low) & (at.query_low >= 0)


@_node
class Lengths(Mask):
    """Only positions below a length take part: one per sequence, `[...]`, or one for all.

    `Lengths(n)` is the length of the sequence, for queries and keys alike; there must be as
    many queries as keys. `Lengths(key_lengths=n)` hides keys alone; with both, each has its
    own.
    """

    query_lengths: Any = None
    key_lengths: Any = None

    def bind(self, grid: Grid) -> Lengths:
        if self.query_lengths is None and self.key_lengths is None:
            raise ValueError("`Lengths` needs `query_lengths` or `key_lengths`, got neither.")
        keys = self.query_lengths if self.key_lengths is None else self.key_lengths
        if self.key_lengths is None and grid.queries.size != grid.keys.size:
            raise ValueError(
                "`Lengths(n)` holds for queries and keys, which must be equally many, got"
                f" {grid.queries.size} and {grid.keys.size}: give `key_lengths` too, or alone."
            )
        return Lengths(
            _limit(self.query_lengths, grid, "Lengths.query_lengths"),
            _limit(keys, grid, "Lengths.key_lengths"),
        )

    def tile(self, tile: Tile) -> Array:
        return self._below(tile.places.query, tile.places.key)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        at = positions_met(grid)
        return self._below(at.query_low, at.key_low), self._below(at.query_high, at.key_high)

    def _below(self, query: Array, key: Array) -> Array:
        inside = _everywhere(True)
        for place, length in ((query, self.query_lengths), (key, self.key_lengths)):
            inside = inside if length is None else inside & (place < length)
        return inside


@_node
class Prefix(Mask):
    """Every query sees the keys at positions below a length, as in `Causal() | Prefix(n)`."""

    length: Any

    def bind(self, grid: Grid) -> Prefix:
        return Prefix(per_sequence(self.length, grid, "Prefix.length"))

    def tile(self, tile: Tile) -> Array:
        return tile.places.key < self.length

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        at = positions_met(grid)
        return at.key_low < self.length, at.key_high < self.length


@_node
class Dense(Mask):
    """A bool array that broadcasts to `[..., N, T, S]`, token by token; True sees.

    An array of three axes is per head, `[N, T, S]`. It is refused if the batch has an axis of N
    sequences, because it may be meant per sequence: write `[B, 1, T, S]` or `[1, N, T, S]`.
    """

    keep: Any

    def bind(self, grid: Grid) -> Dense:
        keep = to_array(self.keep, name="mask")
        if keep.dtype != jnp.bool_:
            raise TypeError(f"`mask` must be bool (True sees a key), got {keep.dtype}.")
        return Dense(per_score(keep, grid, "mask"))

    def tile(self, tile: Tile) -> Array:
        keep = self.keep
        if keep.shape[2] != 1:
            keep = tile.queries(keep, 2)
        return keep if keep.shape[3] == 1 else tile.keys(keep, 3)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        some = everything = self.keep
        for side, axis in ((grid.queries, 2), (grid.keys, 3)):
            if self.keep.shape[axis] != 1:
                some = jnp.moveaxis(jnp.any(side.cut(some, axis, "edge"), axis + 1), 0, axis)
                everything = side.cut(everything, axis, "edge")
                everything = jnp.moveaxis(jnp.all(everything, axis + 1), 0, axis)
        return some, everything


@_node
class Function(Mask):
    """Where `keep(index)` is True.

    The index holds four int arrays, batch, head, query and key (positions), that broadcast to
    a tile. The function may capture traced arrays. No tile is known to be empty or full. It is
    traced anew in every call, as the `score` of `attention` is; such masks are equal when the
    function is the same object.
    """

    keep: Callable[..., Array] = dataclasses.field(metadata={"static": True})

    def bind(self, grid: Grid) -> _BoundFunction:
        check_takes(self.keep, "index", name="the function of `masks.Function`")
        index = grid.index(0, 0)
        keep, captured = hoist(lambda index: self.keep(index), index)
        shape = (grid.rows, grid.heads, grid.queries.block, grid.keys.block)
        kept = jax.eval_shape(keep, captured, index)
        if not isinstance(kept, jax.ShapeDtypeStruct) or kept.dtype != jnp.bool_:
            raise TypeError(f"the function of `masks.Function` must give bools, got {kept}.")
        if kept.ndim != 4 or any(
            n not in (1, m) for n, m in zip(kept.shape, shape, strict=True)
        ):
            raise ValueError(
                "the function of `masks.Function` must give an array that broadcasts to the"
                f" tile {shape} that it is asked about, got the shape {kept.shape}."
            )
        return _BoundFunction(captured, keep)


@_node
class _BoundFunction(Mask):
    """A function, and what it has captured."""

    captured: Any
    keep: Callable[..., Array] = dataclasses.field(metadata={"static": True})

    def tile(self, tile: Tile) -> Array:
        kept: Array = self.keep(self.captured, tile.places)
        return kept

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        return _everywhere(True), _everywhere(False)


@_node
class _Both(Mask):
    one: Mask
    other: Mask

    def __repr__(self) -> str:
        return f"({self.one!r} & {self.other!r})"

    def bind(self, grid: Grid) -> _Both:
        return _Both(self.one.bind(grid), self.other.bind(grid))

    def tile(self, tile: Tile) -> Array:
        return self.one.tile(tile) & self.other.tile(tile)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        (a_some, a_all), (b_some, b_all) = self.one.bounds(grid), self.other.bounds(grid)
        return a_some & b_some, a_all & b_all


@_node
class _Either(Mask):
    one: Mask
    other: Mask

    def __repr__(self) -> str:
        return f"({self.one!r} | {self.other!r})"

    def bind(self, grid: Grid) -> _Either:
        return _Either(self.one.bind(grid), self.other.bind(grid))

    def tile(self, tile: Tile) -> Array:
        return self.one.tile(tile) | self.other.tile(tile)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        (a_some, a_all), (b_some, b_all) = self.one.bounds(grid), self.other.bounds(grid)
        return a_some | b_some, a_all | b_all


@_node
class _Not(Mask):
    mask: Mask

    def __repr__(self) -> str:
        return f"~{self.mask!r}"

    def bind(self, grid: Grid) -> _Not:
        return _Not(self.mask.bind(grid))

    def tile(self, tile: Tile) -> Array:
        return ~self.mask.tile(tile)

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        some, everything = self.mask.bounds(grid)
        return ~everything, ~some


@_node
class Inside(Mask):
    """Not the padding of the last blocks.

    A padded query sees nothing: a NaN that it alone saw would reach the cotangents of keys.
    """

    def bind(self, grid: Grid) -> Inside:
        return self

    def tile(self, tile: Tile) -> Array:
        queries, keys = tile.grid.queries, tile.grid.keys
        inside = (queries.order(tile.i) < queries.size)[:, None]
        return (inside & (keys.order(tile.j) < keys.size)[None])[None, None]

    def bounds(self, grid: Grid) -> tuple[Array, Array]:
        short_queries, short_keys = (
            (jnp.arange(side.num_blocks) == side.num_blocks - 1) & (side.padding > 0)
            for side in (grid.queries, grid.keys)
        )
        short = short_queries[:, None] | short_keys[None]
        return _everywhere(True), ~short[None, None]


def reads_function(mask: Mask | None) -> bool:
    """Whether a user's function is among the parts of a mask."""
    if mask is None:
        return False
    parts = (part for part in mask._parts().values() if isinstance(part, Mask))
    return isinstance(mask, Function) or any(map(reads_function, parts))


def _comparable(part: Any) -> Any:
    """A part of a mask, so that == and `hash` tell whether it holds the same."""
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
        return int(part)
    if isinstance(part, (np.ndarray, jax.Array)) and not isinstance(part, jax.core.Tracer):
        held = np.asarray(part)
        return held.shape, held.dtype.str, held.tobytes()
    return part if part is None or isinstance(part, Mask) else id(part)


def _shown(part: Any) -> str:
    """A short text for a part of a mask; a large array shows its dtype and shape."""
    if callable(part):
        return str(getattr(part, "__qualname__", part))
    if isinstance(part, (np.ndarray, jax.Array)):
        if isinstance(part, jax.core.Tracer) or part.size > 8:
            return f"{part.dtype}{list(part.shape)}"
        return str(part.tolist())
    return repr(part)


def as_mask(mask: Any) -> Mask | None:
    """A bool array is a `Dense` mask."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, type) and issubclass(mask, Mask):
        raise TypeError(f"`mask` must be a mask, got the class {mask.__name__}: call it.")
    if callable(mask):
        raise TypeError("a function is a mask as `masks.Function(fn)`.")
    if isinstance(mask, str):
        raise TypeError(f"`mask` must be one of softjax.masks or a bool array, got {mask!r}.")
    return Dense(mask)


def _mask(other: Any) -> Mask:
    if isinstance(other, (np.ndarray, jax.Array)):
        return Dense(other)
    if not isinstance(other, Mask):
        raise TypeError(
            f"a mask combines with masks and bool arrays, got {type(other).__name__}."
        )
    return other


def _limit(x: Any, grid: Grid, name: str) -> Array | None:
    return None if x is None else per_sequence(x, grid, name)


@functools.cache
def _constant(value: bool) -> np.ndarray:
    return np.full((1, 1, 1, 1), value)


def _everywhere(value: bool) -> Array:
    return jnp.asarray(_constant(value))
