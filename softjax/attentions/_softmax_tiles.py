"""Softmax attention: one pass over the keys for the value, one for the derivative.

The pass keeps the online softmax state of each query. The rule for the derivative is linear in
the tangents, and visits the tiles again with P = exp(s - lse):

    o' = sum P s' v + sum P v' - mu o,   lse' = mu = sum P s'.

JAX transposes it into the backward pass, and differentiates it again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax import _online
from softjax._inputs import computing_dtype
from softjax._mesh import vary
from softjax._online import OnlineState
from softjax.attentions._operands import (
    Constants,
    DiffOperands,
    TileIndex,
    drop,
    huge,
    in_computing_dtype,
    moves,
    moving,
    push_scores,
    scores_of,
    tile_kinds,
    weighted,
)
from softjax.attentions._tile_loops import (
    map_query_blocks,
    only_tile,
    scan_key_blocks,
    sum_over_keys,
)

WHOLE = TileIndex(0, 0)


class Tangents(NamedTuple):
    """The sums over keys in the tangents of both results."""

    mean: Array  # mu
    sums: Array  # of P s' v + P v'


@jax.custom_jvp
def average(operands: DiffOperands, constants: Constants) -> tuple[Array, Array]:
    """Averages of values `[i, batch, N, query, W]`, and log-sum-exp `[i, batch, N, query]`.

    A query that sees nothing has average 0 and log-sum-exp -inf.
    """
    if constants.static.remember:
        (part,) = only_tile((operands,))
        state, _ = observe_tile(scores_of(part, constants, WHOLE), part, constants, WHOLE)
        return results(state, stack=True)
    grid, dtype = constants.grid, computing_dtype(operands.queries.dtype)
    rows = (grid.rows, grid.heads, grid.queries.block)
    start = vary(_online.init(rows, operands.values.shape[-1], dtype), operands, constants)

    def visit(at: TileIndex, state: OnlineState, part: DiffOperands) -> OnlineState:
        scores = scores_of(part, constants, at)
        return _online.merge(state, observe_tile(scores, part, constants, at)[0])

    def block(i: Any, parts: tuple[DiffOperands], kinds: Array) -> tuple[Array, Array]:
        return results(scan_key_blocks(grid, i, visit, start, kinds, *parts))

    return map_query_blocks(grid, block, (operands,), tile_kinds(constants))


def observe_tile(
    scores: Array, part: DiffOperands, constants: Constants, at: TileIndex
) -> tuple[OnlineState, Array]:
    """The online state of a tile, and its weights below the peak."""
    peak, weights = _online.exp_below_peak(scores)
    sums = weighted(drop(weights, constants, at), part.values)
    return OnlineState(peak, jnp.sum(weights, -1), sums), weights


def results(state: OnlineState, *, stack: bool = False) -> tuple[Array, Array]:
    """Averages and log-sum-exp; with `stack`, those of the only block of queries."""
    out, lse = _online.finish(state)
    lse = jnp.where(state.peak >= huge(lse.dtype), jnp.inf, lse)
    return (out[None], lse[None]) if stack else (out, lse)


@functools.partial(average.defjvp, symbolic_zeros=True)
def _average_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    operands, constants = primals
    dots = moving(tangents[0])
    if constants.static.remember:
        part, dot = only_tile((operands, dots))
        scores, scores_dot = push_scores(part, dot, constants, WHOLE)
        state, weights = observe_tile(scores, part, constants, WHOLE)
        # A key that is not seen has weight 0, also where the total is NaN.
        total = jnp.where(state.total == 0, 1, state.total)[..., None]
        weights = jnp.where(scores == -jnp.inf, 0, weights / total)
        # This is `moves(scores)`, read from the weights, so that the derivative need not keep
        # another array of their size.
        moved = (weights != 0) & ~(state.peak >= huge(weights.dtype))[..., None]
        scores_dot = jnp.where(moved, scores_dot, 0)
        mean, sums = tile_tangents(weights, scores_dot, part, dot, constants, WHOLE)
        out, lse = results(state, stack=True)
        return (out, lse), (sums[None] - mean[None, ..., None] * out, mean[None])

    out, lse = average(operands, constants)
    grid = constants.grid
    zeros = Tangents(jnp.zeros_like(lse[0]), jnp.zeros_like(out[0]))
    start = vary(zeros, primals)

    def term(at: TileIndex, part: DiffOperands, dot: DiffOperands, level: Array) -> Tangents:
        scores, scores_dot = push_scores(part, dot, constants, at)
        weights = weights_at(scores, level)
        scores_dot = jnp.where(moves(scores), scores_dot, 0)
        return tile_tangents(weights, scores_dot, part, dot, constants, at)

    def block(i: Any, parts: Any, kinds: Array, out: Array, lse: Array) -> tuple[Array, Array]:
        level = jnp.where(lse == -jnp.inf, 0, lse)
        mean, sums = sum_over_keys(grid, i, term, start, kinds, parts, level)
        return sums - mean[..., None] * out, mean

    # Widen tangents of half precision, because cotangents would be rounded in each block.
    rows = tile_kinds(constants), out, lse
    parts = operands, in_computing_dtype(dots)
    return (out, lse), map_query_blocks(grid, block, parts, *rows, remember=False)


def weights_at(scores: Array, level: Array) -> Array:
    """exp(scores - level), and 0 for keys that are not seen; the level is the log-sum-exp.

    It is NaN for a query that sees a NaN, which must not reach the keys that it does not see.
    """
    return jnp.where(scores == -jnp.inf, 0, jnp.exp(scores - level[..., None]))


def tile_tangents(
    weights: Array,
    scores_dot: Array,
    part: DiffOperands,
    dot: DiffOperands,
    constants: Constants,
    at: TileIndex,
) -> Tangents:
    """The terms of one tile."""
    pulled = weights * scores_dot
    sums = weighted(drop(pulled, constants, at), part.values)
    if dot.values is not None:
        sums += weighted(drop(weights, constants, at), dot.values)
    return Tangents(jnp.sum(pulled, -1), sums)
