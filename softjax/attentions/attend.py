"""Attention: averages of values, weighted by a map of query-key scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import masks
from softjax._api import named
from softjax._inputs import check_flag, computing_dtype
from softjax._mesh import vary
from softjax.attentions._inputs import TiledAttention, cut_into_tiles, per_head, with_weigher
from softjax.attentions._softmax_tiles import average
from softjax.attentions._threshold_tiles import MAPS, sparse_average

__all__ = ["attention"]


class Options(TypedDict, total=False):
    """The options of `attention` on which the type of its result does not depend."""

    mask: masks.Mask | ArrayLike | None
    bias: ArrayLike | None
    score: Callable[..., Array] | None
    scale: ArrayLike | None
    soft_cap: ArrayLike | None
    cap_bias: bool
    sink: ArrayLike | None
    normalizer: str | tuple[Callable[[Array], Array], ArrayLike]
    positions: ArrayLike | tuple[ArrayLike | None, ArrayLike | None] | None
    dropout_rate: ArrayLike
    dropout_key: Array | None
    block_size: int | tuple[int, int] | None
    implementation: str | None


@overload
def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...


@overload
def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...


@overload
def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]: ...


@named
def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    mask: masks.Mask | ArrayLike | None = None,
    bias: ArrayLike | None = None,
    score: Callable[..., Array] | None = None,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    cap_bias: bool = False,
    sink: ArrayLike | None = None,
    normalizer: str | tuple[Callable[[Array], Array], ArrayLike] = "softmax",
    positions: ArrayLike | tuple[ArrayLike | None, ArrayLike | None] | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: Array | None = None,
    block_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Averages values, weighted by the softmax, or a sparse map, of query-key scores.

    .. math:: o_t = \sum_s p_{ts} v_s, \qquad
        p_{ts} = e^{z_{ts}} \Big/ \Big(e^{c} + \sum_{r} e^{z_{tr}}\Big), \qquad
        z_{ts} = f\big(\kappa \tanh(\lambda \langle q_t, k_s \rangle / \kappa) + b_{ts}\big)

    Args:
        queries: q, `[..., T, N, H]`, real; differentiable.
        keys: k, `[..., S, K, H]`, of the dtype of `queries`, with K heads of which each serves
            N / K heads of the queries in turn; differentiable.
        values: v, `[..., S, K, W]`, likewise; differentiable.
        mask: which query sees which key: an object of `softjax.masks`, or a bool array that
            broadcasts to `[..., N, T, S]`, where True sees.
        bias: b, broadcastable to `[..., N, T, S]`; differentiable. -inf drops a score.
        score: f, a function of (scores, index) that gives new scores of the same shape: those
            of a tile, `[batch, N, query, key]`, and `index.batch`, `index.head`, `index.query`
            and `index.key`, ints that broadcast to it. Arrays that it captures or holds are
            differentiable. -inf drops a score.
        scale: lambda, one number or one per head `[N]`; 1 / sqrt(H) by default; differentiable.
        soft_cap: kappa > 0, one number or one per head; None for no cap; differentiable. As in
            Gemma 2, it caps the products alone, so that a bias of -1e9 hides a key.
        cap_bias: whether to cap the sum of product and bias instead.
        sink: c, a score that takes weight and has no value, one number or one per head; None
            for no sink; differentiable.
        normalizer: how scores become weights: "softmax", "sparsemax", "entmax15", or a pair of
            a function f and a number r for weights f(z - tau) that sum to one. f is convex and
            increases from 0, elementwise, with f(r) = 1; what it captures is differentiable.
        positions: where the tokens stand, for masks and `score`: ints `[..., T]` of 32 bits, or
            a pair for queries and keys; by default 0, 1, 2, ...
        dropout_rate: share of the weights that are dropped, in [0, 1]; the others are divided
            by what is left. Needs `dropout_key`.
        dropout_key: random key, or None with rate 0. The same key drops the same weights,
            however the scores are formed.
        block_size: tokens of a block, or a pair for queries and keys; chosen by default.
        implementation: "dense" forms all scores at once and remembers the weights; "streamed"
            forms them tile by tile and never keeps one; None takes the first for short
            sequences. The results are the same but for rounding.
        return_lse: whether to return also the logarithm of the sum of exponentials; as `sink`,
            for softmax alone.

    Returns:
        Averages `[..., T, N, W]` in the dtype of `queries`; with `return_lse`, a pair of them
        and of the log-sum-exp `[..., T, N]`, float32 or wider, which has its gradient too. A
        query that sees nothing gets exactly 0 (and -inf), with gradient 0. One that sees a NaN
        or inf in a query, key or value gets NaN; one that does not is untouched, also in every
        gradient.

    Raises:
        TypeError: an argument is not real, the dtypes of the three differ, or a mask is not of
            bools.
        ValueError: shapes do not fit, an option is out of its range, or a rate of dropout has
            no key.

    Example:
        >>> tokens = jnp.eye(3)[:, None, :]  # three tokens, one head
        >>> weights = attention(tokens, tokens, tokens, mask=masks.Causal())[:, 0]
        >>> print((100 * weights).round())
        [[100.   0.   0.]
         [ 36.  64.   0.]
         [ 26.  26.  47.]]

    Note:
        O(T S) time, and streamed O(T + S) memory: in the value, the gradient, the JVP and
        Hessian-vector products. Tiles that the mask leaves empty are skipped, in all of these,
        if the mask itself is not batched by `vmap` (leading axes of the arrays are better);
        sparse maps skip those without weight too, once their thresholds are found in some ten
        walks over the scores. Half precision is summed and averaged in float32, and so are
        cotangents; they are rounded once. Both modes, any order.

        A function (`score`, `normalizer`, `masks.Function`) is traced anew in every call, in
        the program of its caller. Outside of `jit` such a call runs operation by operation, and
        compiles its loops anew each time if it is streamed or sparse: call it within `jit`.

    Reference:
        Vaswani et al. (2017), Attention is all you need; Milakov and Gimelshein (2018), Online
        normalizer calculation for softmax; Rabe and Staats (2021), Self-attention does not need
        O(n^2) memory; Dao et al. (2022), FlashAttention. Ainslie et al. (2023), GQA, for shared
        heads; Xiao et al. (2024), Efficient streaming language models with attention sinks.
    """
    if isinstance(block_size, list):
        raise TypeError(f"`block_size` must be an int or a pair of them, got {block_size!r}.")
    check_flag(return_lse, name="return_lse")
    check_flag(cap_bias, name="cap_bias")
    if not isinstance(dropout_key, (jax.Array, np.ndarray, type(None))):
        raise TypeError(f"`dropout_key` must be a random key, got {dropout_key!r}.")
    none_dropped = False
    if isinstance(soft_cap, (int, float)) and not soft_cap > 0:
        raise ValueError(f"`soft_cap` must be positive, got {soft_cap}.")
    if isinstance(dropout_rate, (int, float)):
        none_dropped = dropout_rate == 0
        if not 0 <= dropout_rate <= 1:
            raise ValueError(f"`dropout_rate` must be in [0, 1], got {dropout_rate}.")
    if dropout_key is None and not none_dropped:
        raise ValueError("`dropout_rate` needs a `dropout_key`.")
    weigh: Callable[..., Array] | None = None
    reach: ArrayLike = 0.0
    if not isinstance(normalizer, str):
        weigh, reach = _pair(normalizer, queries)
    elif normalizer != "softmax":
        if normalizer not in MAPS:
            raise ValueError(
                '`normalizer` must be "softmax", "sparsemax", "entmax15" or a pair of a'
                f" function and a number, got {normalizer!r}."
            )
        weigh, reach = MAPS[normalizer]
    if weigh is not None and (return_lse or sink is not None):
        name = "return_lse" if return_lse else "sink"
        raise ValueError(f'`{name}` needs `normalizer="softmax"`.')
    mask = masks.as_mask(mask)
    # The library's `jit` would remember a user's function by its identity alone, and answer
    # with the values that it once held. So the caller's program traces such a call.
    asks = score is not None or not isinstance(normalizer, str) or masks.asks(mask)
    return (_attend if asks else _jitted)(
        queries,
        keys,
        values,
        weigh=weigh,
        reach=reach,
        mask=mask,
        bias=bias,
        score=score,
        scale=scale,
        soft_cap=soft_cap,
        cap_bias=cap_bias,
        sink=sink,
        positions=positions,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_size=block_size,
        implementation=implementation,
        return_lse=return_lse,
    )


def _pair(normalizer: Any, queries: ArrayLike) -> tuple[Callable[..., Array], ArrayLike]:
    pair = isinstance(normalizer, tuple) and len(normalizer) == 2 and callable(normalizer[0])
    if not pair:
        raise TypeError(
            f"`normalizer` must be a name, or a pair of a function and a number, got"
            f" {normalizer!r}."
        )
    weigh, reach = normalizer
    if isinstance(reach, jax.core.Tracer):
        return weigh, reach
    # Otherwise a map of whole rows, such as `softmax`, would be applied to single scores.
    number = jnp.asarray(reach, computing_dtype(jnp.result_type(queries)))
    try:
        with jax.ensure_compile_time_eval():
            at_reach = weigh(number)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            "the function of `normalizer` must be elementwise: of one number it raises an error"
        ) from error
    known = not isinstance(at_reach, jax.core.Tracer)
    if known and not np.allclose(at_reach, 1, atol=1e-3):
        raise ValueError(
            f"the function of `normalizer` must be 1 at its number, {reach}, got {at_reach}."
        )
    return weigh, reach


def _attend(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    weigh: Callable[..., Array] | None,
    reach: ArrayLike,
    sink: ArrayLike | None,
    cap_bias: bool,
    block_size: int | tuple[int, int] | None,
    implementation: str | None,
    return_lse: bool,
    **options: Any,
) -> Array | tuple[Array, Array]:
    given = (queries, keys, values, options, reach, sink)
    queries, keys, values, options, reach, sink = vary(given)
    tiled = cut_into_tiles(
        queries,
        keys,
        values,
        cap_bias=cap_bias,
        block_size=block_size,
        implementation=implementation,
        **options,
    )
    if tiled.constants.grid.empty:
        return _nothing(tiled, sink, return_lse)
    grid, wide = tiled.constants.grid, computing_dtype(tiled.dtype)
    shaped = lambda x: grid.queries.join(x, 2).swapaxes(1, 2)
    if weigh is not None:
        tiled = with_weigher(tiled, weigh)
        reach = jnp.asarray(reach, wide)
        out = sparse_average(tiled.operands, tiled.constants, reach)
        return shaped(out).reshape(tiled.shape).astype(tiled.dtype)
    out, lse = average(tiled.operands, tiled.constants)
    if sink is not None:
        level = per_head(sink, grid.heads, wide, "sink")
        out, lse = with_sink(out, lse, jnp.squeeze(level, 3)[None])
    out = shaped(out).reshape(tiled.shape).astype(tiled.dtype)
    return (out, shaped(lse).reshape(tiled.shape[:-1])) if return_lse else out


STATIC = ("weigh", "cap_bias", "block_size", "implementation", "return_lse")
_jitted = jax.jit(_attend, static_argnames=STATIC)


def _nothing(
    tiled: TiledAttention, sink: ArrayLike | None, return_lse: bool
) -> Array | tuple[Array, Array]:
    """The result where there are no queries, or no keys to see."""
    out = jnp.zeros(tiled.shape, tiled.dtype)
    heads, dtype = tiled.constants.grid.heads, computing_dtype(tiled.dtype)
    level = per_head(-jnp.inf if sink is None else sink, heads, dtype, "sink")
    lse = jnp.broadcast_to(level.reshape(-1), tiled.shape[:-1])
    return (out, lse) if return_lse else out


def with_sink(out: Array, lse: Array, sink: Array) -> tuple[Array, Array]:
    """Averages `[..., W]` after one more score, whose value is 0."""
    # Where both are -inf, neither counts, and the average is 0.
    share = jax.nn.sigmoid(lse - jnp.where(sink == -jnp.inf, 0, sink))
    share = jnp.where((sink == -jnp.inf) & (lse > -jnp.inf), 1, share)
    return out * share[..., None], jnp.logaddexp(lse, sink)
