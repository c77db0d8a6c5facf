"""Reductions of logits: soft maxima and means, one number per slice.

Dropped entries (masked by `where`, or equal to -inf) do not count, and have derivative
exactly zero. A slice that keeps nothing gives -inf; a kept NaN gives NaN.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import api
from softjax._autodiff import with_gradient_of
from softjax._elementary import expm1_over, log1p, log1p_over
from softjax._float import where_finite
from softjax._inputs import Axis, broadcast, check_flag, per_slice, prepare, to_float
from softjax._mesh import AxisName
from softjax._slices import AlongAxes
from softjax._softmax import SOFTMAX, normalizer
from softjax._threshold import solve

__all__ = ["logmeanexp", "logsumexp", "mellowmax"]


@overload
def logsumexp(
    logits: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    axis_name: AxisName = None,
) -> Array: ...


@overload
def logsumexp(
    logits: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[True],
    axis_name: AxisName = None,
) -> tuple[Array, Array]: ...


@overload
def logsumexp(
    logits: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]: ...


@api("axis", "keepdims", "return_sign", "axis_name", spread=("logits", "where", "weights"))
def logsumexp(
    logits: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]:
    r"""Sums exponentials of the kept logits, and takes the logarithm.

    .. math:: \log \sum_i m_i b_i e^{z_i}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        weights: factors b of either sign, real, broadcastable to `[*shape]`; differentiable,
            also at 0. An entry of weight 0 adds nothing, whatever its logit.
        keepdims: whether the reduced axes stay, with size 1.
        return_sign: whether the sign of the sum is returned as well.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        One number per slice, in the dtype of `logits`; -inf where the sum is 0, as in a slice
        that keeps nothing, and NaN where it is negative. With `return_sign`, the pair
        `(log_size, sign)`: the logarithm of the absolute value of the sum, and -1, 0 or 1 (NaN
        where the sum is), which has no derivative.

    Raises:
        TypeError: `logits` or `weights` is not real, `where` not bool, or `return_sign` not
            True or False.
        ValueError: `where` or `weights` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(logsumexp(jnp.zeros(70000, jnp.float16)))
        11.16
        >>> weights = jnp.array([1.0, -3.0])
        >>> log_size, sign = logsumexp(jnp.zeros(2), weights=weights, return_sign=True)
        >>> print(log_size, sign)
        0.6931472 -1.0

    Note:
        O(n) time; temporary memory of a large array: a quarter of it along the last or the
        first axis, else one array. The error is at most 2.5 units in the last place of the
        larger of the peak and the logarithm of the sum. The derivative is `softmax`; it is 0
        for a slice that keeps nothing. Both modes, any order.

        Infinite logits give inf, with the sign of their weights, and NaN where these have both
        signs, as in SciPy.

    Reference:
        Blanchard, Higham and Higham (2021), Accurately computing the log-sum-exp and softmax
        functions.
    """
    return_sign = check_flag(return_sign, name="return_sign")
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    slices = problem.slices
    if weights is None:
        row = log_sum(slices, problem.logits)
        sign = jnp.where(row == -jnp.inf, 0, jnp.where(jnp.isnan(row), row, 1))
    else:
        row, sign = _weighted(slices, problem.logits, weights)
    if not return_sign:
        row = jnp.where(sign < 0, jnp.nan, row)
        return _squeeze_and_cast(row, problem.axes, keepdims, problem.dtype)
    sign = jax.lax.stop_gradient(sign)
    pair = (_squeeze_and_cast(x, problem.axes, keepdims, problem.dtype) for x in (row, sign))
    return next(pair), next(pair)


@jax.custom_jvp
def log_sum(slices: AlongAxes, logits: Array) -> Array:
    """`logsumexp` of prepared logits, with the axes kept."""
    found = normalizer(slices, logits, None)
    return found.peak + found.log_total


@log_sum.defjvp
def _log_sum_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # A rule to save memory: it remembers the logits alone, and forms the softmax again.
    slices, logits = primals

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(logits: Array, dot: Array) -> Array:
        probs = solve(SOFTMAX, slices, logits).probs
        # The tangent of an entry without weight may be NaN.
        return slices.sum_of_tangents(probs * jnp.where(probs != 0, dot, 0))

    return log_sum(slices, logits), tangent(logits, tangents[1])


def _weighted(slices: AlongAxes, logits: Array, weights: ArrayLike) -> tuple[Array, Array]:
    """The logarithm of the absolute value of the weighted sum, and the sign of the sum."""
    # Plain differentiation is right, because the sum is linear in the weights, also at 0.
    weights, _ = to_float(weights, name="weights")
    weights = broadcast(weights.astype(logits.dtype), logits.shape, name="weights")
    counted = jax.lax.stop_gradient(jnp.where(weights != 0, logits, -jnp.inf))
    peak = slices.max(counted)
    anchor = where_finite(peak)
    # Finite entries add nothing beside infinite ones, and entries of weight 0 add nothing.
    added = (logits != -jnp.inf) & ~((weights == 0) & ~jnp.isfinite(logits))
    added &= ~((peak == jnp.inf) & (logits < jnp.inf))
    is_peak = counted == peak
    finite = with_gradient_of(logits, jnp.where(logits == jnp.inf, anchor, logits))
    scores = jnp.where(added, finite, anchor) - anchor
    # An entry of weight 0 may stand far above the others; its exponential must not overflow.
    highest = jnp.log(jnp.finfo(logits.dtype).max) - 1
    terms = jnp.where(added, weights, 0) * jnp.exp(jnp.minimum(scores, highest))
    terms_at_peak = jnp.where(is_peak, terms, 0)
    at_peak, rest = slices.sum(terms_at_peak), slices.sum(jnp.where(is_peak, 0, terms))
    total = at_peak + rest
    sign = jax.lax.stop_gradient(jnp.sign(total))
    # As in a sum without weights, log1p keeps the digits of the terms beside 1. A small sum
    # takes another form, because subtracting 1 from it would lose its digits.
    small = jnp.abs(total) < 0.5
    beside_one = (sign * at_peak - 1) + sign * rest
    is_zero = total == 0
    log_size = jnp.where(
        small,
        jnp.log(jnp.where(is_zero, 1, jnp.where(small, sign * total, 1))),
        log1p(jnp.where(small, 0, beside_one)),
    )
    row = jnp.where(peak == jnp.inf, jnp.inf, anchor) + log_size
    # A difference of infinite terms has no value, so the result is NaN.
    unknown = (peak == jnp.inf) & (slices.sum(jnp.abs(terms_at_peak)) != jnp.abs(at_peak))
    row = jnp.where(unknown | jnp.isnan(total), jnp.nan, jnp.where(is_zero, -jnp.inf, row))
    return row, jnp.where(unknown, jnp.nan, sign)


@api("axis", "keepdims", "axis_name", spread=("logits", "where"))
def logmeanexp(
    logits: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    axis_name: AxisName = None,
) -> Array:
    r"""Averages exponentials of the kept logits, and takes the logarithm.

    .. math:: \log \Big( \sum_i m_i e^{z_i} \Big/ \sum_i m_i \Big)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        keepdims: whether the reduced axes stay, with size 1.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        One number per slice, in the dtype of `logits`; -inf for a slice that keeps nothing.
        Entries equal to -inf are dropped: they do not count in the mean either.

    Raises:
        TypeError: `logits` is not real, or `where` not bool.
        ValueError: `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(logmeanexp(jnp.array([1.0, 1.0, 1.0])))
        1.0

    Note:
        Cost and derivatives as `logsumexp`.
    """
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    slices = problem.slices
    kept = (problem.logits != -jnp.inf).astype(problem.logits.dtype)
    count = jnp.maximum(slices.sum(kept), 1)
    row = log_sum(slices, problem.logits) - jnp.log(count)
    return _squeeze_and_cast(row, problem.axes, keepdims, problem.dtype)


@api("axis", "axis_name", spread=("values", "where"))
def mellowmax(
    values: ArrayLike,
    *,
    omega: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Takes a soft maximum that is a non-expansion: the log-mean-exp at an inverse scale.

    .. math:: \frac{1}{\omega} \log \frac{1}{n} \sum_i m_i e^{\omega x_i}

    Args:
        values: numbers x, `[*shape]`, real or -inf (dropped); differentiable.
        omega: inverse scale, any real or infinite number, one or one per slice;
            differentiable. It is the mean at 0, the maximum at inf, the minimum at -inf, and
            a soft minimum where negative.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        One number per slice, in the dtype of `values`, between their minimum and their
        maximum; -inf for a slice that keeps nothing.

    Raises:
        TypeError: `values` is not real, or `where` not bool.
        ValueError: `where` or `omega` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(mellowmax(jnp.array([1.0, 2.0, 3.0]), omega=0.0))
        2.0

    Note:
        O(n). Nothing is divided by omega, so values and derivatives are smooth through 0.
        Both modes, any order.

    Reference:
        Asadi and Littman (2017), An alternative softmax operator for reinforcement learning.
    """
    problem = prepare(values, axis=axis, where=where, name="values", axis_name=axis_name)
    x, slices = problem.logits, problem.slices
    omega = per_slice(omega, x, problem.axes, name="omega")
    kept = x != -jnp.inf
    fixed = jax.lax.stop_gradient(x)
    top, bottom = slices.max(fixed), -slices.max(jnp.where(kept, -fixed, -jnp.inf))
    # Relative to the extreme that dominates, every exponent is at most 0. With phi(v) =
    # (e^v - 1)/v and psi(v) = log(1 + v)/v nothing is divided by omega, which may be 0.
    extreme = jnp.where(omega < 0, bottom, top)
    anchor = where_finite(extreme)
    unlimited = jnp.isinf(omega)
    rate = jnp.where(unlimited, 0, omega)
    infinite = x == jnp.inf
    below = jnp.where(kept & ~infinite, x, anchor) - anchor
    # An infinite value adds exp(-inf) = 0 to the sum where omega is negative.
    beyond = 1000 / jnp.where(rate < 0, -rate, 1)
    below = jnp.where(infinite & (rate < 0), beyond, below)
    count = jnp.maximum(slices.sum(kept.astype(x.dtype)), 1)
    mean = slices.sum(jnp.where(kept, below * expm1_over(rate * below), 0)) / count
    row = anchor + mean * log1p_over(rate * mean)
    limit = jnp.where(omega < 0, -slices.max(jnp.where(kept, -x, -jnp.inf)), slices.max(x))
    row = jnp.where(unlimited, limit, row)
    above = (top == jnp.inf) & ((rate > 0) | (bottom == jnp.inf))
    row = jnp.where(above, log_sum(slices, x), row)
    row = jnp.where((top == jnp.inf) & (rate == 0) & ~unlimited, jnp.inf, row)
    row = jnp.where(top == -jnp.inf, -jnp.inf, row)
    row = jnp.where(jnp.isnan(mean), jnp.nan, row)  # A maximum may drop the NaN.
    return _squeeze_and_cast(row, problem.axes, False, problem.dtype)


def _squeeze_and_cast(
    row: Array, axes: tuple[int, ...], keepdims: bool, dtype: jnp.dtype
) -> Array:
    return (row if keepdims else jnp.squeeze(row, axes)).astype(dtype)
