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
from jax import Array, lax

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


class Result(NamedTuple):
    """The result per query, `[i, batch, N, query, ...]`: 0 and -inf if it sees nothing."""

    out: Array  # the average of the values, `[..., W]`
    lse: Array  # log(sum(exp(s))); inf if the query sees an infinite score
    total: Array  # sum(exp(s - max(s))), a constant for derivatives


@jax.custom_jvp
def average(operands: DiffOperands, constants: Constants) -> Result:
    """Averages of values, over all keys."""
    if constants.static.remember:
        (part,) = only_tile((operands,))
        state, _ = observe_tile(scores_of(part, constants, WHOLE), part, constants, WHOLE)
        return results(state, stack=True)
    grid, dtype = constants.grid, computing_dtype(operands.queries.dtype)
    rows = (grid.rows, grid.heads, grid.queries.block)
    start = vary(_online.init(rows, operands.values.shape[-1], dtype), operands, constants)
    visit = functools.partial(merge_tile, constants)

    def block(i: Any, parts: tuple[DiffOperands], kinds: Array) -> Result:
        return results(scan_key_blocks(grid, i, visit, start, kinds, *parts))

    return Result(*map_query_blocks(grid, block, (operands,), tile_kinds(constants)))


def observe_tile(
    scores: Array, part: DiffOperands, constants: Constants, at: TileIndex
) -> tuple[OnlineState, Array]:
    """The online state of a tile, and its weights below the peak."""
    peak, weights = _online.exp_below_peak(scores)
    sums = weighted(drop(weights, constants, at), part.values)
    return OnlineState(peak, jnp.sum(weights, -1), sums), weights


def merge_tile(
    constants: Constants, at: TileIndex, state: OnlineState, part: DiffOperands
) -> OnlineState:
    """The state after one more tile."""
    scores = scores_of(part, constants, at)
    return _online.merge(state, observe_tile(scores, part, constants, at)[0])


def results(state: OnlineState, *, stack: bool = False) -> Result:
    """The result of a state; with `stack`, that of the only block of queries."""
    out, lse = _online.finish(state)
    lse = jnp.where(state.peak >= huge(lse.dtype), jnp.inf, lse)
    result = Result(out, lse, lax.stop_gradient(state.total))
    return jax.tree.map(lambda x: x[None], result) if stack else result


def level_and_share(result: Result) -> tuple[Array, Array]:
    """What is subtracted from scores, and by what the sums of exponentials are multiplied.

    The level is the log-sum-exp. The finite number that stands for an infinite score swallows
    the logarithm of how many there are, so their sums are divided by that number.
    """
    infinite = result.lse == jnp.inf
    level = jnp.where(infinite, huge(result.lse.dtype), result.lse)
    share = jnp.where(infinite, 1 / jnp.where(infinite, result.total, 1), 1)
    return jnp.where(result.lse == -jnp.inf, 0, level), share


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
        result = results(state, stack=True)
        return result, tangents_of(result, mean[None], sums[None])

    result = average(operands, constants)
    grid = constants.grid
    zeros = Tangents(jnp.zeros_like(result.lse[0]), jnp.zeros_like(result.out[0]))
    start = vary(zeros, primals)
    term = functools.partial(push_tile, constants)

    def block(i: Any, parts: Any, kinds: Array, *result: Array) -> Result:
        level, share = level_and_share(Result(*result))
        mean, sums = sum_over_keys(grid, i, term, start, kinds, parts, level)
        return tangents_of(Result(*result), mean, share[..., None] * sums)

    # Widen tangents of half precision, because cotangents would be rounded in each block.
    rows = tile_kinds(constants), *result
    parts = operands, in_computing_dtype(dots)
    return result, Result(*map_query_blocks(grid, block, parts, *rows, remember=False))


def tangents_of(result: Result, mean: Array, sums: Array) -> Result:
    """The tangent of a result from sums over its keys."""
    return Result(sums - mean[..., None] * result.out, mean, jnp.zeros_like(result.total))


def push_tile(
    constants: Constants, at: TileIndex, part: DiffOperands, dot: DiffOperands, level: Array
) -> Tangents:
    """The terms of one tile; the level is what `level_and_share` finds for each query.

    It is NaN for a query that sees a NaN, which must not reach the keys that it does not see.
    """
    scores, scores_dot = push_scores(part, dot, constants, at)
    weights = jnp.where(scores == -jnp.inf, 0, jnp.exp(scores - level[..., None]))
    scores_dot = jnp.where(moves(scores), scores_dot, 0)
    return tile_tangents(weights, scores_dot, part, dot, constants, at)


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
