"""Softmax as a threshold map: f = exp, whose threshold is the logarithm of the sum.

Exact in the working precision. Rounding of logits - peak is put back to first order, and
beside the full sum runs the sum over all but the peak, so that log-probabilities near 0 and
probabilities near 1 keep their distance from it.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from softjax._blocks import by_one_thread
from softjax._exact import centre, log1p_in_two
from softjax._slices import Slices
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
    scores = centre(logits, peak, temperature, slices.spread)
    marked, marked_sink = exponentials(slices, logits, peak, temperature), None
    if sink is not None:
        marked_sink = _weigh(lambda row: row, sink, peak, temperature)
    num_peaks, others = split_at_peak(marked, slices, marked_sink)
    empty = peak == -jnp.inf
    total = jnp.where(empty, 1, num_peaks + others)
    others += jnp.where(empty, 0, num_peaks - 1)
    threshold, lost = log1p_in_two(jnp.where(empty, 0, others))
    # (By a quotient, which XLA takes once a slice; cheaper ends it would repeat once an entry.)
    threshold /= jnp.where(empty, 2, 1)
    weights = _unmark_peaks(marked)
    vanish = weights == 0
    # (Of a divisor that is one number a slice XLA would take the rounded inverse. In the unit
    # of the weights its square, which plain differentiation divides by, would be inf.)
    divisor = jnp.where(vanish, 1, slices.spread(total))
    probs = jnp.where(vanish, 0, weights / _UNIT / divisor)
    margins = scores.minus(slices.spread(threshold))
    threshold = jnp.where(empty, -jnp.inf, threshold)
    leak = None if marked_sink is None else _unmark_peaks(marked_sink) / _UNIT / total
    return Solution(probs, margins, threshold, lost, others / total, leak)


# Weights are formed times 2^64: of the sum of the others, nothing is lost where XLA flushes
# numbers below the least normal one to 0.
_LIFT = 64
_UNIT = 2.0**_LIFT


def exponentials(slices: Slices, x: Array, peak: Array, temperature: Array | None) -> Array:
    """The weights of x below the peak of its slice, times 2^64, with peaks marked."""
    weigh = functools.partial(_weigh, slices.spread)
    return by_one_thread(weigh, slices, x, peak, temperature)


def _weigh(
    spread: Callable[[Array], Array], x: Array, peak: Array, temperature: Array | None
) -> Array:
    return mark_peaks(centre(x, peak, temperature, spread).exp(_LIFT))


def mark_peaks(weights: Array, unit: float = _UNIT) -> Array:
    """The weights, with -unit for those of peaks, which are the unit."""
    return jnp.where(weights == unit, weights - 2 * unit, weights)


def _unmark_peaks(marked: Array) -> Array:
    return jnp.where(marked < 0, marked + 2 * _UNIT, marked)


def split_at_peak(
    marked: Array, slices: Slices, marked_sink: Array | None = None, unit: float = _UNIT
) -> tuple[Array, Array]:
    """How many weights are that of the peak, and the sum of all others in its unit."""
    # A running sum rounds every small weight that it adds to the peak's the same way, so
    # the peak is left out; a maximum is the cheapest way to do that.
    total, others = slices.sum(marked), slices.total(lax.stop_gradient(marked), _positive)
    if marked_sink is not None:
        total += marked_sink
        others += _positive(lax.stop_gradient(marked_sink))
    total, others = total / unit, others / unit
    num_peaks = lax.stop_gradient(jnp.round(others - total))
    return num_peaks, others + (total - lax.stop_gradient(total))


def _positive(marked: Array) -> Array:
    # (Of a plain 0, from which the sum starts too, XLA's CPU backend would make an array.)
    return jnp.maximum(marked, jnp.array(-0.0, marked.dtype))


SOFTMAX = Family(_solve)
