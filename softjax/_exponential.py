"""Softmax as a threshold map: f = exp, whose threshold is the logarithm of the sum.

Exact in the working precision. Rounding of logits - peak is put back to first order, and
beside the full sum runs the sum over all but the peak, so that log-probabilities near 0 and
probabilities near 1 keep their distance from it.
"""

import jax.numpy as jnp
from jax import Array

from softjax._exact import centre
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
    del index, budget
    peak = slices.max(logits)
    if sink is not None:
        peak = jnp.maximum(peak, sink)
    scores = centre(logits, peak, temperature, slices.spread)
    weights = scores.exp()
    total = slices.sum(weights)
    top = jnp.where(peak == -jnp.inf, 0.0, jnp.ones_like(peak))
    others = slices.sum(jnp.minimum(weights, slices.spread(top) - weights))
    sink_weight = None
    if sink is not None:
        sink_scores = centre(sink, peak, temperature, lambda row: row)
        sink_weight = sink_scores.exp()
        total += sink_weight
        others += jnp.minimum(sink_weight, top - sink_weight)
    # The peak's weight is 1: below 1.5 it stands alone, and no other exceeds 1/2.
    others = jnp.where(total > 1.5, total - 1, others)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    threshold = jnp.where(empty, 0, jnp.log1p(others))
    probs = weights / slices.spread(total)
    margins = scores.values - slices.spread(threshold)
    threshold = jnp.where(empty, -jnp.inf, threshold)
    leak = None if sink is None else sink_weight / total
    return Solution(probs, margins, threshold, others / total, leak)


SOFTMAX = Family(_solve)
