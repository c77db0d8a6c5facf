"""Errors for labels that are no class, for debugging."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from softjax._api import api
from softjax._inputs import check_int, known_labels, to_array, to_integers

__all__ = ["check_labels"]


@api("num_classes", "ignore_index", jit=False)
def check_labels(
    labels: ArrayLike, num_classes: int, *, ignore_index: int | None = None
) -> Array:
    r"""Returns the labels, with an error for one that is no class.

    .. math:: y_i \in \{0, \dots, n - 1\}

    Args:
        labels: classes y, int, `[*shape]`; not differentiable.
        num_classes: how many classes n there are.
        ignore_index: a label that is none of them and is allowed too; None allows no other.

    Returns:
        The labels, unchanged.

    Raises:
        TypeError: `labels` is not of integers.
        ValueError: a label is neither a class nor ignored. Under `jit` and other
            transformations it is an error of `jax.experimental.checkify`, in a function that
            `checkify` has transformed, and nothing happens in others. Both name the row (under
            `vmap`, that of an example).

    Example:
        >>> check_labels(jnp.array([0, 3]), 3)
        Traceback (most recent call last):
        ValueError: `labels` must be in [0, 3), got 3 in row 1.

    Note:
        For debugging: JAX calls a program with such a check by a slower path, about 0.1 ms per
        call. The losses have no such check, and give NaN in the rows of such labels.
    """
    given = to_array(labels, name="labels")
    labels = to_integers(given, name="labels")
    num_classes = check_int(num_classes, name="num_classes")
    if not labels.size:
        return given
    known = known_labels(labels, num_classes, ignore_index).known
    row = jnp.argmin(known)
    # This is a sum because one entry cannot be cut out of an array that is spread over devices.
    here = jnp.arange(labels.size).reshape(labels.shape) == row
    label = jnp.sum(jnp.where(here, labels, 0), dtype=labels.dtype)
    message = f"`labels` must be in [0, {num_classes}), got {{label}} in row {{row}}."
    if isinstance(known, jax.core.Tracer):
        checkify.debug_check(jnp.all(known), message, label=label, row=row)
    elif not known.all():
        raise ValueError(message.format(label=label, row=row))
    return given
