"""Which entries are normalised together: the slices of an array.

A slice runs along axes, or gathers the entries of one segment. Either kind knows how to
reduce entries to one number a slice (`total` sums terms that are not negative, with fewer
roundings than `sum`) and how to spread such numbers over the entries again; all the mathematics
above is written in these words alone.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._float import MANY, long_sum, long_total, statically_greater, sum_in_pairs
from softjax._mesh import is_sharded

FOLDED = 32768  # entries from which on terms are added up part by part,
PARTS = 16  # of so many parts
WIDTH = 16  # entries of a part that fill a processor's registers
Term = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlongAxes:
    """Slices along axes, which reductions keep with size 1."""

    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def sum(self, x: Array) -> Array:
        return self._sum(lambda x: long_sum(x, self.axes), lambda x: x, x)

    def total(self, x: Array, term: Term = lambda x: x) -> Array:
        return self._sum(lambda x: long_total(x, self.axes, term), term, x)

    def _sum(self, in_blocks: Term, term: Term, x: Array) -> Array:
        """The sum of term(x). Of many trailing entries, accelerators take it in a tree."""
        first = x.ndim - len(self.axes)
        length = math.prod(x.shape[i] for i in self.axes)
        if set(self.axes) != set(range(first, x.ndim)) or not statically_greater(length, MANY):
            return in_blocks(x)
        in_a_tree = lambda x: jnp.sum(term(x), self.axes, keepdims=True)
        return lax.platform_dependent(x, cpu=in_blocks, default=in_a_tree)

    def max(self, x: Array) -> Array:
        return jnp.max(x, self.axes, keepdims=True, initial=-jnp.inf)

    def broadcast(self, row: Array) -> Array:
        return row  # Broadcasts by itself.

    def sums(self, terms: list[Array]) -> list[Array]:
        """The sums of several terms, which accelerators take in one pass, and in a tree."""
        add = lambda one, other: tuple(map(operator.add, one, other))
        zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
        rows = lax.reduce(tuple(terms), zeros, add, self.axes)
        return [jnp.expand_dims(row, self.axes) for row in rows]

    def sum_of(
        self,
        term: Callable[..., Array],
        entries: tuple[Array, ...],
        *rows: Array | None,
        least: int | None = 0,
    ) -> Array:
        """The sum of term(*entries, *rows), in one of many passes over the entries.

        In parts from `least` entries on, as in `parts`: those of long terms compile longer.
        """
        cut: Callable[[Array], Any] = lambda x: self.parts(x, least=least)

        def whole(entries: tuple[Array, ...], *rows: Array | None) -> Array:
            return self.sum(term(*entries, *rows))

        def in_parts(entries: tuple[Array, ...], *rows: Array | None) -> Array:
            # (Or XLA would share what another pass forms of these, and write it out.)
            rows = lax.optimization_barrier(rows)
            groups = zip(*map(cut, entries), strict=True)
            once = jax.jit(term)  # Traced for one part.
            terms = [[once(*xs, *rows) for xs in zip(*g, strict=True)] for g in groups]
            return self.sum(add_parts(terms))

        if cut(entries[0]) is None:
            return whole(entries, *rows)
        return lax.platform_dependent(entries, *rows, cpu=in_parts, default=whole)

    def parts(
        self, x: Array, num: int = PARTS, least: int | None = None
    ) -> list[list[Array]] | None:
        """Slices along the last axis cut into `num` parts of equal length, and a rest.

        Added up part by part, the terms of a sum are one loop for XLA's CPU backend, which
        would write all of them out before it sums along an axis; others add as they form them.
        Slices of fewer than 2 num entries are cut into these. None if nothing is gained, as in
        an array of fewer than `least` entries.
        """
        whole, last = math.prod(x.shape), x.ndim - 1
        least = FOLDED if least is None else least
        is_open = not isinstance(whole, int)  # In an export for any size.
        if is_open or last not in self.axes or whole < least or is_sharded(x) or many_cpus():
            return None
        length = x.shape[last]
        if length == 0 or 2 * num <= length < num * WIDTH:
            return None
        num = length if length < 2 * num else num
        size = length // num
        cut = lambda first, size: lax.slice_in_dim(x, first, first + size, axis=last)
        parts = [cut(i * size, size) for i in range(num)]
        rest = length - num * size
        return [parts, [cut(length - rest, rest)]] if rest else [parts]


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

    def broadcast(self, row: Array) -> Array:
        return row[self.ids]

    def sum_of(
        self,
        term: Callable[..., Array],
        entries: tuple[Array, ...],
        *rows: Array | None,
        least: int | None = 0,
    ) -> Array:
        del least
        wide = (None if row is None else self.broadcast(row) for row in rows)
        return self.sum(term(*entries, *wide))

    def parts(self, x: Array) -> None:
        del x


Slices = AlongAxes | BySegment


def many_cpus() -> bool:
    """Whether a compiler may have spread slices over CPU devices: their parts are elsewhere."""
    try:
        return jax.device_count("cpu") > 1
    except RuntimeError:  # There is none.
        return False


def join_parts(sums: list[Array]) -> Array:
    """One array of what became of each group of parts."""
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, -1)


def add_parts(groups: list[list[Array]]) -> Array:
    """The sum of the parts of each group, joined."""
    sums = join_parts([sum_in_pairs(parts) for parts in groups])
    # (The select keeps XLA's CPU backend from joining these sums to one along an axis.)
    return jnp.where(sums == 0, 0, sums)
