"""1 - p_y, to full relative precision, where p_y is nearly 1 under a sparse map.

With b = alpha - 1, the lead L_j = z_y - z_j over another entry, and v = 1 - p_y^b,

    p_j = (d_j - v)_+^(1/b),   d_j = 1 - b L_j,   sum_{j != y} p_j = 1 - (1 - v)^(1/b).

Each d_j is a sum of two floats, so the root v of this equation, which is convex for alpha <= 2,
has all its digits even where p_y rounds to 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from softjax._cpu import blocked_over_slices
from softjax._elementary import log1p
from softjax._float import remainder, two_difference, two_quotient
from softjax._mesh import vary
from softjax._slices import AlongAxes


class OneMinusP(NamedTuple):
    root: Array  # v
    others_sum: Array  # sum_{j != y} p_j = 1 - p_y
    powers_sum: Array  # sum_{j != y} p_j^alpha


@blocked_over_slices
def one_minus_p(
    slices: AlongAxes,
    logits: Array,
    labels: Array,
    label_logit: Array,
    guess: Array,
    alpha: Array | None,
) -> OneMinusP:
    """Refines a guess of 1 - p_y below 1/2.

    All but the logits are one number per slice; the label's logit is finite. Alpha None stands
    for 2, which needs no powers.
    """
    unit = float(jnp.finfo(logits.dtype).eps)
    bend = jnp.ones_like(label_logit) if alpha is None else alpha - 1
    power = 1 / bend
    weigh = _weights(slices, logits, labels, label_logit, alpha)

    def weight_of(v: Array) -> Array:
        return v if alpha is None else -jnp.expm1(log1p(-v) * power)

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, _, count = state
        (probs, margin), others_sum = weigh(v), weight_of(v)
        excess = slices.sum(probs) - others_sum
        slopes = jnp.sign(probs) if alpha is None else probs / margin
        slope = power * (slices.sum(slopes) + (1 - others_sum) / (1 - v))
        target = jnp.clip(v + excess / slope, 0, 0.9)
        moving = (jnp.abs(excess) > 16 * unit * others_sum) & (target != v)
        return target, jnp.any(moving), count + 1

    start = guess if alpha is None else -jnp.expm1(bend * log1p(-guess))
    state = vary((start, jnp.array(True)), logits, but=slices.mesh_axes)
    unfinished = lambda state: state[1] & (state[2] < 64)
    v = lax.while_loop(unfinished, move, (*state, jnp.array(0)))[0]
    probs, margin = weigh(v)
    return OneMinusP(v, weight_of(v), slices.sum(probs * margin))


def other_probs_at(
    slices: AlongAxes,
    logits: Array,
    labels: Array,
    label_logit: Array,
    alpha: Array | None,
    v: Array,
) -> Array:
    """The p_j, one per entry, that the root v of `one_minus_p` gives; 0 at the label."""
    return _weights(slices, logits, labels, label_logit, alpha)(v)[0]


def _weights(
    slices: AlongAxes, logits: Array, labels: Array, label_logit: Array, alpha: Array | None
) -> Callable[[Array], tuple[Array, Array]]:
    """A function of v that returns the p_j and their margins d_j - v."""
    unit = float(jnp.finfo(logits.dtype).eps)
    bend = jnp.ones_like(label_logit) if alpha is None else alpha - 1
    power, power_lost = two_quotient(jnp.ones_like(bend), bend)
    places = slices.places(logits, labels.dtype)
    # An entry that is a little further behind than 1 / b has no weight, whatever rounding does.
    floor = label_logit - (power * 1.01 + 8 * unit * jnp.abs(label_logit))
    behind = (places == labels) | (logits < floor)
    lead, lost = two_difference(label_logit, jnp.where(behind, label_logit, logits))
    product = lead
    if alpha is not None:
        # The select prevents XLA from fusing the product, unrounded, with the difference. Its
        # other side is no constant, because XLA would move such a select behind the difference.
        product = jnp.where(behind, label_logit, bend * lead)
        lost = bend * lost - jnp.where(behind, 0, remainder(product, bend, lead))
    # Not a literal: XLA would sum it with other constants first.
    one = jnp.where(jnp.isnan(product), product, 1)
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
