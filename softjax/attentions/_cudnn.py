"""Attention by NVIDIA's kernels, with every derivative that the tiles have.

cuDNN has a kernel for the value and one for the gradient, and JAX can differentiate neither.
So the value and the transpose are the kernels', and the tangent is that of the streamed form.

What the kernels make of NaN and inf is not documented. They get 0 in place of a bad token, and
NaN is written into the results where a bad token was seen. A query sees either all keys or the
keys up to its own place, so the first bad key and the last bad query tell who has seen one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softjax import masks
from softjax._own_transpose import linear_map

Attend = Callable[..., Array]
Three = tuple[Array, Array, Array]
WIDEST, WIDEST_ON_HOPPER = 128, 256  # heads that the kernels take


class _Cleaned(NamedTuple):
    """The arrays with 0 for bad tokens."""

    arrays: Three
    bad_query: Array  # [batch, T, N]
    bad_key: Array  # [batch, S, K]; also where the value is bad
    seen: Array  # whether a query is bad, or sees a bad key, [batch, T, N]


def why_no_kernel(
    queries: Any,
    keys: Any,
    values: Any,
    *,
    mask: Any,
    scale: Any,
    normalizer: Any,
    return_lse: bool,
    implementation: Any,
    **others: Any,
) -> str:
    """The reason why the kernels cannot serve a call of `attention`; empty if they can."""
    del implementation
    shapes = [jnp.shape(x) for x in (queries, keys, values)]
    dtype, width = jnp.result_type(queries), shapes[0][-1]
    tile_options = (
        "block_size",
        "bias",
        "score",
        "soft_cap",
        "sink",
        "positions",
        "dropout_key",
        "axis_name",
    )
    given = [name for name in tile_options if others[name] is not None]
    if jax.default_backend() != "gpu":
        return "the default device is no GPU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernels are for bfloat16 and float16, and `queries` are {dtype}"
    if shapes[1] != shapes[2]:
        return "`keys` and `values` differ in their widths"
    if width % 8 or not 0 < width <= _widest():
        return f"the width of a head, {width}, is no multiple of 8 up to {_widest()}"
    if 0 in (*shapes[0], *shapes[1]):
        return "there are no tokens"
    if given:
        return f"its kernels have no place for `{given[0]}`"
    if not (scale is None or isinstance(scale, (int, float))):
        return "`scale` is an array, and its kernels take a number"
    if return_lse:
        return "its backward pass has no place for the log-sum-exp"
    if normalizer != "softmax":
        return "it has softmax alone"
    if mask is not None and not _is_causal(mask):
        return "it has no masks but `Causal()`"
    if mask is not None and shapes[0][-3] != shapes[1][-3]:
        return "there are not as many queries as keys under `Causal()`"
    return ""


def _is_causal(mask: Any) -> bool:
    return type(mask) is masks.Causal and isinstance(mask.offset, int) and mask.offset == 0


def _widest() -> int:
    capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    return WIDEST_ON_HOPPER if int(capability.partition(".")[0]) >= 9 else WIDEST


def kernel_attention(
    queries: Array, keys: Array, values: Array, *, mask: Any, scale: Any, attention: Attend
) -> Array:
    """Averages of values; `attention` is the public function, for the tangent."""
    flat = lambda x: x.reshape(-1, *x.shape[-3:])
    scale = None if scale is None else float(scale)
    out, _ = _compiled_average(
        *(flat(queries), flat(keys), flat(values)), mask is not None, scale, attention
    )
    return out.reshape(queries.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _kernel_average(
    queries: Array,
    keys: Array,
    values: Array,
    is_causal: bool,
    scale: float | None,
    attention: Attend,
) -> tuple[Array, list[Array]]:
    """Averages of values, and what the gradient's kernel needs besides."""
    del attention
    cleaned = _cleaned((queries, keys, values), is_causal)
    out, pullback = jax.vjp(_kernel(is_causal, scale), *cleaned.arrays)
    return jnp.where(cleaned.seen[..., None], jnp.nan, out), jax.tree.leaves(pullback)


@functools.partial(_kernel_average.defjvp, symbolic_zeros=True)
def _kernel_average_jvp(
    is_causal: bool, scale: float | None, attention: Attend, primals: Any, tangents: Any
) -> Any:
    out, saved = _kernel_average(*primals, is_causal, scale, attention)
    moves = [not isinstance(dot, SymbolicZero) for dot in tangents]
    moving = lambda xs: [x for x, is_moving in zip(xs, moves, strict=True) if is_moving]

    def tangent(residuals: Any, dots: list[Array]) -> Array:
        arrays, _ = residuals

        def call(moved: list[Array]) -> Array:
            rest = iter(moved)
            pairs = zip(arrays, moves, strict=True)
            whole = (next(rest) if is_moving else x for x, is_moving in pairs)
            mask = masks.Causal() if is_causal else None
            return attention(*whole, mask=mask, scale=scale, implementation="streamed")

        out_dot: Array = jax.jvp(call, (moving(arrays),), (dots,))[1]
        return out_dot

    def transpose(residuals: Any, bar: Array) -> list[Array]:
        arrays, saved = residuals
        return moving(_pull(arrays, saved, bar, is_causal, scale))

    out_dot = linear_map(tangent, transpose, out, (primals, saved), moving(tangents))
    # No derivative depends on these tangents, because `linear_map` takes none through the
    # transpose.
    still = [zero_from_primal(x, symbolic_zeros=True) for x in saved]
    return (out, saved), (out_dot, still)


_compiled_average = jax.jit(_kernel_average, static_argnums=(3, 4, 5))


def _pull(
    arrays: Three, saved: list[Array], bar: Array, is_causal: bool, scale: float | None
) -> Three:
    """The cotangents of the arrays, from that of the result."""
    cleaned = _cleaned(arrays, is_causal)
    pullback_of = lambda *arrays: jax.vjp(_kernel(is_causal, scale), *arrays)[1]
    structure = jax.tree.structure(jax.eval_shape(pullback_of, *cleaned.arrays))
    bar = jnp.where(cleaned.seen[..., None], 0, bar)
    bars: Three = jax.tree.unflatten(structure, saved)(bar)
    # A query that has seen a bad token spoils the gradients of all tokens that it sees, but a
    # bad token is a constant.
    spoilt = _by_key_head(cleaned.seen, arrays[1].shape[2])
    if is_causal:
        place = jnp.arange(spoilt.shape[1])[None, :, None]
        spoilt = place <= jnp.max(jnp.where(spoilt, place, -1), 1, keepdims=True)
    else:
        spoilt = jnp.any(spoilt, 1, keepdims=True)

    def mark(bar: Array, bad: Array, spoilt: Array) -> Array:
        return jnp.where(bad[..., None], 0, jnp.where(spoilt[..., None], jnp.nan, bar))

    return (
        mark(bars[0], cleaned.bad_query, cleaned.seen),
        mark(bars[1], cleaned.bad_key, spoilt),
        mark(bars[2], cleaned.bad_key, spoilt),
    )


def _kernel(is_causal: bool, scale: float | None) -> Attend:
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=is_causal, scale=scale, implementation="cudnn"
    )


def _cleaned(arrays: Three, is_causal: bool) -> _Cleaned:
    queries, keys, values = arrays
    bad_query = ~jnp.all(jnp.isfinite(queries), -1)
    bad_key = ~jnp.all(jnp.isfinite(keys) & jnp.isfinite(values), -1)
    if is_causal:
        place = jnp.arange(keys.shape[1])[None, :, None]
        seen = place >= jnp.min(jnp.where(bad_key, place, place.size), 1, keepdims=True)
    else:
        seen = jnp.any(bad_key, 1, keepdims=True)
    seen = bad_query | jnp.repeat(seen, queries.shape[2] // keys.shape[2], 2)
    clean = lambda bad, x: jnp.where(bad[..., None], 0, x)
    cleaned = clean(bad_query, queries), clean(bad_key, keys), clean(bad_key, values)
    return _Cleaned(cleaned, bad_query, bad_key, seen)


def _by_key_head(seen: Array, num_key_heads: int) -> Array:
    """Whether any of the query heads that share a key head has seen a bad token."""
    batch, num_queries, _ = seen.shape
    return jnp.any(seen.reshape(batch, num_queries, num_key_heads, -1), -1)
