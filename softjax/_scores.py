"""Scores: logits below the peak of their slice, divided by its temperature after that."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from softjax._elementary import exp_of_sum
from softjax._float import two_difference, two_quotient

FAR = 1000.0  # this far below the peak a score has no weight: exp is 0 in float64 too


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
