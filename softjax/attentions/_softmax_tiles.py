"""Softmax attention: one pass over the keys for the value, one for the derivative.

The pass keeps the online softmax state of each query: the largest score, the sum of the
exponentials below it, and their sum of values. The rule for the derivative is linear in
the tangents, and visits the tiles again with P = exp(s - lse):

    o' = sum P s' v + sum P v' - mu o,   lse' = mu = sum P s'.

JAX transposes it into the backward pass, and differentiates it again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._float import where_finite
from softjax._inputs import computing_dtype
from softjax._mesh import vary
from softjax.attentions._operands import (
    Constants,
    DiffOperands,
    Static,
    TileIndex,
    drop,
    huge,
    moving,
    push_scores,
    scores_of,
    tile_kinds,
    weighted,
    widened,
)
from softjax.attentions._tile_loops import (
    map_query_blocks,
    only_tile,
    scan_key_blocks,
    sum_over_keys,
)

WHOLE = TileIndex(0, 0)


class _Seen(NamedTuple):
    peak: Array  # [batch, N, query]
    total: Array  # [batch, N, query]
    sums: Array  # [batch, N, query, W], of values, not yet divided by the total


class _Moved(NamedTuple):
    mean: Array  # mu
    sums: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def average(
    static: Static, operands: DiffOperands, constants: Constants
) -> tuple[Array, Array]:
    """Averages of values `[i, batch, N, query, W]`, and log-sum-exp `[i, batch, N, query]`.

    A query that sees nothing has average 0 and log-sum-exp -inf.
    """
    if static.remember:
        (part,) = only_tile((operands,))
        return _at_once(scores_of(static, part, constants, WHOLE), part, constants)[:2]
    grid, kinds = constants.grid, tile_kinds(constants)
    dtype = computing_dtype(operands.queries.dtype)
    rows = (grid.rows, grid.heads, grid.queries.block)
    zero = jnp.zeros(rows, dtype)

    def block(i: Any, parts: tuple[DiffOperands], kinds: Array) -> tuple[Array, Array]:
        start = _Seen(jnp.full(rows, -jnp.inf, dtype), zero, _no_sums(zero, operands))
        start = vary(start, operands, constants)

        def visit(at: TileIndex, seen: _Seen, part: DiffOperands) -> _Seen:
            # (Written so that plain differentiation is right too: JAX 0.10 forgets the rule
            # where the reverse of a scan is differentiated once more.)
            scores = scores_of(static, part, constants, at)
            peak = jnp.maximum(seen.peak, lax.stop_gradient(jnp.max(scores, -1)))
            anchor = where_finite(peak)
            weights = jnp.exp(scores - anchor[..., None])
            fade = jnp.exp(seen.peak - anchor)
            total = seen.total * fade + jnp.sum(weights, -1)
            sums = weighted(drop(weights, constants, at), part.values)
            return _Seen(peak, total, seen.sums * fade[..., None] + sums)

        seen = scan_key_blocks(grid, i, visit, start, kinds, *parts)
        total = jnp.where(seen.total == 0, 1, seen.total)
        return seen.sums / total[..., None], _log_sum(seen.peak, seen.total)

    return map_query_blocks(grid, block, (operands,), kinds)


def _at_once(
    scores: Array, part: DiffOperands, constants: Constants
) -> tuple[Array, Array, Array]:
    """The averages and log-sum-exp of a single tile, and its weights."""
    peak = lax.stop_gradient(jnp.max(scores, -1))
    weights = jnp.exp(scores - where_finite(peak)[..., None])
    total = jnp.sum(weights, -1)
    divisor = jnp.where(total == 0, 1, total)[..., None]
    out = weighted(drop(weights, constants, WHOLE), part.values) / divisor
    return out[None], _log_sum(peak, total)[None], weights / divisor


def _log_sum(peak: Array, total: Array) -> Array:
    lse = where_finite(peak) + jnp.log(jnp.where(total == 0, 1, total))
    lse = jnp.where(peak >= huge(lse.dtype), jnp.inf, lse)
    return jnp.where(total == 0, -jnp.inf, lse)


def _average_jvp(static: Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    operands, constants = primals
    dots = moving(tangents[0])
    if static.remember:
        part, dot = only_tile((operands, dots))
        scores, scores_dot = push_scores(static, part, dot, constants, WHOLE)
        out, lse, weights = _at_once(scores, part, constants)
        moved = _move(weights, scores_dot, part, dot, constants, WHOLE)
        return (out, lse), (
            moved.sums[None] - moved.mean[None, ..., None] * out,
            moved.mean[None],
        )

    out, lse = average(static, operands, constants)
    grid, kinds = constants.grid, tile_kinds(constants)
    zero = jnp.zeros(lse.shape[1:], lse.dtype)

    def block(i: Any, parts: Any, kinds: Array, out: Array, lse: Array) -> tuple[Array, Array]:
        level = jnp.where(lse == -jnp.inf, 0, lse)

        def term(at: TileIndex, part: DiffOperands, dot: DiffOperands, level: Array) -> _Moved:
            scores, scores_dot = push_scores(static, part, dot, constants, at)
            weights = jnp.exp(scores - level[..., None])
            return _move(weights, scores_dot, part, dot, constants, at)

        start = vary(_Moved(zero, _no_sums(zero, operands)), primals)
        moved = sum_over_keys(grid, i, term, start, kinds, parts, level)
        return moved.sums - moved.mean[..., None] * out, moved.mean

    # (Widened, or the cotangents of half precision would be rounded with every block.)
    dots = widened(dots)
    dots = map_query_blocks(grid, block, (operands, dots), kinds, out, lse, remember=False)
    return (out, lse), dots


average.defjvp(_average_jvp, symbolic_zeros=True)


def _move(
    weights: Array,
    scores_dot: Array,
    part: DiffOperands,
    dot: DiffOperands,
    constants: Constants,
    at: TileIndex,
) -> _Moved:
    """What a tile adds to the tangents."""
    pulled = weights * scores_dot
    sums = weighted(drop(pulled, constants, at), part.values)
    if dot.values is not None:
        sums += weighted(drop(weights, constants, at), dot.values)
    return _Moved(jnp.sum(pulled, -1), sums)


def _no_sums(zero: Array, operands: DiffOperands) -> Array:
    return jnp.zeros((*zero.shape, operands.values.shape[-1]), zero.dtype)
