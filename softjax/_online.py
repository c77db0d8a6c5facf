"""The online softmax state: softmax averages that can be built in parts and merged.

Two states of two disjoint sets of scores merge into the state of their union, whatever the
sets: keys in blocks, vocabularies in tiles, devices in a ring. `merge` is associative and
commutative, and `init` is its neutral element; nothing in it makes a NaN of -inf.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softjax._float import where_finite


class State(NamedTuple):
    """Of scores x and values v: what their softmax average needs, and no more."""

    peak: Array  # max(x), [...]; -inf where nothing has been seen
    total: Array  # sum(exp(x - peak)), [...]
    average: Array  # sum(exp(x - peak) v) / total, [..., width]; 0 where nothing was seen


def init(shape: tuple[int, ...], width: int, dtype: DTypeLike) -> State:
    """The state of no scores at all."""
    peak = jnp.full(shape, -jnp.inf, dtype)
    return State(peak, jnp.zeros(shape, dtype), jnp.zeros((*shape, width), dtype))


def observe(scores: Array, values: Array) -> State:
    """The state of scores [..., n] with values [..., n, width]; -inf drops an entry."""
    peak = jnp.max(scores, -1, initial=-jnp.inf)
    dropped = scores == -jnp.inf
    below = jnp.where(dropped, 0, scores - where_finite(peak)[..., None])
    weights = jnp.where(dropped, 0, jnp.exp(below))
    total = jnp.sum(weights, -1)
    shares = weights / jnp.where(total == 0, 1, total)[..., None]
    kept = jnp.where(dropped[..., None], 0, values)
    return State(peak, total, jnp.einsum("...n,...nw->...w", shares, kept))


def merge(a: State, b: State) -> State:
    """The state of both sets of scores together."""
    peak = jnp.maximum(a.peak, b.peak)
    anchor = where_finite(peak)
    a_total = a.total * jnp.exp(a.peak - anchor)
    b_total = b.total * jnp.exp(b.peak - anchor)
    total = a_total + b_total
    share = (b_total / jnp.where(total == 0, 1, total))[..., None]
    return State(peak, total, a.average + share * (b.average - a.average))


def update(state: State, scores: Array, values: Array) -> State:
    """The state after further scores [..., n] with values [..., n, width]."""
    return merge(state, observe(scores, values))


def finish(state: State) -> tuple[Array, Array]:
    """The softmax average of the values, and the log-sum-exp of the scores."""
    empty = state.total == 0
    log_total = jnp.log(jnp.where(empty, 1, state.total))
    return state.average, jnp.where(empty, -jnp.inf, where_finite(state.peak) + log_total)
