"""Attention in parts: averages over sets of keys that merge, and keys that lie in pages.

An average and its log-sum-exp are the whole online state of a set of keys. Sets that
are attended to apart (splits of a long cache, a shared prefix, another device) merge exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _online, masks
from softjax._api import api
from softjax._closures import jit_unless_asked
from softjax._inputs import check_int, computing_dtype, to_float, to_integers
from softjax._mesh import vary
from softjax.attentions._inputs import per_head
from softjax.attentions.attend import attention, with_sink

__all__ = ["merge_attention", "paged_attention"]

AT_ONCE = 512  # keys gathered at once, about


@api()
def merge_attention(outs: ArrayLike, lses: ArrayLike) -> tuple[Array, Array]:
    r"""Merges attention over disjoint sets of keys into attention over all of them.

    .. math:: o = \sum_i e^{l_i - l} o_i, \qquad l = \log \sum_i e^{l_i}

    Args:
        outs: averages o, `[parts, ..., W]`, of `attention` over each set; differentiable.
        lses: their log-sum-exp l, `[parts, ...]`; differentiable. -inf where a query has seen
            nothing of a set.

    Returns:
        The average `[..., W]` in the dtype of `outs`, and its log-sum-exp, float32 or wider.

    Raises:
        TypeError: an argument is not real.
        ValueError: the shapes do not fit.

    Example:
        >>> out, lse = merge_attention(jnp.array([[1.0], [4.0]]), jnp.array([0.5, 0.5]))
        >>> print(out, lse.round(1))
        [2.5] 1.2

    Note:
        O(n) time and memory; both modes, any order. Averages in half precision lose what they
        were rounded to: parts of a long sequence are better kept in float32.
    """
    outs, out_dtype = to_float(outs, name="outs")
    lses, _ = to_float(lses, name="lses")
    if outs.ndim < 2 or lses.shape != outs.shape[:-1]:
        raise ValueError(
            f"`outs` must be [parts, ..., W] and `lses` [parts, ...], got {outs.shape} and"
            f" {lses.shape}."
        )
    dtype = jnp.promote_types(outs.dtype, lses.dtype)
    scores = jnp.moveaxis(lses.astype(dtype), 0, -1)
    # In the limit, infinite scores share the average equally.
    infinite = scores == jnp.inf
    some = jnp.any(infinite, -1)
    limits = jnp.where(infinite, 0, jnp.where(some[..., None], -jnp.inf, scores))
    state = _online.observe(limits, jnp.moveaxis(outs.astype(dtype), 0, -2))
    out, lse = _online.finish(state)
    return out.astype(out_dtype), jnp.where(some, jnp.inf, lse)


def _prepare_paged_call(given: dict[str, Any]) -> bool:
    check_int(given.get("num_splits", 1), name="num_splits", least=1)
    given["mask"] = masks.as_mask(given.get("mask"))
    return given.get("score") is not None or masks.reads_function(given["mask"])


@api("num_splits", jit=False)
@jit_unless_asked("num_splits", prepare_call=_prepare_paged_call)
def paged_attention(
    queries: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    lengths: ArrayLike,
    *,
    mask: masks.Mask | None = None,
    score: Callable[..., Array] | None = None,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    sink: ArrayLike | None = None,
    num_splits: int = 1,
) -> Array:
    r"""Attends from the last tokens of each sequence to keys that lie in pages.

    .. math:: o_t = \sum_{s \le t} p_{ts} v_s, \qquad
        k_s = K[\mathrm{table}[\lfloor s / P \rfloor], s \bmod P]

    Args:
        queries: q, `[..., T, N, H]`, of the tokens at positions length - T to length - 1, each
            of which sees the keys up to its own position; differentiable.
        key_pages: K, `[num_pages, P, K, H]`, P keys a page; differentiable.
        value_pages: V, `[num_pages, P, K, W]`; differentiable.
        page_table: the pages of each sequence, in order, ints `[..., M]`. Entries behind the
            length play no part.
        lengths: keys of each sequence, those of the queries included, ints `[...]`.
        mask: which of these a query may see, by positions (`masks.Window`, say).
        score: as in `attention`, with the same cost outside of `jit`; its index holds
            positions.
        scale: as in `attention`; differentiable.
        soft_cap: as in `attention`, of the products alone; differentiable.
        sink: as in `attention`; differentiable.
        num_splits: into how many parts the pages of a sequence are split, which are visited
            side by side and merged (for accelerators that one query cannot fill).

    Returns:
        Averages `[..., T, N, W]` in the dtype of `queries`.

    Raises:
        TypeError: as `attention`; `page_table` or `lengths` is not of integers.
        ValueError: as `attention`.

    Example:
        >>> pages = jnp.arange(8.0).reshape(4, 2, 1, 1)  # four pages of two keys
        >>> query, table = jnp.zeros((1, 1, 1)), jnp.array([2, 0])
        >>> print(paged_attention(query, pages, pages, table, jnp.array(3)).squeeze())
        3.0

    Note:
        Some 512 keys per sequence are gathered at once: O(T + P) memory beside the pages, and
        time as `attention` over M P keys. A page number out of range gives NaN to the queries
        that see it. Both modes, any order.

    Reference:
        Kwon et al. (2023), Efficient memory management for large language model serving with
        PagedAttention; Dao et al. (2023), Flash-Decoding, for the splits.
    """
    # `attention` checks the rest of the queries; here integers become the default float.
    _, dtype = to_float(queries, name="queries")
    queries = jnp.asarray(queries).astype(dtype)
    key_pages, value_pages = jnp.asarray(key_pages), jnp.asarray(value_pages)
    table, lengths = (
        to_integers(x, name=name).astype(jnp.int32)
        for name, x in (("page_table", page_table), ("lengths", lengths))
    )
    batch = queries.shape[:-3]
    if key_pages.ndim != 4 or value_pages.shape[:3] != key_pages.shape[:3]:
        raise ValueError(
            "`key_pages` must be [num_pages, P, K, H] and `value_pages` [num_pages, P, K, W],"
            f" got {key_pages.shape} and {value_pages.shape}."
        )
    if table.shape[:-1] != batch or table.ndim != len(batch) + 1 or lengths.shape != batch:
        raise ValueError(
            f"`page_table` must be [..., M] and `lengths` [...] with the batch {batch} of"
            f" `queries`, got {table.shape} and {lengths.shape}."
        )
    num_pages, size, num_queries = table.shape[-1], key_pages.shape[1], queries.shape[-3]
    at_once = max(1, min(AT_ONCE // max(1, size), -(-num_pages // num_splits)))
    num_steps = max(1, -(-num_pages // (at_once * num_splits)))
    padding = num_steps * at_once * num_splits - num_pages
    # Negative numbers are no pages, and neither is the padding of the table.
    outside = key_pages.shape[0]
    table = jnp.where(table < 0, outside, table)
    padded = [(0, 0)] * len(batch) + [(0, padding)]
    table = jnp.pad(table, padded, constant_values=outside)
    table = jnp.moveaxis(table.reshape(*batch, num_splits, num_steps, at_once), -2, 0)
    last = jnp.arange(num_queries, 0, -1, dtype=jnp.int32)
    query_positions = lengths[..., None] - last.reshape(*(1,) * len(batch), -1)
    seen = masks.Causal() & masks.Lengths(key_lengths=lengths)
    seen = seen if mask is None else seen & mask

    def attend(keys: Array, values: Array, places: Array) -> _online.OnlineState:
        positions = query_positions, places
        out, lse = attention(
            queries,
            keys,
            values,
            mask=seen,
            score=score,
            scale=scale,
            soft_cap=soft_cap,
            positions=positions,
            return_lse=True,
        )
        total = jnp.where(lse == -jnp.inf, 0, 1).astype(lse.dtype)
        return _online.OnlineState(lse, total, out.astype(lse.dtype))

    shape, width = queries.shape[:-1], value_pages.shape[-1]
    start = _online.init(shape, width, computing_dtype(queries.dtype))
    walk = functools.partial(_walk, attend, start, key_pages, value_pages)
    parts = jax.vmap(walk, (-2, 0))(
        table, jnp.arange(num_splits, dtype=jnp.int32) * num_steps * at_once * size
    )
    out, lse = merge_attention(*parts)
    if sink is not None:
        level = per_head(sink, queries.shape[-2], lse.dtype, "sink").reshape(-1)
        out, _ = with_sink(out, lse, level.reshape(*(1,) * len(batch), 1, -1))
    return out.astype(queries.dtype)


def _walk(
    attend: Callable[..., _online.OnlineState],
    start: _online.OnlineState,
    key_pages: Array,
    value_pages: Array,
    table: Array,
    first: Array,
) -> tuple[Array, Array]:
    """Visits pages `[steps, ..., pages]`, whose first key is at the position `first`."""
    num_keys = table.shape[-1] * key_pages.shape[1]

    def gather(pages: Array, some: Array) -> Array:
        found = jnp.take(pages, some, 0, mode="fill", fill_value=jnp.nan)
        return found.reshape(*some.shape[:-1], num_keys, *pages.shape[2:])

    def visit(state: _online.OnlineState, step: Any) -> tuple[_online.OnlineState, None]:
        number, some = step
        places = first + number * num_keys + jnp.arange(num_keys, dtype=jnp.int32)
        part = attend(gather(key_pages, some), gather(value_pages, some), places)
        return _online.merge(state, part), None

    numbers = jnp.arange(table.shape[0], dtype=jnp.int32)
    start = vary(start, key_pages)
    return _online.finish(lax.scan(visit, start, (numbers, table))[0])
