"""Scores: logits below the peak of their slice, divided by its temperature after that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._float import two_difference, two_quotient

FAR = 1000.0  # this far below the peak a score has no weight: exp is 0 in float64 too


class Scores(NamedTuple):
    """Centred scores: (x - peak) / temperature = near + errors where they are above -`FAR`."""

    values: Array  # at most 0; -inf where dropped
    near: Array  # values, but at least -`FAR` or little less
    errors: Array  # what rounding took from `near`
    dropped: Array  # at -inf, or finite below an infinite peak

    @property
    def is_peak(self) -> Array:
        """Whether the score is 0, or so close to it that it may differ by rounding alone.

        If XLA forms the logits anew for the maximum, it may round them otherwise.
        """
        return self.near > -1 / 16

    @property
    def is_far(self) -> Array:
        """Whether the entry is dropped, or so far below the peak that it has no weight."""
        return self.near <= -0.99 * FAR  # Rounding may leave `near` a little above -`FAR`.

    def minus(self, threshold: Array) -> Array:
        """The margins: -inf where dropped, whatever the threshold."""
        return jnp.where(self.dropped, -jnp.inf, self.values - threshold)

    def exp(self) -> Array:
        """The exponentials, with the rounding of the scores put back to first order."""
        weights = jnp.exp(self.near)
        return weights + weights * self.errors


@jax.jit
def centre(x: Array, peak: Array, temperature: Array | None) -> Scores:
    """Scores of x; `peak` and `temperature` broadcast against it.

    Beside an infinite entry, all finite ones are dropped; at temperature 0, all but the
    largest. At an infinite temperature all scores that are not dropped are 0.
    """
    limits = jnp.finfo(x.dtype)
    highest = float(limits.max)
    is_infinite = peak == jnp.inf
    anchor = jnp.where(is_infinite, highest, jnp.where(peak == -jnp.inf, 0, peak))
    dropped = x < jnp.where(is_infinite, jnp.inf, -highest)
    if temperature is not None:
        return _divided(x, peak, anchor, dropped, temperature)
    values = jnp.where(dropped, -jnp.inf, jnp.minimum(highest, x) - anchor)
    # Huge numbers are halved so that no difference overflows; those that differ are far apart.
    # Clipping makes every number finite, so no NaN is made on the way. XLA's CPU backend lets
    # a NaN through as the second operand of a maximum or minimum.
    scale = jnp.where(jnp.abs(peak) > highest / 4, 0.5, 1).astype(x.dtype)
    anchor = jnp.where(is_infinite, highest, anchor * scale)
    floor = anchor - jnp.maximum(FAR, 4 * float(limits.eps) * jnp.abs(anchor))
    near, errors = two_difference(jnp.minimum(highest, jnp.maximum(floor, x * scale)), anchor)
    return Scores(values, near, lax.stop_gradient(errors), dropped)


def _divided(
    x: Array, peak: Array, anchor: Array, dropped: Array, temperature: Array
) -> Scores:
    limits = jnp.finfo(x.dtype)
    highest = float(limits.max)
    # A temperature below the smallest normal number counts as 0 because it may be flushed.
    cold, flat = jnp.abs(temperature) < limits.tiny, jnp.isinf(temperature)
    temperature = jnp.where(cold, 0, jnp.where(temperature < 0, jnp.nan, temperature))
    divisor = jnp.where(cold | flat, 1, temperature)
    # A NaN is not dead, because it compares false.
    dead = dropped | (x < jnp.maximum(peak - FAR * temperature, -highest))
    kept = jnp.where(dead | (x == jnp.inf), anchor, x)
    # Subtract halves, because their difference does not overflow before it is divided.
    values = (x / 2 - anchor / 2) / divisor * 2
    values = jnp.where(cold | dropped, -jnp.inf, values)
    # In this unit no difference overflows, and no rounding error is flushed to 0.
    fine = 2.0 ** (2 * limits.nmant + 8)
    unit = jnp.where(
        divisor < 1 / fine, fine, jnp.where(temperature > highest / 2**12, 0.25, 1)
    )
    within = lambda x: jnp.clip(x, -highest, highest)
    near, errors = two_difference(within(kept * unit), within(anchor * unit))
    divisor = jnp.where(flat, 1, divisor * unit)
    near, remainder = two_quotient(near, divisor)
    # XLA may turn this division into a multiplication and fuse it, unrounded, into a later
    # subtraction; the select prevents that. A NaN times 0 stays.
    near = jnp.where(dead, -FAR, jnp.where(flat, near * 0, near))
    errors = jnp.where(dead | flat, 0, remainder + errors / divisor)
    values = jnp.where(dead, values, near)
    return Scores(values, near, lax.stop_gradient(errors), values == -jnp.inf)


def centre_at(x: Array, anchor: Array, temperature: Array | None) -> tuple[Array, Array]:
    """(x - anchor) / temperature and its rounding error, held within 4 `FAR` of 0."""
    far = 4 * FAR
    low, high = jnp.finfo(x.dtype).min, jnp.finfo(x.dtype).max
    anchor = jnp.clip(anchor, low, high)
    values = jnp.clip(x, low, high) / 2 - anchor / 2
    divisor = jnp.ones((), x.dtype)
    if temperature is not None:
        flat = jnp.isinf(temperature)
        cold = temperature < jnp.finfo(x.dtype).tiny
        divisor = jnp.where(cold | flat, 1, temperature)
        values = jnp.where(cold, jnp.sign(values) * high, values)
        values = jnp.where(flat, 0, values)
    usual = jnp.abs(values) < far / 2 * divisor
    near, errors = two_difference(jnp.where(usual & (values != 0), x, anchor), anchor)
    if temperature is not None:
        near, remainder = two_quotient(near, divisor)
        errors = remainder + errors / divisor
    return jnp.where(usual | jnp.isnan(x), near, jnp.sign(values) * far), errors
