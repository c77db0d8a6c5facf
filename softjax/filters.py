"""Filters: score transforms that keep some logits as they are and drop the rest to -inf.

They find their threshold by a search over reductions, never by sorting, and derivatives pass
through what is kept. Dropped (-inf) entries stay dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, PROBABILITY, api
from softjax._cpu import blocked_over_slices
from softjax._float import where_finite
from softjax._inputs import Axis, per_slice, prepare
from softjax._rootfinding import largest_threshold, ordered
from softjax._slices import AlongAxes, Slices
from softjax._softmax import SOFTMAX
from softjax._threshold import solve

Rank = Callable[[Slices, Array], tuple[Array, Array | None]]  # keys and weights

__all__ = ["min_p_filter", "top_k_filter", "top_p_filter", "typical_filter"]


@api("axis", k=NONNEGATIVE)
def top_k_filter(logits: ArrayLike, k: ArrayLike, *, axis: Axis = -1) -> Array:
    r"""Keeps the k largest logits of each slice, and drops the rest to -inf.

    .. math:: \{ i : z_i \ge z_{(k)} \}

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        k: how many to keep, one number or one a slice, traced or not; not differentiable.
            A fraction counts as the next whole number; more than there are keeps all; 0
            keeps none.
        axis: axis, axes, or None for all, along which a slice runs.

    Returns:
        Logits `[*shape]`; -inf where dropped. Ties with the k-th largest are kept.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `k` does not broadcast or is a negative Python number, or `axis` is out of
            range.

    Example:
        >>> print(top_k_filter(jnp.array([1.0, 3.0, 2.0]), 2))
        [-inf   3.   2.]

    Note:
        No sort: 32 counting passes (64 in float64) halve the range of bit patterns; on
        accelerators 11 (22) find three bits each.
    """
    return _filter(logits, axis, k, "k", lambda slices, x: (x, None))


@api("axis", p=PROBABILITY)
def top_p_filter(logits: ArrayLike, p: ArrayLike, *, axis: Axis = -1) -> Array:
    r"""Keeps the smallest set of largest logits that holds a mass p, the nucleus.

    .. math:: \{ i : z_i \ge v \}, \qquad
        v = \max \Big\{ v : \sum_{z_j \ge v} \mathrm{softmax}(z)_j \ge p \Big\}

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        p: probability in [0, 1] that the kept entries reach, one number or one a slice,
            traced or not; not differentiable. The largest logit is always kept.
        axis: axis, axes, or None for all, along which a slice runs.

    Returns:
        Logits `[*shape]`; -inf where dropped. Ties with the smallest one kept are kept.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `p` does not broadcast or is a Python number outside [0, 1], or `axis` is
            out of range.

    Example:
        >>> print(top_p_filter(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.7))
        [-0.6931472 -1.2039728       -inf]

    Note:
        No sort: 32 summing passes (64 in float64) halve the range of bit patterns; on
        accelerators 11 (22) find three bits each.

    Reference:
        Holtzman et al. (2020), The curious case of neural text degeneration.
    """
    return _filter(logits, axis, p, "p", lambda slices, x: (x, solve(SOFTMAX, slices, x).probs))


@api("axis", mass=PROBABILITY)
def typical_filter(logits: ArrayLike, mass: ArrayLike, *, axis: Axis = -1) -> Array:
    r"""Keeps the entries whose information is closest to the entropy, up to a mass.

    Entries are ranked by :math:`|-\log p_i - H|`, least first, and kept until their
    probabilities reach the mass.

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        mass: probability in [0, 1] that the kept entries reach, one number or one a slice,
            traced or not; not differentiable. The most typical entry is always kept.
        axis: axis, axes, or None for all, along which a slice runs.

    Returns:
        Logits `[*shape]`; -inf where dropped. Ties with the last one kept are kept.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `mass` does not broadcast or is a Python number outside [0, 1], or `axis`
            is out of range.

    Example:
        >>> print(typical_filter(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.3))
        [      -inf -1.2039728       -inf]

    Note:
        No sort: 32 summing passes (64 in float64) halve the range of bit patterns; on
        accelerators 11 (22) find three bits each.

    Reference:
        Meister et al. (2023), Locally typical sampling.
    """
    return _filter(logits, axis, mass, "mass", _by_typicality)


def _by_typicality(slices: Slices, x: Array) -> tuple[Array, Array]:
    """Ranks by -|-log p - H|."""
    solution = solve(SOFTMAX, slices, x)
    dropped = solution.margins == -jnp.inf
    log_probs = jnp.where(dropped, 0, solution.margins)
    entropy = -slices.sum(solution.probs * log_probs)
    keys = jnp.where(dropped, -jnp.inf, -jnp.abs(log_probs + slices.broadcast(entropy)))
    return keys, solution.probs


def _filter(logits: ArrayLike, axis: Axis, amount: ArrayLike, name: str, rank: Rank) -> Array:
    """Keeps the entries of the highest rank that together weigh an amount."""
    problem = prepare(logits, axis=axis)
    x, slices = jax.lax.stop_gradient(problem.logits), AlongAxes(problem.axes)
    row = jax.lax.stop_gradient(per_slice(amount, x, problem.axes, name=name))

    @blocked_over_slices
    def keep(slices: AlongAxes, x: Array, amount: Array) -> Array:
        keys, weights = rank(slices, x)
        # All of a mass that adds up to 1 is everything, whatever the sum rounds to.
        amount = jnp.where((weights is not None) & (amount >= 1), jnp.inf, amount)
        keys = ordered(keys)
        threshold = largest_threshold(slices, keys, weights, amount)
        if weights is not None:  # Of a mass of 0, the first entry is still kept.
            lowest = jnp.iinfo(keys.dtype).min
            first = jnp.max(keys, slices.axes, keepdims=True, initial=lowest)
            threshold = jnp.minimum(threshold, first)
        return ~(keys < slices.broadcast(threshold))

    return _drop(problem.logits.astype(problem.dtype), keep(slices, x, row))


@api("axis", min_p=PROBABILITY)
def min_p_filter(logits: ArrayLike, min_p: ArrayLike, *, axis: Axis = -1) -> Array:
    r"""Keeps the logits whose probability is at least a fraction of the largest one.

    .. math:: p_i \ge \mathrm{min\_p} \cdot \max_j p_j

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        min_p: the fraction, in [0, 1], one number or one a slice, traced or not; not
            differentiable. 0 keeps all, 1 only the largest.
        axis: axis, axes, or None for all, along which a slice runs.

    Returns:
        Logits `[*shape]`; -inf where dropped.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `min_p` does not broadcast or is a Python number outside [0, 1], or `axis`
            is out of range.

    Example:
        >>> print(min_p_filter(jnp.array([0.0, -1.0, -5.0]), 0.1))
        [  0.  -1. -inf]

    Reference:
        Nguyen et al. (2024), Turning up the heat: min-p sampling.
    """
    problem = prepare(logits, axis=axis)
    x, slices = problem.logits, AlongAxes(problem.axes)
    min_p = jax.lax.stop_gradient(per_slice(min_p, x, problem.axes, name="min_p"))
    peak = jax.lax.stop_gradient(slices.max(x))
    gap = jnp.where(peak == jnp.inf, -jnp.inf, x - where_finite(peak))
    gap = jnp.where(x == peak, 0, gap)
    kept = ~(gap < jnp.log(min_p))
    return _drop(x.astype(problem.dtype), kept)


@jax.custom_jvp
def _drop(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)


@_drop.defjvp
def _drop_jvp(primals: tuple[Array, Array], tangents: Any) -> tuple[Array, Array]:
    # A rule, for memory: the result tells what is kept, and no mask is remembered beside it.
    filtered = _drop(*primals)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pass_through(filtered: Array, logits_dot: Array) -> Array:
        return jnp.where(filtered == -jnp.inf, 0, logits_dot)

    return filtered, pass_through(filtered, tangents[0])
