"""Arithmetic that keeps what rounding drops.

A rounded difference or quotient comes with its error, so that `exp` of it can be mended:
exp(s + e) = exp(s) (1 + e) for |e| of the order of eps. Long sums run over short blocks.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

FAR = 1000.0  # this far below the peak a score has no weight: exp is 0 in float64 too
BLOCK = 64  # terms that one running sum takes
LONG = 32768  # terms that XLA's sum of the last axis takes,
MANY = 1024  # or adds up within a rounding or so
SMALL = 4096  # entries below which XLA sums an array term by term
FEW = 4  # terms that lose nothing to speak of in a running sum


def capped(x: Array, cap: Array) -> Array:
    """Computes cap tanh(x / cap), with its limits at 0 and inf; NaN for a negative cap."""
    usable = (cap > 0) & (cap < jnp.inf)
    limit = jnp.where(usable, cap, 1)
    # tanh is 1 from 50 on, so that infinite logits need not meet the quotient's derivative.
    reach = 50 * lax.stop_gradient(limit)
    inside = limit * jnp.tanh(jnp.clip(x, -reach, reach) / limit)
    outside = jnp.where(cap == jnp.inf, x, jnp.where(cap == 0, 0, jnp.nan))
    return jnp.where(usable, inside, outside)


class Scores(NamedTuple):
    """Centred scores: (x - peak) / temperature = values + errors where not dead."""

    values: Array  # at most 0; -inf where dropped
    near: Array  # values, but 0 where dead
    errors: Array  # what rounding took from `near`
    dead: Array  # dropped, or further than `FAR` below the peak
    dropped: Array  # at -inf, or finite below an infinite peak

    def minus(self, threshold: Array) -> Array:
        """The margins: -inf where dropped, whatever the threshold."""
        return jnp.where(self.dropped, -jnp.inf, self.values - threshold)

    def poison(self, total: Callable[[Array], Array]) -> Array:
        """NaN for a slice that keeps a NaN, and 0 for others; XLA's maximum may miss it."""
        return total(self.near * 0)

    def exp(self, lift: int = 0) -> Array:
        """The exponentials, to about one rounding, times 2^lift."""
        return jnp.where(self.dead, 0, exp_of_sum(self.near, self.errors, lift))


def centre(
    x: Array, peak: Array, temperature: Array | None, spread: Callable[[Array], Array]
) -> Scores:
    """Scores below the peak of their slice, divided by its temperature after that.

    Infinite entries, if there are any, are the peak alone; so are the largest entries at
    temperature 0. At an infinite temperature all scores that are not dropped are 0.
    """
    limits = jnp.finfo(x.dtype)
    highest = float(limits.max)
    # (Selects, for the reason that `where_finite` gives.)
    anchor = jnp.where(jnp.isfinite(peak), peak, jnp.where(peak == jnp.inf, highest, 0))
    anchor = jnp.where(jnp.isnan(peak), peak, anchor)
    reach: Array | float = FAR
    if temperature is not None:
        # Below the smallest normal number a temperature may be flushed to 0, and is 0.
        cold = jnp.abs(temperature) < limits.tiny
        temperature = jnp.where(cold, 0, jnp.where(temperature < 0, jnp.nan, temperature))
        reach = FAR * temperature
    lowest = jnp.maximum(peak - reach, -highest)
    lowest = jnp.where(jnp.isnan(lowest), -highest, lowest)
    dead = x < spread(jnp.where(jnp.isinf(peak), jnp.inf, lowest))
    kept = jnp.where(dead, spread(anchor), x)
    kept = jnp.where(kept > highest, highest, kept)  # Infinite ones are at the anchor.
    # (In as few steps as there may be: a loop of many is given to threads, however short.)
    dropped = x < spread(jnp.where(peak == jnp.inf, jnp.inf, -highest))
    if temperature is None:
        values = jnp.where(dropped, -jnp.inf, jnp.minimum(x, highest) - spread(anchor))
        near, errors = two_difference(kept, spread(anchor))
        return Scores(values, near, lax.stop_gradient(errors), dead, dropped)
    flat = jnp.isinf(temperature)
    divisor = jnp.where(cold | flat, 1, temperature)
    # (By halves, whose difference does not overflow before it is divided.)
    values = (jnp.minimum(x, highest) / 2 - spread(anchor) / 2) / spread(divisor) * 2
    values = jnp.where(spread(cold) | dropped, -jnp.inf, values)
    # In a unit in which no difference overflows and no rounding error is flushed to 0.
    fine = 2.0 ** (2 * limits.nmant + 8)
    unit = jnp.where(
        divisor < 1 / fine, fine, jnp.where(temperature > highest / 2**12, 0.25, 1)
    )
    within = lambda x: jnp.clip(x, -highest, highest)
    near, errors = two_difference(within(kept * spread(unit)), spread(within(anchor * unit)))
    divisor = spread(jnp.where(flat, 1, divisor * unit))
    near, remainder = two_quotient(near, divisor)
    # A quotient by a row may be a product, which a compiler may fuse, unrounded, with a
    # difference that follows: a select comes between.
    near = jnp.where(dead, 0, jnp.where(spread(flat), near * 0, near))  # NaN stays.
    errors = jnp.where(spread(flat), 0, remainder + errors / divisor)
    values = jnp.where(dead, values, near)
    return Scores(values, near, lax.stop_gradient(errors), dead, values == -jnp.inf)


def centre_at(
    x: Array, anchor: Array, temperature: Array | None, spread: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """(x - anchor) / temperature and its rounding error, held within 4 `FAR` of 0."""
    far = 4 * FAR
    low, high = jnp.finfo(x.dtype).min, jnp.finfo(x.dtype).max
    anchor = spread(jnp.clip(anchor, low, high))
    values = jnp.clip(x, low, high) / 2 - anchor / 2
    divisor = jnp.ones((), x.dtype)
    if temperature is not None:
        flat = jnp.isinf(temperature)
        cold = temperature < jnp.finfo(x.dtype).tiny
        divisor = spread(jnp.where(cold | flat, 1, temperature))
        values = jnp.where(spread(cold), jnp.sign(values) * high, values)
        values = jnp.where(spread(flat), 0, values)
    usual = jnp.abs(values) < far / 2 * divisor
    near, errors = two_difference(jnp.where(usual & (values != 0), x, anchor), anchor)
    if temperature is not None:
        near, remainder = two_quotient(near, divisor)
        errors = remainder + errors / divisor
    return jnp.where(usual | jnp.isnan(x), near, jnp.sign(values) * far), errors


def exp_of_sum(near: Array, error: Array | float = 0.0, lift: int = 0) -> Array:
    """exp(near + error) 2^lift, near in [-FAR, 88], for a small error; 0 where not normal.

    With near = k log 2 + r the error joins r, which no rounding of `near` has touched. (XLA's
    own exp takes its argument rounded, and twice the time on a CPU.)
    """
    wide = near.dtype == jnp.float64
    integer, num_terms = (jnp.int64, 14) if wide else (jnp.int32, 8)
    limits = jnp.finfo(near.dtype)
    k = lax.round(near * (1 / math.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = (near - k * _LOG2_HIGH) - k * _LOG2_LOW  # The first product is exact.
    rest += error
    series = functools.reduce(
        lambda tail, i: tail * rest + 1 / math.factorial(i),
        reversed(range(2, num_terms - 1)),
        jnp.full_like(rest, 1 / math.factorial(num_terms - 1)),
    )
    mantissa = 1 + (rest + rest * rest * series)
    # Added to a number whose last digit is 1, an integer stands in the bits of the sum. (To
    # convert it takes several steps, for the sake of what is no integer.)
    magic = jnp.array(1.5 * 2.0**limits.nmant, near.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(k) + magic, integer)
    exponent = bits - (lax.bitcast_convert_type(magic, integer) - (limits.maxexp - 1 + lift))
    exponent = jnp.maximum(exponent, 0)
    return mantissa * lax.bitcast_convert_type(exponent << limits.nmant, near.dtype)


# log 2 in two parts, of which the first leaves room for a factor of 12 bits in float32 too.
_LOG2_HIGH = 2839 / 2**12
_LOG2_LOW = float.fromhex("0x1.0bfbe8e7bcd5ep-15")


def two_difference(a: Array, b: Array) -> tuple[Array, Array]:
    """fl(a - b) and its rounding error, exactly (Knuth's TwoSum; finite arguments)."""
    difference = a - b
    b_virtual = difference - a
    return difference, (a - (difference - b_virtual)) - (b + b_virtual)


def two_quotient(a: Array, b: Array) -> tuple[Array, Array]:
    """fl(a / b) and what is missing from it, to first order (finite, b not 0)."""
    quotient = a / b
    q_high, b_high = high_half(quotient), high_half(b)
    q_low, b_low = quotient - q_high, b - b_high
    # Each product is exact, so a compiler that contracts them to fused multiply-adds
    # changes nothing.
    remainder = ((a - q_high * b_high) - q_high * b_low - q_low * b_high) - q_low * b_low
    return quotient, remainder / b


def high_half(x: Array) -> Array:
    """The leading half of the significant bits, by clearing the rest."""
    integer, mask = (
        (jnp.uint64, ~0x7FFFFFF & (2**64 - 1))
        if x.dtype == jnp.float64
        else (jnp.uint32, ~0xFFF & (2**32 - 1))
    )
    bits = lax.bitcast_convert_type(x, integer)
    return lax.bitcast_convert_type(bits & jnp.array(mask, integer), x.dtype)


def long_sum(x: Array, axes: tuple[int, ...]) -> Array:
    """Sums over `axes`, kept with size 1, with an error that does not grow with the length.

    Partial sums of few terms are summed in their turn, level by level.
    """
    for axis in axes:
        while _is_long(x, axis):
            x = _partial_sums(x, axis)
        x = jnp.sum(x, axis, keepdims=True)
    return x


def long_total(
    x: Array, axes: tuple[int, ...], term: Callable[[Array], Array] = lambda x: x
) -> Array:
    """`long_sum` of term(x) >= 0, in which only the blocks are rounded."""
    for axis in axes:
        x = _total(x, axis, term)
        term = lambda x: x
    return x if axes else term(x)


def _total(x: Array, axis: int, term: Callable[[Array], Array]) -> Array:
    add = functools.partial(jnp.sum, axis=axis, keepdims=True)
    in_two = lambda x: operator.add(*sum_in_two(x, add, lambda row: row))
    length, is_last = x.shape[axis], axis == x.ndim - 1
    if exceeds(length, FEW) and exceeds(SMALL, x.size):
        # (Of a batch of small arrays, which may be large, another choice is made.)
        small = jax.custom_batching.custom_vmap(lambda x: in_two(term(x)))
        small.def_vmap(lambda _, __, x: (_total(x, axis + 1, jax.vmap(term)), True))
        plain = add(term(x))
        return small(lax.stop_gradient(x)) + (plain - lax.stop_gradient(plain))
    if exceeds(length, MANY if is_last else FEW):
        return in_two(_partial_sums(x, axis, term, BLOCK if is_last else FEW))
    return add(term(x))


def _is_long(x: Array, axis: int) -> bool:
    """Whether XLA's own sum loses digits: the last axis it sums in a tree, others in a run."""
    return exceeds(x.shape[axis], LONG if axis == x.ndim - 1 else BLOCK)


def exceeds(a: Any, b: Any) -> bool:
    """Whether a > b; not if that is open, as the sizes of an export may be."""
    return isinstance(a, int) and isinstance(b, int) and a > b


def sum_in_two(
    x: Array, total: Callable[[Array], Array], spread: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The sum of x >= 0 as a leading part, which is exact, and what is missing from it.

    Both parts of each entry are exact, and the leading ones are multiples of a unit in
    which their sum needs no more digits than there are (Rump, Ogita and Oishi, 2008).
    """
    step = lax.stop_gradient(spread(4 * total(x)))
    leading = (x + step) - step
    return total(leading), total(x - leading)


def sum_in_pairs(terms: list[Array]) -> Array:
    """The sum of terms, in as few roundings one after the other as there can be."""
    while len(terms) > 1:
        pairs = [operator.add(*terms[i : i + 2]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return terms[0]


def _partial_sums(
    x: Array, axis: int, term: Callable[[Array], Array] = lambda x: x, block: int = BLOCK
) -> Array:
    # Terms are formed block by block, or XLA would write them all out before it sums them.
    length = x.shape[axis]
    whole = length - length % block
    head = lax.slice_in_dim(x, 0, whole, axis=axis)
    shape = (*x.shape[:axis], whole // block, block, *x.shape[axis + 1 :])
    sums = jnp.sum(term(head.reshape(shape)), axis + 1)
    if whole == length:
        return sums
    tail = term(lax.slice_in_dim(x, whole, length, axis=axis))
    tail = jnp.sum(tail, axis, keepdims=True)
    return jnp.concatenate([sums, tail], axis)


def log1p(x: Array) -> Array:
    """log(1 + x), to little more than one rounding; XLA's own errs by 1.1 ulp and more."""
    return log1p_in_two(x)[0]


@jax.jit
def log1p_in_two(x: Array) -> tuple[Array, Array]:
    """log(1 + x), and most of what rounding took from it.

    With 1 + x = 2^k (1 + f) and s = f / (2 + f), which is at most 0.18,
    log(1 + f) = 2 artanh(s) = f - h + s (h + 2 s^2 / 3 + 2 s^4 / 5 + ...), h = f^2 / 2.
    """
    wide = x.dtype == jnp.float64
    integer, num_terms = (jnp.int64, 12) if wide else (jnp.int32, 6)
    limits = jnp.finfo(x.dtype)
    usual = (x > -1) & (x < jnp.inf)
    one = jnp.where(usual, 1, x)  # Of a literal, XLA would make x of (1 + x) - 1.
    y = jnp.where(usual, one + x, 1)
    lost = jnp.where(usual, x - (y - one), 0)
    bits = lax.bitcast_convert_type(lax.stop_gradient(y), integer)
    # 2^-k in two factors, as one may be too small.
    k = (bits >> limits.nmant) - (limits.maxexp - 1)
    power = lambda k: lax.bitcast_convert_type((limits.maxexp - 1 - k) << limits.nmant, x.dtype)
    first, second = power(k >> 1), power(k - (k >> 1))
    m = y * first * second
    large = m > math.sqrt(2)
    half = jnp.where(large, jnp.array(0.5, x.dtype), 1)
    f = m * half - 1
    # (A select, or a compiler may contract the product with one of the differences alone.)
    s, half_square = f / (2 + f), jnp.where(usual, f * f / 2, 0)
    series = functools.reduce(
        lambda tail, i: (tail + 2 / (2 * i + 1)) * s * s,
        reversed(range(1, num_terms)),
        jnp.zeros_like(s),
    )
    log_m = f - half_square
    rest = ((f - log_m) - half_square) + s * (half_square + series)
    k = k.astype(x.dtype) + large.astype(x.dtype)
    leading, error = two_difference(k * _LOG2_HIGH, -log_m)
    # What 1 + x lost, over 1 + x: (1 - s) / (1 + s) is 1 / (1 + f), to three digits here.
    lost *= first * second * half * (1 - 2 * s * (1 - s * (1 - s * (1 - s))))
    rest += error + (k * _LOG2_LOW + lost)
    rounded = leading + rest
    outside = jnp.log(jnp.where(usual, 1, 1 + x))
    return jnp.where(usual, rounded, outside), rest - (rounded - leading)


def expm1_over(x: Array) -> Array:
    """(exp(x) - 1) / x, and 1 at 0, with its derivatives."""
    near = jnp.abs(x) < 0.1
    far = jnp.where(near, 1.0, x)
    return jnp.where(near, _series(x, near, _EXPM1_OVER), jnp.expm1(far) / far)


def log1p_over(x: Array) -> Array:
    """log(1 + x) / x, and 1 at 0, with its derivatives."""
    near = jnp.abs(x) < 0.01
    far = jnp.where(near, 1.0, x)
    return jnp.where(near, _series(x, near, _LOG1P_OVER), log1p(far) / far)


def expm1_over_twice(x: Array) -> Array:
    """(exp(x) - 1 - x) / x^2, and 1/2 at 0, with its derivatives."""
    near = jnp.abs(x) < 0.5
    far = jnp.where(near, 1.0, x)
    return jnp.where(
        near, expm1_over_twice_near(jnp.where(near, x, 0)), (jnp.expm1(far) / far - 1) / far
    )


def expm1_over_twice_near(x: Array) -> Array:
    """`expm1_over_twice` within 1 of 0, by its series alone: no slow function is called."""
    num_terms = 18 if x.dtype == jnp.float64 else 11
    return functools.reduce(
        lambda tail, i: tail * x + 1 / math.factorial(i),
        reversed(range(2, num_terms + 1)),
        jnp.full_like(x, 1 / math.factorial(num_terms + 1)),
    )


_EXPM1_OVER = [1.0 / math.factorial(i + 1) for i in range(12)]
_LOG1P_OVER = [(-1.0) ** i / (i + 1) for i in range(9)]


def _series(x: Array, near: Array, coefficients: list[float]) -> Array:
    return jnp.polyval(jnp.array(coefficients[::-1], x.dtype), jnp.where(near, x, 0))


def where_finite(row: Array, other: float = 0.0) -> Array:
    """`row` where it is finite.

    Applied to statistics of slices. (As a select it also ends XLA's fused reduction at the
    size of the slices: without it the CPU backend writes the statistic out once an element.)
    """
    return jnp.where(jnp.isfinite(row), row, other)


@jax.custom_jvp
def passed_on(soft: Array, hard: Array) -> Array:
    """Hard values with the derivative of soft ones."""
    # (A rule, as h + (s - s) would be NaN where a soft value is infinite.)
    del soft
    return hard


@passed_on.defjvp
def _passed_on_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return passed_on(*primals), tangents[0]
