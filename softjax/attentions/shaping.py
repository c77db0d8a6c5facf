"""Queries, keys and slopes for attention: ways to shape its logits before they are formed.

A factor that belongs to a query or to a key is cheapest applied to it. A change that depends on
the places of both is a score function; ALiBi is the best known.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._inputs import broadcast, check_int, to_float

__all__ = ["alibi_slopes", "qk_norm", "scalable_queries"]


@api("num_heads")
def alibi_slopes(num_heads: int) -> Array:
    r"""Gives each head the slope of its linear bias by distance (ALiBi).

    .. math:: m_i = 2^{-8 i / n}, \qquad i = 1, \ldots, n

    Args:
        num_heads: n, a positive int. If it is not a power of two, the largest power p below
            comes first, and then every other slope of those for 2 p.

    Returns:
        Slopes `[n]` in the default float type, for a score z - m |t - s|.

    Raises:
        TypeError: `num_heads` is not an int.
        ValueError: it is not positive.

    Example:
        >>> slopes = alibi_slopes(4)
        >>> print(slopes)
        [0.25       0.0625     0.015625   0.00390625]
        >>> gap = lambda at: abs(at.query - at.key)
        >>> score = lambda z, at: z - slopes[None, :, None, None] * gap(at)  # for `attention`

    Reference:
        Press, Smith and Lewis (2022), Train short, test long: attention with linear biases
        enables input length extrapolation.
    """
    num_heads = check_int(num_heads, name="num_heads", least=1)
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)]
    exponents += [4 * i / power for i in range(1, 2 * power, 2)][: num_heads - power]
    return jnp.exp2(-jnp.asarray(exponents, jnp.result_type(float)))


@api(epsilon=NONNEGATIVE)
def qk_norm(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    query_scale: ArrayLike = 1.0,
    key_scale: ArrayLike = 1.0,
    epsilon: ArrayLike = 1e-6,
) -> tuple[Array, Array]:
    r"""Normalises queries and keys, so that their products cannot grow.

    .. math:: \hat q_h = g_h q_h \Big/ \sqrt{\epsilon + \tfrac{1}{H} \sum_i q_i^2}

    Args:
        queries: q, `[..., H]`, real; differentiable.
        keys: k, `[..., H]`, real; differentiable.
        query_scale: g for the queries, broadcastable to them: one number, one per component
            `[H]`, or one per head too `[N, H]`; differentiable.
        key_scale: likewise for the keys; differentiable.
        epsilon: at least 0, one number; not differentiable. With 0, a vector of zeros stays.

    Returns:
        Both normalised, each in its own shape and dtype. A vector that holds NaN or inf is NaN,
        with derivative 0.

    Raises:
        TypeError: an argument is not real.
        ValueError: a scale does not broadcast, or `epsilon` is a negative Python number.

    Example:
        >>> queries, keys = qk_norm(jnp.array([3.0, -3.0]), jnp.array([0.0, 1e30]))
        >>> print(queries.round(4), keys.round(4))
        [ 1. -1.] [0.     1.4142]

    Note:
        The squares of huge and tiny numbers neither overflow nor vanish. Vectors of unit length
        and a learned temperature g, as Henry et al. have it, are the same with
        `attention(..., scale=g / H)`.

    Reference:
        Henry et al. (2020), Query-key normalization for transformers; Dehghani et al. (2023),
        Scaling vision transformers to 22 billion parameters.
    """
    given = (("queries", queries, query_scale), ("keys", keys, key_scale))
    first, second = (_unit(x, scale, epsilon, name) for name, x, scale in given)
    return first, second


def _unit(x: ArrayLike, scale: ArrayLike, epsilon: ArrayLike, name: str) -> Array:
    x, out_dtype = to_float(x, name=name)
    option = "query_scale" if name == "queries" else "key_scale"
    scale = to_float(scale, name=option)[0].astype(x.dtype)
    scale = broadcast(scale, x.shape, name=option, target=name)
    epsilon = jax.lax.stop_gradient(to_float(epsilon, name="epsilon")[0]).astype(x.dtype)
    bad = ~jnp.all(jnp.isfinite(x), -1, keepdims=True)
    x = jnp.where(bad, 0, x)
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True, initial=0))
    peak = jnp.maximum(peak, jnp.sqrt(epsilon))
    peak = jnp.where(peak == 0, 1, peak)
    below = x / peak
    mean = jnp.sum(below * below, -1, keepdims=True) / max(1, x.shape[-1])
    square = mean + (jnp.sqrt(epsilon) / peak) ** 2
    unit = below * jax.lax.rsqrt(jnp.where(square == 0, 1, square))
    return jnp.where(bad, jnp.nan, unit * scale).astype(out_dtype)


@api()
def scalable_queries(queries: ArrayLike, counts: ArrayLike, scale: ArrayLike = 1.0) -> Array:
    r"""Scales queries by the logarithm of how many keys they see (scalable softmax).

    .. math:: \hat q_t = s \, q_t \log n_t

    Args:
        queries: q, `[..., T, N, H]`, real; differentiable.
        counts: n, how many keys a query sees, one number or broadcastable to `[..., T]`; not
            differentiable. Below 1 as 1. Under a causal mask, 1, 2, ..., T.
        scale: s, one number or one per head `[N]`; differentiable.

    Returns:
        Queries `[..., T, N, H]` in their dtype, with which the logits of attention are those of
        `scalable_scores`.

    Raises:
        TypeError: an argument is not real.
        ValueError: the shapes do not fit.

    Example:
        >>> print(scalable_queries(jnp.ones((3, 1, 1)), jnp.arange(1, 4)).squeeze())
        [0.        0.6931472 1.0986123]

    Reference:
        Nakanishi (2025), Scalable-softmax is superior for attention.
    """
    x, out_dtype = to_float(queries, name="queries")
    if x.ndim < 3:
        raise ValueError(f"`queries` must be [..., T, N, H], got {x.shape}.")
    counts = jax.lax.stop_gradient(to_float(counts, name="counts")[0]).astype(x.dtype)
    counts = broadcast(counts, x.shape[:-2], name="counts", target="queries [..., T]")
    scale = to_float(scale, name="scale")[0].astype(x.dtype)
    scale = broadcast(scale, x.shape[-2:-1], name="scale", target="the heads of queries")
    factor = jnp.log(jnp.maximum(counts, 1))[..., None] * broadcast(
        scale, x.shape[:-1], name="scale", target="queries"
    )
    return (x * factor[..., None]).astype(out_dtype)
