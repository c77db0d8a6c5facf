"""Floating-point operations that return their rounding errors, and sums that bound theirs."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK = 64  # terms that one running sum takes

LONG = 32768  # terms that XLA's sum of the last axis takes,

MANY = 1024  # or adds up within a rounding or so

SMALL = 4096  # entries below which XLA sums an array term by term

FEW = 4  # terms that lose nothing to speak of in a running sum


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
    if statically_greater(length, FEW) and statically_greater(SMALL, x.size):
        # (Of a batch of small arrays, which may be large, another choice is made.)
        small = jax.custom_batching.custom_vmap(lambda x: in_two(term(x)))
        small.def_vmap(lambda _, __, x: (_total(x, axis + 1, jax.vmap(term)), True))
        plain = add(term(x))
        return small(lax.stop_gradient(x)) + (plain - lax.stop_gradient(plain))
    if statically_greater(length, MANY if is_last else FEW):
        return in_two(_partial_sums(x, axis, term, BLOCK if is_last else FEW))
    return add(term(x))


def _is_long(x: Array, axis: int) -> bool:
    """Whether XLA's own sum loses digits: the last axis it sums in a tree, others in a run."""
    return statically_greater(x.shape[axis], LONG if axis == x.ndim - 1 else BLOCK)


def statically_greater(a: Any, b: Any) -> bool:
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
