"""Slices: the entries that are normalised together.

A slice runs along axes of an array, or gathers the entries of one segment. Both kinds reduce
entries to one number per slice (`sum`, `sum_of`, `max`) and broadcast such numbers to the
entries again. All the mathematics is written in these words.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax import _cpu

Term = Callable[..., Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlongAxes:
    """Slices along axes, which reductions keep with size 1."""

    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def sum(self, x: Array) -> Array:
        return _sum(self.axes, x)

    def sum_of_tangents(self, x: Array) -> Array:
        """A sum whose transpose is one broadcast, where that of `sum` would pad each part."""
        return jnp.sum(x, self.axes, keepdims=True)

    def sum_of(self, term: Term, entries: tuple[Array, ...], *per_slice: Array | None) -> Array:
        """The sum of term(*entries, *per_slice); the terms of a large array are not stored."""
        whole = lambda *args: jnp.sum(term(*args), self.axes, keepdims=True)
        if not _cpu.can_cut(entries, self.axes):
            return whole(*entries, *per_slice)
        in_parts = lambda *args: _cpu.sum_of_terms(
            term, args[: len(entries)], args[len(entries) :], self.axes
        )
        return lax.platform_dependent(*entries, *per_slice, cpu=in_parts, default=whole)

    def max(self, x: Array) -> Array:
        return jnp.max(x, self.axes, keepdims=True, initial=-jnp.inf)

    def broadcast(self, per_slice: Array) -> Array:
        return per_slice  # It broadcasts by itself.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum(axes: tuple[int, ...], x: Array) -> Array:
    whole = lambda x: jnp.sum(x, axes, keepdims=True)
    if not _cpu.can_cut((x,), axes):
        return whole(x)
    in_pairs = lambda x: _cpu.sum_in_pairs(x, axes)
    return lax.platform_dependent(x, cpu=in_pairs, default=whole)


@_sum.defjvp
def _sum_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _sum(axes, *primals), AlongAxes(axes).sum_of_tangents(*tangents)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BySegment:
    """Slices made of the entries along axis 0 that share an id in [0, num)."""

    ids: Array  # [n], int
    num: int = dataclasses.field(metadata={"static": True})

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
