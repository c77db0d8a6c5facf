"""Which entries are normalised together: the slices of an array.

A slice runs along axes, or gathers the entries of one segment. Either kind knows how to
reduce entries to one number a slice (`total` sums terms that are not negative, with fewer
roundings than `sum`) and how to spread such numbers over the entries again; all the mathematics
above is written in these words alone.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from softjax._exact import long_sum, long_total

Term = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlongAxes:
    """Slices along axes, which reductions keep with size 1."""

    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def sum(self, x: Array) -> Array:
        return long_sum(x, self.axes)

    def total(self, x: Array, term: Term = lambda x: x) -> Array:
        return long_total(x, self.axes, term)

    def max(self, x: Array) -> Array:
        return jnp.max(x, self.axes, keepdims=True, initial=-jnp.inf)

    def spread(self, row: Array) -> Array:
        return row  # Broadcasts by itself.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BySegment:
    """Slices made of the entries along axis 0 that share an id in [0, num)."""

    ids: Array  # [n], int
    num: int = dataclasses.field(metadata={"static": True})

    def sum(self, x: Array) -> Array:
        # Running sums in several lanes a segment, O(n) in all, keep the error small.
        lanes = max(1, min(256, math.isqrt(x.shape[0] // max(1, self.num))))
        spread_ids = self.ids * lanes + jnp.arange(x.shape[0], dtype=self.ids.dtype) % lanes
        sums = jax.ops.segment_sum(x, spread_ids, self.num * lanes)
        return jnp.sum(sums.reshape(self.num, lanes, *x.shape[1:]), 1)

    def total(self, x: Array, term: Term = lambda x: x) -> Array:
        return self.sum(term(x))

    def max(self, x: Array) -> Array:
        return jax.ops.segment_max(x, self.ids, self.num)

    def spread(self, row: Array) -> Array:
        return row[self.ids]


Slices = AlongAxes | BySegment
