"""Floating-point operations that return their rounding errors, and sums that bound theirs."""

import jax.numpy as jnp
from jax import Array, lax


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


def where_finite(row: Array, other: float = 0.0) -> Array:
    """`row` where it is finite.

    Applied to statistics of slices. (As a select it also ends XLA's fused reduction at the
    size of the slices: without it the CPU backend writes the statistic out once an element.)
    """
    return jnp.where(jnp.isfinite(row), row, other)
