"""What a label that leads misses of weight 1 under a sparse map, however little it is.

With b = alpha - 1, the lead L_j = z_y - z_j over another entry, and v = 1 - p_y^b,

    p_j = (d_j - v)_+^(1/b),   d_j = 1 - b L_j,   sum_{j != y} p_j = 1 - (1 - v)^(1/b).

The d_j are known to two parts, so the root v of this equation, which is convex for alpha <= 2,
has all its digits where the lead is all but complete and p_y rounds to 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from softjax._cpu import blocked_over_slices
from softjax._elementary import log1p
from softjax._float import high_half, two_difference, two_quotient
from softjax._mesh import vary
from softjax._slices import AlongAxes


class Missed(NamedTuple):
    root: Array  # v
    rest: Array  # sum_{j != y} p_j = 1 - p_y
    powers: Array  # sum_{j != y} p_j^alpha


@blocked_over_slices
def missed(
    slices: AlongAxes,
    logits: Array,
    labels: Array,
    own: Array,
    guess: Array,
    alpha: Array | None,
) -> Missed:
    """From a guess of `rest` below 1/2; `own` is the label's logit, and finite.

    All are one number a slice. Alpha None stands for 2, where powers are not needed.
    """
    unit = float(jnp.finfo(logits.dtype).eps)
    bend = jnp.ones_like(own) if alpha is None else alpha - 1
    power = 1 / bend
    weigh = _weights(slices, logits, labels, own, alpha)

    def weight_of(v: Array) -> Array:
        return v if alpha is None else -jnp.expm1(log1p(-v) * power)

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, _, count = state
        (probs, margin), rest = weigh(v), weight_of(v)
        excess = slices.sum(probs) - rest
        slopes = jnp.sign(probs) if alpha is None else probs / margin
        slope = power * (slices.sum(slopes) + (1 - rest) / (1 - v))
        target = jnp.clip(v + excess / slope, 0, 0.9)
        moving = (jnp.abs(excess) > 16 * unit * rest) & (target != v)
        return target, jnp.any(moving), count + 1

    start = guess if alpha is None else -jnp.expm1(bend * log1p(-guess))
    state = *vary((start, jnp.array(True)), logits), jnp.array(0)
    v = lax.while_loop(lambda state: state[1] & (state[2] < 64), move, state)[0]
    probs, margin = weigh(v)
    return Missed(v, weight_of(v), slices.sum(probs * margin))


def others_at(
    slices: AlongAxes, logits: Array, labels: Array, own: Array, alpha: Array | None, v: Array
) -> Array:
    """The p_j, one an entry, that the root v of `missed` gives; 0 at the label."""
    return _weights(slices, logits, labels, own, alpha)(v)[0]


def _weights(
    slices: AlongAxes, logits: Array, labels: Array, own: Array, alpha: Array | None
) -> Callable[[Array], tuple[Array, Array]]:
    """Of v, the p_j and their margins d_j - v."""
    unit = float(jnp.finfo(logits.dtype).eps)
    bend = jnp.ones_like(own) if alpha is None else alpha - 1
    power, power_lost = two_quotient(jnp.ones_like(bend), bend)
    places = lax.broadcasted_iota(labels.dtype, logits.shape, slices.axes[0])
    # A little further behind than 1 / b an entry has no weight, whatever rounding does.
    floor = own - (power * 1.01 + 8 * unit * jnp.abs(own))
    behind = (places == labels) | (logits < floor)
    lead, lost = two_difference(own, jnp.where(behind, own, logits))
    product = lead
    if alpha is not None:
        # (A select, so that no compiler fuses the rounded product with the difference; of a
        # constant it would be moved behind that.)
        product = jnp.where(behind, own, bend * lead)
        lost = bend * lost - jnp.where(behind, 0, _product_error(bend, lead, product))
    one = jnp.where(jnp.isnan(product), product, 1)  # Of a literal, XLA would sum constants.
    near, near_lost = two_difference(one, product)
    lost = near_lost - lost

    def weigh(v: Array) -> tuple[Array, Array]:
        if alpha is None:
            margin = (near - v) + lost
            probs = jnp.where(behind, 0, jnp.maximum(margin, 0))
            return probs, probs
        high, low = two_difference(near, v)
        low += lost
        margin = high + low
        low -= margin - high
        inside = (margin > 0) & ~behind
        margin = jnp.where(inside, margin, 1)
        mended = power_lost * jnp.log(margin) + power * jnp.where(inside, low, 0) / margin
        return jnp.where(inside, margin**power * (1 + mended), 0), margin

    return weigh


def _product_error(a: Array, b: Array, product: Array) -> Array:
    """fl(a b) - a b, exactly: of halves each product is exact."""
    a_high, b_high = high_half(a), high_half(b)
    a_low, b_low = a - a_high, b - b_high
    return ((product - a_high * b_high) - a_high * b_low - a_low * b_high) - a_low * b_low
