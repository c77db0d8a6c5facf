"""Elementary functions that keep their last digits: exp, log1p, their quotients, a cap."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._float import two_difference


def capped(x: Array, cap: Array) -> Array:
    """Computes cap tanh(x / cap), with its limits at 0 and inf; NaN for a negative cap."""
    usable = (cap > 0) & (cap < jnp.inf)
    limit = jnp.where(usable, cap, 1)
    # tanh is 1 from 50 on, so that infinite logits need not meet the quotient's derivative.
    reach = 50 * lax.stop_gradient(limit)
    inside = limit * jnp.tanh(jnp.clip(x, -reach, reach) / limit)
    outside = jnp.where(cap == jnp.inf, x, jnp.where(cap == 0, 0, jnp.nan))
    return jnp.where(usable, inside, outside)


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


@jax.jit
def expm1_over_twice_near(x: Array) -> Array:
    """`expm1_over_twice` within 1 of 0, by its series alone: no slow function is called."""
    num_terms = 18 if x.dtype == jnp.float64 else 11
    return functools.reduce(
        lambda tail, i: tail * x + 1 / math.factorial(i),
        reversed(range(2, num_terms + 1)),
        jnp.full_like(x, 1 / math.factorial(num_terms + 1)),
    )


def _series(x: Array, near: Array, coefficients: list[float]) -> Array:
    return jnp.polyval(jnp.array(coefficients[::-1], x.dtype), jnp.where(near, x, 0))


# log 2 in two parts, of which the first leaves room for a factor of 12 bits in float32 too.
_LOG2_HIGH = 2839 / 2**12

_LOG2_LOW = float.fromhex("0x1.0bfbe8e7bcd5ep-15")

_EXPM1_OVER = [1.0 / math.factorial(i + 1) for i in range(12)]

_LOG1P_OVER = [(-1.0) ** i / (i + 1) for i in range(9)]
