"""The surprise at a label, -log p, with what smoothing and the z-loss ask for besides.

With w_j = exp(z_j - peak) and S the sum of all w but the label's, the surprise is

    (peak - z_y) + log(1 + S + (w_y - 1)).

It is exact at every size: where the label is a peak, w_y - 1 is 0 and S is all that counts;
where not, the result is at least log 2. The derivative in z_y, -S / (S + w_y), cancels nothing.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from softjax._blocks import by_one_thread
from softjax._elementary import exp_of_sum, log1p
from softjax._float import two_difference, where_finite
from softjax._mesh import is_sharded
from softjax._scores import FAR
from softjax._slices import FOLDED, PARTS, AlongAxes, add_parts
from softjax.entropies import pick


class Statistics(NamedTuple):
    """Of each row: what its losses are made of."""

    surprise: Array  # -log p of the label; inf where it is dropped
    logsumexp: Array  # -inf where nothing is kept
    even: Array | None = None  # mean(-c log p) over the kept classes, with c their weights


def surprise(logits: Array, labels: Array, axis: int) -> Array:
    """-log p of labels in [0, n): `cross_entropy` of what has been prepared."""
    return statistics(axis, logits, labels).surprise


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def statistics(
    axis: int, logits: Array, labels: Array, class_weights: Array | None = None
) -> Statistics:
    """The statistics of rows of prepared logits; `class_weights` broadcast against them."""
    shares = _share_unwritten(axis, logits, labels)
    return _conclude(axis, shares, logits, labels, class_weights)


@functools.partial(statistics.defjvp, symbolic_zeros=True)
def _statistics_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Statistics, Statistics]:
    # A rule, so that one array is remembered, the derivative at the label keeps its digits, and
    # a dropped entry has none.
    logits, labels, class_weights = primals
    dots = tuple(None if isinstance(dot, SymbolicZero) else dot for dot in tangents)
    shares = _share(axis, _differs, logits, labels)
    found = _conclude(axis, shares, logits, labels, class_weights)
    inverse = 1 / shares.total
    finite = found.surprise != jnp.inf  # An infinite surprise is constant.
    rows = (
        jnp.where(finite, inverse, 0),
        jnp.where(finite, shares.rest * inverse, 0),
        inverse,
        shares.own * inverse,
        shares.peak,
        shares.log_total,
    )
    expand = functools.partial(jnp.expand_dims, axis=axis)
    total = lambda x: jnp.squeeze(AlongAxes((axis,)).sum(x), axis)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(others: Array, rows: Any, kept: Any, logits: Any, dots: Any) -> Statistics:
        logits_dot, _, weights_dot = dots
        certain, missing, inverse, own, peak, log_total = map(expand, rows)
        hit = _places(others, labels, axis) == expand(labels)
        zero = jnp.zeros_like(found.surprise)
        surprise_dot = logsumexp_dot = zero
        if logits_dot is not None:
            pull = jnp.where(hit, -missing, others * certain)
            surprise_dot = total(jnp.where(pull != 0, pull * logits_dot, 0))
            probs = jnp.where(hit, own, others * inverse)
            logsumexp_dot = total(jnp.where(probs != 0, probs * logits_dot, 0))
        if class_weights is None:
            return Statistics(surprise_dot, logsumexp_dot)
        even_dot = zero
        if logits_dot is not None:
            weights = jnp.where(kept, class_weights, 0)
            even_dot += total(weights) * logsumexp_dot
            even_dot -= total(jnp.where(kept, weights * logits_dot, 0))
        if weights_dot is not None:
            costs = jnp.where(kept, below_peak(peak, logits) + log_total, 0)
            even_dot += total(costs * weights_dot)
        return Statistics(
            surprise_dot, logsumexp_dot, even_dot / _count(kept, axis, others.dtype)
        )

    # (Beside the weights, what is dropped is remembered as bits, and the logits only for the
    # derivative in the class weights.)
    kept = None if class_weights is None else logits != -jnp.inf
    values = None if dots[2] is None else logits
    moved = tangent(shares.others, rows, kept, values, dots)
    return _found_again(axis, found, logits, labels, class_weights), moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _found_again(
    axis: int, found: Statistics, logits: Array, labels: Array, class_weights: Array | None
) -> Statistics:
    """What has been found, with the derivative of `statistics` for the next order too.

    (By itself it would differentiate to p - 1 at the label, which cancels.)
    """
    return found


@functools.partial(_found_again.defjvp, symbolic_zeros=True)
def _found_again_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Statistics, Statistics]:
    return _found_again(axis, *primals), _statistics_jvp(axis, primals[1:], tangents[1:])[1]


class _Shares(NamedTuple):
    others: Array | None  # weights exp(z - peak), but 0 for the label
    rest: Array  # their sum, one a row, as are the following
    own: Array  # the label's weight; 0 where it is dropped
    total: Array  # of all weights; 1 where nothing is kept
    log_total: Array
    peak: Array


def _share_unwritten(axis: int, logits: Array, labels: Array) -> _Shares:
    """The shares without the weights, none of which is written out if they are many."""
    # (XLA's CPU backend is slow where it sums along an axis as it forms the terms. If they are
    # not added up part by part, a mask in arithmetic keeps it from writing them.)
    whole = math.prod(logits.shape)  # It may be open, in an export for any size.
    is_usual = isinstance(whole, int) and axis == logits.ndim - 1
    is_small = is_usual and whole < FOLDED and not is_sharded((logits, labels))
    in_parts = AlongAxes((axis,)).parts(logits, _num_parts(logits, axis)) is not None
    mask = _differs if is_small or in_parts else _distance
    return _share(axis, mask, logits, labels, written=False)._replace(others=None)


def _share(
    axis: int,
    mask: Callable[..., Array],
    logits: Array,
    labels: Array,
    written: bool = True,
) -> _Shares:
    peak = jnp.max(lax.stop_gradient(logits), axis, initial=-jnp.inf)
    others, rest, own = _weigh(axis, mask, written, logits, labels, peak)
    empty = peak == -jnp.inf
    total = jnp.where(empty, 1, rest + own)
    log_total = jnp.where(empty, 0, log1p(rest + (own - 1)))
    return _Shares(others, rest, own, total, log_total, peak)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _weigh(
    axis: int,
    mask: Callable[..., Array],
    written: bool,
    logits: Array,
    labels: Array,
    peak: Array,
) -> tuple[Array, Array, Array]:
    # Dead and infinite entries are clipped, not selected, and numbers so large that a
    # difference might overflow are halved: all that differ there are far apart.
    limits = jnp.finfo(logits.dtype)
    scale = jnp.where(jnp.abs(peak) > limits.max / 4, 0.5, 1).astype(logits.dtype)
    anchor = jnp.where(peak == jnp.inf, limits.max, where_finite(peak) * scale)
    floor = anchor - jnp.maximum(FAR, 4 * limits.eps * jnp.abs(anchor))
    expand = functools.partial(jnp.expand_dims, axis=axis)

    def weights(z: Array, scale: Array, anchor: Array, floor: Array) -> Array:
        # (In this order: XLA's CPU backend lets a NaN through as the second operand.)
        near = jnp.minimum(limits.max, jnp.maximum(floor, z * scale))
        below, error = two_difference(near, anchor)
        if mask is _differs:
            return exp_of_sum(jnp.maximum(-FAR, below), lax.stop_gradient(error))
        weights = jnp.exp(below)
        return weights + weights * lax.stop_gradient(error)

    slices, rows = AlongAxes((axis,)), tuple(map(expand, (scale, anchor, floor)))
    cut: Callable[[Array], Any] = lambda x: slices.parts(x, _num_parts(x, axis))
    others = by_one_thread(
        lambda z, counts, *rows: weights(z, *rows) * counts,
        slices,
        logits,
        mask(logits, labels, axis),
        *rows,
    )

    def rest_in_parts(logits: Array, labels: Array, others: Array) -> Array:
        # Of what is written out anyway, or the same sum of terms that are not.
        if written:
            return slices.sum(add_parts(cut(others)))
        groups = cut(logits)
        sizes = (z.shape[-1] for parts in groups for z in parts)
        places = itertools.accumulate(sizes, initial=0)
        once = jax.jit(weights)  # Traced for one part.
        masked = lambda z: once(z, *rows) * mask(z, labels - next(places), axis)
        return slices.sum(add_parts([list(map(masked, parts)) for parts in groups]))

    if cut(logits) is None:
        rest = slices.sum(others)
    else:
        whole = lambda logits, labels, others: slices.sum(others)
        rest = lax.platform_dependent(logits, labels, others, cpu=rest_in_parts, default=whole)
    # (By a quotient, which XLA takes once a row.)
    rest /= jnp.where(rest == jnp.inf, 2, 1)
    own = weights(pick(logits, labels, axis), scale, anchor, floor)
    return others, jnp.squeeze(rest, axis), own


@_weigh.defjvp
def _weigh_jvp(
    axis: int, mask: Callable[..., Array], written: bool, primals: Any, tangents: Any
) -> Any:
    # A rule, for what stands where entries are dropped; the peak is a constant.
    others, rest, own = _weigh(axis, mask, written, *primals)
    logits_dot, labels = tangents[0], primals[1]
    others_dot = jnp.where(others != 0, others * logits_dot, 0)
    rest_dot = jnp.squeeze(AlongAxes((axis,)).sum(others_dot), axis)
    own_dot = jnp.where(own != 0, own * pick(logits_dot, labels, axis), 0)
    return (others, rest, own), (others_dot, rest_dot, own_dot)


def _conclude(
    axis: int, shares: _Shares, logits: Array, labels: Array, class_weights: Array | None
) -> Statistics:
    chosen = pick(logits, labels, axis)
    nats = below_peak(shares.peak, chosen) + shares.log_total
    found = Statistics(
        jnp.where(chosen == -jnp.inf, jnp.inf, nats), shares.peak + shares.log_total
    )
    if class_weights is None:
        return found
    kept = logits != -jnp.inf
    expand = functools.partial(jnp.expand_dims, axis=axis)
    costs = below_peak(expand(shares.peak), logits) + expand(shares.log_total)
    costs = jnp.where(kept & (class_weights != 0), costs * class_weights, 0)
    total = jnp.squeeze(AlongAxes((axis,)).sum(costs), axis)
    return found._replace(even=total / _count(kept, axis, logits.dtype))


def below_peak(peak: Array, logits: Array) -> Array:
    """How far kept logits are below the peak: those that are infinite are peaks."""
    infinite = jnp.isinf(logits)
    return jnp.where(infinite, 0, peak) - jnp.where(infinite, 0, logits)


def _count(kept: Array, axis: int, dtype: jnp.dtype) -> Array:
    return jnp.maximum(jnp.sum(kept, axis, dtype=dtype), 1)


def _num_parts(logits: Array, axis: int) -> int:
    """Parts of 16 entries and more, or as many as the entries of a short slice."""
    length = logits.shape[axis]
    is_short = not isinstance(length, int) or length < 2 * PARTS
    return PARTS if is_short else max(2, min(PARTS, length // 16))


def _places(logits: Array, labels: Array, axis: int) -> Array:
    return lax.broadcasted_iota(labels.dtype, logits.shape, axis)


def _differs(logits: Array, labels: Array, axis: int) -> Array:
    """0 for the label, and 1 for all others."""
    differs = _places(logits, labels, axis) != jnp.expand_dims(labels, axis)
    return differs.astype(logits.dtype)


def _distance(logits: Array, labels: Array, axis: int) -> Array:
    """The same by arithmetic, for as many classes as the dtype can count."""
    num_classes = logits.shape[axis]
    if num_classes * float(jnp.finfo(logits.dtype).eps) > 1:
        return _differs(logits, labels, axis)
    ones = (1,) * (logits.ndim - 1 - axis)
    places = jnp.arange(num_classes, dtype=logits.dtype).reshape(-1, *ones)
    places = jnp.expand_dims(places, tuple(range(axis)))
    labels = jnp.expand_dims(labels, axis).astype(logits.dtype)
    return jnp.minimum(jnp.abs(places - labels), 1)
