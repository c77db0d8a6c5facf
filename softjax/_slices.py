"""Slices: the entries that are normalised together.

A slice runs along axes of an array, or gathers the entries of one segment. Both kinds reduce
entries to one number per slice (`sum`, `sum_of`, `max`) and broadcast such numbers to the
entries again. All maps are written in these operations, except for the online sum of
`_accelerators.py`.

Inside of `shard_map`, a slice along axes may be spread over the devices of a mesh. Every
reduction then ends in a collective, whose result is the same on all these devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax import _cpu
from softjax._mesh import num_devices

Term = Callable[..., Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlongAxes:
    """Slices along axes, which reductions keep with size 1, and over the axes of a mesh."""

    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    mesh_axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def sum(self, x: Array) -> Array:
        return self.sum_over_devices(_sum(self.axes, x))

    def sum_of_tangents(self, x: Array) -> Array:
        """A sum whose transpose is one broadcast, where that of `sum` would pad each part."""
        return self.sum_over_devices(jnp.sum(x, self.axes, keepdims=True))

    def sum_of(self, term: Term, entries: tuple[Array, ...], *per_slice: Array | None) -> Array:
        """The sum of term(*entries, *per_slice); the terms of a large array are not stored."""
        whole = lambda *args: jnp.sum(term(*args), self.axes, keepdims=True)
        if not _cpu.can_cut(entries, self.axes):
            return self.sum_over_devices(whole(*entries, *per_slice))
        in_parts = lambda *args: _cpu.sum_of_terms(
            term, args[: len(entries)], args[len(entries) :], self.axes
        )
        return self.sum_over_devices(
            lax.platform_dependent(*entries, *per_slice, cpu=in_parts, default=whole)
        )

    def max(self, x: Array) -> Array:
        if self.mesh_axes:
            return _max_over_devices(self, x)
        return jnp.max(x, self.axes, keepdims=True, initial=-jnp.inf)

    def zero(self, x: Array) -> Array:
        """0 per slice of finite x.

        Away from a CPU it comes from the maximum. XLA makes one kernel of a slice on a GPU if
        x meets a maximum first, and seven if x meets a sum of products.
        """
        return lax.platform_dependent(
            x, cpu=lambda x: jnp.zeros_like(self.max(x)), default=lambda x: 0 * self.max(x)
        )

    def sum_over_devices(self, per_device: Array) -> Array:
        """The sum over devices of what each one computed, such as the sum of its part."""
        return lax.psum(per_device, self.mesh_axes) if self.mesh_axes else per_device

    def broadcast(self, per_slice: Array) -> Array:
        return per_slice  # It broadcasts by itself.

    def length(self, x: Array) -> int:
        """How many entries each slice of x has, on all devices together."""
        return math.prod(x.shape[i] for i in self.axes) * self.num_devices

    def kept_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one number per slice of an array of this shape."""
        return tuple(1 if i in self.axes else n for i, n in enumerate(shape))

    @property
    def on_this_device(self) -> "AlongAxes":
        """The part of each slice that this device holds."""
        return AlongAxes(self.axes)

    @property
    def num_devices(self) -> int:
        return num_devices(self.mesh_axes)

    def places(self, x: Array, dtype: DTypeLike) -> Array:
        """The place of each entry in its slice, which runs along one axis."""
        places = lax.broadcasted_iota(dtype, x.shape, self.axes[0])
        if not self.mesh_axes:
            return places
        return places + self.first_place(x.shape[self.axes[0]], dtype)

    def pick(self, x: Array, labels: Array) -> Array:
        """The entry of each slice, along one axis, that its label names; NaN if there is none.

        The labels count the entries on all devices together.
        """
        (axis,) = self.axes
        known = (labels >= 0) & (labels < self.length(x))
        if x.shape[axis] == 0:
            return jnp.full(labels.shape, jnp.nan, x.dtype)
        index, here = self._on_this_device(x, labels, known)
        index = jnp.expand_dims(jnp.where(here, index, 0), axis)
        chosen = jnp.squeeze(jnp.take_along_axis(x, index, axis), axis)
        if self.mesh_axes:
            chosen = self.sum_over_devices(jnp.where(here, chosen, 0))
        return jnp.where(known, chosen, jnp.nan)

    def pick_per_class(self, per_class: Array, labels: Array) -> Array:
        """The entry of a vector, spread as a slice is, that each label in [0, n) names."""
        if not self.mesh_axes:
            return per_class[labels]
        index, here = AlongAxes((0,), self.mesh_axes)._on_this_device(per_class, labels, True)
        chosen = per_class[jnp.where(here, index, 0)]
        return self.sum_over_devices(jnp.where(here, chosen, 0))

    def _on_this_device(self, x: Array, labels: Array, known: Any) -> tuple[Array, Any]:
        """The labels as places in this device's part, and which of the known fall into it."""
        if not self.mesh_axes:
            return labels, known
        first = self.first_place(x.shape[self.axes[0]], labels.dtype)
        last = first + (x.shape[self.axes[0]] - 1)
        return labels - first, (labels >= first) & (labels <= last) & known

    def gather(self, x: Array) -> Array:
        """The entries along the first axis of all devices."""
        return lax.all_gather(x, self.mesh_axes, tiled=True) if self.mesh_axes else x

    def first_place(self, length: int, dtype: DTypeLike) -> Array:
        """The place in its slice of the first of the `length` entries on this device."""
        return lax.axis_index(self.mesh_axes).astype(dtype) * length


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum(axes: tuple[int, ...], x: Array) -> Array:
    whole = lambda x: jnp.sum(x, axes, keepdims=True)
    if not _cpu.can_cut((x,), axes):
        return whole(x)
    by_halves = lambda x: _cpu.sum_by_halves(x, axes)
    return lax.platform_dependent(x, cpu=by_halves, default=whole)


@_sum.defjvp
def _sum_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _sum(axes, *primals), AlongAxes(axes).sum_of_tangents(*tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _max_over_devices(slices: AlongAxes, x: Array) -> Array:
    # On CPUs `pmax` may drop a NaN, as a maximum may. A sum never drops one.
    return lax.pmax(AlongAxes(slices.axes).max(x), slices.mesh_axes)


@_max_over_devices.defjvp
def _max_over_devices_jvp(
    slices: AlongAxes, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    # This rule is needed because JAX cannot differentiate `pmax`. Ties share the derivative.
    (x,), (x_dot,) = primals, tangents
    largest = _max_over_devices(slices, x)
    is_largest = (x == largest).astype(x.dtype)
    count = slices.sum_of_tangents(is_largest)
    moved = slices.sum_of_tangents(jnp.where(is_largest != 0, x_dot, 0))
    return largest, moved / jnp.maximum(count, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BySegment:
    """Slices made of the entries along axis 0 that share an id in [0, num)."""

    ids: Array  # [n], int
    num: int = dataclasses.field(metadata={"static": True})
    mesh_axes = ()

    @property
    def on_this_device(self) -> "BySegment":
        return self

    def sum_over_devices(self, per_device: Array) -> Array:
        return per_device

    def sum(self, x: Array) -> Array:
        # Several running sums per segment, O(n) in all, keep the error small.
        lanes = max(1, min(256, math.isqrt(x.shape[0] // max(1, self.num))))
        lane_ids = self.ids * lanes + jnp.arange(x.shape[0], dtype=self.ids.dtype) % lanes
        sums = jax.ops.segment_sum(x, lane_ids, self.num * lanes)
        return jnp.sum(sums.reshape(self.num, lanes, *x.shape[1:]), 1)

    sum_of_tangents = sum

    def max(self, x: Array) -> Array:
        return jax.ops.segment_max(x, self.ids, self.num)

    def broadcast(self, per_slice: Array) -> Array:
        return per_slice[self.ids]

    def sum_of(self, term: Term, entries: tuple[Array, ...], *per_slice: Array | None) -> Array:
        wide = (None if row is None else self.broadcast(row) for row in per_slice)
        return self.sum(term(*entries, *wide))


Slices = AlongAxes | BySegment
