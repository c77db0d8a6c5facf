"""Information in nats, from logits: entropies, divergences and log-probabilities.

Dropped entries (masked by `where`, or equal to -inf) have probability 0 and count as
0 log 0 = 0, in values and in derivatives.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import PROBABILITY, api
from softjax._autodiff import constant_where_infinite, with_gradient_of
from softjax._divergence import divergence_terms, nats_between
from softjax._elementary import log1p
from softjax._float import two_difference, where_finite
from softjax._inputs import (
    Axis,
    Problem,
    check_same_shape,
    known_labels,
    labels_of,
    per_slice,
    prepare,
    resolve_one_axis,
)
from softjax._mesh import AxisName
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX, SOFTMAX, normalizer
from softjax._softmax_stats import row_statistics
from softjax._threshold import Solution, solve

__all__ = ["entropy", "jensen_shannon_divergence", "kl_divergence", "log_prob"]


@api("axis", "axis_name", spread=("logits", "where"))
def entropy(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Computes Shannon's entropy of `softmax`, in nats.

    .. math:: H = -\sum_i p_i \log p_i, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        One number per slice, in [0, log n], in the dtype of `logits`; 0 for a slice that keeps
        nothing.

    Raises:
        TypeError: `logits` is not real, or `where` not bool.
        ValueError: `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(entropy(jnp.array([0.0, 0.0, -jnp.inf])))
        0.6931472

    Note:
        O(n). All terms are at least 0, so a confident slice keeps the digits of its small
        entropy. Both modes, any order.
    """
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    slices = problem.slices
    row = softmax_entropy(slices, problem.logits, None)
    return jnp.squeeze(row, problem.axes).astype(problem.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def softmax_entropy(slices: AlongAxes, x: Array, temperature: Array | None) -> Array:
    """The entropy of softmax(x / temperature), with the axes kept.

    With scores s <= 0 below the peak, log(sum(exp(s))) + <p, -s>: no term is below 0.
    """

    def moment(x: Array, peak: Array, temperature: Array | None, divisor: Array) -> Array:
        scores = centre(x, peak, temperature)
        return -scores.near * (scores.exp() / divisor)

    found = normalizer(slices, x, temperature)
    mean = slices.sum_of(moment, (x,), found.peak, temperature, found.divisor)
    # `found.log_total` is a unit or two more exact, and doubles the program.
    return jnp.log1p(found.rest) + mean


@softmax_entropy.defjvp
def _softmax_entropy_jvp(slices: AlongAxes, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # The derivative is -<p', s>, in which s may be shifted. The terms <p, s'> + (log sum)' are
    # left out because they sum to 0: where the entropy is nearly constant, the rounding errors
    # of these two large terms would be all that is left.

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(primals: Any, tangents: Any) -> Array:
        peak = lax.stop_gradient(slices.max(primals[0]))
        probs = lambda *args: solve(SOFTMAX, slices, *args).probs
        scores = centre(primals[0], peak, primals[1])
        return -slices.sum_of_tangents(jax.jvp(probs, primals, tangents)[1] * scores.near)

    return softmax_entropy(slices, *primals), tangent(primals, tangents)


@api("axis", "axis_name", spread=("p_logits", "q_logits", "where"))
def kl_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Computes the Kullback-Leibler divergence between two softmaxes, in nats.

    .. math:: D(p \,\|\, q) = \sum_i p_i \log (p_i / q_i), \qquad
        p = \mathrm{softmax}(x), \; q = \mathrm{softmax}(y)

    Args:
        p_logits: scores x, `[*shape]`, real or -inf (dropped); differentiable.
        q_logits: scores y, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        One number per slice, at least 0, in the wider dtype of the two; inf (and
        constant) where q drops what p keeps, 0 where p keeps nothing.

    Raises:
        TypeError: logits are not real, or `where` not bool.
        ValueError: the shapes differ, `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(kl_divergence(jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])))
        0.6931472

    Note:
        O(n) time. The terms p log(p/q) + q - p are never negative, and log(p/q) comes from the
        logits themselves, so close distributions keep the digits of their small divergence,
        and of its gradient, however far apart the logits are as a whole. Temporary memory of
        large arrays: half of one for the value, a quarter for the gradient, which keeps both
        logits; about one where slices are short, four where they run along an axis between
        others. Both modes, any order.
    """
    p_problem = prepare(p_logits, axis=axis, where=where, name="p_logits", axis_name=axis_name)
    q_problem = prepare(q_logits, axis=axis, where=where, name="q_logits", axis_name=axis_name)
    check_same_shape(q_problem, p_problem, name="q_logits", other="p_logits")
    row = divergence(p_problem, q_problem)
    dtype = jnp.promote_types(p_problem.dtype, q_problem.dtype)
    return jnp.squeeze(row, p_problem.axes).astype(dtype)


def divergence(p_problem: Problem, q_problem: Problem) -> Array:
    """T^2 D(p || q), one number per slice, with the axes kept. The temperature is that of p."""
    dtype = jnp.promote_types(p_problem.logits.dtype, q_problem.logits.dtype)
    logits = [problem.logits.astype(dtype) for problem in (p_problem, q_problem)]
    slices, temperature = p_problem.slices, p_problem.temperature
    temperature = None if temperature is None else temperature.astype(dtype)
    return nats_between(slices, *logits, temperature)[0]


@api("axis", "axis_name", spread=("logits", "where"))
def log_prob(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Reads the log-probability of one label per slice.

    .. math:: \log p_y = z_y - \log \sum_j m_j e^{z_j}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        axis_name: mesh axis, or axes, over which the classes are spread, inside of
            `jax.shard_map`; None: not spread. The labels count the classes of all devices.

    Returns:
        One number per label, in the dtype of `logits`; -inf for a dropped label, NaN in a slice
        that keeps a NaN and for a label outside [0, n), which is never taken for another class.

    Raises:
        TypeError: `logits` is not real, `labels` not integer, `where` not bool, or `axis`
            not one int.
        ValueError: `labels` is of another shape, `where` does not broadcast, or `axis` is out
            of range.

    Example:
        >>> print(log_prob(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([1, 0])))
        [-6.9314718e-01 -1.9287499e-22]

    Note:
        O(n); as precise as `log_softmax`. It is minus `cross_entropy`, and has its derivative
        rule: the gradient needs no array but its own. Both modes, any order.
    """
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    labels = labels_of(labels, problem.logits.shape, axis)
    slices = AlongAxes((axis,), problem.mesh_axes)
    classes = known_labels(labels, slices.length(problem.logits), None)
    nll = row_statistics(slices, problem.logits, classes.labels).nll
    nll = classes.finish(constant_where_infinite(nll))
    return (0 - nll).astype(problem.dtype)


@api("axis", "axis_name", spread=("p_logits", "q_logits", "where"), weight=PROBABILITY)
def jensen_shannon_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    weight: ArrayLike = 0.5,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Computes the Jensen-Shannon divergence between two softmaxes, in nats.

    .. math:: w D(p \,\|\, m) + (1 - w) D(q \,\|\, m), \qquad m = w p + (1 - w) q, \quad
        p = \mathrm{softmax}(x), \; q = \mathrm{softmax}(y)

    Args:
        p_logits: scores x, `[*shape]`, real or -inf (dropped); differentiable.
        q_logits: scores y, `[*shape]`, real or -inf (dropped); differentiable.
        weight: w of p in their mixture m, in [0, 1], one number or one per slice;
            differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry of both.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        One number per slice, in the wider dtype of the two: at least 0, and at most the entropy
        of (w, 1 - w), which is log 2 for equal weights and is reached where p and q share no
        entry; 0 where either keeps nothing.

    Raises:
        TypeError: logits are not real, or `where` not bool.
        ValueError: the shapes differ, an argument does not broadcast, `weight` is a Python
            number outside of [0, 1], or `axis` is out of range.

    Example:
        >>> p_logits, q_logits = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])
        >>> print(jensen_shannon_divergence(p_logits, q_logits))
        0.6931472

    Note:
        O(n). Divided by w, it tends to D(p || q) as w tends to 0. Both sums are of terms that
        are never negative, and log(p/m) comes from the logits themselves, so close
        distributions keep the digits of their small divergence, and of its gradient. Both
        modes, any order.

    Reference:
        Lin (1991), Divergence measures based on the Shannon entropy; Agarwal et al. (2024),
        On-policy distillation of language models.
    """
    p_problem = prepare(p_logits, axis=axis, where=where, name="p_logits", axis_name=axis_name)
    q_problem = prepare(q_logits, axis=axis, where=where, name="q_logits", axis_name=axis_name)
    check_same_shape(q_problem, p_problem, name="q_logits", other="p_logits")
    dtype = jnp.promote_types(p_problem.logits.dtype, q_problem.logits.dtype)
    x, y = p_problem.logits.astype(dtype), q_problem.logits.astype(dtype)
    weight = per_slice(weight, x, p_problem.axes, name="weight")
    slices = p_problem.slices
    row = _jensen_shannon(slices, x, y, weight)
    out_dtype = jnp.promote_types(p_problem.dtype, q_problem.dtype)
    return jnp.squeeze(row, p_problem.axes).astype(out_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _jensen_shannon(slices: AlongAxes, x: Array, y: Array, weight: Array) -> Array:
    to_p, to_q = _log_ratios_to_mixture(slices, x, y, weight)[2:]
    # An infinite divergence of weight 0 counts as nothing.
    return jnp.where(weight == 0, 0, weight * to_p) + jnp.where(
        weight == 1, 0, (1 - weight) * to_q
    )


@_jensen_shannon.defjvp
def _jensen_shannon_jvp(slices: AlongAxes, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # A rule, because this form of the gradient keeps its digits: the mixture need not be
    # differentiated, since it minimises the weighted sum.
    (x, y, weight), (x_dot, y_dot, weight_dot) = primals, tangents
    probs = lambda z: solve(SOFTMAX, slices, z).probs
    p_dot, q_dot = jax.jvp(probs, (x,), (x_dot,))[1], jax.jvp(probs, (y,), (y_dot,))[1]
    log_p, log_q, to_p, to_q = _log_ratios_to_mixture(slices, x, y, weight)
    finite = lambda log: jnp.where(jnp.isinf(log), 0, log)
    slope = weight * p_dot * finite(log_p) + (1 - weight) * q_dot * finite(log_q)
    slope = slices.sum_of_tangents(slope)
    return _jensen_shannon(slices, *primals), slope + weight_dot * (to_p - to_q)


def _log_ratios_to_mixture(
    slices: AlongAxes, x: Array, y: Array, weight: Array
) -> tuple[Array, Array, Array, Array]:
    """log(p / m) and log(q / m) where they count, D(p || m) and D(q || m)."""
    p, q = (solve(LOG_SOFTMAX, slices, z) for z in (x, y))
    kept_p, kept_q = p.margins != -jnp.inf, q.margins != -jnp.inf
    both = kept_p & kept_q
    apart = jnp.where(both, p.margins, 0) - jnp.where(both, q.margins, 0)
    ratio = with_gradient_of(apart, _corrected_log_ratio(slices, x, y, p, q, apart))
    ratio = jnp.where(both, ratio, jnp.where(kept_p, jnp.inf, -jnp.inf))
    log_p, log_q = mixture_log_ratios(ratio, weight)
    # The sums are 0 or 1. A maximum would not do, because XLA's may drop a NaN.
    some = (slices.sum(p.probs) != 0) & (slices.sum(q.probs) != 0)
    log_p = jnp.where(some & (p.probs != 0), log_p, 0)
    log_q = jnp.where(some & (q.probs != 0), log_q, 0)
    mixture = weight * p.probs + (1 - weight) * q.probs
    to_p, to_q = (
        jnp.where(some, slices.sum(divergence_terms(z.probs, mixture, log)), 0)
        for z, log in ((p, log_p), (q, log_q))
    )
    return log_p, log_q, to_p, to_q


def mixture_log_ratios(ratio: Array, weight: Array) -> tuple[Array, Array]:
    """log(p / m) and log(q / m) of m = weight p + (1 - weight) q, from log(p / q)."""
    # Near 0 these are logarithms of 1 plus a small number. Further away they are logarithms of
    # sums without cancellation, whose exponentials cannot overflow.
    near = jnp.clip(ratio, -1, 1)
    near_p = -log1p((1 - weight) * jnp.expm1(-near))
    near_q = -log1p(weight * jnp.expm1(near))
    above = _minus_log(weight + (1 - weight) * jnp.exp(-jnp.maximum(ratio, 1)))
    below = _minus_log((1 - weight) + weight * jnp.exp(jnp.minimum(ratio, -1)))
    log_p = jnp.where(ratio > 1, above, jnp.where(ratio < -1, below + ratio, near_p))
    log_q = jnp.where(ratio > 1, above - ratio, jnp.where(ratio < -1, below, near_q))
    return log_p, log_q


def _minus_log(x: Array) -> Array:
    """-log(x), and inf with derivative 0 at 0."""
    return jnp.where(x == 0, jnp.inf, -jnp.log(jnp.where(x == 0, 1, x)))


def _corrected_log_ratio(
    slices: AlongAxes, x: Array, y: Array, p: Solution, q: Solution, apart: Array
) -> Array:
    """log(p / q) from the logits, because rounded logarithms have fewer of its digits."""
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    high, low = two_difference(jnp.where(finite, x, 0), jnp.where(finite, y, 0))
    peaks = (where_finite(slices.max(z)) for z in (x, y))
    peak_high, peak_low = two_difference(*peaks)
    shift = slices.max(q.margins) - slices.max(p.margins)
    ratio = jnp.where(finite, ((high - peak_high) - shift) + (low - peak_low), apart)
    # The error of the shift follows from the sum of q, which must be 1.
    near = finite & (jnp.abs(ratio) < 1)
    gain = slices.sum(jnp.where(near, p.probs * jnp.expm1(-ratio), q.probs - p.probs))
    ratio = ratio + log1p(jnp.where(jnp.abs(gain) < 0.5, gain, 0))
    return jax.lax.stop_gradient(ratio)
