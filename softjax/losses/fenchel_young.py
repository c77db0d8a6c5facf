"""Regrets of the sparse maps (Fenchel-Young losses): 0 once the label leads by a margin."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import api
from softjax._autodiff import with_gradient_of
from softjax._elementary import expm1_over_twice, log1p
from softjax._inputs import per_slice
from softjax._slices import AlongAxes
from softjax._threshold import Solution
from softjax.entropies import pick
from softjax.losses._envelope import Found, Regret, hit_by, regret
from softjax.losses._labels import kept_shape, label_rows
from softjax.losses._one_minus_p import missed, others_at
from softjax.sparse import ENTMAX, MAX_ALPHA, SPARSEMAX

__all__ = ["entmax_loss", "sparsemax_loss"]


@api("axis")
def sparsemax_loss(logits: ArrayLike, labels: ArrayLike, *, axis: int = -1) -> Array:
    r"""Measures the regret of `sparsemax` at a label; 0 once the label leads by a margin of 1.

    .. math:: \tfrac12 \lVert e_y - z \rVert^2 - \tfrac12 \lVert p - z \rVert^2, \qquad
        p = \mathrm{sparsemax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.

    Returns:
        One loss a label, float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`.

    Example:
        >>> print(sparsemax_loss(jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0])))
        [0.25 0.  ]

    Note:
        The Fenchel-Young loss of `sparsemax`: its gradient is p - e_y. A sum of terms that are
        never negative, of relative error below 1e-6 in float32 at every size of the loss. O(n)
        a pass. Both modes, any order.

    Reference:
        Martins and Astudillo (2016), From softmax to sparsemax; Blondel, Martins and Niculae
        (2020), Learning with Fenchel-Young losses.
    """
    rows = label_rows(logits, labels, axis, None, None)
    alpha = jnp.full((1,) * rows.logits.ndim, 2.0, rows.logits.dtype)
    return rows.finish(regret(_SPARSEMAX, rows.axis, rows.logits, rows.labels, alpha))


@api("axis", alpha=(1, MAX_ALPHA))
def entmax_loss(
    logits: ArrayLike, labels: ArrayLike, alpha: ArrayLike = 1.5, *, axis: int = -1
) -> Array:
    r"""Measures the regret of `entmax` at a label: between cross-entropy and sparsemax loss.

    .. math:: \langle p - e_y, z \rangle + H_\alpha(p), \qquad p = \mathrm{entmax}_\alpha(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        alpha: entropic index in [1, 10000], one number or one a slice (size 1 along `axis`);
            differentiable, with `cross_entropy` as the limit at 1.
        axis: the one axis of the classes.

    Returns:
        One loss a label, float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`; also if `alpha` is a Python number outside of that, or
            does not broadcast to one a slice.

    Example:
        >>> print(entmax_loss(jnp.zeros(2), jnp.array(1)))
        0.39052433

    Note:
        Its gradient is p - e_y; it is 0 once the label leads by 1 / (alpha - 1). A sum of terms
        that are never negative, of relative error below 1e-6 in float32 at every size of the
        loss for alpha in [1.001, 2]; above, absolutely so where it is about to end. O(n) a
        pass. Both modes, any order.

    Reference:
        Peters, Niculae and Martins (2019), Sparse sequence-to-sequence models; Blondel, Martins
        and Niculae (2020), Learning with Fenchel-Young losses.
    """
    rows = label_rows(logits, labels, axis, None, None)
    alpha = per_slice(alpha, rows.logits, (rows.axis,), name="alpha")
    alpha = jnp.broadcast_to(alpha, kept_shape(rows))
    return rows.finish(regret(_ENTMAX, rows.axis, rows.logits, rows.labels, alpha))


def _sparse_regret(
    level: float,
    bent: bool,
    solution: Solution,
    logits: Array,
    labels: Array,
    axis: int,
    alpha: Array,
) -> Found:
    # With b = alpha - 1 and l = -log p_y the loss is
    #     sum_{j != y} p_j^alpha / alpha + int_{p_y}^1 t^(b - 1) (1 - t) dt,
    # and the integral is l^2 (alpha psi(-alpha l) - b psi(-b l)), psi(v) = (e^v - 1 - v) / v^2.
    # Outside of the support it is level - 1 / alpha - margin, where `level` is the margin of
    # an entry of weight 1. Where the label has most of the weight, `missed` keeps the digits.
    probs = solution.probs
    hit = hit_by(probs, labels, axis)
    others = jnp.where(hit, 0, probs)
    some = others > 0
    powers = jnp.where(some, jnp.where(some, others, 1) ** alpha, 0)
    slices = AlongAxes((axis,))
    rest, first = slices.sum(others), slices.sum(powers)
    own = jnp.expand_dims(pick(logits, labels, axis), axis)
    leads = (rest < 0.5) & jnp.isfinite(own) & (alpha >= 1 + _LEAST_BEND) & (alpha <= 2)
    args = (logits, jnp.expand_dims(labels, axis), jnp.where(leads, own, 0))
    index = jnp.where(leads, alpha, 2) if bent else None
    args, guess, index = jax.lax.stop_gradient((args, jnp.where(leads, rest, 0), index))
    found = missed(slices, *args, guess, index)
    # (Entry by entry, which XLA does in the place of the plain weights.)
    exact = others_at(slices, *args, index, found.root)
    others = with_gradient_of(others, jnp.where(leads, exact, others))
    rest = with_gradient_of(rest, jnp.where(leads, found.rest, rest))
    first = with_gradient_of(first, jnp.where(leads, found.powers, first)) / alpha
    margin = jnp.expand_dims(pick(solution.margins, labels, axis), axis)
    p = jnp.expand_dims(pick(probs, labels, axis), axis)
    bend = alpha - 1
    # (Where p is small, the subtraction 1 - rest would cancel in its turn.)
    near, inside = rest < 0.5, p > 0
    surprise = jnp.where(
        near, -log1p(-jnp.where(near, rest, 0)), -jnp.log(jnp.where(inside, p, 1))
    )
    integral = (
        surprise
        * surprise
        * (
            alpha * expm1_over_twice(-alpha * surprise)
            - bend * expm1_over_twice(-bend * surprise)
        )
    )
    outside = level - 1 / alpha - jnp.where(inside, 0, margin)
    loss = first + jnp.where(inside, integral, outside)
    sound = ~jnp.isnan(rest + p) | (margin == -jnp.inf)  # A comparison with NaN hides it.
    loss = jnp.squeeze(jnp.where(sound, loss, jnp.nan), axis)
    return Found(loss, others, rest, surprise)


_LEAST_BEND = 2.0**-10  # of alpha - 1; below, the loss is nearly a cross-entropy

_SPARSEMAX = Regret(SPARSEMAX, functools.partial(_sparse_regret, 1.0, False))
_ENTMAX = Regret(ENTMAX, functools.partial(_sparse_regret, 0.0, True))
