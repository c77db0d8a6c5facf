"""Cross-entropies of softmax or the sigmoid with labels, discounted or not."""

from __future__ import annotations

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, PROBABILITY, api
from softjax._autodiff import constant_where_infinite
from softjax._inputs import broadcast, check_flag, is_static_zero, mask, nan_outside, to_float
from softjax._mesh import AxisName
from softjax._softmax_stats import row_statistics
from softjax.losses._labels import (
    label_rows,
    label_weights,
    per_label,
    reduce_rows,
    weights_per_logit,
)
from softjax.losses._reduction import check_reduction, reduce_kept
from softjax.losses._terms import cross_entropy_terms, times_nll

__all__ = ["cross_entropy", "focal_loss", "sigmoid_focal_loss"]


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    return_z_loss: Literal[False] = False,
    axis_name: AxisName = None,
) -> Array: ...


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    return_z_loss: Literal[True],
    axis_name: AxisName = None,
) -> tuple[Array, Array]: ...


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    return_z_loss: bool,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]: ...


@api(
    "axis",
    "ignore_index",
    "reduction",
    "return_z_loss",
    "axis_name",
    spread=("logits", "where", "class_weights"),
    label_smoothing=PROBABILITY,
    z_loss=NONNEGATIVE,
)
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    return_z_loss: bool = False,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]:
    r"""Measures -log p of one label per slice, in nats.

    .. math:: (1 - \epsilon) w_y (-\log p_y)
        + \frac{\epsilon}{n} \sum_j m_j w_j (-\log p_j) + c \, (\log Z)^2, \qquad
        p = \mathrm{softmax}(z), \; Z = \sum_j m_j e^{z_j}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the n classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry. The n of the
            smoothing counts the kept entries.
        ignore_index: a label, of any value, whose rows have loss and gradient 0, whatever they
            hold.
        label_smoothing: epsilon in [0, 1], one number or one per label; differentiable.
        z_loss: factor c >= 0 of the squared logarithm of the normaliser, one number or one per
            label; differentiable.
        class_weights: factors w >= 0, `[n]`; differentiable. With smoothing they weigh as in
            PyTorch's `cross_entropy`.
        reduction: "mean" divides the sum by that of the class weights of the labels that are
            not ignored, as PyTorch does; "sum"; or None.
        return_z_loss: whether to return the part of the z-loss too, for a log.
        axis_name: mesh axis, or axes, over which the classes are spread, inside of
            `jax.shard_map`; None: not spread. The labels count the classes of all devices,
            `class_weights` are those of this device's classes, and `reduction` is over this
            device's rows. `mean_loss` can average the rows of all devices.

    Returns:
        One loss per label, of the shape of `labels`, or one number with `reduction`; float32 or
        wider, and never negative; NaN where an option in an array is out of range. With
        `return_z_loss`, the pair (loss, z-loss), both reduced alike, of which the first
        contains the second. A dropped label, or a +inf at another class, makes the loss inf,
        which is constant: no logit has a derivative. A class weight of 0, or a smoothing of 1,
        counts that inf as 0.

    Raises:
        TypeError: `logits` is not real, `labels` not integer, `where` not bool, or `axis` not
            one int.
        ValueError: `labels` is of another shape, an option does not broadcast, `axis` is out
            of range, `reduction` is none of the above, or `label_smoothing` is a Python number
            outside of [0, 1].

    Example:
        >>> print(cross_entropy(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([1, 0])))
        [6.9314718e-01 1.9287499e-22]

    Note:
        O(n) time. Temporary memory of large logits: a quarter of them for the value, less for
        the gradient; if the classes lie along an axis between others, two arrays for the value
        and one for the gradient; with smoothing, up to three. No one-hot array is made.
        Computed as
        (max - z_y) + log1p(sum over the others), of relative error about 2e-7 in float32 at
        every size of the loss; the label's derivative is minus the sum of the other
        probabilities, not p - 1. Both modes, any order. An unknown label's loss is a constant
        NaN, so its row has gradient 0.

    Reference:
        Szegedy et al. (2016), Rethinking the inception architecture, for the smoothing;
        Chowdhery et al. (2022), PaLM, for the z-loss.
    """
    check_reduction(reduction)
    check_flag(return_z_loss, name="return_z_loss")
    soft_hint = ": weights of all classes are for `soft_cross_entropy`"
    rows = label_rows(logits, labels, axis, where, ignore_index, axis_name, soft_hint)
    smoothing = weights = z_factor = None
    if not is_static_zero(label_smoothing):
        smoothing = nan_outside(per_label(label_smoothing, rows, "label_smoothing"), 0, 1)
        weights = jnp.ones((1,) * rows.logits.ndim, rows.logits.dtype)
        if class_weights is not None:
            weights = weights_per_logit(class_weights, rows.logits, rows.axis)
    if not is_static_zero(z_loss):
        z_factor = nan_outside(per_label(z_loss, rows, "z_loss"), 0)
    found = row_statistics(rows.slices, rows.logits, rows.labels, weights)
    terms = cross_entropy_terms(
        found.nll,
        found.logsumexp,
        found.uniform_nll,
        label_weight=label_weights(class_weights, rows),
        smoothing=smoothing,
        z_loss=z_factor,
    )
    loss, *z_terms = map(rows.classes.finish, terms)
    z_term = z_terms[0] if z_terms else jnp.zeros_like(loss)
    reduced = functools.partial(
        reduce_rows,
        labels=labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        reduction=reduction,
        axis_name=axis_name,
    )
    total = reduced(constant_where_infinite(loss + z_term if z_terms else loss))
    return (total, reduced(z_term)) if return_z_loss else total


_MAX_GAMMA = 1e18  # its square is finite in float32


@api(
    "axis",
    "ignore_index",
    "reduction",
    "axis_name",
    spread=("logits", "where", "class_weights"),
    gamma=(0, _MAX_GAMMA),
)
def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures -log p of a label, discounted where the model is already right.

    .. math:: -w_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        gamma: the discount, in [0, 1e18] (0 is `cross_entropy`), one number or one per label;
            differentiable. In an array more counts as 1e18.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.
        ignore_index: a label, of any value, whose rows have loss and gradient 0, whatever they
            hold.
        class_weights: factors w >= 0, `[n]`; differentiable.
        reduction: as in `cross_entropy`.
        axis_name: as in `cross_entropy`.

    Returns:
        One loss per label, or one number with `reduction`; float32 or wider, and at least 0.
        NaN where an option in an array is out of range.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`; also if `gamma` is a Python number outside of that.

    Example:
        >>> print(focal_loss(jnp.zeros(2), jnp.array(1), gamma=2.0))
        0.1732868

    Note:
        O(n). 1 - p is computed from log p without cancellation. Both modes, any order, where
        p_y < 1.

    Reference:
        Lin et al. (2017), Focal loss for dense object detection.
    """
    check_reduction(reduction)
    rows = label_rows(logits, labels, axis, where, ignore_index, axis_name)
    gamma = nan_outside(per_label(gamma, rows, "gamma"), 0)

    nll = row_statistics(rows.slices, rows.logits, rows.labels).nll
    dropped = nll == jnp.inf
    finite = jnp.where(dropped, 1, nll)
    discount = _discount(-jnp.expm1(-finite), gamma)
    losses = jnp.where(dropped, nll, discount * finite)
    # A power of 1, or one that is not taken, does not show that gamma is NaN.
    losses = jnp.where(jnp.isnan(gamma), jnp.nan, losses)
    label_weight = label_weights(class_weights, rows)
    if label_weight is not None:
        losses = times_nll(label_weight, losses)
    losses = rows.classes.finish(losses)
    return reduce_rows(
        losses,
        labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        reduction=reduction,
        axis_name=axis_name,
    )


@api("reduction", gamma=(0, _MAX_GAMMA), alpha=PROBABILITY)
def sigmoid_focal_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str | None = None,
) -> Array:
    r"""Measures the focal loss of independent yes-or-no decisions, one per logit.

    .. math:: a \, (1 - q)^\gamma \big(-t \log p - (1 - t) \log(1 - p)\big), \qquad
        p = \frac{1}{1 + e^{-z}}, \quad q = t p + (1 - t)(1 - p), \quad
        a = t \alpha + (1 - t)(1 - \alpha)

    Args:
        logits: scores z, `[*shape]`, real; differentiable.
        targets: t in [0, 1], broadcastable to `[*shape]`: 1 for yes, 0 for no; differentiable.
        gamma: the discount, in [0, 1e18] (0 is the binary cross-entropy), broadcastable to
            `[*shape]`; differentiable. In an array more counts as 1e18.
        alpha: the weight of yes, in [0, 1], with 1 - alpha that of no, broadcastable to
            `[*shape]`; differentiable. None weighs both by 1.
        where: mask, bool, broadcastable to `[*shape]`. False leaves an entry out: its loss and
            gradient are 0, whatever it holds.
        reduction: "mean" divides the sum by the number of entries that are not left out;
            "sum"; or None.

    Returns:
        One loss per logit, `[*shape]`, or one number with `reduction`; float32 or wider, at
        least 0. NaN where `gamma` or `alpha` in an array is out of range.

    Raises:
        TypeError: an argument is not real, or `where` not bool.
        ValueError: an option does not broadcast, `gamma` or `alpha` is a Python number outside
            of its range, or `reduction` is none of the above.

    Example:
        >>> print(sigmoid_focal_loss(jnp.zeros(2), jnp.array([1.0, 0.0]), alpha=0.25))
        [0.0433217 0.1299651]

    Note:
        Every factor is computed without cancellation, so confident decisions keep the digits of
        their small losses. Detectors divide the sum by the number of positive targets. Both
        modes, any order, where q < 1.

    Reference:
        Lin et al. (2017), Focal loss for dense object detection.
    """
    check_reduction(reduction)
    z, _ = to_float(logits, name="logits")
    keep = None if where is None else mask(where, z.shape)

    def entries(option: ArrayLike, name: str) -> Array:
        value = broadcast(to_float(option, name=name)[0].astype(z.dtype), z.shape, name=name)
        return value if keep is None else jnp.where(keep, value, 0)

    z = z if keep is None else jnp.where(keep, z, 0)
    t = entries(targets, "targets")
    gamma = nan_outside(entries(gamma, "gamma"), 0)
    # At z = inf or -inf one logarithm is infinite; `times_nll` counts it if its target is
    # not 0.
    no, yes = jax.nn.sigmoid(-z), jax.nn.sigmoid(z)
    nll = times_nll(t, jax.nn.softplus(-z)) + times_nll(1 - t, jax.nn.softplus(z))
    discount = _discount(t * no + (1 - t) * yes, gamma)
    losses = constant_where_infinite(times_nll(discount, nll))
    losses = jnp.where(jnp.isnan(z + t + gamma), jnp.nan, losses)
    if alpha is not None:
        alpha = nan_outside(entries(alpha, "alpha"), 0, 1)
        losses = times_nll(t * alpha + (1 - t) * (1 - alpha), losses)
    if keep is not None:
        losses = jnp.where(keep, losses, 0)
    return reduce_kept(losses, keep, reduction)


def _discount(missing: Array, gamma: Array) -> Array:
    """(1 - p)^gamma from the missing probability 1 - p, with a derivative where that is 0."""
    some = missing > 0
    power = jnp.where(some, missing, 1) ** jnp.minimum(gamma, _MAX_GAMMA)
    return jnp.where(some, power, jnp.where(gamma == 0, 1, 0))
