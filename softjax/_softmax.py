"""Softmax as a threshold map: f = exp, whose threshold is the logarithm of the sum.

Exact in the working precision. Rounding of logits - peak is put back to first order, and
beside the full sum runs the sum over all but the peak, so that log-probabilities near 0 and
probabilities near 1 keep their distance from it. In small arrays the weights are written out
and summed, in large ones added up as they are formed, and formed again for the result.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._blocks import by_one_thread
from softjax._elementary import exp_of_sum, log1p, log1p_in_two
from softjax._float import sum_in_pairs, sum_in_two, two_difference
from softjax._scores import FAR, centre
from softjax._slices import Slices, join_parts
from softjax._threshold import Family, Solution


def _solve(
    slices: Slices,
    logits: Array,
    temperature: Array | None,
    index: None,
    budget: None,
    sink: Array | None,
) -> Solution:
    # (Written so that plain differentiation would be right too, with the peak a constant and
    # no derivative in what mends rounding: JAX 0.10 differentiates the value twice over without
    # the rule where a scan is differentiated in reverse.)
    del index, budget
    peak = lax.stop_gradient(slices.max(logits))
    if sink is not None:
        peak = jnp.maximum(peak, lax.stop_gradient(sink))
    weights = weigh(slices, logits, peak, temperature)
    peak = weights.peak
    scores = centre(logits, peak, temperature, slices.broadcast)
    num_peaks, others, sink_weight = weights.num_peaks, weights.others, None
    if sink is not None:
        sink_weight = exponentials(sink, peak, temperature)
        is_peak = sink_weight == UNIT
        num_peaks += is_peak.astype(sink.dtype)
        others += _beside_peak(sink_weight, is_peak) / UNIT
    empty = peak == -jnp.inf
    total = jnp.where(empty, 1, num_peaks + others)
    others += jnp.where(empty, 0, num_peaks - 1)
    threshold, lost = log1p_in_two(jnp.where(empty, 0, others))
    # (By quotients, which XLA takes once a slice; cheaper ends it would repeat once an entry.)
    threshold /= jnp.where(empty, 2, 1)
    total /= jnp.where(empty, 2, 1)
    log_total = threshold, lost + weights.lost / total
    probs = _divide(slices, logits, temperature, weights, total, log_total)
    margins = scores.minus(slices.broadcast(threshold))
    threshold = jnp.where(empty, -jnp.inf, threshold)
    leak = None if sink_weight is None else sink_weight / UNIT / total
    return Solution(probs, margins, threshold, lost, others / total, leak)


# Weights are formed times 2^64: of the sum of the others, nothing is lost where XLA flushes
# numbers below the least normal one to 0.
LIFT = 64
UNIT = 2.0**LIFT
FROM_BASE = 256  # entries of a slice from which on probabilities are formed from a base


class Weights(NamedTuple):
    """Exponentials of slices below their peaks."""

    peak: Array  # NaN where one is kept, which XLA's maximum may miss, but no sum
    num_peaks: Array  # how many weights are left out of `others`, one number a slice
    others: Array  # the sum of all the rest
    lost: Array  # most of what rounding took from that
    entries: Callable[[], Array]  # all of them, times 2^64

    def beside_one(self) -> Array:
        """The sum of all but one peak; 0 for a slice that keeps nothing."""
        return self.others + jnp.where(self.peak == -jnp.inf, 0, self.num_peaks - 1)


def weigh(slices: Slices, x: Array, peak: Array, temperature: Array | None) -> Weights:
    """The weights of x, whose slices have these peaks."""
    args = (x, peak, temperature)
    form = functools.partial(exponentials, spread=slices.broadcast)
    marked: Array | None = None
    if slices.parts(x) is None:
        marked = by_one_thread(lambda *args: mark_peaks(form(*args)), slices, *args)
        num_peaks, others, lost = _sum_marked(marked, slices)
    else:
        num_peaks, others, lost = lax.platform_dependent(
            *args,
            cpu=functools.partial(_split_in_parts, slices),
            default=functools.partial(_split_at_once, slices),
        )
    peak = jnp.where(jnp.isnan(others), jnp.nan, peak)

    def entries() -> Array:
        if marked is not None:
            return _unmark_peaks(marked)
        # To form them again takes no longer than to have written them out and read them. (XLA
        # would do that for the sum and here, if these were the same rows.)
        return form(x, *lax.optimization_barrier((peak, temperature)))

    return Weights(peak, num_peaks, others, lost, entries)


def normalise(
    slices: Slices, x: Array, temperature: Array | None
) -> tuple[Array, Array, Array]:
    """The peak, what makes probabilities of `exponentials`, and the logarithm of their sum."""
    weights = weigh(slices, x, lax.stop_gradient(slices.max(x)), temperature)
    peak, others = weights.peak, weights.beside_one()
    # (By quotients, which XLA takes once a slice.)
    return peak, 1 / (1 + others) / UNIT, log1p(others) / jnp.where(peak == -jnp.inf, 2, 1)


def _divide(
    slices: Slices,
    x: Array,
    temperature: Array | None,
    weights: Weights,
    total: Array,
    log_total: tuple[Array, Array],
) -> Array:
    """The weights over their sum, whose logarithm comes in two parts."""

    def exactly(*_: Array) -> Array:
        entries = weights.entries()
        vanish = entries == 0
        # (Of a divisor that is one number a slice XLA would take the rounded inverse. In the
        # unit of the weights its square, which plain differentiation divides by, would be inf.)
        return jnp.where(
            vanish, 0, entries / UNIT / jnp.where(vanish, 1, slices.broadcast(total))
        )

    is_plain = temperature is None and x.dtype == jnp.float32
    if is_plain and slices.parts(x) is not None and x.shape[-1] >= FROM_BASE:
        args = (x, weights.peak, total, *log_total)
        own = lambda x: exp_of_sum(jnp.maximum(x, -FAR))
        return lax.platform_dependent(
            *args,
            cpu=functools.partial(_from_base, jnp.exp),
            default=functools.partial(_from_base, own),
        )
    return exactly()


def _from_base(
    exp: Callable[[Array], Array],
    x: Array,
    peak: Array,
    total: Array,
    log_total: Array,
    lost: Array,
) -> Array:
    """exp(x - base) exp(base - logsumexp), in as few steps as there may be.

    So short a loop XLA's CPU backend unrolls, and it waits for memory no more than a copy does;
    others will form it again rather than write it out. The base of a slice is 0, a power of
    two, or the peak, so that x - base is exact wherever the result is a normal number, and
    neither exponential leaves the range of float32. `exp` may be XLA's where that is exact: on
    CPUs it errs by 1.01 units in the last place, on an H200 by 1.93.
    """
    highest, room = float(jnp.finfo(x.dtype).max), 87.33
    level = peak + log_total
    excess = level - jnp.clip(level, 0, room)
    size = jnp.abs(excess)
    # (The next power of two above: a rounded level may be one itself, and the sum's logarithm
    # on its other side.)
    bits = lax.bitcast_convert_type(size, jnp.int32)
    power = lax.bitcast_convert_type((bits + 0x800000) & ~0x7FFFFF, x.dtype)
    base = jnp.where(size < room, jnp.sign(excess) * jnp.maximum(1, power), peak)
    # Where a NaN is kept, all that is kept is one; infinite entries, if there are any, share.
    poisoned, infinite, empty = jnp.isnan(level), peak == jnp.inf, peak == -jnp.inf
    base = jnp.where(infinite, highest, jnp.where(poisoned | empty, 0, base))
    lowest = jnp.where(poisoned, -highest, jnp.inf)  # of those that are not of the usual kind
    usual = ~(poisoned | infinite | empty)
    below, error = two_difference(*(jnp.where(usual, row, 0) for row in (base, peak)))
    # (No more than the inverse of the peak's exponential, or its probability might exceed 1; of
    # exp(a), without a step between, XLA would take exp(-a) for it.)
    at_peak = jnp.maximum(exp(-below), jnp.finfo(x.dtype).tiny)
    limit = 1 / at_peak
    # (A GPU rounds quotients in either direction.)
    limit = jnp.where(limit * at_peak > 1, limit * (1 - float(jnp.finfo(x.dtype).eps)), limit)
    below, second = two_difference(below, jnp.where(usual, log_total, 0))
    scale = exp_of_sum(jnp.minimum(below, 0), error + second - jnp.where(usual, lost, 0))
    scale = jnp.where(usual, jnp.minimum(scale, limit), 0)
    share = jnp.where(infinite, 1 / total, jnp.nan)
    # (Plain differentiation finds the derivative of the sum in the base.)
    drift = jnp.where(usual, log_total, 0)
    base, scale, share, lowest = map(lax.stop_gradient, (base, scale, share, lowest))
    base += drift - lax.stop_gradient(drift)
    return jnp.where(x < lowest, exp(x - base) * scale, share)


def _split_in_parts(
    slices: Slices, x: Array, peak: Array, temperature: Array | None
) -> tuple[Array, Array, Array]:
    """The numbers of `Weights`, of entries that are not written out."""
    groups = slices.parts(x) or []
    sums = join_parts([_add_up(parts, peak, temperature) for parts in groups])
    num_peaks = slices.sum(_positive(-jnp.sign(lax.stop_gradient(sums))))
    others = slices.total(sums, jnp.abs)
    leading, rest = sum_in_two(lax.stop_gradient(jnp.abs(sums)), slices.sum, slices.broadcast)
    lost = (leading - lax.stop_gradient(others)) + rest
    return num_peaks, others / UNIT, lost / UNIT


def _split_at_once(
    slices: Slices, x: Array, peak: Array, temperature: Array | None
) -> tuple[Array, Array, Array]:
    """The numbers of `Weights`, by one sum of them: for two they would be written out."""
    is_peak = x == slices.broadcast(jnp.where(peak == -jnp.inf, jnp.nan, peak))
    weights = exponentials(x, peak, temperature, spread=slices.broadcast)
    others = slices.total(_beside_peak(weights, is_peak)) / UNIT
    return slices.sum(is_peak.astype(x.dtype)), others, jnp.zeros_like(others)


def _sum_marked(marked: Array, slices: Slices) -> tuple[Array, Array, Array]:
    num_peaks, others = split_at_peak(marked, slices)
    return num_peaks, others, jnp.zeros_like(others)


def exponentials(
    x: Array,
    peak: Array,
    temperature: Array | None,
    *,
    spread: Callable[[Array], Array] = lambda row: row,
) -> Array:
    """The weights of x, times 2^64."""
    return centre(x, peak, temperature, spread).exp(LIFT)


def _add_up(parts: list[Array], peak: Array, temperature: Array | None) -> Array:
    """The sum of parts of slices, but of one peak each, and negative where that was there."""
    found: Array = jnp.zeros((), jnp.bool_)
    terms = []
    once = jax.jit(exponentials)  # Traced for one part.
    for x in parts:
        weights = once(x, peak, temperature)
        is_peak = weights == UNIT
        terms.append(_beside_peak(weights, is_peak & ~found))
        found |= is_peak
    total = sum_in_pairs(terms)
    # (0 has no sign: the least normal number is nothing beside other weights.)
    return jnp.where(found, -total - float(jnp.finfo(total.dtype).tiny), total)


def _beside_peak(weights: Array, is_peak: Array) -> Array:
    """The weights, with 0 for a peak, but for its derivative."""
    return jnp.where(is_peak, weights - UNIT, weights)


def mark_peaks(weights: Array, unit: float = UNIT) -> Array:
    """The weights, with -unit for those of peaks, which are the unit."""
    return jnp.where(weights == unit, weights - 2 * unit, weights)


def _unmark_peaks(marked: Array) -> Array:
    return jnp.where(marked < 0, marked + 2 * UNIT, marked)


def split_at_peak(marked: Array, slices: Slices, unit: float = UNIT) -> tuple[Array, Array]:
    """How many weights are that of the peak, and the sum of all others in its unit."""
    # A running sum rounds every small weight that it adds to the peak's the same way, so
    # the peak is left out; a maximum is the cheapest way to do that.
    total, others = slices.sum(marked), slices.total(lax.stop_gradient(marked), _positive)
    total, others = total / unit, others / unit
    num_peaks = lax.stop_gradient(jnp.round(others - total))
    return num_peaks, others + (total - lax.stop_gradient(total))


def _positive(marked: Array) -> Array:
    # (Of a plain 0, from which the sum starts too, XLA's CPU backend would make an array.)
    return jnp.maximum(marked, jnp.array(-0.0, marked.dtype))


SOFTMAX = Family(_solve)
