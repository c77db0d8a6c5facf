"""Unsigned integers of 64 bits as pairs of 32 bits, for use without JAX's 64-bit mode."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

WORD = jnp.uint32


class Wide(NamedTuple):
    """The integer 2^32 high + low, modulo 2^64."""

    high: Array
    low: Array


def constant(number: int) -> Wide:
    """A Python int in [0, 2^64)."""
    return Wide(*(jnp.array(word, WORD) for word in divmod(number, 2**32)))


def add(a: Wide, b: Wide) -> Wide:
    low = a.low + b.low
    return Wide(a.high + b.high + (low < b.low).astype(WORD), low)


def subtract(a: Wide, b: Wide) -> Wide:
    return Wide(a.high - b.high - (a.low < b.low).astype(WORD), a.low - b.low)


def at_most(a: Wide, b: Wide) -> Array:
    """Whether a <= b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low <= b.low))


def smaller(a: Wide, b: Wide) -> Wide:
    first = at_most(a, b)
    return Wide(jnp.where(first, a.high, b.high), jnp.where(first, a.low, b.low))


def is_zero(a: Wide) -> Array:
    return (a.high | a.low) == 0


def shifted(word: Array, shift: int) -> Wide:
    """2^shift word, for shifts from 0 to 63."""
    if shift == 0:
        return Wide(jnp.zeros_like(word), word)
    if shift < 32:
        return Wide(word >> (32 - shift), word << shift)
    return Wide(word << (shift - 32), jnp.zeros_like(word))


def shift_left(a: Wide, shift: int) -> Wide:
    """2^shift a, for shifts from 1 to 31."""
    return Wide((a.high << shift) | (a.low >> (32 - shift)), a.low << shift)


def from_parts(high: Array, low: Array, shift: int) -> Wide:
    """2^shift high + low, which is not negative, for int32 with high >= 0."""
    sign, low = (lax.bitcast_convert_type(part, WORD) for part in (low >> 31, low))
    return add(shifted(high.astype(WORD), shift), Wide(sign, low))


def running_sums(terms: Wide) -> Wide:
    """Running sums along the last axis of at most 2^24 terms.

    Digits of 16 bits are summed one by one, or of 8 bits where there are more than 2^16 terms,
    so that a word has room for all carries.
    """
    width = 16 if terms.low.shape[-1] <= 2**16 else 8
    mask = jnp.array(2**width - 1, WORD)
    digits = [(w >> s) & mask for w in (terms.low, terms.high) for s in range(0, 32, width)]
    sums = jnp.cumsum(jnp.stack(digits), -1, dtype=WORD)
    return functools.reduce(add, (shifted(s, i * width) for i, s in enumerate(sums)))


def multiply_high(a: Wide, b: Wide) -> Wide:
    """The upper 64 of the 128 bits of a b: b times the fraction a / 2^64, rounded down."""
    zero = jnp.zeros_like(a.low & b.low)
    middle = Wide(zero, _product(a.low, b.low).high)
    cross = _product(a.low, b.high), _product(a.high, b.low)
    upper = _product(a.high, b.high)
    for part in cross:
        middle = add(middle, Wide(zero, part.low))
        upper = add(upper, Wide(zero, part.high))
    return add(upper, Wide(zero, middle.high))


def _product(a: Array, b: Array) -> Wide:
    """All 64 bits of the product of two words, from halves of 16 bits."""
    half = jnp.array(0xFFFF, WORD)
    a_high, a_low, b_high, b_low = a >> 16, a & half, b >> 16, b & half
    low = a_low * b_low
    first = a_high * b_low + (low >> 16)
    second = a_low * b_high + (first & half)
    high = a_high * b_high + (first >> 16) + (second >> 16)
    return Wide(high, (second << 16) | (low & half))
