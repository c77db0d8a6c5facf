"""Softmax as a threshold map: f = exp, whose threshold is the logarithm of the sum.

With scores s = (logits - peak) / temperature and weights w = exp(s), the probabilities are
w / sum(w) and their logarithms s - log1p(rest), where `rest` is the sum of all weights but that
of one peak, so that a log-probability near 0 keeps its digits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._elementary import log1p
from softjax._scores import centre
from softjax._slices import Slices
from softjax._threshold import Family, Solution


class Normalizer(NamedTuple):
    """What normalises the weights of each slice; one number per slice each."""

    peak: Array  # -inf where nothing is kept
    rest: Array  # the sum of all weights but that of one peak
    is_empty: Array  # whether nothing is kept

    @property
    def total(self) -> Array:
        """The sum of all weights; 1 where nothing is kept."""
        return 1 + self.rest

    @property
    def log_total(self) -> Array:
        return log1p(self.rest)


@jax.jit
def normalizer(
    slices: Slices, x: Array, temperature: Array | None, sink: Array | None = None
) -> Normalizer:
    """Sums the weights of slices, and of a sink, which is one more score per slice."""
    # JAX before 0.12 drops custom rules when the reverse of a scan is differentiated again, so
    # this must also differentiate correctly by itself: the peak and the rounding errors are
    # constants, and the weight left out is subtracted, which keeps its derivative.
    peak = lax.stop_gradient(slices.max(x))
    if sink is not None:
        peak = jnp.maximum(peak, lax.stop_gradient(sink))
    args = (peak, temperature)
    num_peaks = slices.sum_of(_is_peak, (x,), *args)
    # Each of several peaks gives up its share of the one weight that is left out.
    share = 1 / jnp.maximum(num_peaks, 1)
    rest = slices.sum_of(_off_peak, (x,), *args, lax.stop_gradient(share))
    is_empty = (num_peaks == 0) & (rest == 0)
    # The sum shows a NaN that is kept; XLA's CPU backend may lose it in the maximum.
    peak += 0 * lax.stop_gradient(rest)
    if sink is not None:
        is_only_peak = (num_peaks == 0) & (_is_peak(sink, *args) > 0)
        rest += weights(sink, *args) - jnp.where(is_only_peak, 1, 0)
    return Normalizer(peak, rest, is_empty)


def weights(x: Array, peak: Array, temperature: Array | None) -> Array:
    """exp(s), one per entry; 0 where dropped. `peak` and `temperature` broadcast."""
    return centre(x, peak, temperature).exp()


def _is_peak(x: Array, peak: Array, temperature: Array | None) -> Array:
    return centre(x, peak, temperature).is_peak.astype(x.dtype)


def _off_peak(x: Array, peak: Array, temperature: Array | None, share: Array) -> Array:
    scores = centre(x, peak, temperature)
    return scores.exp() - jnp.where(scores.is_peak, share, 0)


def _solve(
    slices: Slices,
    logits: Array,
    temperature: Array | None,
    alpha: None,
    k: None,
    sink: Array | None,
) -> Solution:
    del alpha, k
    found = normalizer(slices, logits, temperature, sink)
    wide = None if temperature is None else slices.broadcast(temperature)
    scores = centre(logits, slices.broadcast(found.peak), wide)
    # One divisor per entry: XLA would multiply by the rounded reciprocal of one per slice.
    divisor = jnp.where(scores.dropped, 1, slices.broadcast(found.total))
    probs = jnp.where(scores.dropped, 0, scores.exp() / divisor)
    margins = scores.minus(slices.broadcast(found.log_total))
    sink_prob = None
    if sink is not None:
        sink_prob = weights(sink, found.peak, temperature) / found.total
    complement = found.rest / found.total
    return Solution(probs, margins, found.log_total, complement, sink_prob)


SOFTMAX = Family(_solve)
