"""Samples without replacement: k classes at once, their log-probability, and sums over them.

The k largest logits with Gumbel noise are a sample of k classes, drawn one after the other
without replacement, in that order (Plackett and Luce). The next largest is the threshold that
they passed. From it follows the probability with which each of them passes, and so an unbiased
estimate of sums over all classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _random
from softjax._api import api
from softjax._elementary import expm1_over
from softjax._inputs import Axis, equal, prepare, resolve_one_axis, to_integers
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX
from softjax._threshold import solve
from softjax.reductions import log_sum

__all__ = ["ranking_log_prob", "sample_without_replacement", "weighted_subset"]


def _check_count(given: dict[str, Any]) -> None:
    k = given.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise ValueError(f"`k` must be a whole number from 0 on, got {k!r}.")


@api("k", "axis", refuse=_check_count)
def sample_without_replacement(
    key: Array,
    logits: ArrayLike,
    k: int,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Draws k different classes, one after the other, from the softmax of what is left.

    .. math:: P(i_1, \dots, i_k) = \prod_j \frac{e^{z_{i_j}}}{\sum_{i \notin
        \{i_1, \dots, i_{j-1}\}} e^{z_i}}

    Args:
        key: random key.
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        k: how many to draw, static, at most the number of classes.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        `(indices, log_probs)`, both of the shape of the logits with size k along `axis`: the
        classes, int32, in the order of the draws, and the log-probability of each draw given
        those before it, float32 or wider, which add up to that of the whole sequence and are
        differentiable. Once everything that is kept has been drawn, -1 and 0. A slice that
        keeps a NaN is -1 and NaN.

    Raises:
        TypeError: `key` is no random key, `logits` not real, `where` not bool, or `axis` not
            one int.
        ValueError: `k` is negative or more than there are classes, `where` does not
            broadcast, or `axis` is out of range.

    Example:
        >>> logits = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
        >>> indices, log_probs = sample_without_replacement(jax.random.key(0), logits, 2)
        >>> print(jnp.sort(indices), log_probs)
        [0 2] [-0.6931472  0.       ]

    Note:
        O(n) memory and one partial sort.

    Reference:
        Kool, van Hoof and Welling (2019), Stochastic beams and where to find them.
    """
    scores, axis = _prepare_ranking(key, logits, k, axis, where)
    indices, _ = _largest(key, scores, k)
    log_probs = _log_probs(scores, indices)
    return jnp.moveaxis(indices, -1, axis), jnp.moveaxis(log_probs, -1, axis)


def _prepare_ranking(
    key: Array, logits: ArrayLike, k: int, axis: Axis, where: ArrayLike | None
) -> tuple[Array, int]:
    """The logits with the axis of classes last, and the place that this axis had."""
    _random.check_key(key)
    x = prepare(logits, axis=axis, where=where).logits
    axis = resolve_one_axis(axis, x.ndim)
    if k > x.shape[axis]:
        raise ValueError(f"`k` must be at most the number of classes {x.shape[axis]}, got {k}.")
    return _random.centred(jnp.moveaxis(x, axis, -1), -1), axis


def _largest(key: Array, x: Array, k: int) -> tuple[Array, Array]:
    """The places of the k largest noisy logits, -1 where dropped, and their values."""
    x = lax.stop_gradient(x)
    noisy = jnp.where(x == -jnp.inf, -jnp.inf, x + _random.gumbel(key, x.shape, x.dtype))
    values, places = lax.top_k(noisy, k)
    good = ~jnp.any(jnp.isnan(x), -1, keepdims=True) & (values > -jnp.inf)
    return jnp.where(good, places.astype(jnp.int32), -1), values


@api("axis")
def ranking_log_prob(
    logits: ArrayLike, indices: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    r"""Computes the log-probability of draws without replacement (Plackett and Luce).

    .. math:: \log P(i_j \mid i_1, \dots, i_{j-1}) = z_{i_j} - \log \sum_{i \notin
        \{i_1, \dots, i_{j-1}\}} e^{z_i}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        indices: classes i, int, different from each other, in the order of the draws: of the
            shape of the logits, with any size along `axis`. -1 stands for no draw.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        The log-probability of each draw given those before it, of the shape of `indices`,
        float32 or wider; their sum along `axis` is that of the sequence. 0 for -1, -inf for
        a class that is dropped or was drawn before, NaN for one that does not exist.

    Raises:
        TypeError: `logits` is not real, `indices` not integer, `where` not bool, or `axis`
            not one int.
        ValueError: `indices` or `where` does not fit the logits, or `axis` is out of range.

    Example:
        >>> print(ranking_log_prob(jnp.zeros(3), jnp.array([2, 0, 1])))
        [-1.0986123 -0.6931472  0.       ]

    Note:
        O(n + k). The mass left after each draw is summed from the end, because a difference
        would cancel where the first draws hold nearly all of the mass.

    Reference:
        Plackett (1975), The analysis of permutations.
    """
    x = prepare(logits, axis=axis, where=where).logits
    axis = resolve_one_axis(axis, x.ndim)
    x, indices = jnp.moveaxis(x, axis, -1), to_integers(indices, name="indices")
    shape = indices.shape
    if len(shape) != x.ndim or shape[:axis] + shape[axis + 1 :] != x.shape[:-1]:
        raise ValueError(
            f"`indices` of shape {shape} must have the shape of `logits`"
            f" {jnp.shape(logits)}, with any size along the axis {axis}."
        )
    log_probs = _log_probs(_random.centred(x, -1), jnp.moveaxis(indices, axis, -1))
    return jnp.moveaxis(log_probs, -1, axis)


def _log_probs(scores: Array, indices: Array) -> Array:
    """The log-probability of each draw given those before it, along the last axis."""
    num, k = scores.shape[-1], indices.shape[-1]
    if k == 0 or num == 0:
        return jnp.where(equal(indices, -1), 0, jnp.full(indices.shape, jnp.nan, scores.dtype))
    inside = (indices >= 0) & (indices < num)
    order = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), indices.shape)
    drawn = _first_draws(jnp.where(inside, indices, num).astype(jnp.int32), num)
    place = jnp.where(inside, indices, 0).astype(jnp.int32)
    again = jnp.take_along_axis(drawn, place, -1) != order
    chosen = jnp.where(inside & ~again, jnp.take_along_axis(scores, place, -1), -jnp.inf)
    # The mass left after each draw is summed from the end, where nothing cancels.
    never = log_sum(AlongAxes((scores.ndim - 1,)), jnp.where(drawn == k, scores, -jnp.inf))
    later = jnp.concatenate([chosen[..., 1:], never], -1)
    later = lax.associative_scan(_log_add, later, reverse=True, axis=chosen.ndim - 1)
    possible = chosen > -jnp.inf
    gap = jnp.where(possible, later - jnp.where(possible, chosen, 0), 0)
    log_probs = jnp.where(possible | jnp.isnan(chosen), 0 - jax.nn.softplus(gap), -jnp.inf)
    known = inside | equal(indices, -1)
    log_probs = jnp.where(equal(indices, -1), 0, jnp.where(known, log_probs, jnp.nan))
    broken = jnp.any(jnp.isnan(scores), -1, keepdims=True)
    return jnp.where(broken, jnp.nan, log_probs)


def _first_draws(places: Array, num: int) -> Array:
    """The first draw of each of `num` classes; k for a class that is never drawn."""
    k = places.shape[-1]

    def of_row(places: Array) -> Array:
        first = jnp.full(num + 1, k, jnp.int32)
        return first.at[places].min(jnp.arange(k, dtype=jnp.int32))[:num]

    rows = jax.vmap(of_row)(places.reshape(-1, k))
    return rows.reshape(*places.shape[:-1], num)


def _log_add(a: Array, b: Array) -> Array:
    """log(e^a + e^b). -inf adds nothing, neither to the value nor to the derivative."""
    peak = lax.stop_gradient(jnp.maximum(a, b))
    nothing = peak == -jnp.inf
    anchor = jnp.where(nothing, 0, peak)
    total = jnp.exp(a - anchor) + jnp.exp(b - anchor)
    return jnp.where(nothing, -jnp.inf, anchor + jnp.log(jnp.where(nothing, 1, total)))


@api("k", "axis", refuse=_check_count)
def weighted_subset(
    key: Array,
    logits: ArrayLike,
    k: int,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Draws k different classes, with weights that estimate sums over all classes.

    .. math:: \mathbb{E} \sum_j w_j f(i_j) = \sum_i p_i f(i), \qquad
        w_j = \frac{p_{i_j}}{P(i_j \text{ passes } \kappa)}

    The threshold :math:`\kappa` is the (k+1)-th largest of the logits with Gumbel noise.

    Args:
        key: random key; the classes are those of `sample_without_replacement` for it.
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        k: how many to draw, static, at most the number of classes.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        `(indices, weights)`, both of the shape of the logits with size k along `axis`: the
        classes, int32, and their weights, float32 or wider; -1 and 0 once everything that is
        kept has been drawn, -1 and NaN in a slice that keeps a NaN. Where k covers all that
        is kept, the weights are the probabilities and the sum is exact.

    Raises:
        TypeError: as `sample_without_replacement`.
        ValueError: as `sample_without_replacement`.

    Example:
        >>> indices, weights = weighted_subset(jax.random.key(0), jnp.zeros(4), 4)
        >>> print(weights)
        [0.25 0.25 0.25 0.25]

    Note:
        Unbiased for every f, and so is its gradient in the logits: the weights are
        differentiated through p alone, at a fixed denominator. The variance falls as k grows,
        to 0 where k covers all. O(n) memory and one partial sort. Both modes, any order.

    Reference:
        Kool, van Hoof and Welling (2020), Estimating gradients for discrete random variables
        by sampling without replacement; Duffield, Lund and Thorup (2007), Priority sampling
        for estimation of arbitrary subset sums.
    """
    scores, axis = _prepare_ranking(key, logits, k, axis, where)
    indices, noisy = _largest(key, scores, min(k + 1, scores.shape[-1]))
    indices = indices[..., :k]
    if scores.shape[-1] == 0:
        return jnp.moveaxis(indices, -1, axis), jnp.zeros(indices.shape, scores.dtype)
    threshold = noisy[..., k:] if noisy.shape[-1] > k else -jnp.inf
    drawn, place = indices != -1, jnp.maximum(indices, 0)
    log_probs = solve(LOG_SOFTMAX, AlongAxes((scores.ndim - 1,)), scores).margins
    read = lambda array: jnp.where(drawn, jnp.take_along_axis(array, place, -1), 0)
    gap = read(lax.stop_gradient(scores)) - threshold
    weights = jnp.where(drawn, jnp.exp(read(log_probs) - _log_passing(gap)), 0)
    broken = jnp.any(jnp.isnan(scores), -1, keepdims=True)
    weights = jnp.where(broken, jnp.nan, weights)
    return jnp.moveaxis(indices, -1, axis), jnp.moveaxis(weights, -1, axis)


def _log_passing(gap: Array) -> Array:
    """log(1 - exp(-e^gap)), for a logit with noise that passes a threshold a gap below it."""
    near = gap < 0
    rate = jnp.exp(jnp.where(near, gap, 0))
    surely = jnp.exp(-jnp.exp(jnp.clip(gap, 0, 80)))
    return jnp.where(near, gap + jnp.log(expm1_over(-rate)), jnp.log1p(-surely))
