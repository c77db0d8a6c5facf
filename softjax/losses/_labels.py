"""Logits with one label per slice, and options with one number per label or per class."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._inputs import (
    Classes,
    broadcast,
    known_labels,
    labels_of,
    per_class,
    prepare,
    resolve_one_axis,
    to_float,
)
from softjax._mesh import AxisName, names_of
from softjax._slices import AlongAxes
from softjax.losses._reduction import reduce, shares_and_masses


class Rows(NamedTuple):
    """Logits with one label per slice."""

    logits: Array
    classes: Classes  # of the shape of logits without the axis
    axis: int
    mesh_axes: tuple[str, ...] = ()  # over which the classes are spread

    @property
    def slices(self) -> AlongAxes:
        return AlongAxes((self.axis,), self.mesh_axes)

    @property
    def labels(self) -> Array:
        return self.classes.labels


def label_rows(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    ignore_index: int | None,
    axis_name: AxisName = None,
    soft_hint: str = "",
) -> Rows:
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    labels = labels_of(labels, problem.logits.shape, axis, soft_hint=soft_hint)
    logits = problem.logits
    slices = AlongAxes((axis,), problem.mesh_axes)
    classes = known_labels(labels, slices.length(logits), ignore_index)
    if classes.ignored is not None:
        logits = jnp.where(jnp.expand_dims(classes.ignored, axis), 0, logits)
    return Rows(logits, classes, axis, problem.mesh_axes)


def per_label(option: ArrayLike, rows: Rows, name: str) -> Array:
    """An option with one number per label; 0 where the label is ignored."""
    value, _ = to_float(option, name=name)
    value = broadcast(
        value.astype(rows.logits.dtype), rows.labels.shape, name=name, target="labels"
    )
    ignored = rows.classes.ignored
    return value if ignored is None else jnp.where(ignored, 0, value)


def weights_per_logit(class_weights: ArrayLike, logits: Array, axis: int) -> Array:
    """The class weights along `axis`, broadcast to the logits."""
    weights = per_class(class_weights, logits.shape[axis], logits.dtype)
    others = tuple(i for i in range(logits.ndim) if i != axis)
    return jnp.broadcast_to(jnp.expand_dims(weights, others), logits.shape)


def label_weights(class_weights: ArrayLike | None, rows: Rows) -> Array | None:
    """The class weight of each label, or None without class weights."""
    if class_weights is None:
        return None
    weights = per_class(class_weights, rows.logits.shape[rows.axis], rows.logits.dtype)
    return rows.slices.pick_per_class(weights, rows.labels)


def reduce_rows(
    losses: Array,
    labels: ArrayLike,
    *,
    ignore_index: int | None,
    class_weights: ArrayLike | None,
    reduction: str | None,
    axis_name: AxisName = None,
) -> Array:
    """The losses of rows, their sum, or their mean over the labels that count."""
    if reduction is None:
        return losses
    shares, masses = shares_and_masses(
        losses,
        labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        example_weights=None,
        class_axes=names_of(axis_name),
    )
    return reduce(losses, shares, masses, reduction)
