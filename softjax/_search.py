"""Searches for a number a slice by reductions alone: nothing is sorted.

`climb` and `bracketed_newton` find where a decreasing function crosses zero;
`largest_threshold` finds a threshold among the entries themselves, by halving the range of
their bit patterns.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from softjax._slices import Slices

Step = Callable[[Array], tuple[Array, Array]]  # tau -> (excess, -slope), one a slice


def climb(step: Step, start: Array) -> Array:
    """Newton's method from the left of the root of a decreasing convex function.

    There it only ever moves right, so it stops when rounding stops it: for a piecewise
    linear function, after finitely many steps, at the root itself.
    """

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, _, count = state
        excess, slope = step(tau)
        target = tau + jnp.where(excess > 0, excess / jnp.where(slope > 0, slope, 1), 0)
        return target, jnp.any(target > tau), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] < 64)

    state = (start, jnp.array(True), jnp.array(0))
    return lax.while_loop(unfinished, move, state)[0]


def bracketed_newton(step: Step, low: Array, high: Array, start: Array) -> Array:
    """Newton's method for a decreasing function with a root in [low, high].

    A step that would leave the bracket halves it instead.
    """

    def move(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, tau, _, count = state
        excess, slope = step(tau)
        low = jnp.where(excess >= 0, tau, low)
        high = jnp.where(excess <= 0, tau, high)
        target = tau + excess / jnp.where(slope > 0, slope, 1)
        inside = (target >= low) & (target <= high) & (slope > 0)
        target = jnp.where(inside, target, low + (high - low) / 2)
        # Halving now and then as well bounds the number of steps.
        target = jnp.where(count % 8 == 7, low + (high - low) / 2, target)
        moving = jnp.abs(target - tau) > 2 * eps * jnp.abs(tau)
        return low, high, target, jnp.any(moving), count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return state[3] & (state[4] < limit)

    eps = jnp.finfo(low.dtype).eps
    limit = 48 if low.dtype == jnp.float32 else 96
    state = (low, high, start, jnp.array(True), jnp.array(0))
    return lax.while_loop(unfinished, move, state)[2]


def largest_threshold(slices: Slices, keys: Array, weights: Array | None, mass: Array) -> Array:
    """The largest v for which the entries with key >= v weigh at least `mass`.

    `weights` None counts entries. Where all of them together weigh less, the result is -inf.
    NaN keys are above every threshold.
    """

    def weigh(low: Array) -> Array:
        above = ~(keys < slices.spread(_from_ordered(low, keys.dtype)))
        return slices.sum(jnp.where(above, 1 if weights is None else weights, 0.0))

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state  # The answer is in [low, high).
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = weigh(middle) >= mass
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    ordered = _to_ordered(jnp.array([-jnp.inf, jnp.inf], keys.dtype))
    low = jnp.full(mass.shape, ordered[0])
    high = jnp.full(mass.shape, ordered[1] + 1)
    low, _ = lax.while_loop(lambda s: jnp.any(s[0] + 1 < s[1]), halve, (low, high))
    return _from_ordered(low, keys.dtype)


def _to_ordered(x: Array) -> Array:
    """Bit patterns as integers in the order of the numbers."""
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(x, integer)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def _from_ordered(ordered: Array, dtype: jnp.dtype) -> Array:
    bits = jnp.where(ordered < 0, ordered ^ jnp.iinfo(ordered.dtype).max, ordered)
    return lax.bitcast_convert_type(bits, dtype)
