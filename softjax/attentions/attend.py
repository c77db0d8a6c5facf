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
from softjax._api import api
from softjax._closures import jit_unless_asked
from softjax._inputs import check_flag, computing_dtype
from softjax._mesh import AxisName, Layout, check_axes, names_of, num_devices
from softjax._random import check_key
from softjax.attentions._backends import call_of, choose
from softjax.attentions._contexts import (
    check_context,
    layout_of_tokens,
    places,
    ring_on_explicit_axes,
    with_all_keys,
    with_all_tokens,
)
from softjax.attentions._cudnn import kernel_attention, why_no_kernel
from softjax.attentions._inputs import cut_into_tiles, per_head, three_arrays, with_weigher
from softjax.attentions._ring import ring_average
from softjax.attentions._softmax_tiles import average
from softjax.attentions._sources import check_kinds, of_source, on_each_device
from softjax.attentions._threshold_tiles import MAPS, sparse_average

__all__ = ["attention"]

STATIC = ("cap_bias", "block_size", "implementation", "return_lse", "context", "axis_name")


def _prepare_call(given: dict[str, Any]) -> bool:
    """Checks what `jit` would hide, and returns whether a user's function is passed."""
    return_lse = check_flag(given.get("return_lse", False), name="return_lse")
    check_flag(given.get("cap_bias", False), name="cap_bias")
    soft_cap, rate = given.get("soft_cap"), given.get("dropout_rate", 0.0)
    if isinstance(soft_cap, (int, float)) and not soft_cap > 0:
        raise ValueError(f"`soft_cap` must be positive, got {soft_cap}.")
    number = isinstance(rate, (int, float))
    if number and not 0 <= rate <= 1:
        raise ValueError(f"`dropout_rate` must be in [0, 1], got {rate}.")
    key = given.get("dropout_key")
    if key is not None:
        check_key(key, name="dropout_key")
    elif not (number and rate == 0):
        raise ValueError("`dropout_rate` needs a `dropout_key`.")
    normalizer = given.get("normalizer", "softmax")
    if not isinstance(normalizer, str):
        _check_pair(normalizer)
    elif normalizer != "softmax" and normalizer not in MAPS:
        raise ValueError(
            '`normalizer` must be "softmax", "sparsemax", "entmax15" or a pair of a'
            f" function and a number, got {normalizer!r}."
        )
    if normalizer != "softmax" and (return_lse or given.get("sink") is not None):
        name = "return_lse" if return_lse else "sink"
        raise ValueError(f'`{name}` needs `normalizer="softmax"`.')
    check_context(given)
    given["mask"] = masks.as_mask(given.get("mask"))
    # Inside of `jit`, the offset of a causal mask would be an array, which cuDNN does not take.
    if given.get("implementation") == "cudnn":
        return True
    asked = given.get("score") is not None or not isinstance(normalizer, str)
    return asked or masks.reads_function(given["mask"])


def _check_pair(normalizer: Any) -> None:
    pair = isinstance(normalizer, tuple) and len(normalizer) == 2 and callable(normalizer[0])
    if not pair:
        raise TypeError(
            f"`normalizer` must be a name, or a pair of a function and a number, got"
            f" {normalizer!r}."
        )
    weigh, reach = normalizer
    if isinstance(reach, jax.core.Tracer):
        return
    # Otherwise a map of whole rows, such as `softmax`, would be applied to single scores.
    try:
        with jax.ensure_compile_time_eval():
            at_reach = weigh(jnp.asarray(reach, jnp.result_type(float)))
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            "the function of `normalizer` must be elementwise: of one number it raises an error"
        ) from error
    known = not isinstance(at_reach, jax.core.Tracer)
    if known and not np.allclose(at_reach, 1, atol=1e-3):
        raise ValueError(
            f"the function of `normalizer` must be 1 at its number, {reach}, got {at_reach}."
        )


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
    context: str
    axis_name: AxisName


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


@api(*STATIC, jit=False)
@jit_unless_asked(
    *("normalizer", *STATIC),
    prepare_call=_prepare_call,
    spread=("queries", "keys", "values", "mask", "bias", "positions"),
    layout=layout_of_tokens,
)
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
    context: str = "ring",
    axis_name: AxisName = None,
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
            forms them tile by tile and never keeps one; "cudnn" calls NVIDIA's kernels for the
            value and the gradient, in half precision, without a mask or with `Causal()`, and
            streams the JVP. None takes "dense" for short sequences and "streamed" for others;
            `explain_attention` tells which. The results are the same but for rounding.
        return_lse: whether to return also the logarithm of the sum of exponentials; as `sink`,
            for softmax alone.
        context: how to attend to keys on other devices. In a "ring" queries stay, and keys and
            values travel from device to device; "allgather" brings all keys and values to each
            device; "ulysses" exchanges tokens for heads, so that each device gets all tokens in
            some of the heads, for keys too.
        axis_name: mesh axis, or axes, over which the tokens are spread, inside of
            `jax.shard_map`. T and S are the numbers of tokens on a device, which holds their
            `positions` (by default those of one device follow those of another) and the ids
            of `masks.Segments`. It holds a bias or mask that is an array for its queries and
            the keys of all devices, whose order is that of the devices. On a mesh of explicit
            axes leave it out, because types tell how tokens are spread: T, S and all arrays are
            then those of the whole sequence. If queries, keys and values spread their tokens
            and their batch alike, they meet in a ring. Otherwise, and for sparse maps, dropout,
            "dense" and masks of your own, the compiler gathers the keys.

    Returns:
        Averages `[..., T, N, W]` in the dtype of `queries`; with `return_lse`, a pair of them
        and of the log-sum-exp `[..., T, N]`, float32 or wider, which has its gradient too. A
        query that sees nothing gets exactly 0 (and -inf), with gradient 0. One that holds a
        NaN or inf, or sees one in a key or value, gets NaN, and gives NaN gradients to all that
        it sees; any other is untouched, also in every gradient. A score of +inf has derivative
        0.

    Raises:
        TypeError: an argument is not real, the dtypes of the three differ, or a mask is not of
            bools.
        ValueError: shapes do not fit, an option is out of its range, or a rate of dropout has
            no key. With `axis_name` also: there is no such axis, an array is not spread over
            it, or an option cannot be had, which are dropout and masks of your own, and in a
            ring sparse maps and "dense".

    Example:
        >>> tokens = jnp.eye(3)[:, None, :]  # three tokens, one head
        >>> weights = attention(tokens, tokens, tokens, mask=masks.Causal())[:, 0]
        >>> print((100 * weights).round())
        [[100.   0.   0.]
         [ 36.  64.   0.]
         [ 26.  26.  47.]]

        Spread over a ring of devices, in an order that gives each of them the same work:

        >>> import jax
        >>> from softjax import zigzag_permutation
        >>> mesh, part = jax.make_mesh((1,), ("ring",)), jax.P("ring")
        >>> order = zigzag_permutation(4, mesh.shape["ring"])
        >>> in_parts = jax.NamedSharding(mesh, part)
        >>> tokens, places = jax.device_put((jnp.ones((4, 1, 2))[order], order), in_parts)
        >>> call = lambda x, places: attention(
        ...     x, x, x, mask=masks.Causal(), positions=places, axis_name="ring"
        ... )
        >>> split = jax.shard_map(call, mesh=mesh, in_specs=(part, part), out_specs=part)
        >>> print(split(tokens, places)[:, 0, 0])
        [1. 1. 1. 1.]

    Note:
        O(T S) time, and streamed O(T + S) memory: in the value, the gradient, the JVP and
        Hessian-vector products. Tiles that the mask leaves empty are skipped, in all of these,
        if the mask itself is not batched by `vmap` (leading axes of the arrays are better);
        sparse maps skip those without weight too, once their thresholds are found in some ten
        walks over the scores. Half precision is summed and averaged in float32, and so are
        cotangents; they are rounded once. Both modes, any order.

        In a ring of n devices nothing is gathered, so that the memory of each falls as 1 / n in
        all modes. Each sends n - 1 times its keys and values for the value, and 3 (n - 1) times
        with the gradient, or 4 (n - 1) in half precision. With a causal mask the first device
        would wait for the last; `zigzag_permutation` orders the tokens so that all do the same
        work. Floats that `score` captures should vary over the ring (`jax.lax.pcast`):
        otherwise the derivative skips only the tiles that are empty on all devices at once.
        "allgather" rounds cotangents in half precision before it adds those of the devices.

        A function (`score`, `normalizer`, `masks.Function`) is traced anew in every call, in
        the program of its caller. Outside of `jit` such a call runs operation by operation, and
        compiles its loops anew each time if it is streamed or sparse: call it within `jit`.

    Reference:
        Vaswani et al. (2017), Attention is all you need; Milakov and Gimelshein (2018), Online
        normalizer calculation for softmax; Rabe and Staats (2021), Self-attention does not need
        O(n^2) memory; Dao et al. (2022), FlashAttention. Ainslie et al. (2023), GQA, for shared
        heads; Xiao et al. (2024), Efficient streaming language models with attention sinks.
        Liu et al. (2023), Ring attention with blockwise transformers for near-infinite context;
        Jacobs et al. (2023), DeepSpeed Ulysses, for the two ways to attend over devices.
    """
    if implementation == "cudnn":
        given = dict(locals())
        queries, keys, values, _ = three_arrays(queries, keys, values)
        reason = why_no_kernel(**given)
        call = call_of(queries.shape, keys.shape[-3], block_size)
        choose(call._replace(why_no_kernel=reason), implementation)
        return kernel_attention(
            queries, keys, values, mask=mask, scale=scale, attention=attention
        )
    mesh_axes = names_of(axis_name)
    options: dict[str, Any] = {
        "mask": masks.as_mask(mask),
        "bias": bias,
        "score": score,
        "scale": scale,
        "soft_cap": soft_cap,
        "cap_bias": cap_bias,
        "positions": positions,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "block_size": block_size,
        "implementation": implementation,
    }
    layout: AxisName | Layout = axis_name
    if isinstance(layout, Layout) and layout.tokens:
        options |= {"sink": sink, "return_lse": return_lse}
        return ring_on_explicit_axes(attention, layout.tokens, queries, keys, values, options)
    if mesh_axes:
        check_axes(mesh_axes, {"positions": positions}, ("positions",), ())
        check_kinds(options["mask"])
        if any(x is not None for x in (options["mask"], score, positions)):
            options["positions"] = places(mesh_axes, positions, queries, keys)
        if context != "ring":
            run = with_all_keys if context == "allgather" else with_all_tokens
            options |= {"sink": sink, "normalizer": normalizer, "return_lse": return_lse}
            return run(attention, mesh_axes, queries, keys, values, options)
        options["num_hops"] = num_devices(mesh_axes)
        options["mask"] = of_source(options["mask"], options["num_hops"])
    tiled = cut_into_tiles(queries, keys, values, **options)
    grid, wide = tiled.constants.grid, computing_dtype(tiled.dtype)
    level = None if sink is None else per_head(sink, grid.heads, wide, "sink")
    shaped = lambda x: grid.queries.join(x, 2).swapaxes(1, 2)
    if grid.empty:
        out = jnp.zeros(tiled.shape, tiled.dtype)
        level = jnp.full(1, -jnp.inf, wide) if level is None else level.reshape(-1)
        lse = jnp.broadcast_to(level, tiled.shape[:-1])
        return (out, lse) if return_lse else out
    if normalizer != "softmax":
        weigh, reach = MAPS[normalizer] if isinstance(normalizer, str) else normalizer
        tiled = with_weigher(tiled, weigh)
        found = sparse_average(tiled.operands, tiled.constants, jnp.asarray(reach, wide))
        return shaped(found).reshape(tiled.shape).astype(tiled.dtype)
    if mesh_axes:
        out, lse, _ = ring_average(mesh_axes, on_each_device(tiled.operands), tiled.constants)
    else:
        out, lse, _ = average(tiled.operands, tiled.constants)
    if level is not None:
        out, lse = with_sink(out, lse, jnp.squeeze(level, 3)[None])
    out = shaped(out).reshape(tiled.shape).astype(tiled.dtype)
    return (out, shaped(lse).reshape(tiled.shape[:-1])) if return_lse else out


def with_sink(out: Array, lse: Array, sink: Array) -> tuple[Array, Array]:
    """Averages `[..., W]` after one more score, whose value is 0."""
    # Where both are -inf, neither counts, and the average is 0.
    share = jax.nn.sigmoid(lse - jnp.where(sink == -jnp.inf, 0, sink))
    share = jnp.where((sink == -jnp.inf) & (lse > -jnp.inf), 1, share)
    return out * share[..., None], jnp.logaddexp(lse, sink)
