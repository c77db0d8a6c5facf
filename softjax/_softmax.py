"""Softmax as a threshold map: f = exp, whose threshold is the logarithm of the sum.

With scores s = (logits - peak) / temperature and weights w = exp(s), the probabilities are
w / sum(w) and their logarithms s - log1p(rest), where `rest` is the sum of all weights but that
of one peak, so that a log-probability near 0 keeps its digits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax import _accelerators
from softjax._elementary import log1p
from softjax._scores import centre
from softjax._slices import BySegment, Slices
from softjax._threshold import Family, Solution


class Normalizer(NamedTuple):
    """What normalises the weights of each slice; one number per slice each."""

    peak: Array  # -inf where nothing is kept
    rest: Array  # the sum of all weights but that of one peak; 0 where nothing is kept

    @property
    def divisor(self) -> Array:
        """The sum of all weights, or 1 where nothing is kept."""
        return 1 + self.rest

    @property
    def is_empty(self) -> Array:
        """Whether nothing is kept. XLA's CPU backend may lose a NaN in the maximum alone."""
        return (self.peak == -jnp.inf) & (self.rest == 0)

    @property
    def log_total(self) -> Array:
        return log1p(self.rest)


@functools.partial(jax.jit, static_argnames="map_follows")
def normalizer(
    slices: Slices,
    x: Array,
    temperature: Array | None,
    sink: Array | None = None,
    *,
    map_follows: bool = False,
) -> Normalizer:
    """The peak and the sum of the weights of each slice, and of a sink, one more score each.

    Set `map_follows` if only an elementwise map of x uses the result, so that XLA can fuse it
    with the reductions.
    """
    peak_first = functools.partial(_peak_first, slices)
    if slices.mesh_axes or isinstance(slices, BySegment) or sink is not None:
        return peak_first(x, temperature, sink)
    online = lambda x, temperature: Normalizer(
        *_accelerators.peak_and_rest(x, slices.axes, temperature)
    )
    is_fused = map_follows and temperature is None and _accelerators.is_fused(x, slices.axes)
    return _accelerators.by_platform(
        is_fused, x, temperature, fused=peak_first, separate=online
    )


def _peak_first(
    slices: Slices, x: Array, temperature: Array | None, sink: Array | None = None
) -> Normalizer:
    # JAX before 0.12 drops custom rules when the reverse of a scan is differentiated again, so
    # this must also differentiate correctly by itself: the peak, the shares and the rounding
    # errors are constants.
    peak = lax.stop_gradient(slices.max(x))
    if sink is not None:
        peak = jnp.maximum(peak, lax.stop_gradient(sink))
    here = slices.on_this_device
    num_peaks = here.sum_of(_is_peak, (x,), peak, temperature)
    rest = here.sum_of(_beside_peak, (x,), num_peaks, peak, temperature)
    if sink is None and not slices.mesh_axes:
        return Normalizer(peak, rest)
    # Each device that holds a peak subtracted 1, and a sink at the peak does so too. One 1 in
    # all is right, so the others are added again.
    num_subtracted = slices.sum_over_devices(jnp.minimum(num_peaks, 1))
    rest = slices.sum_over_devices(rest)
    if sink is not None:
        own = _is_peak(sink, peak, temperature)
        num_subtracted += own
        rest += weights(sink, peak, temperature) - own
    return Normalizer(peak, rest + jnp.maximum(num_subtracted - 1, 0))


def weights(x: Array, peak: Array, temperature: Array | None) -> Array:
    """exp(s), one per entry; 0 where dropped. `peak` and `temperature` broadcast."""
    return centre(x, peak, temperature).exp()


def _is_peak(x: Array, peak: Array, temperature: Array | None) -> Array:
    return centre(x, peak, temperature).is_peak.astype(x.dtype)


def _beside_peak(x: Array, num_peaks: Array, peak: Array, temperature: Array | None) -> Array:
    """The weights, from which the peaks subtract equal shares of 1."""
    scores = centre(x, peak, temperature)
    # A share per entry: XLA would not fuse a number per slice that comes from the count.
    return scores.exp() - scores.is_peak.astype(x.dtype) / jnp.maximum(num_peaks, 1)


def _solve(
    with_margins: bool,
    slices: Slices,
    logits: Array,
    temperature: Array | None,
    alpha: None,
    k: None,
    sink: Array | None,
) -> Solution:
    del alpha, k
    found = normalizer(slices, logits, temperature, sink, map_follows=True)
    wide = None if temperature is None else slices.broadcast(temperature)
    scores = centre(logits, slices.broadcast(found.peak), wide)
    # A NaN shows in the sums, because XLA's CPU backend may lose it in the maximum. So entries
    # that have no weight beside an infinite peak are divided by the sums too.
    dropped = logits == -jnp.inf
    solution = Solution(
        probs=jnp.where(dropped, 0, scores.exp() / slices.broadcast(found.divisor)),
        sink_prob=None
        if sink is None
        else weights(sink, found.peak, temperature) / found.divisor,
    )
    if not with_margins:
        return solution
    threshold = jnp.log1p(found.rest)
    margins = scores.values - slices.broadcast(threshold)
    return solution._replace(margins=jnp.where(dropped, -jnp.inf, margins), threshold=threshold)


SOFTMAX = Family(functools.partial(_solve, False))
LOG_SOFTMAX = Family(functools.partial(_solve, True))  # with the logarithms
