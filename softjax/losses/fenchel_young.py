"""Fenchel-Young losses of the sparse maps: 0 once the label leads by a margin."""

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
from softjax._mesh import AxisName
from softjax._slices import AlongAxes
from softjax._threshold import Solution
from softjax.losses._fenchel_young import FenchelYoung, LabelLoss, fenchel_young, is_label
from softjax.losses._labels import Rows, label_rows, label_weights, reduce_rows
from softjax.losses._one_minus_p import one_minus_p, other_probs_at
from softjax.losses._reduction import check_reduction
from softjax.losses._terms import times_nll
from softjax.sparse import ENTMAX, MAX_ALPHA, SPARSEMAX

__all__ = ["entmax_loss", "sparsemax_loss"]


@api(
    "axis",
    "ignore_index",
    "reduction",
    "axis_name",
    spread=("logits", "where", "class_weights"),
)
def sparsemax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures the regret of `sparsemax` at a label; 0 once the label leads by a margin of 1.

    .. math:: \tfrac12 \lVert e_y - z \rVert^2 - \tfrac12 \lVert p - z \rVert^2, \qquad
        p = \mathrm{sparsemax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.
        ignore_index: a label, of any value, whose rows have loss and gradient 0, whatever they
            hold.
        class_weights: factors >= 0 of the losses by their labels, `[n]`; differentiable. A
            negative one is NaN.
        reduction: as in `cross_entropy`.
        axis_name: as in `cross_entropy`.

    Returns:
        One loss per label, or one number with `reduction`; float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`.

    Example:
        >>> print(sparsemax_loss(jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0])))
        [0.25 0.  ]

    Note:
        The Fenchel-Young loss of `sparsemax`: its gradient is p - e_y. A sum of terms that are
        never negative, of relative error below 1e-6 in float32 at every size of the loss. O(n)
        per pass. Both modes, any order.

    Reference:
        Martins and Astudillo (2016), From softmax to sparsemax; Blondel, Martins and Niculae
        (2020), Learning with Fenchel-Young losses.
    """
    check_reduction(reduction)
    rows = label_rows(logits, labels, axis, where, ignore_index, axis_name)
    losses = _losses(_SPARSEMAX, rows, None, class_weights)
    return reduce_rows(
        losses,
        labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        reduction=reduction,
        axis_name=axis_name,
    )


@api(
    "axis",
    "ignore_index",
    "reduction",
    "axis_name",
    spread=("logits", "where", "class_weights"),
    alpha=(1, MAX_ALPHA),
)
def entmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike = 1.5,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures the regret of `entmax` at a label: between cross-entropy and sparsemax loss.

    .. math:: \langle p - e_y, z \rangle + H_\alpha(p), \qquad p = \mathrm{entmax}_\alpha(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        alpha: entropic index in [1, 10000], one number or one per slice (size 1 along `axis`);
            differentiable, with `cross_entropy` as the limit at 1.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.
        ignore_index: a label, of any value, whose rows have loss and gradient 0, whatever they
            hold.
        class_weights: factors >= 0 of the losses by their labels, `[n]`; differentiable. A
            negative one is NaN.
        reduction: as in `cross_entropy`.
        axis_name: as in `cross_entropy`.

    Returns:
        One loss per label, or one number with `reduction`; float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`; also if `alpha` is a Python number outside of that, or
            does not broadcast to one per slice.

    Example:
        >>> print(entmax_loss(jnp.zeros(2), jnp.array(1)))
        0.39052433

    Note:
        Its gradient is p - e_y; it is 0 once the label leads by 1 / (alpha - 1). The loss is a
        sum of terms that are never negative. In float32 its relative error is below 1e-6 at
        every size of the loss for alpha in [1.001, 2], and its absolute error is below 1e-6 for
        alpha up to 5. From alpha = 10 on the error is up to 0.1, because one eps of a score
        moves the weights at the edge of the support. O(n) per pass. Both modes, any order.

    Reference:
        Peters, Niculae and Martins (2019), Sparse sequence-to-sequence models; Blondel, Martins
        and Niculae (2020), Learning with Fenchel-Young losses.
    """
    check_reduction(reduction)
    rows = label_rows(logits, labels, axis, where, ignore_index, axis_name)
    alpha = per_slice(alpha, rows.logits, (rows.axis,), name="alpha")
    alpha = jnp.broadcast_to(alpha, rows.slices.kept_shape(rows.logits.shape))
    if rows.classes.ignored is not None:
        alpha = jnp.where(jnp.expand_dims(rows.classes.ignored, rows.axis), 2, alpha)
    losses = _losses(_ENTMAX, rows, alpha, class_weights)
    return reduce_rows(
        losses,
        labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        reduction=reduction,
        axis_name=axis_name,
    )


def _losses(
    kind: FenchelYoung, rows: Rows, alpha: Array | None, class_weights: ArrayLike | None
) -> Array:
    """One loss per label; alpha None stands for 2."""
    if alpha is None:
        alpha = jnp.full((1,) * rows.logits.ndim, 2.0, rows.logits.dtype)
    losses = fenchel_young(kind, rows.slices, rows.logits, rows.labels, alpha)
    label_weight = label_weights(class_weights, rows)
    if label_weight is not None:
        losses = times_nll(label_weight, losses)
    return rows.classes.finish(losses)


def _sparse_loss(
    has_alpha: bool,
    solution: Solution,
    logits: Array,
    labels: Array,
    slices: AlongAxes,
    alpha: Array,
) -> LabelLoss:
    # With b = alpha - 1 and l = -log p_y the loss is
    #     sum_{j != y} p_j^alpha / alpha + int_{p_y}^1 t^(b - 1) (1 - t) dt,
    # and the integral is l^2 (alpha psi(-alpha l) - b psi(-b l)), psi(v) = (e^v - 1 - v) / v^2.
    # Outside of the support it is `level` - 1 / alpha - margin, where `level` is the margin of
    # an entry of weight 1: 1 for sparsemax, else 0. Where the label has most of the weight,
    # `one_minus_p` keeps the digits.
    probs = solution.probs
    other_probs = jnp.where(is_label(slices, probs, labels), 0, probs)
    some = other_probs > 0
    powers = jnp.where(some, jnp.where(some, other_probs, 1) ** alpha, 0)
    (axis,) = slices.axes
    others_sum, powers_sum = slices.sum(other_probs), slices.sum(powers)
    label_logit = jnp.expand_dims(slices.pick(logits, labels), axis)
    leads = (others_sum < 0.5) & jnp.isfinite(label_logit)
    leads &= (alpha >= 1 + _LEAST_BEND) & (alpha <= 2)
    args = (logits, jnp.expand_dims(labels, axis), jnp.where(leads, label_logit, 0))
    index = jnp.where(leads, alpha, 2) if has_alpha else None
    guess = jnp.where(leads, others_sum, 0)
    args, guess, index = jax.lax.stop_gradient((args, guess, index))
    found = one_minus_p(slices, *args, guess, index)
    # Form the exact probabilities entry by entry, because XLA then writes them in place of the
    # plain ones.
    exact = other_probs_at(slices, *args, index, found.root)
    other_probs = with_gradient_of(other_probs, jnp.where(leads, exact, other_probs))
    others_sum = with_gradient_of(others_sum, jnp.where(leads, found.others_sum, others_sum))
    powers_sum = with_gradient_of(powers_sum, jnp.where(leads, found.powers_sum, powers_sum))
    margin = jnp.expand_dims(slices.pick(solution.margins, labels), axis)
    p = jnp.expand_dims(slices.pick(probs, labels), axis)
    bend = alpha - 1
    # Where p is small, read -log p from p itself, because 1 - others_sum would cancel.
    near, inside = others_sum < 0.5, p > 0
    nll = jnp.where(
        near,
        -log1p(-jnp.where(near, others_sum, 0)),
        -jnp.log(jnp.where(inside, p, 1)),
    )
    difference = alpha * expm1_over_twice(-alpha * nll) - bend * expm1_over_twice(-bend * nll)
    integral = nll * nll * difference
    level = 0.0 if has_alpha else 1.0
    outside = level - 1 / alpha - jnp.where(inside, 0, margin)
    loss = powers_sum / alpha + jnp.where(inside, integral, outside)
    # A comparison with NaN is False, so NaN must be put back.
    loss = jnp.squeeze(jnp.where(jnp.isnan(others_sum + p), jnp.nan, loss), axis)
    return LabelLoss(loss, other_probs, others_sum, nll)


_LEAST_BEND = 2.0**-10  # of alpha - 1; below, the loss is nearly a cross-entropy

_SPARSEMAX = FenchelYoung(SPARSEMAX, functools.partial(_sparse_loss, False))
_ENTMAX = FenchelYoung(ENTMAX, functools.partial(_sparse_loss, True))
