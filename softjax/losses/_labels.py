"""Logits with one label a slice, and the options that come one a label or one a class."""

from typing import NamedTuple

import jax
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


class Rows(NamedTuple):
    """Logits with one label a slice."""

    logits: Array
    classes: Classes  # of the shape of logits without the axis
    axis: int

    @property
    def labels(self) -> Array:
        return self.classes.labels

    def finish(self, loss: Array) -> Array:
        return self.classes.finish(loss)


def label_rows(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    ignore_index: int | None,
) -> Rows:
    problem = prepare(logits, axis=axis, where=where)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    labels = labels_of(labels, problem.logits.shape, axis)
    logits = problem.logits
    classes = known_labels(labels, logits.shape[axis], ignore_index)
    if classes.ignored is not None:
        logits = jnp.where(jnp.expand_dims(classes.ignored, axis), 0, logits)
    return Rows(logits, classes, axis)


def kept_shape(rows: Rows) -> tuple[int, ...]:
    return tuple(1 if i == rows.axis else n for i, n in enumerate(rows.logits.shape))


def per_label(option: ArrayLike, rows: Rows, name: str) -> Array:
    value, _ = to_float(option, name=name)
    value = broadcast(
        value.astype(rows.logits.dtype), rows.labels.shape, name=name, target="labels"
    )
    ignored = rows.classes.ignored
    return value if ignored is None else jnp.where(ignored, 0, value)


def spread_weights(class_weights: ArrayLike | None, rows: Rows) -> Array:
    """Class weights along the axis of the classes."""
    if class_weights is None:
        return jnp.ones((1,) * rows.logits.ndim, rows.logits.dtype)
    weights = per_class(class_weights, rows.logits.shape[rows.axis], rows.logits.dtype)
    others = tuple(i for i in range(rows.logits.ndim) if i != rows.axis)
    return jnp.expand_dims(weights, others)


def label_weights(class_weights: ArrayLike | None, rows: Rows) -> Array:
    if class_weights is None:
        return jnp.ones((), rows.logits.dtype).reshape((1,) * rows.labels.ndim)
    return spread_weights(class_weights, rows).reshape(-1)[rows.labels]


def constant_where_infinite(loss: Array) -> Array:
    """The loss, which nothing moves where it is infinite."""
    return jnp.where(jnp.isinf(loss), jax.lax.stop_gradient(loss), loss)


def times_nats(factor: Array, nats: Array) -> Array:
    """Factor * nats, where a factor of 0 counts nothing, and infinitely many are constant."""
    infinite = nats == jnp.inf
    constant = jnp.where(factor == 0, 0, jnp.sign(factor) * jnp.inf)
    constant *= jnp.ones_like(nats)  # So that it is spread over a mesh as they are.
    product = factor * jnp.where(infinite, 0, nats)
    return jnp.where(infinite, jax.lax.stop_gradient(constant), product)
