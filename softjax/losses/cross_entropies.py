"""Cross-entropies: the surprise of softmax at labels, targets or a teacher's weights."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, PROBABILITY, api
from softjax._inputs import Axis, broadcast, is_zero, prepare, to_float
from softjax._slices import AlongAxes
from softjax._softmax import SOFTMAX
from softjax._threshold import solve
from softjax.entropies import divergence
from softjax.losses._labels import (
    constant_where_infinite,
    label_rows,
    label_weights,
    per_label,
    spread_weights,
    times_nats,
)
from softjax.losses._softmax_stats import nll, statistics

_HOT = 1e15  # above, the loss is its limit to working precision

__all__ = ["cross_entropy", "distillation_loss", "focal_loss", "soft_cross_entropy"]


@api("axis", "ignore_index", label_smoothing=PROBABILITY, z_loss=NONNEGATIVE)
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
) -> Array:
    r"""Measures the surprise at one label a slice, in nats.

    .. math:: (1 - \epsilon) w_y (-\log p_y)
        + \frac{\epsilon}{n} \sum_j m_j w_j (-\log p_j) + c \, (\log Z)^2, \qquad
        p = \mathrm{softmax}(z), \; Z = \sum_j m_j e^{z_j}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the n classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry. The n of the
            smoothing counts what is kept.
        ignore_index: a label, of any value, whose rows have loss and gradient 0.
        label_smoothing: epsilon in [0, 1], one number or one a label; differentiable.
        z_loss: factor c of the squared logarithm of the normaliser, one number or one a label;
            differentiable.
        class_weights: factors w, `[n]`, real; differentiable. With smoothing they weigh as in
            PyTorch's `cross_entropy`.

    Returns:
        One loss a label, float32 or wider, of the shape of `labels`; never negative.
        `mean_loss` averages them. A dropped label has loss inf, which is constant: no logit
        has a derivative. A class weight of 0, or a smoothing of 1, counts it for nothing.

    Raises:
        TypeError: `logits` is not real, `labels` not integer, `where` not bool, or `axis` not
            one int.
        ValueError: `labels` is of another shape, an option does not broadcast, `axis` is out
            of range, or `label_smoothing` is a Python number outside of [0, 1].

    Example:
        >>> print(cross_entropy(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([1, 0])))
        [6.9314718e-01 1.9287499e-22]

    Note:
        O(n) time; for the value a sixteenth of the logits as temporary memory, where they are
        large (along the last axis), one array for the gradient with whatever options, and no
        one-hot array. Computed as (max - z_y) + log1p(sum over the others), of relative error
        about 2e-7 in float32 at every size of the loss; the label's derivative is minus the sum
        of the other probabilities, not p - 1. Both modes, any order.

    Reference:
        Szegedy et al. (2016), Rethinking the inception architecture, for the smoothing;
        Chowdhery et al. (2022), PaLM, for the z-loss.
    """
    rows = label_rows(logits, labels, axis, where, ignore_index)
    smoothed = not is_zero(label_smoothing)
    weights = spread_weights(class_weights, rows) if smoothed else None
    found = statistics(rows.axis, rows.logits, rows.labels, weights)
    factor = label_weights(class_weights, rows)
    if smoothed:
        epsilon = per_label(label_smoothing, rows, "label_smoothing")
        factor = factor * (1 - epsilon)
    loss = times_nats(factor, found.nll)
    if found.uniform_nll is not None:
        loss += times_nats(epsilon, found.uniform_nll)
    if not is_zero(z_loss):
        finite = jnp.where(jnp.isfinite(found.logsumexp), found.logsumexp, 0)
        loss += per_label(z_loss, rows, "z_loss") * finite**2
    return rows.finish(constant_where_infinite(loss))


@api("axis")
def soft_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Measures the expected surprise under target weights, in nats.

    .. math:: -\sum_j m_j t_j \log p_j, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        targets: weights t >= 0, broadcastable to `[*shape]`; differentiable. They need not sum
            to one.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One loss a slice, float32 or wider; inf where a target stands on an entry that -inf
        drops.

    Raises:
        TypeError: `logits` or `targets` is not real, or `where` not bool.
        ValueError: `targets` or `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(soft_cross_entropy(jnp.zeros(2), jnp.array([0.25, 0.75])))
        0.6931472

    Note:
        O(n). A target of 0 counts as nothing whatever its logit. Both modes, any order.
    """
    problem = prepare(logits, axis=axis, where=where)
    targets, _ = to_float(targets, name="targets")
    targets = broadcast(
        targets.astype(problem.logits.dtype), problem.logits.shape, name="targets"
    )
    if where is not None:
        targets = jnp.where(problem.logits == -jnp.inf, jnp.where(where, targets, 0), targets)
    slices = AlongAxes(problem.axes)
    margins = solve(SOFTMAX, slices, problem.logits).margins
    dropped = margins == -jnp.inf
    terms = jnp.where(dropped, 0, targets) * -jnp.where(dropped, 0, margins)
    impossible = dropped & (targets > 0)
    terms = jnp.where(impossible, jnp.inf, terms)
    return constant_where_infinite(jnp.squeeze(slices.sum(terms), problem.axes))


@api("axis", temperature=NONNEGATIVE)
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: Axis = -1,
) -> Array:
    r"""Measures how far a student is from its teacher, both softened by a temperature.

    .. math:: T^2 D\big(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\big)

    Args:
        student_logits: scores s, `[*shape]`, real or -inf (dropped); differentiable.
        teacher_logits: scores t, `[*shape]`, real or -inf (dropped); differentiable.
        temperature: T in [0, inf], one number or one a slice; differentiable. At 0 (in float32
            below 1e-19) and inf the loss is its limit, and the derivative in T is 0.
        axis: axis, axes, or None for all, along which a slice runs.

    Returns:
        One loss a slice, float32 or wider, at least 0; inf where the student drops what the
        teacher keeps. The limit at T = 0 is 0, at inf half the variance of s - t over what is
        kept (and inf where the two keep different entries).

    Raises:
        TypeError: logits are not real.
        ValueError: the shapes differ, `temperature` does not broadcast to one a slice or is a
            negative Python number, or `axis` is out of range.

    Example:
        >>> print(distillation_loss(jnp.zeros(2), jnp.zeros(2), temperature=2.0))
        0.0

    Note:
        The factor keeps gradients of one size as the temperature changes. O(n); precise also
        where the two are close, as `kl_divergence`. Both modes, any order.

    Reference:
        Hinton, Vinyals and Dean (2015), Distilling the knowledge in a neural network.
    """
    student = prepare(student_logits, axis=axis, temperature=temperature, name="student_logits")
    teacher = prepare(teacher_logits, axis=axis, temperature=temperature, name="teacher_logits")
    names = {"name": "student_logits", "target": "teacher_logits"}
    if student.temperature is None or teacher.temperature is None:
        return jnp.squeeze(divergence(teacher, student, **names), student.axes)
    heat = jnp.promote_types(student.temperature.dtype, teacher.temperature.dtype)
    given = student.temperature.astype(heat)
    cold, hot = jnp.abs(given) < float(jnp.finfo(heat).tiny) ** 0.5, given > _HOT
    usual = jnp.where(cold | hot, 1, given)
    row = divergence(
        teacher._replace(temperature=usual), student._replace(temperature=usual), **names
    )
    # (Which is seldom asked for, and takes longer than the rest.)
    logits = teacher.logits, student.logits
    nothing = lambda *logits: jnp.zeros_like(row)
    variance = functools.partial(_half_variance, student.axes)
    limit = lax.cond(jnp.any(hot), variance, nothing, *logits)
    limit = jnp.where(cold, jnp.where(row == jnp.inf, jnp.inf, 0), limit)
    return jnp.squeeze(jnp.where(cold | hot, limit, row), student.axes)


def _half_variance(axes: tuple[int, ...], teacher: Array, student: Array) -> Array:
    """Half the variance of the logits' difference: the distillation loss of endless heat."""
    slices, dtype = AlongAxes(axes), jnp.promote_types(teacher.dtype, student.dtype)
    kept = [logits != -jnp.inf for logits in (teacher, student)]
    both = kept[0] & kept[1]
    apart = [jnp.where(both, logits, 0).astype(dtype) for logits in (teacher, student)]
    count = jnp.maximum(slices.sum(both.astype(dtype)), 1)
    mean = slices.sum(apart[0] - apart[1]) / count
    rest = jnp.where(both, apart[0] - apart[1] - mean, 0)
    differ = slices.max((kept[0] != kept[1]).astype(dtype)) > 0
    some = slices.max(kept[0].astype(dtype)) > 0
    return jnp.where(some & differ, jnp.inf, slices.sum(rest * rest) / (2 * count))


_MAX_GAMMA = 1e18  # its square is finite in float32


@api("axis", gamma=(0, _MAX_GAMMA))
def focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, gamma: ArrayLike, axis: int = -1
) -> Array:
    r"""Measures the surprise at a label, discounted where the model is already right.

    .. math:: -(1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        gamma: the discount, in [0, 1e18] (0 is `cross_entropy`), one number or one a label;
            differentiable. In an array more counts as 1e18.
        axis: the one axis of the classes.

    Returns:
        One loss a label, float32 or wider.

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
    rows = label_rows(logits, labels, axis, None, None)
    gamma = jnp.minimum(per_label(gamma, rows, "gamma"), _MAX_GAMMA)
    nats = nll(rows.logits, rows.labels, rows.axis)
    dropped = nats == jnp.inf
    finite = jnp.where(dropped, 1, nats)
    missing = -jnp.expm1(-finite)
    some = missing > 0
    discount = jnp.where(
        some, jnp.where(some, missing, 1) ** gamma, jnp.where(gamma == 0, 1, 0)
    )
    loss = jnp.where(dropped, nats, discount * finite)
    # (NaN shows also where its power is 1 or is not taken.)
    return rows.finish(jnp.where(jnp.isnan(gamma), jnp.nan, loss))
