"""The Kullback-Leibler divergence of two softmaxes, to a few roundings at every size.

The divergence is summed in Bregman's form, p log(p/q) + q - p. Its terms are never negative,
and an error that all log(p/q) of a slice share changes it only in second order. log(p/q) comes
from the logits themselves, and terms where p and q are close from a series in it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax import _accelerators
from softjax._autodiff import nonzero, with_gradient_of
from softjax._elementary import expm1_over_twice_near
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX, SOFTMAX, normalizer, weights
from softjax._threshold import solve


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def nats_between(
    slices: AlongAxes, x: Array, y: Array, temperature: Array | None
) -> tuple[Array, Array]:
    """T^2 D(softmax(x / T) || softmax(y / T)), and the shift that `_log_ratio` subtracts."""
    of_p, of_q = (normalizer(slices, z, temperature) for z in (x, y))
    per_slice = (of_p.peak, of_q.peak, temperature, of_p.divisor, of_q.divisor)

    def found(x: Array, y: Array, *rows: Array) -> tuple[Array, Array, Array]:
        x_peak, y_peak, temperature, p_total, q_total, shift = rows
        p = weights(x, x_peak, temperature) / p_total
        q = weights(y, y_peak, temperature) / q_total
        log_ratio = _log_ratio(x, y, x_peak, y_peak, temperature, shift)
        return p, q, jnp.where(p == 0, 0, log_ratio)

    # The rounded logarithms are too coarse for close distributions. The sum of q - p, which
    # must be 0, gives the correction.
    shift = jnp.log1p(of_p.rest) - jnp.log1p(of_q.rest)  # `log_total` would gain nothing.
    gain = slices.sum_of(lambda *args: _gain(*found(*args)), (x, y), *per_slice, shift)
    shift -= jnp.log1p(jnp.where(jnp.abs(gain) < 0.5, gain, 0))
    corrected = _accelerators.recompute_after((*per_slice, shift))
    row = slices.sum_of(lambda *args: divergence_terms(*found(*args)), (x, y), *corrected)
    if temperature is not None:
        row = row * temperature * temperature
    return jnp.where(of_p.is_empty, 0, row), shift


@functools.partial(nats_between.defjvp, symbolic_zeros=True)
def _nats_between_jvp(slices: AlongAxes, primals: Any, tangents: Any) -> Any:
    # D' = <p', log(p/q)> + <q - p, y'>; a shift of either log(p/q) or y' changes nothing.
    row, shift = nats_between(slices, *primals)
    dots = nonzero(tangents)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(primals: Any, dots: Any, row: Array, shift: Array) -> Array:
        (x, y, temperature), (x_dot, y_dot, temperature_dot) = primals, dots
        x_peak, y_peak = (lax.stop_gradient(slices.max(z)) for z in (x, y))
        p, q = (solve(LOG_SOFTMAX, slices, z, temperature) for z in (x, y))
        # An infinite divergence is constant, and so is the divergence of an empty slice.
        varies = (row != jnp.inf) & (x_peak != -jnp.inf)
        both, kept = varies & (p.probs != 0), varies & (q.margins != -jnp.inf)
        log_ratio = _log_ratio(x, y, x_peak, y_peak, temperature, shift)
        margins = [jnp.where(both & kept, z.margins, 0) for z in (p, q)]
        # Values that are known more exactly than by subtraction, with the derivative of the
        # subtraction.
        log_ratio = with_gradient_of(margins[0] - margins[1], jnp.where(both, log_ratio, 0))
        gain = with_gradient_of(q.probs - p.probs, _gain(p.probs, q.probs, log_ratio))
        moved = jnp.zeros_like(x)
        if x_dot is not None:
            probs = lambda x: solve(SOFTMAX, slices, x, temperature).probs
            by_x = jax.jvp(probs, (x,), (x_dot,))[1] * log_ratio
            moved += by_x if temperature is None else by_x * temperature
        if y_dot is not None:
            moved += gain * jnp.where(kept, y_dot, 0)
        row_dot = slices.sum_of_tangents(moved)
        if temperature is None:
            return row_dot
        if temperature_dot is None:
            return temperature * row_dot
        # With r = log(p/q), b = p r + q - p, and u the scores of p above their mean <p, .>,
        # 2 D + T D' is the sum of 2 b + (q - p) r - u b, whose terms are of third order in the
        # logits, where D and D' are of second order and would cancel. A term where p is 0 is
        # 2 q - q v, with v the scores of q above the same mean.
        terms = divergence_terms(p.probs, q.probs, log_ratio)
        scores = [centre(z, peak, temperature).near for z, peak in ((x, x_peak), (y, y_peak))]
        mean = slices.sum(p.probs * scores[0])
        above = jnp.where(both, scores[0] - mean, 0)
        of_q = jnp.where(kept, q.margins, 0) - slices.sum(p.probs * margins[0])
        of_q = jnp.where(
            both, above - log_ratio, with_gradient_of(of_q, scores[1] + shift - mean)
        )
        far = 2 * terms - p.probs * above * log_ratio - gain * of_q
        near, close, _ = _expand(log_ratio)
        near &= p.probs != 0
        left = jnp.where(near, p.probs * _third_order(close) - above * terms, far)
        left = slices.sum(jnp.where(varies & (both | kept), left, 0))
        return temperature * (row_dot + left * temperature_dot)

    return (row, shift), (tangent(primals, dots, row, shift), jnp.zeros_like(shift))


@jax.jit
def _third_order(log_ratio: Array) -> Array:
    """2 (exp(-r) - 1 + r) + r (exp(-r) - 1) within 1 of 0: r^3 / 6 - r^4 / 12 + ..."""
    num_terms = 21 if log_ratio.dtype == jnp.float64 else 13
    series = functools.reduce(
        lambda tail, i: tail * -log_ratio + (i - 2) / math.factorial(i),
        reversed(range(3, num_terms)),
        jnp.full_like(log_ratio, (num_terms - 2) / math.factorial(num_terms)),
    )
    return log_ratio * log_ratio * log_ratio * series


@jax.jit
def _log_ratio(
    x: Array, y: Array, x_peak: Array, y_peak: Array, temperature: Array | None, shift: Array
) -> Array:
    """log(p / q) where p has weight: inf where q is dropped."""
    p, q = (centre(z, peak, temperature) for z, peak in ((x, x_peak), (y, y_peak)))
    far = jnp.where(q.is_far, q.values, q.near)
    return ((p.near - far) - shift) + (p.errors - jnp.where(q.is_far, 0, q.errors))


@jax.jit
def divergence_terms(p: Array, q: Array, log_ratio: Array) -> Array:
    """The terms p log(p / q) + q - p >= 0, for weights q of any sum.

    The logarithm must be finite where p is 0.
    """
    near, _, curve = _expand(log_ratio)
    return jnp.where(near & (p != 0), p * curve, p * log_ratio + (q - p))


@jax.jit
def _gain(p: Array, q: Array, log_ratio: Array) -> Array:
    """The difference q - p, to full precision where the two are close."""
    near, close, curve = _expand(log_ratio)
    return jnp.where(near & (p != 0), p * (curve - close), q - p)


@jax.jit
def _expand(log_ratio: Array) -> tuple[Array, Array, Array]:
    """Whether r = log(p / q) is small, and r and q / p - 1 + r where it is, 0 elsewhere."""
    near = jnp.abs(log_ratio) < 1
    close = jnp.where(near, log_ratio, 0)
    return near, close, close * close * expm1_over_twice_near(-close)
