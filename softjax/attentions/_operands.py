"""What scores are made of, and the scores of one tile.

Arrays with derivatives (`DiffOperands`) are cut into blocks beforehand, so that their cotangents are
formed block by block; the constants (`Constants`) are sliced where a tile needs them. Inside, heads
come before tokens, and the G query heads that share a head of keys lie side by side, so that
no key is ever repeated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from softjax._elementary import capped
from softjax._inputs import computing_dtype
from softjax._mesh import vary
from softjax._tiles import Grid, Tile
from softjax.attentions._dropout import keep_weight
from softjax.masks import Mask


class DiffOperands(NamedTuple):
    """All that has a derivative. None plays no part, or does not move."""

    queries: Any  # [i, batch, K, G, query block, H]
    keys: Any  # [j, batch, K, key block, H]
    values: Any  # [j, batch, K, key block, W]
    bias: Array | None = None  # [i or 1, j or 1, batch or 1, N or 1, block or 1, block or 1]
    scale: Array | None = None  # [1, N or 1, 1, 1], as is the cap
    soft_cap: Array | None = None
    captured: Any = None  # by the score function
    weigher: Any = None  # what the function of a threshold map has captured

    def by_query(self, grid: Grid) -> tuple["DiffOperands", "DiffOperands"]:
        """What is cut along the queries, and the rest."""
        rows = DiffOperands(self.queries, None, None)
        rest = self._replace(queries=None)
        if self.bias is None:
            return rows, rest
        if self.bias.shape[0] == grid.queries.num_blocks:
            return rows._replace(bias=self.bias), rest._replace(bias=None)
        return rows, rest._replace(bias=self.bias[0])

    def by_key(self, grid: Grid) -> tuple["DiffOperands", "DiffOperands"]:
        """Of what belongs to a block of queries: what is cut along the keys, and the rest."""
        rows = DiffOperands(None, self.keys, self.values)
        rest = self._replace(keys=None, values=None)
        if self.bias is None:
            return rows, rest
        if self.bias.shape[0] == grid.keys.num_blocks:
            return rows._replace(bias=self.bias), rest._replace(bias=None)
        return rows, rest._replace(bias=self.bias[0])

    def join(self, rest: "DiffOperands") -> "DiffOperands":
        """The parts together again."""
        return DiffOperands(*(a if b is None else b for a, b in zip(self, rest, strict=True)))


class Constants(NamedTuple):
    """All that has no derivative."""

    grid: Grid
    mask: Mask | None
    bad_queries: Array  # [batch, N, T], which held NaN or inf, and are 0 now
    bad_keys: Array  # [batch, K, S], likewise, in the key or its value
    captured: Any = None  # by the score function
    weigher: Any = None
    dropout: tuple[Array, Array] | None = None  # two words of random bits, and the rate


class TileIndex(NamedTuple):
    """Which tile, and what is known of it."""

    i: Any
    j: Any
    kind: Any = 1  # 0: empty, 1: to be masked, 2: full


class Static(NamedTuple):
    """What is static."""

    score: Callable[..., Array] | None = (
        None  # of (operands, constants captured; scores, index)
    )
    weigh: Callable[..., Array] | None = None  # of a threshold map; None: softmax
    remember: bool = False  # one tile, whose weights are kept for the derivative


def scores_of(static: Static, part: DiffOperands, constants: Constants, at: TileIndex) -> Array:
    """The scores of a tile from its part of the operands, `[batch, N, query, key]`.

    -inf is dropped; NaN marks who sees a bad token. Of a full tile nothing is.
    """
    return _dropped(_raw(static, part, constants, at), static, part, constants, at)


def push_scores(
    static: Static, part: DiffOperands, dot: DiffOperands, constants: Constants, at: TileIndex
) -> tuple[Array, Array]:
    """The scores of a tile, and their tangent in the operands that move: 0 where dropped."""
    apart = ("values", "weigher")
    moving = {
        name: x for name, x in dot._asdict().items() if x is not None and name not in apart
    }
    if not moving:
        scores = scores_of(static, part, constants, at)
        return scores, jnp.zeros_like(scores)
    base = {name: _alike(getattr(part, name), x) for name, x in moving.items()}
    form = lambda moved: _raw(static, part._replace(**moved), constants, at)
    raw, raw_dot = jax.jvp(form, (base,), (moving,))
    scores = _dropped(raw, static, part, constants, at)
    # For the transpose: the cotangent of a dropped score, NaN perhaps, ends here.
    moves = (scores > -jnp.inf) & (scores < huge(scores.dtype))
    return scores, jnp.where(moves, raw_dot, 0)


def _alike(x: Any, dot: Any) -> Any:
    return jax.tree.map(lambda x, dot: x.astype(dot.dtype), x, dot)


def widened(operands: DiffOperands) -> DiffOperands:
    """In the computing dtype: what is cut, and what is added up over blocks."""
    wide = lambda x: x if x is None else x.astype(computing_dtype(x.dtype))
    changed = {
        name: wide(getattr(operands, name)) for name in ("queries", "keys", "values", "bias")
    }
    return operands._replace(**changed)


def moving(dots: DiffOperands) -> DiffOperands:
    """Tangents, of which those that vanish are None; of what is captured, all or none."""

    def kept(dot: Any) -> Any:
        zero = lambda x: isinstance(x, SymbolicZero)
        if not isinstance(dot, tuple):
            return None if zero(dot) else dot
        written = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype) if zero(x) else x
        return None if all(map(zero, dot)) else tuple(map(written, dot))

    return DiffOperands(*map(kept, dots))


def _raw(static: Static, part: DiffOperands, constants: Constants, at: TileIndex) -> Array:
    """The scores before anything is dropped."""
    dtype = computing_dtype(part.queries.dtype)
    scores = _products(part.queries, part.keys, dtype)
    if part.scale is not None:
        scores *= part.scale
    if part.bias is not None:
        scores += _safe_bias(static, part, constants, at).astype(dtype)
    if part.soft_cap is not None:
        scores = capped(scores, part.soft_cap)
    if static.score is not None:
        index = constants.grid.index(at.i, at.j)
        scores = static.score(part.captured, constants.captured, scores, index).astype(dtype)
    return scores


def _safe_bias(
    static: Static, part: DiffOperands, constants: Constants, at: TileIndex
) -> Array:
    """The bias; 0 where a score is dropped of which a function has a derivative."""
    bias = part.bias
    assert bias is not None
    if part.soft_cap is None and static.score is None:
        return bias
    keep = bias != -jnp.inf
    if constants.mask is not None:
        keep &= _seen(constants, at)
    return jnp.where(keep, bias, 0)


def _seen(constants: Constants, at: TileIndex) -> Array:
    assert constants.mask is not None
    index = constants.grid.index(at.i, at.j)
    return constants.mask.tile(Tile(constants.grid, at.i, at.j, index))


def _dropped(
    scores: Array, static: Static, part: DiffOperands, constants: Constants, at: TileIndex
) -> Array:
    """The scores, -inf where dropped, NaN where bad; infinite ones are equal and finite."""
    if part.bias is not None and (part.soft_cap is not None or static.score is not None):
        scores = jnp.where(part.bias == -jnp.inf, -jnp.inf, scores)
    masked = functools.partial(_masked, constants=constants, at=at)
    if isinstance(at.kind, int):
        scores = masked(scores) if at.kind == 1 else scores
    else:
        scores = vary(scores, constants)  # Of both branches alike.
        scores = lax.cond(at.kind == 1, masked, lambda scores: scores, scores)
    return jnp.where(scores > huge(scores.dtype), huge(scores.dtype), scores)


def _masked(scores: Array, constants: Constants, at: TileIndex) -> Array:
    grid = constants.grid
    bad = grid.queries.take(constants.bad_queries, at.i)[..., :, None]
    bad |= _per_head(grid.keys.take(constants.bad_keys, at.j), grid)[..., None, :]
    if grid.queries.padding:  # What fills up the last block may see what no query does.
        bad &= (grid.queries.order(at.i) < grid.queries.size)[None, None, :, None]
    scores = jnp.where(bad & (scores != -jnp.inf), jnp.nan, scores)
    if constants.mask is None:
        return scores
    return jnp.where(_seen(constants, at), scores, -jnp.inf)


def huge(dtype: Any) -> float:
    """What stands for a score of +inf."""
    return float(jnp.finfo(dtype).max) / 4


def weighted(weights: Array, values: Array) -> Array:
    """Sums of values `[batch, K, key, W]` with weights `[batch, N, query, key]`, of N heads."""
    batch, heads, num_queries, num_keys = weights.shape
    groups = weights.reshape(batch, values.shape[1], -1, num_queries, num_keys)
    sums = lax.dot_general(
        groups, values.astype(weights.dtype), (((4,), (2,)), ((0, 1), (0, 1)))
    )
    return sums.reshape(batch, heads, num_queries, values.shape[-1])


def drop(weights: Array, constants: Constants, at: TileIndex) -> Array:
    """The weights after dropout."""
    if constants.dropout is None:
        return weights
    words, rate = constants.dropout
    return weights * keep_weight(words, rate, constants.grid, at.i, at.j, weights.dtype)


def tile_kinds(constants: Constants) -> Array:
    """0 for a tile that is empty, 1 for one that needs masking, 2 for one that is full."""
    grid = constants.grid
    shape = (grid.rows, grid.heads, grid.queries.num_blocks, grid.keys.num_blocks)
    some = everything = jnp.ones((1, 1, 1, 1), bool)
    if constants.mask is not None:
        some, everything = constants.mask.bounds(grid)
    bad_query = jnp.any(grid.queries.cut(constants.bad_queries, 2), (1, 2, 3))
    bad_key = jnp.any(grid.keys.cut(constants.bad_keys, 2), (1, 2, 3))
    clean = ~(bad_query[:, None] | bad_key[None, :])
    some = jnp.any(jnp.broadcast_to(some, (*some.shape[:2], *shape[2:])), (0, 1))
    everything = jnp.all(
        jnp.broadcast_to(everything, (*everything.shape[:2], *shape[2:])), (0, 1)
    )
    return jnp.where(some, jnp.where(everything & clean, 2, 1), 0).astype(jnp.int32)


def _products(queries: Array, keys: Array, dtype: Any) -> Array:
    if queries.dtype != keys.dtype:  # One of them moves.
        queries, keys = queries.astype(dtype), keys.astype(dtype)
    products = lax.dot_general(
        queries, keys, (((4,), (3,)), ((0, 1), (0, 1))), preferred_element_type=dtype
    )
    batch, _, _, num_queries, num_keys = products.shape
    return products.reshape(batch, -1, num_queries, num_keys)


def _per_head(x: Array, grid: Grid) -> Array:
    """`[batch, K, n]` for the N heads of the queries."""
    batch, num_key_heads, n = x.shape
    shared = (batch, num_key_heads, grid.heads // num_key_heads, n)
    return jnp.broadcast_to(x[:, :, None], shared).reshape(batch, grid.heads, n)
