"""The operands of scores, and the scores of one tile.

Arrays with derivatives (`DiffOperands`) are cut into blocks beforehand, so that their
cotangents are formed block by block. The others (`Constants`) are sliced where a tile needs
them. Inside, heads come before tokens, and the G query heads that share a key head lie side by
side, so that no key is ever repeated.

A query or key that holds NaN or inf is NaN here, and so is the key of such a value: products
show who sees it. Derivatives are formed as if it were 0, so that it reaches nobody else.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softjax._elementary import capped
from softjax._inputs import computing_dtype
from softjax._mesh import vary
from softjax._tiles import Grid, Tile
from softjax.attentions._dropout import keep_weight
from softjax.masks import Mask


class DiffOperands(NamedTuple):
    """All that has a derivative; None for an operand that is absent, or has no tangent."""

    queries: Any  # [i, batch, K, G, query block, H]
    keys: Any  # [j, batch, K, key block, H]
    values: Any  # [j, batch, K, key block, W]
    bias: Array | None = None  # [i or 1, j or 1, batch or 1, N or 1, block or 1, block or 1]
    scale: Array | None = None  # [1, N or 1, 1, 1], and so is the cap
    soft_cap: Array | None = None
    captured: Any = None  # floats that the score function captures
    weigher: Any = None  # floats that the function of a threshold map captures

    def by_query(self, grid: Grid) -> tuple["DiffOperands", "DiffOperands"]:
        """The arrays that are cut along the queries, and the rest."""
        rows = DiffOperands(self.queries, None, None)
        return self._replace(queries=None)._cut_bias(rows, grid.queries.num_blocks)

    def by_key(self, grid: Grid) -> tuple["DiffOperands", "DiffOperands"]:
        """For one block of queries: the arrays that are cut along the keys, and the rest."""
        rows = DiffOperands(None, self.keys, self.values)
        rest = self._replace(keys=None, values=None)
        return rest._cut_bias(rows, grid.keys.num_blocks)

    def _cut_bias(
        self, rows: "DiffOperands", num_blocks: int
    ) -> tuple["DiffOperands", "DiffOperands"]:
        if self.bias is None:
            return rows, self
        if self.bias.shape[0] == num_blocks:
            return rows._replace(bias=self.bias), self._replace(bias=None)
        return rows, self._replace(bias=self.bias[0])

    def join(self, rest: "DiffOperands") -> "DiffOperands":
        """The parts together again."""
        return DiffOperands(*(a if b is None else b for a, b in zip(self, rest, strict=True)))


class Static(NamedTuple):
    """The static part of an attention."""

    score: Callable[..., Array] | None = None  # of (floats, rest that it captures, scores, at)
    weigh: Callable[..., Array] | None = None  # the threshold map; None stands for softmax
    cap_bias: bool = False  # whether the soft cap holds for the sum with the bias
    remember: bool = False  # whether there is one tile, whose weights are kept for derivatives


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constants:
    """All that has no derivative."""

    static: Static = dataclasses.field(metadata={"static": True})
    grid: Grid
    mask: Mask | None
    captured: Any = None  # other arrays that the score function captures
    weigher: Any = None  # other arrays that the function of a threshold map captures
    dropout: tuple[Array, Array] | None = None  # two words of random bits, and the rate


class TileIndex(NamedTuple):
    """The place of a tile, and its kind, which its bounds decide."""

    i: Any
    j: Any
    kind: Any = 1  # 0: empty, 1: must be masked, 2: full


def scores_of(part: DiffOperands, constants: Constants, at: TileIndex) -> Array:
    """The scores of a tile from its part of the operands, `[batch, N, query, key]`.

    They are -inf where dropped, and NaN where a bad token is seen. Infinite scores are equal
    and finite.
    """
    return _mark(*_raw(part, constants, at), part, constants, at)


def push_scores(
    part: DiffOperands, dot: DiffOperands, constants: Constants, at: TileIndex
) -> tuple[Array, Array]:
    """The scores of a tile, and their tangent, which counts only where a score `moves`."""
    apart = ("values", "weigher")
    moved = {n: x for n, x in dot._asdict().items() if x is not None and n not in apart}
    if not moved:
        scores = scores_of(part, constants, at)
        return scores, jnp.zeros_like(scores)
    alike = lambda x, dot: x.astype(dot.dtype)
    base = {name: jax.tree.map(alike, getattr(part, name), x) for name, x in moved.items()}
    form = lambda moved: _raw(part._replace(**moved), constants, at)
    raw, raw_dot, bad = jax.jvp(form, (base,), (moved,), has_aux=True)
    return _mark(raw, bad, part, constants, at), raw_dot


def moves(scores: Array) -> Array:
    """Where a score is neither dropped nor +inf. A cotangent, NaN perhaps, ends elsewhere."""
    return (scores != -jnp.inf) & (scores != huge(scores.dtype))


def huge(dtype: Any) -> float:
    """The finite number that stands for a score of +inf."""
    return float(jnp.finfo(dtype).max) / 4


def in_computing_dtype(operands: DiffOperands) -> DiffOperands:
    """Those operands in the computing dtype whose cotangents are added up over blocks."""
    wide = lambda x: x if x is None else x.astype(computing_dtype(x.dtype))
    names = ("queries", "keys", "values", "bias")
    return operands._replace(**{name: wide(getattr(operands, name)) for name in names})


def moving(dots: DiffOperands) -> DiffOperands:
    """Tangents, with None for those that vanish; of captured arrays, all are kept or none."""

    def kept(dot: Any) -> Any:
        zero = lambda x: isinstance(x, SymbolicZero)
        if not isinstance(dot, tuple):
            return None if zero(dot) else dot
        written = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype) if zero(x) else x
        return None if all(map(zero, dot)) else tuple(map(written, dot))

    return DiffOperands(*map(kept, dots))


def _raw(part: DiffOperands, constants: Constants, at: TileIndex) -> tuple[Array, Array]:
    """The scores as if none were bad or dropped, and which of the products are bad."""
    scores, bad = _products(part.queries, part.keys)
    static, bias = constants.static, part.bias
    if part.scale is not None:
        scores *= part.scale
    if bias is not None and (static.score is not None or static.cap_bias):
        # The functions below may have no derivative at a bias that plays no part.
        keep = bias != -jnp.inf
        keep = keep if constants.mask is None else keep & _seen(constants, at)
        bias = jnp.where(keep, bias, 0)
    if bias is not None and static.cap_bias:
        scores += bias.astype(scores.dtype)
    if part.soft_cap is not None:
        scores = capped(scores, part.soft_cap)
    if bias is not None and not static.cap_bias:
        scores += bias.astype(scores.dtype)
    if static.score is not None:
        index = constants.grid.index(at.i, at.j)
        found = static.score(part.captured, constants.captured, scores, index)
        scores = found.astype(scores.dtype)
    return scores, bad


def _mark(
    scores: Array, bad: Array, part: DiffOperands, constants: Constants, at: TileIndex
) -> Array:
    if part.bias is not None:
        scores = jnp.where(part.bias == -jnp.inf, -jnp.inf, scores)
    scores = jnp.where(bad & (scores != -jnp.inf), jnp.nan, scores)
    if constants.mask is not None:
        masked = lambda scores: jnp.where(_seen(constants, at), scores, -jnp.inf)
        if not isinstance(at.kind, int):
            scores = vary(scores, constants)  # Both branches of `cond` must vary alike.
            scores = lax.cond(at.kind == 1, masked, lambda scores: scores, scores)
        elif at.kind == 1:
            scores = masked(scores)
    return jnp.where(scores > huge(scores.dtype), huge(scores.dtype), scores)


def _seen(constants: Constants, at: TileIndex) -> Array:
    assert constants.mask is not None
    index = constants.grid.index(at.i, at.j)
    return constants.mask.tile(Tile(constants.grid, at.i, at.j, index))


@jax.custom_jvp
def _products(queries: Array, keys: Array) -> tuple[Array, Array]:
    """Products `[batch, N, query, key]`, 0 where a token is bad, and where that is."""
    products = _dot(queries, keys)
    bad = jnp.isnan(products)
    return jnp.where(bad, 0, products), bad


@functools.partial(_products.defjvp, symbolic_zeros=True)
def _products_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    # This needs a rule, because a bad token must not reach the tangents of queries that do
    # not see it.
    queries, keys = (jnp.where(jnp.isnan(x), 0, x) for x in primals)
    products, bad = _products(*primals)
    products_dot = jnp.zeros_like(products)
    if not isinstance(tangents[0], SymbolicZero):
        products_dot += _dot(tangents[0], keys)
    if not isinstance(tangents[1], SymbolicZero):
        products_dot += _dot(queries, tangents[1])
    return (products, bad), (products_dot, zero_from_primal(bad, symbolic_zeros=True))


def _dot(queries: Array, keys: Array) -> Array:
    """Products `[batch, N, query, key]` of queries `[batch, K, G, query, H]` with keys."""
    dtype = computing_dtype(queries.dtype)
    if queries.dtype != keys.dtype:  # One of the two is a tangent, or moves.
        queries, keys = queries.astype(dtype), keys.astype(dtype)
    batch, num_key_heads, groups, num_queries, width = queries.shape
    # The queries of all heads that share keys are the rows of one matrix: XLA's CPU backend
    # would copy the scores to contract two axes in the transpose.
    rows = queries.reshape(batch, num_key_heads, groups * num_queries, width)
    products = lax.dot_general(
        rows, keys, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=dtype
    )
    return products.reshape(batch, num_key_heads * groups, num_queries, keys.shape[2])


def weighted(weights: Array, values: Array) -> Array:
    """Sums of values `[batch, K, key, W]` with weights `[batch, N, query, key]`."""
    batch, heads, num_queries, num_keys = weights.shape
    num_key_heads, width = values.shape[1], values.shape[3]
    rows = heads // num_key_heads * num_queries
    weights = weights.reshape(batch, num_key_heads, rows, num_keys)
    values = values.astype(weights.dtype)
    sums = lax.dot_general(weights, values, (((3,), (2,)), ((0, 1), (0, 1))))
    return sums.reshape(batch, heads, num_queries, width)


def drop(weights: Array, constants: Constants, at: TileIndex) -> Array:
    """The weights after dropout."""
    if constants.dropout is None:
        return weights
    words, rate = constants.dropout
    return weights * keep_weight(words, rate, constants.grid, at.i, at.j, weights.dtype)


def tile_kinds(constants: Constants) -> Array:
    """0 for a tile that is empty, 1 for one that must be masked, 2 for one that is full."""
    grid = constants.grid
    shape = grid.queries.num_blocks, grid.keys.num_blocks
    if constants.mask is None:
        return jnp.full(shape, 2, jnp.int32)
    some, everything = constants.mask.bounds(grid)
    over_tiles = lambda x: jnp.broadcast_to(x, (*x.shape[:2], *shape))
    some, everything = (
        jnp.any(over_tiles(some), (0, 1)),
        jnp.all(over_tiles(everything), (0, 1)),
    )
    return jnp.where(some, jnp.where(everything, 2, 1), 0).astype(jnp.int32)
