"""From what a caller passes to the operands of the tiles: shapes, dtypes, blocks.

Queries and keys that hold NaN or inf become NaN, and so does the key of such a value. A query
that sees one gets NaN. No other query is touched, in its value or in any derivative.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._closures import check_takes, hoist_floats
from softjax._inputs import (
    computing_dtype,
    nan_outside,
    nan_unless_positive,
    one_number,
    to_float,
)
from softjax._mesh import vary
from softjax._tiles import Grid, grid_of, per_score
from softjax.attentions._backends import call_of, check_name, choose
from softjax.attentions._dropout import words_of
from softjax.attentions._operands import Constants, DiffOperands, Static
from softjax.attentions._sources import by_source, over_all_keys
from softjax.masks import Inside, Mask


class TiledAttention(NamedTuple):
    """An attention as its tiles see it."""

    operands: DiffOperands
    constants: Constants
    shape: tuple[int, ...]  # of the result, [..., T, N, W]
    dtype: jnp.dtype  # of the result


def cut_into_tiles(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    mask: Mask | None,
    bias: ArrayLike | None,
    score: Callable[..., Array] | None,
    scale: ArrayLike | None,
    soft_cap: ArrayLike | None,
    cap_bias: bool,
    positions: Any,
    dropout_rate: ArrayLike,
    dropout_key: Array | None,
    block_size: int | tuple[int, int] | None,
    implementation: str | None,
    num_hops: int = 0,
) -> TiledAttention:
    """Checks and cuts the arguments of `attention`.

    With `num_hops`, keys and values are those of one of so many devices in a ring, and `bias`
    gets a first axis of sources.
    """
    queries, keys, values, dtype = three_arrays(queries, keys, values)
    *batch, num_queries, heads, width = queries.shape
    num_keys, key_heads = keys.shape[-3], keys.shape[-2]
    wide = computing_dtype(dtype)
    check_name(implementation)
    call = call_of(queries.shape, num_keys, block_size, num_hops)
    blocks_of = choose(call, implementation).blocks
    assert blocks_of is not None
    blocks = blocks_of(call)
    grid = grid_of(
        tuple(batch),
        heads,
        num_queries,
        num_keys,
        blocks=blocks,
        positions=pair_of_positions(positions),
    )
    bound = None if mask is None else mask.bind(grid)
    if grid.queries.padding or grid.keys.padding:
        bound = Inside() if bound is None else bound & Inside()

    by_head = lambda x: x.reshape(grid.rows, *x.shape[-3:]).swapaxes(1, 2)
    queries, keys, values = by_head(queries), by_head(keys), by_head(values)
    bad = ~jnp.all(jnp.isfinite(values), -1, keepdims=True)
    queries = jnp.where(jnp.isfinite(queries), queries, jnp.nan)
    keys = jnp.where(jnp.isfinite(keys) & ~bad, keys, jnp.nan)
    values = jnp.where(bad, 0, values)
    shared = (grid.rows, key_heads, heads // key_heads, num_queries, width)
    queries = queries.reshape(shared)

    capped = None
    if soft_cap is not None:
        capped = nan_unless_positive(per_head(soft_cap, heads, wide, "soft_cap"))
    scale = 1 / max(1, width) ** 0.5 if scale is None else scale
    operands = DiffOperands(
        grid.queries.cut(queries, 3),
        grid.keys.cut(keys, 2),
        grid.keys.cut(values, 2),
        bias=None if bias is None else _bias(bias, grid, num_hops),
        scale=per_head(scale, heads, wide, "scale"),
        soft_cap=capped,
    )
    is_one_tile = grid.queries.num_blocks == grid.keys.num_blocks == 1
    remember = is_one_tile and block_size is None and not num_hops
    static = Static(cap_bias=cap_bias and soft_cap is not None, remember=remember)
    dropout = None
    if dropout_key is not None:
        rate = nan_outside(one_number(dropout_rate, name="dropout_rate"), 0, 1)
        dropout = words_of(dropout_key), rate.astype(wide)
    constants = Constants(static, grid, bound, dropout=dropout)
    if score is not None:
        operands, constants = _with_score(score, operands, constants, wide)
    shape = (*batch, num_queries, heads, values.shape[-1])
    return TiledAttention(operands, constants, shape, dtype)


def per_head(x: ArrayLike, heads: int, dtype: Any, name: str) -> Array:
    """One number, or one per head, as `[1, N or 1, 1, 1]`."""
    x, _ = to_float(x, name=name)
    if x.shape not in ((), (1,), (heads,)):
        raise ValueError(
            f"`{name}` must be one number or one per head, ({heads},), got the shape {x.shape}."
        )
    return x.astype(dtype).reshape(1, -1, 1, 1)


def three_arrays(
    queries: ArrayLike, keys: ArrayLike, values: ArrayLike
) -> tuple[Array, Array, Array, jnp.dtype]:
    given = {"queries": queries, "keys": keys, "values": values}
    dtypes = {name: to_float(x, name=name)[1] for name, x in given.items()}
    dtype = dtypes["queries"]
    for name in ("keys", "values"):
        if dtypes[name] != dtype:
            own, came = jnp.result_type(queries), jnp.result_type(given[name])
            counts = "" if own == dtype else f", which counts as {dtype}"
            raise TypeError(
                f"`{name}` must have the dtype {own} of `queries`{counts}, got {came}."
            )
    queries, keys, values = (jnp.asarray(x).astype(dtype) for x in given.values())
    shapes = f"{queries.shape}, {keys.shape} and {values.shape}"
    wanted = (
        "`queries` must be [..., T, N, H], `keys` [..., S, K, H] and `values` [..., S, K, W]"
    )
    if queries.ndim < 3 or keys.ndim != queries.ndim or values.ndim != queries.ndim:
        raise ValueError(f"{wanted}, got {shapes}.")
    batch = queries.shape[:-3]
    for name, x in (("keys", keys), ("values", values)):
        if x.shape[:-3] != batch:
            raise ValueError(
                f"`{name}` must have the batch axes {batch} of `queries`, got {x.shape[:-3]}."
            )
    if keys.shape[-1] != queries.shape[-1] or values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(f"{wanted}, got {shapes}.")
    if keys.shape[-2] == 0 or queries.shape[-2] % keys.shape[-2]:
        raise ValueError(
            f"the N heads of `queries` must be a multiple of the K of `keys`, got"
            f" {queries.shape[-2]} and {keys.shape[-2]}."
        )
    return queries, keys, values, dtype


def pair_of_positions(positions: Any) -> tuple[Any, Any]:
    if positions is None:
        return None, None
    if isinstance(positions, tuple):
        if len(positions) != 2:
            raise ValueError(
                f"`positions` must be those of queries and keys, got {len(positions)} of them."
            )
        return positions
    return positions, positions


def _bias(bias: ArrayLike, grid: Grid, num_hops: int) -> Array:
    if jnp.result_type(bias) == jnp.bool_:
        raise TypeError("`bias` must hold numbers, got bool: an array of bools is a `mask`.")
    wide, dtype = to_float(bias, name="bias")
    bias = wide.astype(dtype)
    if not num_hops:
        return _cut_scores(per_score(bias, grid, "bias"), grid)
    whole = per_score(bias, over_all_keys(grid, num_hops), "bias")
    return jax.vmap(lambda part: _cut_scores(part, grid))(by_source(whole, num_hops))


def _cut_scores(bias: Array, grid: Grid) -> Array:
    cut = grid.queries.cut(bias, 2) if bias.shape[2] != 1 else bias[None]
    if bias.shape[3] == 1:
        return cut[:, None]
    return jnp.moveaxis(grid.keys.cut(cut, 4), 0, 1)


def _with_score(
    score: Callable[..., Array], operands: DiffOperands, constants: Constants, dtype: Any
) -> tuple[DiffOperands, Constants]:
    if not callable(score):
        raise TypeError(f"`score` must be a function of (scores, index), got {score!r}.")
    check_takes(score, "scores", "index", name="`score`")
    scores = vary(jnp.zeros(_tile_shape(constants.grid), dtype), operands)
    index = constants.grid.index(0, 0)
    run, floats, rest = hoist_floats(lambda scores, at: score(scores, at), scores, index)
    out = jax.eval_shape(run, floats, rest, scores, index)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != scores.shape:
        got = out.shape if isinstance(out, jax.ShapeDtypeStruct) else type(out).__name__
        raise ValueError(f"`score` must give scores of the shape {scores.shape}, got {got}.")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"`score` must give real scores, got {out.dtype}.")
    static = constants.static._replace(score=run)
    constants = dataclasses.replace(constants, static=static, captured=rest)
    return operands._replace(captured=floats), constants


def with_weigher(tiled: TiledAttention, weigh: Callable[[Array], Array]) -> TiledAttention:
    """The same attention under a threshold map."""
    constants, dtype = tiled.constants, computing_dtype(tiled.dtype)
    margins = vary(jnp.zeros(_tile_shape(constants.grid), dtype), tiled.operands)
    run, floats, rest = hoist_floats(lambda margins: weigh(margins), margins)
    out = jax.eval_shape(run, floats, rest, margins)
    wanted = margins.shape, dtype
    if not isinstance(out, jax.ShapeDtypeStruct) or (out.shape, out.dtype) != wanted:
        raise ValueError(
            f"the function of `normalizer` must keep shape and dtype, {margins.shape} and"
            f" {dtype}, got {out}."
        )
    static = constants.static._replace(weigh=run)
    constants = dataclasses.replace(constants, static=static, weigher=rest)
    return tiled._replace(operands=tiled.operands._replace(weigher=floats), constants=constants)


def _tile_shape(grid: Grid) -> tuple[int, ...]:
    return grid.rows, grid.heads, grid.queries.block, grid.keys.block
