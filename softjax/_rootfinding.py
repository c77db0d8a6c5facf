"""Searches for one number per slice by reductions alone: nothing is sorted.

`newton_from_left` and `bracketed_newton` find where a decreasing function crosses zero.
`largest_threshold` finds a threshold among the entries themselves: it halves the range of
their bit patterns until one is left.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._inputs import statically_greater
from softjax._mesh import vary
from softjax._slices import AlongAxes

Step = Callable[[Array], tuple[Array, Array]]  # tau -> (excess, -slope), one per slice
Bracket = tuple[Array, Array, Array, Array, Array, Array]  # low, high, tau, last, moving, count


def newton_from_left(step: Step, start: Array, close: float = 0.0) -> Array:
    """Newton's method from the left of the root of a decreasing convex function.

    From there it only ever moves right. It stops when rounding stops it, or when every step
    is at most `close`. For a piecewise linear function that is after finitely many steps, at
    the root itself.
    """

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, _, count = state
        excess, slope = step(tau)
        target = tau + jnp.where(excess > 0, excess / jnp.where(slope > 0, slope, 1), 0)
        return target, jnp.any(target - tau > close), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] < 64)

    state = (start, vary(jnp.array(True), start), jnp.array(0))
    return lax.while_loop(unfinished, move, state)[0]


def bracketed_newton(step: Step, low: Array, high: Array, start: Array) -> Array:
    """Newton's method for a decreasing function with a root in [low, high].

    The bracket is halved instead where a step would leave it, or where the last step did not
    halve the excess. A slice that has arrived waits for the others.
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
    return lax.while_loop(unfinished, move, state)[2]


def largest_threshold(
    slices: AlongAxes, keys: Array, weights: Array | None, amount: Array
) -> Array:
    """The largest v for which the entries with key >= v weigh at least `amount`.

    Without weights each entry counts as one. If all entries together weigh less than the
    amount, v is the key of -inf. Keys are `ordered` integers, and so is v.
    """
    # The search sums the part below v, because it keeps its digits where the amount is
    # nearly all.
    if weights is None:
        size = size_of_slice(slices, keys)
        spare = size - to_count(amount, size)
        entries: tuple[Array, ...] = (keys,)
        below: Callable[..., Array] = lambda key, limit: _as_count(key < limit)
    else:
        spare = slices.sum(weights) - amount
        entries = (keys, weights)
        below = lambda key, weight, limit: jnp.where(key < limit, weight, 0)
    bits = jnp.iinfo(keys.dtype).bits
    least = ~int(np.array(np.inf, f"float{bits}").view(f"int{bits}"))
    bounds = jnp.array([least, jnp.iinfo(keys.dtype).max], keys.dtype)
    return _last_within(slices, below, entries, spare, bounds)


def first_of_ties(slices: AlongAxes, keys: Array, threshold: Array, amount: Array) -> Array:
    """Marks the `amount` largest keys: of those equal to the threshold, the first ones."""
    size = size_of_slice(slices, keys)
    place = jnp.zeros(keys.shape, jnp.result_type(int))
    for axis in slices.axes:
        place = place * keys.shape[axis] + lax.broadcasted_iota(place.dtype, keys.shape, axis)
    if slices.mesh_axes:
        (axis,) = slices.axes
        place += slices.first_place(keys.shape[axis], place.dtype)
    above = keys > slices.broadcast(threshold)
    missing = to_count(amount, size) - slices.sum(_as_count(above))
    bounds = jnp.array([0, size + 1], place.dtype)

    def ties_before(key: Array, place: Array, limit: Array, threshold: Array) -> Array:
        return _as_count((key == threshold) & (place < limit))

    end = _last_within(slices, ties_before, (keys, place), missing, bounds, threshold)
    return above | ((keys == slices.broadcast(threshold)) & (place < slices.broadcast(end)))


def _last_within(
    slices: AlongAxes,
    term: Callable[..., Array],
    entries: tuple[Array, ...],
    spare: Array,
    bounds: Array,
    *rows: Array,
) -> Array:
    """The largest v in [low, high), the bounds, for which the sum of `term` is at most `spare`.

    The sum of `term(*entries, v, *rows)` must not fall as v grows. If it is larger than `spare`
    at all v, the answer is `low`.
    """
    shape = slices.kept_shape(entries[0].shape)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = slices.sum_of(term, entries, middle, *rows) <= spare
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = (jnp.full(shape, bound) for bound in bounds)
    state = vary((low, high), spare, entries, but=slices.mesh_axes)
    return lax.while_loop(lambda s: jnp.any(s[0] + 1 < s[1]), halve, state)[0]


def size_of_slice(slices: AlongAxes, x: Array) -> int:
    """How many entries a slice of x has, all of which an integer can count."""
    size = slices.length(x)
    limit = int(jnp.iinfo(jnp.result_type(int)).max)
    if statically_greater(size, limit - 1):
        raise ValueError(
            f"a slice of {size} entries is longer than its integers can count, {limit - 1}:"
            " enable 64-bit (`jax_enable_x64`), or take shorter slices."
        )
    return size


def to_count(amount: Array, size: int) -> Array:
    """A number of entries as an integer in [0, size]: a fraction is rounded up."""
    integer = jnp.result_type(int)
    if jnp.issubdtype(amount.dtype, jnp.floating):
        # The next float may be more than the largest integer; NaN keeps all.
        fits = amount < 2.0 ** (jnp.iinfo(integer).bits - 1)
        amount = jnp.where(fits, jnp.ceil(jnp.where(fits, amount, 0)).astype(integer), size)
    return jnp.clip(amount, 0, size).astype(integer)


def _as_count(marks: Array) -> Array:
    # Not a float, because float32 holds no odd number above 2^24.
    return marks.astype(jnp.result_type(int))


def ordered(x: Array) -> Array:
    """Integers in the order of the numbers. 0 and -0 are the same; NaN is above all."""
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
