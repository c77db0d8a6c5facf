"""Sparse maps: from logits to probabilities of which many are exactly zero.

All are threshold maps, p = f(z / T - tau). `entmax` runs from softmax (alpha = 1) through
`entmax15` to `sparsemax` (alpha = 2). Dropped entries (masked by `where`, or equal to -inf)
have weight, and derivative, exactly zero; a slice that keeps nothing is all zeros; a kept NaN
makes its slice NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._cpu import blocked_over_slices
from softjax._elementary import expm1_over, expm1_over_twice, log1p_over
from softjax._float import high_half, two_difference
from softjax._inputs import Axis, nan_outside, per_slice, prepare
from softjax._mesh import AxisName
from softjax._rootfinding import bracketed_newton, newton_from_left
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax._threshold import Family, Solution, probs_of, reciprocal

MAX_ALPHA = 1e4

__all__ = ["entmax", "entmax15", "sparsemax"]


@api("axis", "axis_name", spread=("logits", "where"), temperature=NONNEGATIVE)
def sparsemax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""Projects the logits onto the probability simplex.

    .. math:: p = \arg\min_{p \in \Delta} \lVert p - z / T \rVert^2 = (z / T - \tau)_+

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T in [0, inf], as in `softmax`; differentiable.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Probabilities `[*shape]` in the dtype of `logits`; exactly 0 at and below the
        threshold.

    Raises:
        TypeError: as `softmax`.
        ValueError: as `softmax`.

    Example:
        >>> print(sparsemax(jnp.array([1.0, 0.5, -1.0])))
        [0.75 0.25 0.  ]

    Note:
        Nothing is sorted. Newton's method on the piecewise linear sum ends at the threshold
        after finitely many passes, mostly five to ten, each O(n). On CPU it takes a few slices
        at a time, which stay in the cache. Both modes, any order; where an entry meets the
        threshold, the derivative is that of one side.

    Reference:
        Martins and Astudillo (2016), From softmax to sparsemax. Michelot (1986) for the
        search.
    """
    problem = prepare(
        logits, axis=axis, where=where, temperature=temperature, axis_name=axis_name
    )
    return probs_of(SPARSEMAX, problem)


@blocked_over_slices
def _solve_sparsemax(
    slices: AlongAxes, logits: Array, temperature: Array | None, *_: None
) -> Solution:
    peak = slices.max(logits)
    scores = centre(logits, peak, temperature)

    def step(tau: Array) -> tuple[Array, Array]:
        above = slices.sum_of(lambda x, tau: jnp.maximum(x - tau, 0), (scores.values,), tau)
        count = lambda x, tau: (x > tau).astype(tau.dtype)
        return above - 1, slices.sum_of(count, (scores.values,), tau)

    poison = slices.sum(scores.near * 0)  # NaN if the slice keeps a NaN.
    # The largest weight is at least 1 / n, which bounds tau where n - 1 rounds to n.
    tau = newton_from_left(step, jnp.full_like(peak, -1))
    tau = jnp.minimum(tau, -1 / _length(slices, logits)) + poison
    scores = centre(logits, peak + poison, temperature)

    def split(*args: Any) -> tuple[list[Array], Array]:
        roots, lost = _roots(1, *args)
        return [roots], jnp.where(roots > 0, lost, 0)

    per_slice = (peak, temperature, tau)
    inside = lambda *args: (_roots(1, *args)[0] > 0).astype(logits.dtype)
    count = slices.sum_of(inside, (logits,), *per_slice)
    excess = _excess(slices, split, [1], logits, *per_slice)
    shift = jnp.where(peak == -jnp.inf, 0, excess / jnp.maximum(count, 1))
    margins, lost = _margins(scores.near, scores.errors, slices.broadcast(tau))
    margins = (margins - slices.broadcast(shift)) + lost
    probs = jnp.where(scores.dropped | (margins < _unseen(margins)), 0, margins)
    return Solution(probs, scores.minus(slices.broadcast(tau + shift)), tau + shift)


SPARSEMAX = Family(
    _solve_sparsemax, slope=lambda probs, _: (probs > 0).astype(probs.dtype), is_even=True
)


@api("axis", "axis_name", spread=("logits", "where"), temperature=NONNEGATIVE)
def entmax15(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""Maps logits to sparse probabilities halfway between softmax and sparsemax.

    .. math:: p = \arg\max_{p \in \Delta} \langle p, z / T \rangle
        + \tfrac{4}{3} \sum_j (p_j - p_j^{3/2}) = (z / 2T - \tau)_+^2

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T in [0, inf], as in `softmax`; differentiable.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Probabilities `[*shape]` in the dtype of `logits`, some exactly 0.

    Raises:
        TypeError: as `softmax`.
        ValueError: as `softmax`.

    Example:
        >>> print(entmax15(jnp.array([1.0, 0.0, -2.0])))
        [0.8307189 0.1692811 0.       ]

    Note:
        Nothing is sorted. Newton's method rises to the threshold, and a quadratic on the
        support that it finds ends the search. O(n) per pass; on CPU it takes a few slices at a
        time, which stay in the cache. Both modes, any order, also at saturated inputs.

    Reference:
        Peters, Niculae and Martins (2019), Sparse sequence-to-sequence models.
    """
    problem = prepare(
        logits, axis=axis, where=where, temperature=temperature, axis_name=axis_name
    )
    return probs_of(ENTMAX15, problem)


@blocked_over_slices
def _solve_entmax15(
    slices: AlongAxes, logits: Array, temperature: Array | None, *_: None
) -> Solution:
    peak = slices.max(logits)
    scores = centre(logits, peak, temperature)
    halves = scores.values / 2

    def step(tau: Array) -> tuple[Array, Array]:
        # The root of sqrt(sum) - 1, which is convex too, and closer to linear than the sum.
        above = lambda x, tau: jnp.maximum(x - tau, 0)
        square = slices.sum_of(lambda x, tau: above(x, tau) ** 2, (halves,), tau)
        return square - jnp.sqrt(square), slices.sum_of(above, (halves,), tau)

    poison = slices.sum(scores.near * 0)  # NaN if the slice keeps a NaN.
    tau = newton_from_left(step, jnp.full_like(peak, -1), _close(slices, halves)) + poison
    scores = centre(logits, peak + poison, temperature)

    def split(*args: Any) -> tuple[list[Array], Array]:
        # All products with a leading half are exact; only the smallest is rounded.
        roots, lost = _roots(2, *args)
        lead = high_half(roots)
        rest = roots - lead
        return [lead * lead, 2 * lead * rest], rest * rest + 2 * roots * lost

    per_slice, half = (peak, temperature, tau), float(jnp.finfo(logits.dtype).eps) ** 0.5
    total = lambda term: slices.sum_of(term, (logits,), *per_slice)
    first = total(lambda *args: _roots(2, *args)[0])
    count = total(lambda *args: (_roots(2, *args)[0] > 0).astype(logits.dtype))
    # On a known support the sum of squares is a quadratic in tau, which has a closed solution.
    excess = _excess(slices, split, [1, 4 * half], logits, *per_slice)
    bent = jnp.sqrt(jnp.maximum(first * first - count * excess, 0))
    shift = excess / jnp.where(peak == -jnp.inf, 1, first + bent)
    roots, lost = _margins(scores.near / 2, scores.errors / 2, slices.broadcast(tau))
    roots = (roots - slices.broadcast(shift)) + lost
    # The rounding error of the excess grows with the number of entries in the support.
    unseen = _unseen(roots) * jnp.maximum(1, count / jnp.maximum(first, 1))
    probs = jnp.where(scores.dropped | (roots < slices.broadcast(unseen)), 0, roots * roots)
    threshold = 2 * (tau + shift)
    return Solution(probs, scores.minus(slices.broadcast(threshold)), threshold)


def _roots(
    divisor: int, x: Array, peak: Array, temperature: Array | None, tau: Array
) -> tuple[Array, Array]:
    """How far scores over the divisor are above tau, 0 if below, and the rounding errors."""
    scores = centre(x, peak, temperature)
    margins, lost = _margins(scores.near / divisor, scores.errors / divisor, tau)
    return jnp.where((margins > 0) & ~scores.is_far, margins, 0), lost


def _excess(
    slices: AlongAxes,
    split: Callable[..., tuple[list[Array], Array]],
    bounds: list[float],
    logits: Array,
    peak: Array,
    *per_slice: Array | None,
) -> Array:
    """The rounding error by which the weights of a slice sum to more than 1.

    `split` returns a weight as exact parts, whose sums are within `bounds`, and a rest. Each
    part is then cut in two: a multiple of a unit, chosen so that the sum of multiples is exact,
    and the remainder (Rump, Ogita and Oishi, 2008).
    """
    # Not a literal: XLA would fold (part + unit) - unit to part.
    one = jnp.where(peak == -jnp.inf, 2, jnp.ones_like(peak))

    def cut(*args: Any) -> tuple[list[Array], Array]:
        parts, rest = split(*args[:-1])
        units = [4 * bound * args[-1] for bound in bounds]
        coarse = [(part + unit) - unit for part, unit in zip(parts, units, strict=True)]
        for part, lead in zip(parts, coarse, strict=True):
            rest += part - lead
        return coarse, rest

    total = lambda term: slices.sum_of(term, (logits,), peak, *per_slice, one)
    excess = jnp.full_like(peak, -1)
    for i in range(len(bounds)):  # The large parts first, because they cancel exactly.
        excess += total(lambda *args, i=i: cut(*args)[0][i])
    return excess + total(lambda *args: cut(*args)[1])


def _close(slices: AlongAxes, entries: Array) -> float:
    """The length d of a last step, which leaves an error of at most n d^2 = eps."""
    return math.sqrt(float(jnp.finfo(entries.dtype).eps) / _length(slices, entries))


def _length(slices: AlongAxes, entries: Array) -> float:
    """The number of entries per slice; infinite if the size is open, as in an export."""
    length = slices.length(entries)
    return max(1, length) if isinstance(length, int) else math.inf


def _margins(near: Array, errors: Array, tau: Array) -> tuple[Array, Array]:
    """The differences near + errors - tau, in two parts."""
    margins, lost = two_difference(near, tau)
    return margins, lost + errors


def _unseen(margins: Array) -> float:
    """The resolution of a threshold in two parts: a smaller margin counts as 0."""
    return 4 * float(jnp.finfo(margins.dtype).eps) ** 2


def _root(probs: Array, _: None) -> Array:
    positive = probs > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, probs, 1)), 0)


ENTMAX15 = Family(_solve_entmax15, slope=_root)


@api(
    "axis",
    "axis_name",
    spread=("logits", "where"),
    temperature=NONNEGATIVE,
    alpha=(1, MAX_ALPHA),
)
def entmax(
    logits: ArrayLike,
    alpha: ArrayLike = 1.5,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""Maps logits to probabilities by alpha-entmax, from softmax (1) to sparsemax (2) and on.

    .. math:: p = \arg\max_{p \in \Delta} \langle p, z / T \rangle + H_\alpha(p)
        = \big[(\alpha - 1)(z / T - \tau)\big]_+^{1 / (\alpha - 1)}, \qquad
        H_\alpha(p) = \frac{1}{\alpha (\alpha - 1)} \sum_j (p_j - p_j^\alpha)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        alpha: entropic index in [1, 10000], one number or one per slice; differentiable, with
            the softmax limit at exactly 1. Outside, in an array, it gives NaN.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T in [0, inf], as in `softmax`; differentiable.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Probabilities `[*shape]` in the dtype of `logits`; some exactly 0 where alpha > 1.

    Raises:
        TypeError: as `softmax`.
        ValueError: as `softmax`; also if `alpha` is a Python number outside of that or does not
            broadcast to one per slice.

    Example:
        >>> print(entmax(jnp.array([1.0, 0.0, -2.0]), 2.0))
        [1. 0. 0.]

    Note:
        Nothing is sorted. Newton's method runs within a bracket, on a function whose slope is
        at most -1 for every alpha. A pass takes two exponentials and a logarithm per entry, so
        `entmax15` and `sparsemax` are faster where they apply. The error is within 8 units in
        the last place of the largest weight up to alpha 2. Above 2, weights rise from the edge
        of the support with an infinite slope, so one eps of a score changes a weight there by
        eps^(1 / (alpha - 1)). Both modes, any order.

    Reference:
        Peters, Niculae and Martins (2019), Sparse sequence-to-sequence models; Correia,
        Niculae and Martins (2019), Adaptively sparse transformers, for d/dalpha.
    """
    problem = prepare(
        logits, axis=axis, where=where, temperature=temperature, axis_name=axis_name
    )
    alpha = per_slice(alpha, problem.logits, problem.axes, name="alpha")
    return probs_of(ENTMAX, problem, alpha=alpha)


@blocked_over_slices
def _solve_entmax(
    slices: AlongAxes, logits: Array, temperature: Array | None, alpha: Array, *_: None
) -> Solution:
    # With b = alpha - 1 and c = exp(b rise), the weights relative to the peak's are
    # r_i = (1 + b c s_i)_+^(1/b), exp(s_i) at b = 0, and they are consistent where
    # log(sum r) = rise. That has slope -sum(r^(1-b)) / sum(r) <= -1 in the rise, and
    # p = r / sum(r) is accurate for every alpha.
    peak = slices.max(logits)
    scores = centre(logits, peak, temperature)
    bend = nan_outside(alpha, 1, MAX_ALPHA) - 1
    highest = jnp.log(jnp.finfo(logits.dtype).max) - 1

    def stretch(rise: Array) -> Array:
        return slices.broadcast(jnp.exp(jnp.minimum(bend * rise, highest)))

    def log_ratios(rise: Array) -> tuple[Array, Array]:
        scaled = scores.near * stretch(rise)
        reach = slices.broadcast(bend) * scaled
        inside = ~(scores.is_far | (reach <= -1))
        return jnp.where(inside, scaled * log1p_over(jnp.where(inside, reach, 0)), 0), inside

    def step(rise: Array) -> tuple[Array, Array]:
        logs, inside = log_ratios(rise)
        total = slices.sum(jnp.where(inside, jnp.exp(logs), 0))
        slope = slices.sum(jnp.where(inside, jnp.exp((1 - slices.broadcast(bend)) * logs), 0))
        total = jnp.where(total == 0, 1, total)
        return jnp.log(total) - rise, slope / total

    low = jnp.zeros_like(peak)
    high = jnp.log(jnp.maximum(slices.sum((~scores.is_far).astype(logits.dtype)), 1))
    rise = bracketed_newton(step, low, high, low)
    logs, inside = log_ratios(rise)
    ratios = jnp.where(inside, jnp.exp(logs), 0)
    slopes = jnp.where(inside, jnp.exp((1 - slices.broadcast(bend)) * logs), 0)
    # First-order corrections for the rounding of the rise and of the scores.
    total, mass = slices.sum(ratios), slices.sum(slopes)
    empty = total == 0
    lacking = (jnp.log(jnp.where(empty, 1, total)) - rise) * total * reciprocal(mass)
    ratios += (
        slices.broadcast(lacking) * (ratios - slopes) + slopes * stretch(rise) * scores.errors
    )
    ratios = jnp.maximum(ratios, 0)
    # The sum is exp(rise), which is more accurate where the sum is steep in the rise.
    steep = mass > 4 * total
    total = jnp.where(steep, jnp.exp(rise) * (1 + lacking), slices.sum(ratios))
    scores = centre(logits, peak + total * 0, temperature)  # NaN for all that is kept.
    probs = jnp.where(scores.dropped, 0, ratios / slices.broadcast(jnp.where(empty, 1, total)))
    threshold = rise * expm1_over(-bend * rise)  # (1 - exp(-b rise)) / b
    return Solution(probs, scores.minus(slices.broadcast(threshold)), threshold)


def _entmax_slope(probs: Array, alpha: Array) -> Array:
    """p^(2 - alpha) on the support."""
    positive = probs > 0
    return jnp.where(positive, jnp.where(positive, probs, 1) ** (2 - alpha), 0)


def _entmax_df_dalpha(probs: Array, alpha: Array) -> Array:
    """df/dalpha = -p (ln p)^2 phi((1 - alpha) ln p), phi(v) = (e^v - 1 - v) / v^2."""
    positive = probs > 0
    logs = jnp.log(jnp.where(positive, probs, 1))
    return -probs * logs * logs * expm1_over_twice((1 - alpha) * logs)


ENTMAX = Family(_solve_entmax, slope=_entmax_slope, df_dalpha=_entmax_df_dalpha)
