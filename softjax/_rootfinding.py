"""Searches for a number a slice by reductions alone: nothing is sorted.

`newton_from_left` and `bracketed_newton` find where a decreasing function crosses zero;
`largest_threshold` finds a threshold among the entries themselves, by halving the range of
their bit patterns, or, on accelerators, digit by digit: there few passes count, and to look
whether a loop is done takes as long as one.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._mesh import vary
from softjax._slices import AlongAxes

DIGIT = 3  # bits that one pass finds
State = TypeVar("State", bound=tuple[Any, ...])
Step = Callable[[Array], tuple[Array, Array]]  # tau -> (excess, -slope), one a slice
Bracket = tuple[Array, Array, Array, Array, Array, Array]  # low, high, tau, last, moving, count


def newton_from_left(step: Step, start: Array, close: float = 0.0) -> Array:
    """Newton's method from the left of the root of a decreasing convex function.

    There it only ever moves right, so it stops when rounding stops it (for a piecewise
    linear function, after finitely many steps, at the root itself), or when all steps are
    at most `close`.
    """

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, _, count = state
        excess, slope = step(tau)
        target = tau + jnp.where(excess > 0, excess / jnp.where(slope > 0, slope, 1), 0)
        return target, jnp.any(target - tau > close), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] < 64)

    state = (start, vary(jnp.array(True), start), jnp.array(0))
    return _repeat(unfinished, move, state)[0]


def bracketed_newton(step: Step, low: Array, high: Array, start: Array) -> Array:
    """Newton's method for a decreasing function with a root in [low, high].

    Where a step would leave the bracket, or the last one did not halve the excess, the
    bracket is halved instead. A slice that has arrived waits for the others.
    """

    def move(state: Bracket) -> Bracket:
        low, high, tau, last, moving, count = state
        excess, slope = step(tau)
        low = jnp.where(excess >= 0, tau, low)
        high = jnp.where(excess <= 0, tau, high)
        newton = tau + excess / jnp.where(slope > 0, slope, 1)
        arrived = jnp.abs(newton - tau) <= 2 * eps * jnp.abs(tau)
        usable = (newton >= low) & (newton <= high) & (slope > 0)
        usable &= arrived | (jnp.abs(excess) <= last / 2)
        target = jnp.where(usable, newton, low + (high - low) / 2)
        moving_on = moving & (target != tau) & ~(arrived & usable)
        return low, high, jnp.where(moving, target, tau), jnp.abs(excess), moving_on, count + 1

    def unfinished(state: Bracket) -> Array:
        *_, moving, count = state
        return jnp.any(moving) & (count < limit)

    eps = jnp.finfo(low.dtype).eps
    limit = 64 if low.dtype == jnp.float32 else 128
    last = jnp.full(start.shape, jnp.inf, start.dtype)
    moving = jnp.full(start.shape, True)
    state = (*vary((low, high, start, last, moving)), jnp.array(0))
    return _repeat(unfinished, move, state)[2]


def _repeat(
    unfinished: Callable[[State], Array], move: Callable[[State], State], state: State
) -> State:
    """`lax.while_loop`, on accelerators by two moves at a time; one too many does no harm."""
    return lax.platform_dependent(
        state,
        cpu=lambda state: lax.while_loop(unfinished, move, state),
        default=lambda state: lax.while_loop(unfinished, lambda s: move(move(s)), state),
    )


def largest_threshold(
    slices: AlongAxes, keys: Array, weights: Array | None, amount: Array
) -> Array:
    """The largest v for which the entries with key >= v weigh at least `amount`.

    `weights` None counts entries. What is summed is the part below v, so that digits are
    kept where the amount is nearly all. If all weigh less than the amount, v is the least.
    Keys are compared, and v is given, as `ordered` integers.
    """
    if weights is None:
        everything = jnp.ones(keys.shape, amount.dtype)
        entries: tuple[Array, ...] = (keys,)
        below: Callable[..., Array] = lambda key, limit: (key < limit).astype(amount.dtype)
    else:
        everything, entries = weights, (keys, weights)
        below = lambda key, weight, limit: jnp.where(key < limit, weight, 0)
    spare = slices.sum(everything) - amount
    limits = jnp.array([-jnp.inf, jnp.nan], amount.dtype)
    low, high = vary(tuple(jnp.full(spare.shape, x) for x in ordered(limits)), spare)

    def by_halves(low: Array, high: Array, spare: Array, *entries: Array) -> Array:
        def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = state  # The answer is in [low, high).
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            enough = slices.sum_of(below, entries, middle) <= spare
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        return lax.while_loop(lambda s: jnp.any(s[0] + 1 < s[1]), halve, (low, high + 1))[0]

    return by_halves(low, high, spare, *entries)


def ordered(x: Array) -> Array:
    """Integers in the order of the numbers; 0 and -0 are one, NaN is above all."""
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    limits = jnp.iinfo(integer)
    bits = lax.bitcast_convert_type(x, integer)
    bits = jnp.where(bits == limits.min, 0, bits)
    bits = jnp.where(bits < 0, bits ^ limits.max, bits)
    return jnp.where(jnp.isnan(x), limits.max - 1, bits)


def from_ordered(bits: Array, dtype: DTypeLike) -> Array:
    """The number of an `ordered` integer."""
    return lax.bitcast_convert_type(
        jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits), dtype
    )
