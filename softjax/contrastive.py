"""Contrastive losses: which key belongs to which query, over all pairs of a batch.

The N x N similarities are formed block by block and never stored, in either mode, so that
memory grows with N D and not with N^2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import POSITIVE, api
from softjax._autodiff import with_gradient_of
from softjax._inputs import check_flag, computing_dtype, nan_unless_positive, one_number
from softjax._mesh import vary
from softjax._scan import scan_blocks
from softjax.output_layers import linear_cross_entropy
from softjax.output_layers._layer import (
    common_dtype,
    is_master,
    products,
    real_array,
    refuse_bool,
)
from softjax.output_layers._stream import ENTRIES

__all__ = ["info_nce", "siglip_loss"]


@api("symmetric", temperature=POSITIVE)
def info_nce(
    queries: ArrayLike, keys: ArrayLike, *, temperature: ArrayLike, symmetric: bool = True
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

    Returns:
        One number, float32 or wider, at least 0.

    Raises:
        TypeError: `queries` or `keys` is not real.
        ValueError: the shapes are not `[N, D]` alike, or `temperature` is not one number or a
            negative Python number.

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
    queries, keys = _pairs(queries, keys)
    temperature = one_number(temperature, name="temperature")
    check_flag(symmetric, name="symmetric")
    if queries.shape[0] == 0:
        return jnp.zeros((), computing_dtype(queries.dtype))
    labels = jnp.arange(queries.shape[0])
    loss = functools.partial(
        linear_cross_entropy, labels=labels, temperature=temperature, reduction="mean"
    )
    if not symmetric:
        return loss(queries, keys)
    return (loss(queries, keys) + loss(keys, queries)) / 2


@api(temperature=POSITIVE)
def siglip_loss(
    queries: ArrayLike, keys: ArrayLike, *, temperature: ArrayLike, bias: ArrayLike
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

    Returns:
        One number, float32 or wider, at least 0.

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
    queries, keys = _pairs(queries, keys)
    dtype = computing_dtype(queries.dtype)
    rate = 1 / nan_unless_positive(one_number(temperature, name="temperature").astype(dtype))
    refuse_bool(bias, name="bias")
    bias = one_number(bias, name="bias").astype(dtype)
    num_pairs = queries.shape[0]
    if num_pairs == 0:
        return jnp.zeros((), dtype)
    block = max(1, min(num_pairs, ENTRIES // num_pairs))

    @jax.checkpoint
    def part(first: Array, some: Array, queries: Array, rate: Array, bias: Array) -> Array:
        scores = rate * products(queries, some) + bias
        own = jnp.arange(num_pairs)[:, None] == first + jnp.arange(some.shape[0])[None]
        return jnp.sum(jax.nn.softplus(jnp.where(own, -scores, scores)))

    def visit(total: Array, first: Array, some: Array) -> tuple[Array, None]:
        return total + part(first, some, queries, rate, bias), None

    return scan_blocks(visit, vary(jnp.zeros((), dtype), keys), keys, block)[0] / num_pairs


def _pairs(queries: ArrayLike, keys: ArrayLike) -> tuple[Array, Array]:
    """Both in one dtype, because the two directions must see the same similarities."""
    queries, keys = real_array(queries, name="queries"), real_array(keys, name="keys")
    if queries.ndim != 2 or keys.shape != queries.shape:
        raise ValueError(
            f"`queries` and `keys` must be [N, D] alike, got {queries.shape} and {keys.shape}."
        )
    if is_master(queries, keys):
        # Products of numbers that bfloat16 holds are the same in float32.
        keys = with_gradient_of(keys, lax.reduce_precision(keys, 8, 7))
    dtype = common_dtype(queries, keys)
    return queries.astype(dtype), keys.astype(dtype)
