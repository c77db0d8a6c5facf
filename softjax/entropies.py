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

from softjax._api import api
from softjax._divergence import nats_between
from softjax._inputs import Axis, Problem, labels_of, prepare, resolve_one_axis
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax._softmax import SOFTMAX, normalizer
from softjax._threshold import solve

__all__ = ["entropy", "kl_divergence", "log_prob"]


@api("axis")
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

    def moment(x: Array, peak: Array, temperature: Array | None) -> Array:
        scores = centre(x, peak, temperature)
        return -scores.near * scores.exp()

    found = normalizer(slices, x, temperature)
    mean = slices.sum_of(moment, (x,), found.peak, temperature) / found.total
    return found.log_total + mean


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
        scores = centre(primals[0], peak, primals[1])
        return -slices.sum(jax.jvp(probs, primals, tangents)[1] * scores.near)

    return softmax_entropy(axes, *primals), tangent(primals, tangents)


@api("axis")
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
        One number a slice, at least 0, in the wider dtype of the two; inf (and
        constant) where q drops what p keeps, 0 where p keeps nothing.

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
    return nats_between(p_problem.axes, *logits, temperature)[0]


@api("axis")
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
    labels = labels_of(labels, problem.logits.shape, axis)
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
