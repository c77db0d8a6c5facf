"""The online softmax state: softmax averages that can be built in parts and merged.

The states of two disjoint sets of scores merge into the state of their union, whatever the
sets are: keys in blocks, vocabularies in tiles, devices in a ring. `merge` is associative and
commutative, and `init` is its neutral element. Nothing here turns -inf into NaN.

A peak is a constant for derivatives, since neither the average nor the log-sum-exp depends on
it. All functions are right under plain differentiation, because JAX before 0.12 drops custom
rules when the reverse of a scan is differentiated again.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._float import where_finite


class OnlineState(NamedTuple):
    """The statistics of scores x and values v that their softmax average needs."""

    peak: Array  # max(x), [...]; -inf where nothing has been seen
    total: Array  # sum(exp(x - peak)), [...]
    sums: Array  # sum(exp(x - peak) v), [..., width]


def init(shape: tuple[int, ...], width: int, dtype: DTypeLike) -> OnlineState:
    """The state of no scores at all."""
    peak = jnp.full(shape, -jnp.inf, dtype)
    return OnlineState(peak, jnp.zeros(shape, dtype), jnp.zeros((*shape, width), dtype))


def exp_below_peak(scores: Array) -> tuple[Array, Array]:
    """The peak of scores [..., n], and their exponentials below it; -inf drops a score."""
    peak = lax.stop_gradient(jnp.max(scores, -1, initial=-jnp.inf))
    return peak, jnp.exp(scores - where_finite(peak)[..., None])


def observe(scores: Array, values: Array) -> OnlineState:
    """The state of scores [..., n] with values [..., n, width]."""
    dropped = scores == -jnp.inf
    peak, weights = exp_below_peak(scores)
    kept = jnp.where(dropped[..., None], 0, values)
    return OnlineState(
        peak, jnp.sum(weights, -1), jnp.einsum("...n,...nw->...w", weights, kept)
    )


def merge(a: OnlineState, b: OnlineState) -> OnlineState:
    """The state of both sets of scores together."""
    peak = lax.stop_gradient(jnp.maximum(a.peak, b.peak))
    anchor = where_finite(peak)
    a_scale, b_scale = jnp.exp(a.peak - anchor), jnp.exp(b.peak - anchor)
    return OnlineState(
        peak,
        a.total * a_scale + b.total * b_scale,
        a.sums * a_scale[..., None] + b.sums * b_scale[..., None],
    )


def update(state: OnlineState, scores: Array, values: Array) -> OnlineState:
    """The state after further scores [..., n] with values [..., n, width]."""
    return merge(state, observe(scores, values))


def finish(state: OnlineState) -> tuple[Array, Array]:
    """The softmax average of the values, and the log-sum-exp of the scores.

    They are 0 and -inf where nothing has been seen.
    """
    empty = state.total == 0
    total = jnp.where(empty, 1, state.total)
    lse = jnp.where(empty, -jnp.inf, where_finite(state.peak) + jnp.log(total))
    return state.sums / total[..., None], lse
