"""Attention under threshold maps: sparsemax, entmax15, and maps of a user's own.

The weights are f(z - tau), with a threshold tau for each query that makes them sum to one.
Newton's method finds it: each step visits the tiles that still reach above it, which become
fewer, because it only rises. One more loop over those tiles takes the weighted sum of the
values. The threshold has one rule, that of an implicit function,

    tau' = sum f'(z - tau) z' / sum f'(z - tau),

and the weighted sum is differentiated as it stands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softjax._float import where_finite
from softjax._inputs import computing_dtype
from softjax._mesh import vary
from softjax._threshold import reciprocal
from softjax.attentions._operands import (
    Constants,
    DiffOperands,
    TileIndex,
    drop,
    in_computing_dtype,
    moves,
    moving,
    push_scores,
    scores_of,
    tile_kinds,
    weighted,
)
from softjax.attentions._tile_loops import map_query_blocks, scan_key_blocks, sum_over_keys


def _sparsemax(margins: Array) -> Array:
    return jnp.where(margins > 0, margins, 0)


def _entmax15(margins: Array) -> Array:
    return jnp.where(margins > 0, margins / 2, 0) ** 2


# Each f, and the number at which it is 1: its reach.
MAPS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "sparsemax": (_sparsemax, 1.0),
    "entmax15": (_entmax15, 2.0),
}
STEPS = 64  # Newton's method takes no more steps.


class _Thresholds(NamedTuple):
    """The threshold of each query, whose weights are f((z - peak) - tau)."""

    tau: Array  # [i, batch, N, query]; NaN where a NaN is seen
    peak: Array  # the largest score, a constant; 0 where nothing is seen
    kinds: Any  # of tiles; 0 also where all weights are 0


class _NewtonState(NamedTuple):
    tau: Array
    kinds: Array
    moving: Array
    steps: Array


def sparse_average(operands: DiffOperands, constants: Constants, reach: Array) -> Array:
    """Averages of values `[i, batch, N, query, W]`."""
    # Widen half precision, because cotangents would be rounded in each block.
    operands = in_computing_dtype(operands)
    found = _threshold(operands, constants, reach)
    grid = constants.grid
    start = jnp.zeros((*found.tau.shape[1:], operands.values.shape[-1]), found.tau.dtype)
    start = vary(start, operands, constants)

    def block(i: Any, parts: tuple[DiffOperands], found: _Thresholds) -> Array:
        def term(at: TileIndex, part: DiffOperands, tau: Array, peak: Array) -> Array:
            scores = scores_of(part, constants, at)
            weights = _margin_weights(part, constants, scores, tau, peak)
            return weighted(drop(weights, constants, at), part.values)

        rows = (found.tau, found.peak)
        return sum_over_keys(grid, i, term, start, found.kinds, parts, *rows)

    out = map_query_blocks(grid, block, (operands,), found, remember=False)
    return jnp.where(jnp.isnan(found.tau)[..., None], jnp.nan, out)


def _margin_weights(
    part: DiffOperands,
    constants: Constants,
    scores: Array,
    tau: Array,
    peak: Array,
) -> Array:
    dropped = scores == -jnp.inf
    margins = jnp.where(dropped, 0, (scores - peak[..., None]) - tau[..., None])
    assert constants.static.weigh is not None
    weights = constants.static.weigh(part.weigher, constants.weigher, margins)
    return jnp.where(dropped, 0, jnp.where(jnp.isnan(scores), jnp.nan, weights))


@jax.custom_jvp
def _threshold(operands: DiffOperands, constants: Constants, reach: Array) -> _Thresholds:
    grid = constants.grid
    dtype = computing_dtype(operands.queries.dtype)
    rows = (grid.rows, grid.heads, grid.queries.block)

    def block(i: Any, parts: tuple[DiffOperands], kinds: Array) -> _Thresholds:
        def higher(at: TileIndex, peak: Array, part: DiffOperands) -> Array:
            return jnp.maximum(peak, jnp.max(scores_of(part, constants, at), -1))

        lowest = vary(jnp.full(rows, -jnp.inf, dtype), operands, constants)
        peak = where_finite(scan_key_blocks(grid, i, higher, lowest, kinds, *parts))

        def sums(tau: Array, kinds: Array) -> tuple[Array, Array, Array]:
            """The sums of weights and slopes, and the tiles that reach above the thresholds."""

            def visit(at: TileIndex, seen: Any, part: DiffOperands) -> Any:
                scores = scores_of(part, constants, at)
                weigh = lambda tau: -_margin_weights(part, constants, scores, tau, peak)
                weights, slopes = jax.jvp(weigh, (tau,), (jnp.ones_like(tau),))
                live = jnp.where(
                    jnp.any(~(weights >= 0)), seen[2].at[at.j].set(at.kind), seen[2]
                )
                return seen[0] - jnp.sum(weights, -1), seen[1] + jnp.sum(slopes, -1), live

            zero = jnp.zeros_like(tau)
            start = vary((zero, zero, jnp.zeros_like(kinds)), tau)
            return scan_key_blocks(grid, i, visit, start, kinds, *parts)

        def newton_step(state: _NewtonState) -> _NewtonState:
            total, slope, live = sums(state.tau, state.kinds)
            above = (total > 1) & (slope > 0)
            step = jnp.where(above, (total - 1) / jnp.where(above, slope, 1), 0)
            far = jnp.any(step > 2 * jnp.finfo(dtype).eps * (reach + 1))
            tau = jnp.where(jnp.isnan(total), jnp.nan, state.tau + step)
            return _NewtonState(tau, live, far, state.steps + 1)

        start = _NewtonState(jnp.full(rows, -reach), kinds, jnp.array(True), jnp.array(0))
        start = vary(start, operands, constants)
        found = lax.while_loop(lambda s: s.moving & (s.steps < STEPS), newton_step, start)
        return _Thresholds(found.tau, peak, found.kinds)

    return map_query_blocks(grid, block, (operands,), tile_kinds(constants))


def _threshold_jvp(primals: Any, tangents: Any) -> tuple[_Thresholds, _Thresholds]:
    # The rule of an implicit function (see the module), with slopes of f by `jax.jvp`.
    operands, constants, _ = primals
    found = _threshold(*primals)
    dots, grid = moving(tangents[0]), constants.grid
    zero = vary(jnp.zeros(found.tau.shape[1:], found.tau.dtype), found, primals)

    def slopes(at: TileIndex, part: DiffOperands, tau: Array, peak: Array) -> Array:
        scores = scores_of(part, constants, at)
        weigh = lambda tau: -_margin_weights(part, constants, scores, tau, peak)
        return jnp.sum(jax.jvp(weigh, (tau,), (jnp.ones_like(tau),))[1], -1)

    def term(
        at: TileIndex, part: DiffOperands, dot: DiffOperands, tau: Array, peak: Array
    ) -> Array:
        scores, scores_dot = push_scores(part, dot, constants, at)
        scores_dot = jnp.where(moves(scores), scores_dot, 0)

        def weigh(scores: Array, weigher: Any) -> Array:
            return _margin_weights(part._replace(weigher=weigher), constants, scores, tau, peak)

        if dot.weigher is None:
            pushed = jax.jvp(lambda s: weigh(s, part.weigher), (scores,), (scores_dot,))
        else:
            pushed = jax.jvp(weigh, (scores, part.weigher), (scores_dot, dot.weigher))
        return jnp.sum(pushed[1], -1)

    def block(i: Any, parts: Any, found: _Thresholds) -> Array:
        rows = (found.tau, found.peak)
        slope = sum_over_keys(grid, i, slopes, zero, found.kinds, parts[:1], *rows)
        moved = sum_over_keys(grid, i, term, zero, found.kinds, parts, *rows)
        return moved * reciprocal(slope)

    tau_dot = map_query_blocks(grid, block, (operands, dots), found, remember=False)
    fixed = [zero_from_primal(x, symbolic_zeros=True) for x in (found.peak, found.kinds)]
    return found, _Thresholds(tau_dot, *fixed)


_threshold.defjvp(_threshold_jvp, symbolic_zeros=True)
