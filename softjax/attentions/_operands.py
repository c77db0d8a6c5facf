"""What scores are made of, and the scores of one tile.

Arrays with derivatives (`Floats`) are cut into blocks beforehand, so that their cotangents are
formed block by block; the others (`Others`) are sliced where a tile needs them. Inside, heads
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


class Floats(NamedTuple):
    """All that has a derivative. None plays no part, or does not move."""

    queries: Any  # [i, batch, K, G, query block, H]
    keys: Any  # [j, batch, K, key block, H]
    values: Any  # [j, batch, K, key block, W]
    bias: Array | None = None  # [i or 1, j or 1, batch or 1, N or 1, block or 1, block or 1]
    scale: Array | None = None  # [1, N or 1, 1, 1], as is the cap
    soft_cap: Array | None = None
    captured: Any = None  # by the score function
    weigher: Any = None  # what the function of a threshold map has captured

    def by_query(self, grid: Grid) -> tuple["Floats", "Floats"]:
        """What is cut along the queries, and the rest."""
        rows = Floats(self.queries, None, None)
        rest = self._replace(queries=None)
        if self.bias is None:
            return rows, rest
        if self.bias.shape[0] == grid.queries.num_blocks:
            return rows._replace(bias=self.bias), rest._replace(bias=None)
        return rows, rest._replace(bias=self.bias[0])

    def by_key(self, grid: Grid) -> tuple["Floats", "Floats"]:
        """Of what belongs to a block of queries: what is cut along the keys, and the rest."""
        rows = Floats(None, self.keys, self.values)
        rest = self._replace(keys=None, values=None)
        if self.bias is None:
            return rows, rest
        if self.bias.shape[0] == grid.keys.num_blocks:
            return rows._replace(bias=self.bias), rest._replace(bias=None)
        return rows, rest._replace(bias=self.bias[0])

    def join(self, rest: "Floats") -> "Floats":
        """The parts together again."""
        return Floats(*(a if b is None else b for a, b in zip(self, rest, strict=True)))


class Others(NamedTuple):
    """All that has no derivative."""

    grid: Grid
    mask: Mask | None
    bad_queries: Array  # [batch, N, T], which held NaN or inf, and are 0 now
    bad_keys: Array  # [batch, K, S], likewise, in the key or its value
    captured: Any = None  # by the score function
    weigher: Any = None
    dropout: tuple[Array, Array] | None = None  # two words of random bits, and the rate


class Place(NamedTuple):
    """Which tile, and what is known of it."""

    i: Any
    j: Any
    kind: Any = 1  # 0: empty, 1: to be masked, 2: full


class Program(NamedTuple):
    """What is static."""

    score: Callable[..., Array] | None = None  # of (floats, others captured; scores, index)
    weigh: Callable[..., Array] | None = None  # of a threshold map; None: softmax
    remember: bool = False  # one tile, whose weights are kept for the derivative


def scores_of(program: Program, part: Floats, others: Others, at: Place) -> Array:
    """The scores of a tile from its part of the operands, `[batch, N, query, key]`.

    -inf is dropped; NaN marks who sees a bad token. Of a full tile nothing is.
    """
    return _dropped(_raw(program, part, others, at), program, part, others, at)


def push_scores(
    program: Program, part: Floats, dot: Floats, others: Others, at: Place
) -> tuple[Array, Array]:
    """The scores of a tile, and their tangent in the operands that move: 0 where dropped."""
    apart = ("values", "weigher")
    moving = {
        name: x for name, x in dot._asdict().items() if x is not None and name not in apart
    }
    if not moving:
        scores = scores_of(program, part, others, at)
        return scores, jnp.zeros_like(scores)
    base = {name: _alike(getattr(part, name), x) for name, x in moving.items()}
    form = lambda moved: _raw(program, part._replace(**moved), others, at)
    raw, raw_dot = jax.jvp(form, (base,), (moving,))
    scores = _dropped(raw, program, part, others, at)
    # For the transpose: the cotangent of a dropped score, NaN perhaps, ends here.
    moves = (scores > -jnp.inf) & (scores < huge(scores.dtype))
    return scores, jnp.where(moves, raw_dot, 0)


def _alike(x: Any, dot: Any) -> Any:
    return jax.tree.map(lambda x, dot: x.astype(dot.dtype), x, dot)


def widened(floats: Floats) -> Floats:
    """In the computing dtype: what is cut, and what is added up over blocks."""
    wide = lambda x: x if x is None else x.astype(computing_dtype(x.dtype))
    changed = {
        name: wide(getattr(floats, name)) for name in ("queries", "keys", "values", "bias")
    }
    return floats._replace(**changed)


def moving(dots: Floats) -> Floats:
    """Tangents, of which those that vanish are None; of what is captured, all or none."""

    def kept(dot: Any) -> Any:
        zero = lambda x: isinstance(x, SymbolicZero)
        if not isinstance(dot, tuple):
            return None if zero(dot) else dot
        written = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype) if zero(x) else x
        return None if all(map(zero, dot)) else tuple(map(written, dot))

    return Floats(*map(kept, dots))


def _raw(program: Program, part: Floats, others: Others, at: Place) -> Array:
    """The scores before anything is dropped."""
    dtype = computing_dtype(part.queries.dtype)
    scores = _products(part.queries, part.keys, dtype)
    if part.scale is not None:
        scores *= part.scale
    if part.bias is not None:
        scores += _safe_bias(program, part, others, at).astype(dtype)
    if part.soft_cap is not None:
        scores = capped(scores, part.soft_cap)
    if program.score is not None:
        index = others.grid.index(at.i, at.j)
        scores = program.score(part.captured, others.captured, scores, index).astype(dtype)
    return scores


def _safe_bias(program: Program, part: Floats, others: Others, at: Place) -> Array:
    """The bias; 0 where a score is dropped of which a function has a derivative."""
    bias = part.bias
    assert bias is not None
    if part.soft_cap is None and program.score is None:
        return bias
    keep = bias != -jnp.inf
    if others.mask is not None:
        keep &= _seen(others, at)
    return jnp.where(keep, bias, 0)


def _seen(others: Others, at: Place) -> Array:
    assert others.mask is not None
    index = others.grid.index(at.i, at.j)
    return others.mask.tile(Tile(others.grid, at.i, at.j, index))


def _dropped(scores: Array, program: Program, part: Floats, others: Others, at: Place) -> Array:
    """The scores, -inf where dropped, NaN where bad; infinite ones are equal and finite."""
    if part.bias is not None and (part.soft_cap is not None or program.score is not None):
        scores = jnp.where(part.bias == -jnp.inf, -jnp.inf, scores)
    masked = functools.partial(_masked, others=others, at=at)
    if isinstance(at.kind, int):
        scores = masked(scores) if at.kind == 1 else scores
    else:
        scores = vary(scores, others)  # Of both branches alike.
        scores = lax.cond(at.kind == 1, masked, lambda scores: scores, scores)
    return jnp.where(scores > huge(scores.dtype), huge(scores.dtype), scores)


def _masked(scores: Array, others: Others, at: Place) -> Array:
    grid = others.grid
    bad = grid.queries.take(others.bad_queries, at.i)[..., :, None]
    bad |= _per_head(grid.keys.take(others.bad_keys, at.j), grid)[..., None, :]
    if grid.queries.padding:  # What fills up the last block may see what no query does.
        bad &= (grid.queries.order(at.i) < grid.queries.size)[None, None, :, None]
    scores = jnp.where(bad & (scores != -jnp.inf), jnp.nan, scores)
    if others.mask is None:
        return scores
    return jnp.where(_seen(others, at), scores, -jnp.inf)


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


def drop(weights: Array, others: Others, at: Place) -> Array:
    """The weights after dropout."""
    if others.dropout is None:
        return weights
    words, rate = others.dropout
    return weights * keep_weight(words, rate, others.grid, at.i, at.j, weights.dtype)


def tile_kinds(others: Others) -> Array:
    """0 for a tile that is empty, 1 for one that needs masking, 2 for one that is full."""
    grid = others.grid
    shape = (grid.rows, grid.heads, grid.queries.num_blocks, grid.keys.num_blocks)
    some = everything = jnp.ones((1, 1, 1, 1), bool)
    if others.mask is not None:
        some, everything = others.mask.bounds(grid)
    bad_query = jnp.any(grid.queries.cut(others.bad_queries, 2), (1, 2, 3))
    bad_key = jnp.any(grid.keys.cut(others.bad_keys, 2), (1, 2, 3))
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
