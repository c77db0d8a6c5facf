"""The negative log-likelihood of a label, with what smoothing and the z-loss need besides.

With weights w_j = exp(z_j - peak) and `rest`, the sum of all w but the label's, it is

    (peak - z_y) + log(1 + rest + (w_y - 1)).

It is exact at every size: if the label is a peak, w_y - 1 is 0 and `rest` is all that counts;
if not, the result is at least log 2. The derivative in z_y, -rest / (rest + w_y), cancels
nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._autodiff import nonzero
from softjax._slices import AlongAxes
from softjax._softmax import weights


class RowStatistics(NamedTuple):
    """One number per slice each."""

    nll: Array  # -log p of the label; inf where it is dropped and no NaN is kept
    logsumexp: Array  # -inf where nothing is kept
    uniform_nll: Array | None  # mean(-c log p) over the kept classes, with c their weights
    peak: Array  # a constant for derivatives
    rest: Array  # the sum of all weights but the label's
    label_weight: Array  # 0 where the label is dropped


def nll(logits: Array, labels: Array, axis: int) -> Array:
    """-log p of labels in [0, n): `cross_entropy` of prepared logits."""
    return row_statistics(AlongAxes((axis,)), logits, labels).nll


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def row_statistics(
    slices: AlongAxes, logits: Array, labels: Array, class_weights: Array | None = None
) -> RowStatistics:
    """The statistics of prepared logits; `class_weights` broadcast against them."""
    (axis,) = slices.axes
    per_slice = functools.partial(jnp.squeeze, axis=axis)
    peak = slices.max(lax.stop_gradient(logits))
    entries = logits, slices.places(logits, labels.dtype)
    rest = per_slice(slices.sum_of(_off_label, entries, peak, jnp.expand_dims(labels, axis)))
    peak, label_logit = per_slice(peak), slices.pick(logits, labels)
    label_weight = weights(label_logit, peak, None)
    is_empty = rest + label_weight == 0
    log_total = jnp.log1p(jnp.where(is_empty, 0, rest + (label_weight - 1)))
    # The loss of a dropped label is infinite, unless the slice keeps a NaN.
    endless = jnp.where(jnp.isnan(rest), rest, jnp.inf)
    found = jnp.where(
        label_logit == -jnp.inf, endless, below_peak(peak, label_logit) + log_total
    )
    uniform_nll = None
    if class_weights is not None:
        expand = functools.partial(jnp.expand_dims, axis=axis)
        costs = below_peak(expand(peak), logits) + expand(log_total)
        kept = logits != -jnp.inf
        costs = jnp.where(kept & (class_weights != 0), costs * class_weights, 0)
        uniform_nll = per_slice(slices.sum(costs)) / _num_kept(slices, kept, logits.dtype)
    return RowStatistics(found, peak + log_total, uniform_nll, peak, rest, label_weight)


@functools.partial(row_statistics.defjvp, symbolic_zeros=True)
def _row_statistics_jvp(
    slices: AlongAxes, primals: Any, tangents: Any
) -> tuple[RowStatistics, RowStatistics]:
    # A rule for three reasons: the derivative at the label keeps its digits, a dropped entry
    # has none, and nothing is remembered but the logits and a few numbers per slice.
    logits, labels, class_weights = primals
    dots = nonzero(tangents)
    (axis,) = slices.axes
    found = row_statistics(slices, *primals)
    expand = functools.partial(jnp.expand_dims, axis=axis)
    total_of = lambda x: jnp.squeeze(slices.sum_of_tangents(x), axis)
    zero = jnp.zeros_like(found.nll)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(
        logits: Array, labels: Array, class_weights: Any, found: RowStatistics, dots: Any
    ) -> RowStatistics:
        logits_dot, _, weights_dot = dots
        total = found.rest + found.label_weight
        inverse = 1 / jnp.where(total == 0, 1, total)
        nll_dot = logsumexp_dot = rest_dot = label_weight_dot = zero
        kept = logits != -jnp.inf
        if logits_dot is not None:
            # A dropped entry has no second derivative either, whatever its tangent is.
            kept_logits = jnp.where(kept, logits, -jnp.inf)
            entries = weights(kept_logits, expand(found.peak), None)
            is_label = slices.places(logits, labels.dtype) == expand(labels)
            # The label counts even if its weight underflows, because its slope is the weight
            # of the others.
            logits_dot = jnp.where(kept & ((entries != 0) | is_label), logits_dot, 0)
            # An infinite loss is constant.
            certain = jnp.where(found.nll == jnp.inf, 0, inverse)
            slopes = jnp.where(is_label, -expand(found.rest), entries)
            nll_dot = total_of(slopes * expand(certain) * logits_dot)
            logsumexp_dot = total_of(entries * expand(inverse) * logits_dot)
            rest_dot = total_of(jnp.where(is_label, 0, entries) * logits_dot)
            label_weight_dot = total_of(jnp.where(is_label, entries, 0) * logits_dot)
        uniform_dot = None
        if class_weights is not None:
            uniform_dot = zero
            counted = jnp.where(kept, class_weights, 0)
            if logits_dot is not None:
                uniform_dot += total_of(counted) * logsumexp_dot
                uniform_dot -= total_of(jnp.where(kept, counted * dots[0], 0))
            if weights_dot is not None:
                costs = below_peak(expand(found.peak), logits)
                costs += expand(found.logsumexp - found.peak)
                uniform_dot += total_of(jnp.where(kept, costs, 0) * weights_dot)
            uniform_dot /= _num_kept(slices, kept, logits.dtype)
        return RowStatistics(
            nll_dot, logsumexp_dot, uniform_dot, zero, rest_dot, label_weight_dot
        )

    return found, tangent(logits, labels, class_weights, found, dots)


def _off_label(logits: Array, classes: Array, peak: Array, labels: Array) -> Array:
    return jnp.where(classes == labels, 0, weights(logits, peak, None))


def below_peak(peak: Array, logits: Array) -> Array:
    """How far kept logits are below the peak: those that are infinite are peaks."""
    infinite = jnp.isinf(logits)
    return jnp.where(infinite, 0, peak) - jnp.where(infinite, 0, logits)


def _num_kept(slices: AlongAxes, kept: Array, dtype: jnp.dtype) -> Array:
    """The number of kept entries, at least 1, because it is a divisor."""
    count = slices.sum_over_devices(jnp.sum(kept, slices.axes[0], dtype=dtype))
    return jnp.maximum(count, 1)
