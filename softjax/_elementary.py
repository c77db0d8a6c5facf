"""Elementary functions that keep their last digits: log1p, quotients that cancel, a cap."""

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
    # Clipped where tanh is 1, so that the derivative never sees an infinite logit.
    reach = 50 * lax.stop_gradient(limit)
    inside = limit * jnp.tanh(jnp.clip(x, -reach, reach) / limit)
    outside = jnp.where(cap == jnp.inf, x, jnp.where(cap == 0, 0, jnp.nan))
    return jnp.where(usable, inside, outside)


def log1p(x: Array) -> Array:
    """log(1 + x), to little more than one rounding; that of a CPU errs by up to 2.4 ulp."""
    return lax.platform_dependent(x, cpu=_log1p, default=jnp.log1p)


@jax.jit
def _log1p(x: Array) -> Array:
    """With 1 + x = 2^k (1 + f) and s = f / (2 + f), which is at most 0.18,
    log(1 + f) = 2 artanh(s) = f - h + s (h + 2 s^2 / 3 + 2 s^4 / 5 + ...), h = f^2 / 2.
    """
    wide = x.dtype == jnp.float64
    integer, num_terms = (jnp.int64, 12) if wide else (jnp.int32, 6)
    limits = jnp.finfo(x.dtype)
    usual = (x > -1) & (x < jnp.inf)
    one = jnp.where(usual, 1, x)  # Not a literal: XLA would simplify (1 + x) - 1 to x.
    y = jnp.where(usual, one + x, 1)
    lost = jnp.where(usual, x - (y - one), 0)
    bits = lax.bitcast_convert_type(lax.stop_gradient(y), integer)
    # 2^-k has two factors, because one may be too small.
    k = (bits >> limits.nmant) - (limits.maxexp - 1)
    power = lambda k: lax.bitcast_convert_type((limits.maxexp - 1 - k) << limits.nmant, x.dtype)
    first, second = power(k >> 1), power(k - (k >> 1))
    m = y * first * second
    large = m > math.sqrt(2)
    half = jnp.where(large, jnp.array(0.5, x.dtype), 1)
    f = m * half - 1
    # The select stops XLA from fusing the product with one of the two differences.
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
    # The rounding error of 1 + x is divided by it: 1 / (1 + f) is (1 - s) / (1 + s), and three
    # digits of that are enough.
    lost *= first * second * half * (1 - 2 * s * (1 - s * (1 - s * (1 - s))))
    rest += error + (k * _LOG2_LOW + lost)
    outside = jnp.log(jnp.where(usual, 1, 1 + x))
    return jnp.where(usual, leading + rest, outside)


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
    """`expm1_over_twice` within 1 of 0, by its series alone."""
    num_terms = 18 if x.dtype == jnp.float64 else 11
    return functools.reduce(
        lambda tail, i: tail * x + 1 / math.factorial(i),
        reversed(range(2, num_terms + 1)),
        jnp.full_like(x, 1 / math.factorial(num_terms + 1)),
    )


def _series(x: Array, near: Array, coefficients: list[float]) -> Array:
    return jnp.polyval(jnp.array(coefficients[::-1], x.dtype), jnp.where(near, x, 0))


# log 2 in two parts; the product of the first and a number of 12 bits is exact in float32.
_LOG2_HIGH = 2839 / 2**12
_LOG2_LOW = float.fromhex("0x1.0bfbe8e7bcd5ep-15")
_EXPM1_OVER = [1.0 / math.factorial(i + 1) for i in range(12)]
_LOG1P_OVER = [(-1.0) ** i / (i + 1) for i in range(9)]
