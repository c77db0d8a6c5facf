"""Score transforms: logits in, logits out, to compose before any map.

They cap, scale or bend scores, or drop entries by setting them to -inf. Filters keep the
original logits of what they keep; they find their threshold by a search over reductions, never
by sorting, and derivatives pass through what is kept. Dropped (-inf) entries stay dropped.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._blocks import in_blocks
from softjax._exact import log1p, where_finite
from softjax._exponential import SOFTMAX
from softjax._inputs import (
    NONNEGATIVE,
    PROBABILITY,
    Axis,
    per_class,
    per_slice,
    prepare,
    public,
    resolve_one_axis,
    to_float,
)
from softjax._search import largest_threshold, ordered
from softjax._slices import AlongAxes, Slices
from softjax._threshold import solve

Rank = Callable[[Slices, Array], tuple[Array, Array | None]]  # keys and weights

__all__ = [
    "adjusted_scores",
    "min_p_filter",
    "scalable_scores",
    "sigsoftmax_scores",
    "soft_cap",
    "taylor_scores",
    "top_k_filter",
    "top_p_filter",
    "typical_filter",
]


@public(cap=NONNEGATIVE)
def soft_cap(logits: ArrayLike, cap: ArrayLike) -> Array:
    r"""Bounds logits smoothly.

    .. math:: c \tanh(z / c)

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.
        cap: bound c in [0, inf], broadcastable to `[*shape]`; differentiable inside, with
            derivative 0 at the limits. inf bounds nothing; a negative one in an array gives
            NaN.

    Returns:
        Scores in [-c, c], `[*shape]`, in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `cap` does not broadcast, or is a negative Python number.

    Example:
        >>> print(soft_cap(jnp.array([1.0, 1000.0]), 50.0))
        [ 0.99986655 50.        ]

    Reference:
        Bello et al. (2016), Neural combinatorial optimization with reinforcement learning.
    """
    x, dtype = to_float(logits, name="logits")
    cap = per_slice(cap, x, (), name="cap")
    kept = x != -jnp.inf
    usable = (cap > 0) & (cap < jnp.inf)
    limit = jnp.where(usable, cap, 1)
    # tanh is 1 from 50 on, so that infinite logits need not meet the quotient's derivative.
    reach = 50 * jax.lax.stop_gradient(limit)
    capped = limit * jnp.tanh(jnp.clip(jnp.where(kept, x, 0), -reach, reach) / limit)
    capped = jnp.where(
        usable, capped, jnp.where(cap == jnp.inf, x, jnp.where(cap == 0, 0, jnp.nan))
    )
    return jnp.where(kept, capped, -jnp.inf).astype(dtype)


@public("axis", k=NONNEGATIVE)
def top_k_filter(logits: ArrayLike, k: ArrayLike, *, axis: Axis = -1) -> Array:
    r"""Keeps the k largest logits of each slice, and drops the rest to -inf.

    .. math:: \{ i : z_i \ge z_{(k)} \}

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        k: how many to keep, one number or one a slice, traced or not; not differentiable.
            More than there are keeps all; 0 keeps none.
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
        No sort: 32 counting passes (64 in float64) halve the range of bit patterns.
    """
    return _filter(logits, axis, k, "k", lambda slices, x: (x, None))


@public("axis", p=PROBABILITY)
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
        No sort: 32 summing passes (64 in float64) halve the range of bit patterns.

    Reference:
        Holtzman et al. (2020), The curious case of neural text degeneration.
    """
    return _filter(logits, axis, p, "p", lambda slices, x: (x, solve(SOFTMAX, slices, x).probs))


@public("axis", mass=PROBABILITY)
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
        No sort: 32 summing passes (64 in float64) halve the range of bit patterns.

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
    keys = jnp.where(dropped, -jnp.inf, -jnp.abs(log_probs + slices.spread(entropy)))
    return keys, solution.probs


def _filter(logits: ArrayLike, axis: Axis, amount: ArrayLike, name: str, rank: Rank) -> Array:
    """Keeps the entries of the highest rank that together weigh an amount."""
    problem = prepare(logits, axis=axis)
    x, slices = jax.lax.stop_gradient(problem.logits), AlongAxes(problem.axes)
    row = jax.lax.stop_gradient(per_slice(amount, x, problem.axes, name=name))

    @in_blocks
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
        return ~(keys < slices.spread(threshold))

    return jnp.where(keep(slices, x, row), problem.logits, -jnp.inf).astype(problem.dtype)


@public("axis", min_p=PROBABILITY)
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
    return jnp.where(kept, x, -jnp.inf).astype(problem.dtype)


@public("axis")
def scalable_scores(
    logits: ArrayLike,
    scale: ArrayLike = 1.0,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Scales logits by the logarithm of how many there are (scalable softmax).

    .. math:: s \, z_i \log n, \qquad n = \sum_j m_j

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        scale: factor s, one number or one a slice; differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        Scores `[*shape]` in the dtype of `logits`; -inf where dropped.

    Raises:
        TypeError: `logits` is not real, or `where` not bool.
        ValueError: `where` or `scale` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(scalable_scores(jnp.array([1.0, 0.0])))
        [0.6931472 0.       ]

    Reference:
        Nakanishi (2025), Scalable-softmax is superior for attention.
    """
    problem = prepare(logits, axis=axis, where=where)
    x, slices = problem.logits, AlongAxes(problem.axes)
    scale = per_slice(scale, x, problem.axes, name="scale")
    kept = x != -jnp.inf
    count = slices.sum(kept.astype(x.dtype))
    factor = scale * jnp.log(jnp.maximum(count, 1))
    infinite = x == jnp.inf
    scores = jnp.where(kept & ~infinite, x, 0) * factor
    # One kept entry alone has factor 0, and score 0 whatever it is.
    limit = jnp.where(factor > 0, jnp.inf, jnp.where(factor < 0, -jnp.inf, factor))
    scores = jnp.where(infinite, limit, scores)
    return jnp.where(kept, scores, -jnp.inf).astype(problem.dtype)


@public("axis")
def adjusted_scores(logits: ArrayLike, adjustment: ArrayLike, *, axis: int = -1) -> Array:
    r"""Shifts logits by one number a class: logit adjustment for long tails, or a prior.

    .. math:: z_c + a_c

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.
        adjustment: shifts a, `[C]`, real or -inf (drops a class); differentiable.
            `logit_adjustment` makes them from class counts: added in the training loss, they
            teach the logits of equally frequent classes; subtracted from other logits when
            they are used, they correct for the frequencies.
        axis: the one axis of the C classes.

    Returns:
        Scores `[*shape]` in the dtype of `logits`; -inf where dropped.

    Raises:
        TypeError: `logits` or `adjustment` is not real, or `axis` not one int.
        ValueError: `adjustment` is not `[C]`, or `axis` is out of range.

    Example:
        >>> print(adjusted_scores(jnp.array([1.0, 2.0]), jnp.array([0.0, -jnp.inf])))
        [  1. -inf]

    Note:
        O(n). Both modes, any order.

    Reference:
        Menon et al. (2021), Long-tail learning via logit adjustment.
    """
    x, dtype = to_float(logits, name="logits")
    axis = resolve_one_axis(axis, x.ndim)
    shifts = per_class(adjustment, x.shape[axis], x.dtype, name="adjustment")
    shifts = jnp.expand_dims(shifts, tuple(i for i in range(x.ndim) if i != axis))
    kept = (x != -jnp.inf) & (shifts != -jnp.inf)
    scores = jnp.where(kept, x, 0) + jnp.where(kept, shifts, 0)
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)


@public()
def sigsoftmax_scores(logits: ArrayLike) -> Array:
    r"""Bends logits so that their softmax is sigsoftmax, p proportional to exp(z) sigmoid(z).

    .. math:: z + \log \sigma(z) = 2 z - \log(1 + e^z)

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.

    Returns:
        Scores `[*shape]` in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not real.

    Example:
        >>> print(sigsoftmax_scores(jnp.array([0.0])))
        [-0.6931472]

    Reference:
        Kanai et al. (2018), Sigsoftmax: reanalysis of the softmax bottleneck.
    """
    x, dtype = to_float(logits, name="logits")
    kept = x != -jnp.inf
    scores = x + jax.nn.log_sigmoid(jnp.where(kept, x, 0))
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)


@public()
def taylor_scores(logits: ArrayLike) -> Array:
    r"""Bends logits so that their softmax is Taylor softmax, of weights 1 + z + z^2 / 2.

    .. math:: \log(1 + z + z^2 / 2)

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.

    Returns:
        Scores `[*shape]` in the dtype of `logits`; at least -log 2, as the weights are at
        least 1/2.

    Raises:
        TypeError: `logits` is not real.

    Example:
        >>> print(taylor_scores(jnp.array([0.0, 2.0])))
        [0.        1.609438]

    Reference:
        de Brebisson and Vincent (2016), An exploration of softmax alternatives belonging to
        the spherical loss family.
    """
    x, dtype = to_float(logits, name="logits")
    kept = x != -jnp.inf
    # Away from 0 the square leads; it would overflow.
    far = jnp.abs(x) > 4
    near, inverse = jnp.where(far | ~kept, 0, x), 1 / jnp.where(far & kept, x, 1)
    leading = 2 * jnp.log(jnp.where(far & kept, jnp.abs(x), 1)) - math.log(2)
    large = leading + log1p(2 * inverse + 2 * inverse * inverse)
    scores = jnp.where(far, large, log1p(near + near * near / 2))
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)
