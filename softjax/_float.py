"""Floating-point operations that return their rounding errors."""

import jax.numpy as jnp
from jax import Array, lax


def two_difference(a: Array, b: Array) -> tuple[Array, Array]:
    """fl(a - b) and its rounding error, exactly (Knuth's TwoSum; finite arguments)."""
    difference = a - b
    b_virtual = difference - a
    return difference, (a - (difference - b_virtual)) - (b + b_virtual)


def two_quotient(a: Array, b: Array) -> tuple[Array, Array]:
    """fl(a / b) and its rounding error, to first order (finite arguments, b not 0)."""
    quotient = a / b
    return quotient, remainder(a, quotient, b) / b


def remainder(x: Array, a: Array, b: Array) -> Array:
    """Computes x - a b, exactly, where x is the rounded product or close to it.

    Each product of halves is exact, so a compiler that contracts them to fused multiply-adds
    changes nothing.
    """
    a_high, b_high = high_half(a), high_half(b)
    a_low, b_low = a - a_high, b - b_high
    return ((x - a_high * b_high) - a_high * b_low - a_low * b_high) - a_low * b_low


def high_half(x: Array) -> Array:
    """The leading half of the significant bits, by clearing the rest."""
    integer, mask = (
        (jnp.uint64, ~0x7FFFFFF & (2**64 - 1))
        if x.dtype == jnp.float64
        else (jnp.uint32, ~0xFFF & (2**32 - 1))
    )
    bits = lax.bitcast_convert_type(x, integer)
    return lax.bitcast_convert_type(bits & jnp.array(mask, integer), x.dtype)


def where_finite(x: Array, other: float = 0.0) -> Array:
    """X where it is finite, and `other` elsewhere."""
    return jnp.where(jnp.isfinite(x), x, other)
