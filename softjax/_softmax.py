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
    """What normalises the weights of each slice; one number per slice each.

    A peak has weight 1. The peaks are counted apart, so that a small sum of the other weights
    keeps its digits.
    """

    peak: Array  # -inf where nothing is kept
    num_peaks: Array  # 0 where nothing is kept, or where a NaN is
    beside: Array  # the sum of all other weights

    @property
    def total(self) -> Array:
        """The sum of all weights; 0 where nothing is kept."""
        return self.num_peaks + self.beside

    @property
    def rest(self) -> Array:
        """The sum of all weights but that of one peak."""
        # If XLA forms the logits anew for the maximum, it may round them otherwise, and no
        # entry equals the peak. One entry within a rounding of it is then among the others.
        return jnp.where(self.total == 0, 0, (self.num_peaks - 1) + self.beside)

    @property
    def divisor(self) -> Array:
        """The total, or 1 where nothing is kept."""
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
    # constants, and the weight of a peak is subtracted, which keeps its derivative.
    peak = lax.stop_gradient(slices.max(x))
    if sink is not None:
        peak = jnp.maximum(peak, lax.stop_gradient(sink))
    args = (peak, temperature)
    num_peaks = slices.sum_of(_is_peak, (x,), *args)
    beside = slices.sum_of(_beside_peak, (x,), *args)
    if sink is not None:
        num_peaks += _is_peak(sink, *args)
        beside += _beside_peak(sink, *args)
    return Normalizer(peak, num_peaks, beside)


def weights(x: Array, peak: Array, temperature: Array | None) -> Array:
    """exp(s), one per entry; 0 where dropped. `peak` and `temperature` broadcast."""
    return centre(x, peak, temperature).exp()


def _is_peak(x: Array, peak: Array, temperature: Array | None) -> Array:
    return centre(x, peak, temperature).is_peak.astype(x.dtype)


def _beside_peak(x: Array, peak: Array, temperature: Array | None) -> Array:
    """The weights, but 0 for a peak."""
    scores = centre(x, peak, temperature)
    return scores.exp() - scores.is_peak.astype(x.dtype)


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
    peak = found.peak
    wide = None if temperature is None else slices.broadcast(temperature)
    scores = centre(logits, slices.broadcast(peak), wide)
    # A NaN shows in the sums, because XLA's CPU backend may lose it in the maximum. So an entry
    # that has no weight beside an infinite peak must meet the sums too.
    dropped = logits == -jnp.inf
    margins = scores.values - slices.broadcast(found.log_total)
    # One divisor per entry: XLA would multiply by the rounded reciprocal of one per slice.
    divisor = jnp.where(dropped, 1, slices.broadcast(found.total))
    return Solution(
        probs=jnp.where(dropped, 0, scores.exp() / divisor),
        margins=jnp.where(dropped, -jnp.inf, margins),
        threshold=found.log_total,
        complement=found.rest / found.divisor,
        sink_prob=None if sink is None else weights(sink, peak, temperature) / found.divisor,
    )


SOFTMAX = Family(_solve)
