"""Information in nats, from logits: entropies, divergences and log-probabilities.

Dropped entries (masked by `where`, or equal to -inf) have probability 0 and count as
0 log 0 = 0, in values and in derivatives.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._exact import centre, expm1_over_twice_near, log1p
from softjax._exponential import LIFT, SOFTMAX, UNIT, exponentials, weigh
from softjax._inputs import Axis, Problem, check_labels, prepare, public, resolve_one_axis
from softjax._slices import AlongAxes
from softjax._threshold import solve

__all__ = ["entropy", "kl_divergence", "log_prob"]


@public("axis")
def entropy(logits: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Computes Shannon's entropy of `softmax`, in nats.

    .. math:: H = -\sum_i p_i \log p_i, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One number a slice, in [0, log n], in the dtype of `logits`; 0 for a slice that keeps
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
    problem = prepare(logits, axis=axis, where=where)
    row = softmax_entropy(problem.axes, problem.logits, None)
    return jnp.squeeze(row, problem.axes).astype(problem.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def softmax_entropy(axes: tuple[int, ...], x: Array, temperature: Array | None) -> Array:
    """The entropy of softmax(x / temperature), with the axes kept.

    With scores s <= 0 below the peak, log(sum(exp(s))) + <p, -s>: no term is below 0.
    """
    slices = AlongAxes(axes)
    peak = lax.stop_gradient(slices.max(x))

    def moment(x: Array, peak: Array, temperature: Array | None) -> Array:
        scores = centre(x, peak, temperature, lambda row: row)
        return -scores.near * scores.exp(LIFT)

    scale, log_total = _normaliser(slices, x, peak, temperature)
    mean = slices.sum_of(moment, (x,), peak, temperature) * scale
    return jnp.where(peak == -jnp.inf, 0, log_total + mean)


@softmax_entropy.defjvp
def _softmax_entropy_jvp(
    axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    # By -<p', s>, in which s may be shifted: <p, s'> + (log sum)' is 0, and would be the
    # rounding errors of two large terms where the entropy is nearly constant.
    slices = AlongAxes(axes)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(primals: Any, tangents: Any) -> Array:
        peak = lax.stop_gradient(slices.max(primals[0]))
        probs = lambda *args: solve(SOFTMAX, slices, *args).probs
        scores = centre(primals[0], peak, primals[1], slices.spread)
        return -slices.sum(jax.jvp(probs, primals, tangents)[1] * scores.near)

    return softmax_entropy(axes, *primals), tangent(primals, tangents)


def _normaliser(
    slices: AlongAxes, x: Array, peak: Array, temperature: Array | None
) -> tuple[Array, Array]:
    """What makes probabilities of `exponentials`, and the logarithm of the sum of weights."""
    weights = weigh(slices, x, peak, temperature)
    empty = peak == -jnp.inf
    others = jnp.where(empty, 0, weights.others + (weights.num_peaks - 1))
    # (By quotients, as in `_exponential`.)
    return 1 / (1 + others) / UNIT, log1p(others) / jnp.where(empty, 2, 1)


@public("axis")
def kl_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Computes the Kullback-Leibler divergence between two softmaxes, in nats.

    .. math:: D(p \,\|\, q) = \sum_i p_i \log (p_i / q_i), \qquad
        p = \mathrm{softmax}(x), \; q = \mathrm{softmax}(y)

    Args:
        p_logits: scores x, `[*shape]`, real or -inf (dropped); differentiable.
        q_logits: scores y, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One number a slice, at least 0, in the wider dtype of the two; inf where q drops what
        p keeps, 0 where p keeps nothing.

    Raises:
        TypeError: logits are not real, or `where` not bool.
        ValueError: the shapes differ, `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(kl_divergence(jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])))
        0.6931472

    Note:
        O(n) time. Summed as p log(p/q) + q - p, whose terms are never negative, and log(p/q)
        from the logits themselves: close distributions keep the digits of their small
        divergence, and of its gradient, however far apart the logits are as a whole. Large
        arrays take a fifth of one as temporary memory, and one for the gradient, for which both
        logits are kept. Both modes, any order.
    """
    p_problem = prepare(p_logits, axis=axis, where=where, name="p_logits")
    q_problem = prepare(q_logits, axis=axis, where=where, name="q_logits")
    row = divergence(p_problem, q_problem, name="q_logits", target="p_logits")
    dtype = jnp.promote_types(p_problem.dtype, q_problem.dtype)
    return jnp.squeeze(row, p_problem.axes).astype(dtype)


def divergence(p_problem: Problem, q_problem: Problem, *, name: str, target: str) -> Array:
    """T^2 D(p || q), one number a slice, with the axes kept. The temperature is that of p."""
    if p_problem.logits.shape != q_problem.logits.shape:
        raise ValueError(
            f"`{name}` of shape {q_problem.logits.shape} must have the shape"
            f" {p_problem.logits.shape} of `{target}`."
        )
    dtype = jnp.promote_types(p_problem.logits.dtype, q_problem.logits.dtype)
    logits = [problem.logits.astype(dtype) for problem in (p_problem, q_problem)]
    temperature = p_problem.temperature
    temperature = None if temperature is None else temperature.astype(dtype)
    return _divergence(p_problem.axes, *logits, temperature)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _divergence(
    axes: tuple[int, ...], x: Array, y: Array, temperature: Array | None
) -> tuple[Array, Array]:
    """T^2 D(softmax(x / T) || softmax(y / T)), and what `_log_ratio` takes from differences.

    Summed in Bregman's form, p log(p/q) + q - p, whose terms are never negative. It adds up
    to the same, whatever error of first order the log(p/q) of a slice have in common.
    """
    slices = AlongAxes(axes)
    x_peak, y_peak = (lax.stop_gradient(slices.max(z)) for z in (x, y))
    p_scale, p_log = _normaliser(slices, x, x_peak, temperature)
    q_scale, q_log = _normaliser(slices, y, y_peak, temperature)
    rows = (x_peak, y_peak, temperature, p_scale, q_scale)

    def found(x: Array, y: Array, *rows: Array) -> tuple[Array, Array, Array]:
        x_peak, y_peak, temperature, p_scale, q_scale, shift = rows
        p = exponentials(x, x_peak, temperature) * p_scale
        q = exponentials(y, y_peak, temperature) * q_scale
        ratio = _log_ratio(x, y, x_peak, y_peak, temperature, shift)
        return p, q, jnp.where(p == 0, 0, ratio)

    # Rounded logarithms are too coarse for distributions that are closer. What they lack shows
    # in the sum of q - p.
    shift = p_log - q_log
    gain = slices.sum_of(lambda *args: _gain(*found(*args)), (x, y), *rows, shift)
    shift -= log1p(jnp.where(jnp.abs(gain) < 0.5, gain, 0))
    row = slices.sum_of(lambda *args: _nats(*found(*args)), (x, y), *rows, shift)
    if temperature is not None:
        row = row * temperature * temperature
    return jnp.where(x_peak == -jnp.inf, 0, row), shift


@_divergence.defjvp
def _divergence_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    # Of D it is <p', log(p/q)> + <q - p, y'>, in either of which a shift is free.
    slices = AlongAxes(axes)
    row, shift = _divergence(axes, *primals)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(primals: Any, tangents: Any, row: Array, shift: Array) -> Array:
        (x, y, temperature), (x_dot, y_dot, temperature_dot) = primals, tangents
        x_peak, y_peak = (lax.stop_gradient(slices.max(z)) for z in (x, y))
        probs = lambda x: solve(SOFTMAX, slices, x, temperature).probs
        p_dot = jax.jvp(probs, (x,), (x_dot,))[1]
        p, q = (solve(SOFTMAX, slices, z, temperature) for z in (x, y))
        # An infinite divergence is constant, as is that of nothing.
        varies = (row != jnp.inf) & (x_peak != -jnp.inf)
        both, kept = varies & (p.probs != 0), varies & (q.margins != -jnp.inf)
        ratio = _log_ratio(x, y, x_peak, y_peak, temperature, shift)
        margins = [jnp.where(both & kept, z.margins, 0) for z in (p, q)]
        ratio = _known(jnp.where(both, ratio, 0), margins[0] - margins[1])
        gain = _known(_gain(p.probs, q.probs, ratio), q.probs - p.probs)
        y_dot = jnp.where(kept, y_dot, 0)
        if temperature is None:
            return slices.sum(p_dot * ratio + gain * y_dot)
        # In T what is left of 2 T D + T^2 D' is of third order in the logits, term by term.
        terms = _nats(p.probs, q.probs, ratio)
        scores = [
            centre(z, peak, temperature, slices.spread).near
            for z, peak in ((x, x_peak), (y, y_peak))
        ]
        mean = slices.sum(p.probs * scores[0])
        above = jnp.where(both, scores[0] - mean, 0)
        of_q = jnp.where(kept, q.margins, 0) - slices.sum(p.probs * margins[0])
        of_q = jnp.where(both, above - ratio, _known(scores[1] + shift - mean, of_q))
        far = 2 * terms - p.probs * above * ratio - gain * of_q
        near, close, _ = _expand(ratio)
        near &= p.probs != 0
        left = jnp.where(near, p.probs * _third_order(close) - above * terms, far)
        left = slices.sum(jnp.where(varies & (both | kept), left, 0))
        scaled = slices.sum(p_dot * ratio * temperature + gain * y_dot)
        return temperature * (scaled + left * temperature_dot)

    return (row, shift), (tangent(primals, tangents, row, shift), jnp.zeros_like(shift))


@jax.custom_jvp
def _known(value: Array, like: Array) -> Array:
    """A value that is known better than what it is to be differentiated as."""
    del like
    return value


@_known.defjvp
def _known_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _known(*primals), tangents[1]


def _third_order(ratio: Array) -> Array:
    """2 (exp(-r) - 1 + r) + r (exp(-r) - 1) within 1 of 0: r^3 / 6 - r^4 / 12 + ..."""
    num_terms = 21 if ratio.dtype == jnp.float64 else 13
    series = functools.reduce(
        lambda tail, i: tail * -ratio + (i - 2) / math.factorial(i),
        reversed(range(3, num_terms)),
        jnp.full_like(ratio, (num_terms - 2) / math.factorial(num_terms)),
    )
    return ratio * ratio * ratio * series


def _log_ratio(
    x: Array, y: Array, x_peak: Array, y_peak: Array, temperature: Array | None, shift: Array
) -> Array:
    """log(p / q) where p has weight: inf where q is dropped."""
    p, q = (
        centre(z, peak, temperature, lambda row: row) for z, peak in ((x, x_peak), (y, y_peak))
    )
    far = jnp.where(q.dead, q.values, q.near)
    return ((p.near - far) - shift) + (p.errors - jnp.where(q.dead, 0, q.errors))


def _nats(p: Array, q: Array, ratio: Array) -> Array:
    """The terms p log(p / q) + q - p."""
    near, _, curve = _expand(ratio)
    return jnp.where(near & (p != 0), p * curve, p * ratio + (q - p))


def _gain(p: Array, q: Array, ratio: Array) -> Array:
    """The difference q - p, to full precision where the two are close."""
    near, close, curve = _expand(ratio)
    return jnp.where(near & (p != 0), p * (curve - close), q - p)


def _expand(ratio: Array) -> tuple[Array, Array, Array]:
    """Where r = log(p / q) is small, r, and q / p - 1 + r."""
    near = jnp.abs(ratio) < 1
    close = jnp.where(near, ratio, 0)
    return near, close, close * close * expm1_over_twice_near(-close)


@public("axis")
def log_prob(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Reads the log-probability of one label a slice.

    .. math:: \log p_y = z_y - \log \sum_j m_j e^{z_j}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One number a label, in the dtype of `logits`; -inf for a dropped label, NaN for a
        label outside [0, n), which is never taken for another class.

    Raises:
        TypeError: `logits` is not real, `labels` not integer, `where` not bool, or `axis`
            not one int.
        ValueError: `labels` is of another shape, `where` does not broadcast, or `axis` is out
            of range.

    Example:
        >>> print(log_prob(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([1, 0])))
        [-6.9314718e-01 -1.9287499e-22]

    Note:
        O(n); as precise as `log_softmax`. Both modes, any order.
    """
    problem = prepare(logits, axis=axis, where=where)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    labels = check_labels(labels, problem.logits.shape, axis)
    solution = solve(SOFTMAX, AlongAxes((axis,)), problem.logits)
    return pick(solution.margins, labels, axis).astype(problem.dtype)


def pick(x: Array, labels: Array, axis: int) -> Array:
    """The entry of each slice that its label names; NaN where there is none."""
    num_classes = x.shape[axis]
    known = (labels >= 0) & (labels < num_classes)
    if num_classes == 0:
        return jnp.full(labels.shape, jnp.nan, x.dtype)
    index = jnp.expand_dims(jnp.where(known, labels, 0), axis)
    chosen = jnp.squeeze(jnp.take_along_axis(x, index, axis), axis)
    return jnp.where(known, chosen, jnp.nan)
