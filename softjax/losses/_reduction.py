"""Sums and means over the examples that count."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._inputs import broadcast, equal, labels_of, per_class, to_float
from softjax._slices import AlongAxes


def check_reduction(reduction: str | None) -> None:
    if reduction not in ("mean", "sum", None):
        raise ValueError(f'`reduction` must be "mean", "sum" or None, got {reduction!r}.')


def reduce(losses: Array, shares: Array, masses: Array, reduction: str | None) -> Array:
    """The losses times their shares: one per example, their sum, or their mean."""
    if reduction is None:
        return shares * _counted(losses, shares)
    total = sum_of_counted(losses, shares)
    return over_mass(total, masses) if reduction == "mean" else total


def reduce_kept(losses: Array, kept: Array | None, reduction: str | None) -> Array:
    """`reduce`, with a share of 1 for each example that is kept."""
    if reduction is None:
        return losses
    shares = jnp.ones_like(losses) if kept is None else kept.astype(losses.dtype)
    return reduce(losses, shares, shares, reduction)


def shares_and_masses(
    losses: Array,
    labels: ArrayLike | None,
    *,
    ignore_index: int | None,
    class_weights: ArrayLike | None,
    example_weights: ArrayLike | None,
    class_axes: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    """The factor of each loss in their sum, and its part in the divisor of their mean.

    `class_axes` are the mesh axes over which the class weights are spread.
    """
    shares = jnp.ones_like(losses)
    if example_weights is not None:
        example_weights, _ = to_float(example_weights, name="example_weights")
        shares = broadcast(
            example_weights.astype(losses.dtype),
            losses.shape,
            name="example_weights",
            target="losses",
        )
    if labels is None:
        return shares, shares
    labels = labels_of(labels, (*losses.shape, 1), losses.ndim)
    if ignore_index is not None:
        shares = jnp.where(equal(labels, ignore_index), 0, shares)
    if class_weights is None:
        return shares, shares
    weights = per_class(class_weights, None, losses.dtype)
    classes = AlongAxes((0,), class_axes)
    known = (labels >= 0) & (labels < classes.length(weights))
    chosen = classes.pick_per_class(weights, jnp.where(known, labels, 0))
    return shares, shares * jnp.where(known, chosen, 1)


def sum_of_counted(losses: Array, shares: Array, mesh_axes: tuple[str, ...] = ()) -> Array:
    """The sum of shares * losses, where a share of 0 adds 0, whatever its loss is.

    `mesh_axes` are those over which the examples are spread.
    """
    return _sum_of_all(shares * _counted(losses, shares), mesh_axes)


def _counted(losses: Array, shares: Array) -> Array:
    # A finite loss of share 0 stays, because the share has a derivative.
    return jnp.where((shares != 0) | jnp.isfinite(losses), losses, 0)


def over_mass(total: Array, masses: Array, mesh_axes: tuple[str, ...] = ()) -> Array:
    """The mean, and 0 where nothing counts."""
    mass = _sum_of_all(masses, mesh_axes)
    return total / jnp.where(mass == 0, 1, mass)


def _sum_of_all(x: Array, mesh_axes: tuple[str, ...]) -> Array:
    return AlongAxes((0,), mesh_axes).sum(x.reshape(-1))[0]
