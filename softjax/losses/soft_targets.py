"""Losses of softmax with weights of all classes: targets, or a teacher's probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._autodiff import constant_where_infinite
from softjax._inputs import (
    Axis,
    Problem,
    broadcast,
    check_same_shape,
    prepare,
    resolve_one_axis,
    to_array,
    to_float,
)
from softjax._mesh import AxisName
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX
from softjax._threshold import solve
from softjax.entropies import divergence
from softjax.losses._labels import weights_per_logit
from softjax.losses._reduction import check_reduction, reduce_kept

__all__ = ["distillation_loss", "soft_cross_entropy"]

_HOT = 1e15  # above this temperature the loss is its limit to working precision


@api(
    "axis",
    "reduction",
    "axis_name",
    spread=("logits", "targets", "where", "class_weights"),
)
def soft_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    example_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures the expected -log p under target weights, in nats.

    .. math:: -\sum_j m_j w_j t_j \log p_j, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        targets: weights t >= 0, broadcastable to `[*shape]`; differentiable. They need not sum
            to one.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        example_where: mask of whole slices, bool, broadcastable to the shape of the losses.
            False leaves a slice out: its loss and gradient are 0, whatever it holds.
        class_weights: factors w >= 0 of the classes, `[n]`, where `axis` is one;
            differentiable. A negative one is NaN.
        reduction: "mean" divides the sum by the number of slices that are not left out, as
            PyTorch does with target weights; "sum"; or None.
        axis_name: as in `cross_entropy`; the targets are those of this device's classes.

    Returns:
        One loss per slice, or one number with `reduction`; float32 or wider; inf where a target
        stands on an entry that -inf drops.

    Raises:
        TypeError: `logits` or `targets` is not real, a mask is not bool, or `axis` is not one
            int where `class_weights` is given.
        ValueError: `targets` or a mask does not broadcast, `axis` is out of range,
            `class_weights` is of another shape, or `reduction` is none of the above.

    Example:
        >>> print(soft_cross_entropy(jnp.zeros(2), jnp.array([0.25, 0.75])))
        0.6931472

    Note:
        O(n). A target or a class weight of 0 counts as nothing whatever its logit. Both modes,
        any order.
    """
    check_reduction(reduction)
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    targets, _ = to_float(targets, name="targets")
    targets = broadcast(
        targets.astype(problem.logits.dtype), problem.logits.shape, name="targets"
    )
    if where is not None:
        targets = jnp.where(problem.logits == -jnp.inf, jnp.where(where, targets, 0), targets)
    weights = None
    if class_weights is not None:
        one = resolve_one_axis(axis, problem.logits.ndim)
        weights = weights_per_logit(class_weights, problem.logits, one)
    slices = problem.slices

    def loss(logits: Array, targets: Array, weights: Array | None) -> Array:
        if weights is not None:
            targets = targets * weights
        margins = solve(LOG_SOFTMAX, slices, logits).margins
        dropped = margins == -jnp.inf
        terms = jnp.where(dropped, 0, targets) * -jnp.where(dropped, 0, margins)
        terms = jnp.where(dropped & (targets > 0), jnp.inf, terms)
        return constant_where_infinite(jnp.squeeze(slices.sum(terms), problem.axes))

    arrays = problem.logits, targets, weights
    return _losses_of_slices(loss, arrays, problem, example_where, reduction)


@api(
    "axis",
    "reduction",
    "axis_name",
    spread=("student_logits", "teacher_logits", "where"),
    temperature=NONNEGATIVE,
)
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    example_where: ArrayLike | None = None,
    reduction: str | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures how far a student is from its teacher, both softened by a temperature.

    .. math:: T^2 D\big(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\big)

    Args:
        student_logits: scores s, `[*shape]`, real or -inf (dropped); differentiable.
        teacher_logits: scores t, `[*shape]`, real or -inf (dropped); differentiable.
        temperature: T in [0, inf], one number or one per slice; differentiable. At 0 (in
            float32 below 1e-19) and inf the loss is its limit, and the derivative in T is 0.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry of both.
        example_where: mask of whole slices, bool, broadcastable to the shape of the losses.
            False leaves a slice out: its loss and gradient are 0, whatever it holds.
        reduction: "mean" divides the sum by the number of slices that are not left out; "sum";
            or None.
        axis_name: mesh axis, or axes, over which the classes are spread, inside of
            `jax.shard_map`; None: not spread. `reduction` is over this device's rows.

    Returns:
        One loss per slice, or one number with `reduction`; float32 or wider, at least 0; inf
        where the student drops an entry that the teacher keeps. The limit at T = 0 is 0, at inf
        half the variance of s - t over the kept entries (and inf where the two keep different
        entries).

    Raises:
        TypeError: logits are not real, or a mask is not bool.
        ValueError: the shapes differ, a mask does not broadcast, `temperature` does not
            broadcast to one per slice or is a negative Python number, `axis` is out of range,
            or `reduction` is none of the above.

    Example:
        >>> print(distillation_loss(jnp.zeros(2), jnp.zeros(2), temperature=2.0))
        0.0

    Note:
        The factor keeps gradients of one size as the temperature changes. O(n); precise also
        where the two are close, as `kl_divergence`. Both modes, any order.

    Reference:
        Hinton, Vinyals and Dean (2015), Distilling the knowledge in a neural network.
    """
    check_reduction(reduction)
    options: dict[str, Any] = {
        "axis": axis,
        "where": where,
        "temperature": temperature,
        "axis_name": axis_name,
    }
    student = prepare(student_logits, **options, name="student_logits")
    teacher = prepare(teacher_logits, **options, name="teacher_logits")
    check_same_shape(student, teacher, name="student_logits", other="teacher_logits")
    shared = None
    if student.temperature is not None and teacher.temperature is not None:
        dtype = jnp.promote_types(student.temperature.dtype, teacher.temperature.dtype)
        shape = student.slices.kept_shape(student.logits.shape)
        shared = jnp.broadcast_to(student.temperature.astype(dtype), shape)

    def loss(student_logits: Array, teacher_logits: Array, temperature: Array | None) -> Array:
        pair = (
            teacher._replace(logits=teacher_logits),
            student._replace(logits=student_logits),
        )
        return jnp.squeeze(_softened_divergence(*pair, temperature), student.axes)

    arrays = student.logits, teacher.logits, shared
    return _losses_of_slices(loss, arrays, student, example_where, reduction)


def _losses_of_slices(
    function: Callable[..., Array],
    arrays: tuple[Array | None, ...],
    problem: Problem,
    example_where: ArrayLike | None,
    reduction: str | None,
) -> Array:
    """function(*arrays), without the slices that are left out, and reduced."""
    shape = problem.logits.shape
    result_shape = tuple(n for i, n in enumerate(shape) if i not in problem.axes)
    keep = None
    if example_where is not None:
        keep = to_array(example_where, name="example_where")
        if keep.dtype != jnp.bool_:
            raise TypeError(
                f"`example_where` must be bool (True keeps a slice), got {keep.dtype}."
            )
        keep = broadcast(keep, result_shape, name="example_where", target="the losses")
        kept = jnp.expand_dims(keep, problem.axes)
        arrays = jax.tree.map(lambda x: jnp.where(kept, x, 1), arrays)
    losses = function(*arrays)
    if keep is not None:
        losses = jnp.where(keep, losses, 0)
    return reduce_kept(losses, keep, reduction)


def _softened_divergence(
    teacher: Problem, student: Problem, temperature: Array | None
) -> Array:
    """T^2 times the divergence, one number per slice, and its limits in the temperature."""
    if temperature is None:
        return divergence(teacher, student)
    cold = jnp.abs(temperature) < float(jnp.finfo(temperature.dtype).tiny) ** 0.5
    hot = temperature > _HOT
    usual = jnp.where(cold | hot, 1, temperature)
    row = divergence(teacher._replace(temperature=usual), student._replace(temperature=usual))
    # The limit at inf is behind a condition, because few calls need it and it costs more than
    # the rest.
    logits = [jnp.where(hot, problem.logits, 0) for problem in (teacher, student)]
    nothing = lambda *logits: jnp.zeros_like(row)
    variance = functools.partial(_half_variance, student.slices)
    limit = lax.cond(jnp.any(hot), variance, nothing, *logits)
    limit = jnp.where(cold, jnp.where(row == jnp.inf, jnp.inf, 0), limit)
    return jnp.where(cold | hot, limit, row)


def _half_variance(slices: AlongAxes, teacher: Array, student: Array) -> Array:
    """Half the variance of the logits' difference, the loss at an infinite temperature."""
    dtype = jnp.promote_types(teacher.dtype, student.dtype)
    has_nan = jnp.isnan(teacher) | jnp.isnan(student)  # of which the other may be dropped
    # Infinite logits drop the finite ones of their slice, and are equal.
    kept = [~centre(x, slices.max(x), None).dropped for x in (teacher, student)]
    both = kept[0] & kept[1]
    finite = [jnp.where(both & (x != jnp.inf), x, 0).astype(dtype) for x in (teacher, student)]
    apart = finite[0] - finite[1]
    count = jnp.maximum(slices.sum(both.astype(dtype)), 1)
    rest = jnp.where(both, apart - slices.sum(apart) / count, 0)
    rest = jnp.where(has_nan, jnp.nan, rest)
    variance = slices.sum(rest * rest) / (2 * count)
    differ = slices.max((kept[0] != kept[1]).astype(dtype)) > 0
    some = slices.max(kept[0].astype(dtype)) > 0
    return jnp.where(some & differ & ~jnp.isnan(variance), jnp.inf, variance)
