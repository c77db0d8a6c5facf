"""Contrastive losses: which key belongs to which query, over all pairs of a batch.

The N x N similarities are formed block by block and never stored, in either mode, so that
memory grows with N D and not with N^2.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softjax._api import POSITIVE, api
from softjax._autodiff import with_gradient_of
from softjax._inputs import (
    check_flag,
    computing_dtype,
    mask,
    nan_unless_positive,
    one_number,
)
from softjax._mesh import AxisName, names_of, vary
from softjax._scan import scan_blocks
from softjax._slices import AlongAxes
from softjax.output_layers import linear_cross_entropy
from softjax.output_layers._layer import (
    common_dtype,
    is_mixed_precision,
    products,
    real_array,
    refuse_bool,
)
from softjax.output_layers._stream import ENTRIES

__all__ = ["info_nce", "siglip_loss"]


@api("symmetric", "axis_name", spread=("queries", "keys", "where"), temperature=POSITIVE)
def info_nce(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    temperature: ArrayLike,
    symmetric: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures the surprise at each query's own key among all keys, and the other way round.

    .. math:: \frac{1}{N} \sum_i -\log
        \frac{e^{\langle q_i, k_i \rangle / T}}{\sum_j e^{\langle q_i, k_j \rangle / T}}

    Args:
        queries: q, `[N, D]`, real, usually of unit length; differentiable.
        keys: k, `[N, D]`; differentiable. The i-th belongs to the i-th query. Where its dtype
            is another, both are promoted as JAX does, except that float32 keys are rounded to
            bfloat16, but not their gradient, for bfloat16 queries.
        temperature: T > 0, one number; differentiable.
        symmetric: whether to average with the same among all queries for each key (CLIP).
        where: mask of the pairs, bool, broadcastable to `[N]`. False leaves out a query and its
            key, whatever they hold: the loss is that of the other pairs alone.
        axis_name: mesh axis, or axes, over which the pairs are spread, inside of
            `jax.shard_map`; None: not spread. Each device compares its own queries with the
            keys of all devices, `[N, D]`, which it gathers. With `symmetric` it also compares
            its own keys with all queries.

    Returns:
        One number, float32 or wider, at least 0; 0 where no pair is left.

    Raises:
        TypeError: `queries` or `keys` is not real, or `where` not bool.
        ValueError: the shapes are not `[N, D]` alike, `where` does not broadcast, or
            `temperature` is not one number or a negative Python number.

    Example:
        >>> print(info_nce(jnp.eye(2), jnp.eye(2), temperature=0.05))
        2.0611537e-09

    Note:
        `linear_cross_entropy` with the keys as weights: O(N^2 D) time and O(N D) memory from
        2048 pairs on (below, the similarities are kept), in both modes and at any order. The
        digits of a confident match are kept.

    Reference:
        van den Oord, Li and Vinyals (2018), Representation learning with contrastive predictive
        coding; Radford et al. (2021), Learning transferable visual models, for the two sides.
    """
    queries, keys, kept = _pairs(queries, keys, where)
    temperature = one_number(temperature, name="temperature")
    check_flag(symmetric, name="symmetric")
    if queries.shape[0] == 0:
        return jnp.zeros((), computing_dtype(queries.dtype))
    pairs = AlongAxes((0,), names_of(axis_name))
    labels = _own_places(pairs, queries)
    masked: dict[str, Any] = {}
    if kept is not None:
        labels = jnp.where(kept, labels, -1)
        masked = {
            "ignore_index": -1,
            "bias": jnp.where(pairs.gather(kept), 0.0, -jnp.inf),
        }
    loss = functools.partial(
        linear_cross_entropy,
        labels=labels,
        temperature=temperature,
        reduction="sum" if pairs.mesh_axes else "mean",
        **masked,
    )
    total = loss(queries, pairs.gather(keys))
    if symmetric:
        total = (total + loss(keys, pairs.gather(queries))) / 2
    if not pairs.mesh_axes:
        return total
    return pairs.sum_over_devices(total) / _num_left(pairs, queries, kept, total.dtype)


@api("axis_name", spread=("queries", "keys", "where"), temperature=POSITIVE)
def siglip_loss(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    temperature: ArrayLike,
    bias: ArrayLike,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures the surprise at each pair's being a match or none, each on its own.

    .. math:: \frac{1}{N} \sum_{i, j} \log\big(1 + e^{-y_{ij} z_{ij}}\big), \qquad
        z_{ij} = \langle q_i, k_j \rangle / T + b, \quad y_{ij} = \pm 1

    Args:
        queries: q, `[N, D]`, real, usually of unit length; differentiable.
        keys: k, `[N, D]`, of any dtype, as in `info_nce`; differentiable. y is 1 where i = j,
            and else -1.
        temperature: T > 0, one number, the inverse of the paper's t; differentiable.
        bias: b, one number; differentiable.
        where: mask of the pairs, as in `info_nce`; N is then the number of those that are left.
        axis_name: mesh axis, or axes, over which the pairs are spread, inside of
            `jax.shard_map`; None: not spread. Each device compares its own queries with the
            keys of all devices, `[N, D]`, which it gathers.

    Returns:
        One number, float32 or wider, at least 0; 0 where no pair is left.

    Raises:
        TypeError: as `info_nce`; also if `bias` is bool.
        ValueError: as `info_nce`; also if `bias` is not one number.

    Example:
        >>> print(siglip_loss(jnp.eye(2), jnp.eye(2), temperature=1.0, bias=0.0).round(4))
        1.0064

    Note:
        O(N^2 D) time and O(N D) memory: the loss takes a block of keys at a time, and the
        derivative forms each block again. Both modes, any order.

    Reference:
        Zhai et al. (2023), Sigmoid loss for language image pre-training.
    """
    queries, keys, kept = _pairs(queries, keys, where)
    dtype = computing_dtype(queries.dtype)
    rate = 1 / nan_unless_positive(one_number(temperature, name="temperature").astype(dtype))
    refuse_bool(bias, name="bias")
    bias = one_number(bias, name="bias").astype(dtype)
    num_pairs = queries.shape[0]
    if num_pairs == 0:
        return jnp.zeros((), dtype)
    block = max(1, min(num_pairs, ENTRIES // num_pairs))
    pairs = AlongAxes((0,), names_of(axis_name))
    keys, kept_keys = pairs.gather(keys), None if kept is None else pairs.gather(kept)
    places = _own_places(pairs, queries)[:, None]
    # This comes before the loop, because its transpose would sum over devices in each block.
    queries, rate, bias = vary((queries, rate, bias), keys)

    @jax.checkpoint
    def part(
        first: Array, some: Any, queries: Array, kept: Array | None, rate: Array, bias: Array
    ) -> Array:
        keys, kept_keys = some
        scores = rate * products(queries, keys) + bias
        own = places == first + jnp.arange(keys.shape[0])[None]
        terms = jax.nn.softplus(jnp.where(own, -scores, scores))
        if kept is not None:
            terms = jnp.where(kept[:, None] & kept_keys[None], terms, 0)
        return jnp.sum(terms)

    def visit(total: Array, first: Array, some: Any) -> tuple[Array, None]:
        return total + part(first, some, queries, kept, rate, bias), None

    start = vary(jnp.zeros((), dtype), (keys, kept))
    total, _ = scan_blocks(visit, start, (keys, kept_keys), block)
    return pairs.sum_over_devices(total) / _num_left(pairs, queries, kept, dtype)


def _num_left(
    pairs: AlongAxes, queries: Array, kept: Array | None, dtype: DTypeLike
) -> Array | int:
    """How many pairs of all devices a mask leaves, or 1 if it leaves none."""
    if kept is None:
        return queries.shape[0] * pairs.num_devices
    return jnp.maximum(pairs.sum_over_devices(jnp.sum(kept, dtype=dtype)), 1)


def _own_places(pairs: AlongAxes, queries: Array) -> Array:
    """The place of each query among the queries of all devices."""
    places = jnp.arange(queries.shape[0])
    if not pairs.mesh_axes:
        return places
    return places + pairs.first_place(queries.shape[0], places.dtype)


def _pairs(
    queries: ArrayLike, keys: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array | None]:
    """Both in one dtype, because both directions must have the same similarities.

    The third result is the mask of the pairs. A pair that it leaves out is replaced by zeros.
    """
    queries, keys = real_array(queries, name="queries"), real_array(keys, name="keys")
    if queries.ndim != 2 or keys.shape != queries.shape:
        raise ValueError(
            f"`queries` and `keys` must be [N, D] alike, got {queries.shape} and {keys.shape}."
        )
    kept = None
    if where is not None:
        kept = mask(where, queries.shape[:1], name="pairs")
        queries, keys = (jnp.where(kept[:, None], x, 0) for x in (queries, keys))
    if is_mixed_precision(queries, keys):
        # Products of numbers that bfloat16 holds are the same in float32.
        keys = with_gradient_of(keys, lax.reduce_precision(keys, 8, 7))
    dtype = common_dtype(queries, keys)
    return queries.astype(dtype), keys.astype(dtype), kept
