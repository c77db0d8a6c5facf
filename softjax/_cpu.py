"""What a CPU needs for reductions; `_accelerators.py` has what a GPU and a TPU need.

XLA's CPU backend takes a sum as a running sum, and stores its terms first; `sum_of_terms`
avoids both. A search for a threshold reads its slices ten times;
`blocked_over_slices` runs it on a few slices at a time, which stay in the cache, and which do
not wait for the slowest slice of all.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._mesh import may_be_sharded

LARGE = 2**17  # entries from which on terms are not stored
PARTS = 4  # into which an axis of a large array is cut
FEW = 8  # terms that lose little in a running sum
LONG = 2**14  # terms of a large array's last axis that XLA adds up in a tree
BLOCK = 2**18  # entries of the slices of one block: 1 MB in float32
ROWS = 2048  # slices of one block at most, because all wait for the slowest
UNCUT = 16384  # entries of an array that is searched as a whole
Tree = TypeVar("Tree")


def can_cut(entries: Sequence[Array], axes: tuple[int, ...]) -> bool:
    """Whether a sum over `axes` gains anything from parts.

    Sharded axes stay whole, as does an axis whose size is open in an export.
    """
    is_open = not all(isinstance(size, int) for x in entries for size in x.shape)
    if is_open or may_be_sharded(entries) or not axes:
        return False
    longest = max(x.shape[axis] for x in entries for axis in axes)
    return longest > FEW or max(x.size for x in entries) >= LARGE


def sum_by_halves(x: Array, axes: tuple[int, ...], size: int | None = None) -> Array:
    """The sum over `axes`, which are kept with size 1, of an array that had `size` entries.

    Halves are added until few entries are left, because a running sum of many equal terms
    rounds most of them the same way. The last axis of a large array is halved less often,
    because its sum is compiled to several running sums.
    """
    is_large = (x.size if size is None else size) >= LARGE
    for axis in axes:
        limit = LONG if is_large and axis == x.ndim - 1 else FEW
        while x.shape[axis] > limit:
            x = _halve(x, axis)
        x = jnp.sum(x, axis, keepdims=True)
    return x


def _halve(x: Array, axis: int) -> Array:
    """The second half of an axis added to the first; an odd length gets one more 0."""
    length = x.shape[axis]
    if length % 2:
        padding = [(0, int(i == axis), 0) for i in range(x.ndim)]
        x = lax.pad(x, x.dtype.type(0), padding)
    return operator.add(*jnp.split(x, 2, axis))


def sum_of_terms(
    term: Callable[..., Array],
    entries: Sequence[Array],
    per_slice: Sequence[Array | None],
    axes: tuple[int, ...],
) -> Array:
    """The sum of term(*entries, *per_slice); of a large array, a quarter of them is stored."""
    shape = jnp.broadcast_shapes(*(x.shape for x in entries))
    size, longest = math.prod(shape), max(axes, key=lambda axis: shape[axis])
    if size < LARGE or size == 0:
        return sum_by_halves(term(*entries, *per_slice), axes)
    # Each part forms its own terms, and one loop adds them up. The barrier stops XLA from
    # storing terms that another pass forms too.
    per_slice = lax.optimization_barrier(tuple(per_slice))
    once = jax.jit(term)  # Traced once per length of a part.
    parts = zip(*(_cut(jnp.broadcast_to(x, shape), longest) for x in entries), strict=True)
    x = _add_equal_parts([once(*part, *per_slice) for part in parts], longest)
    # The first select stops XLA from cutting that loop, the second from storing one sum per
    # entry.
    total = sum_by_halves(_selected(x), axes, size)
    return _selected(total)


def _selected(x: Array) -> Array:
    """The same numbers and derivatives, from a select that XLA cannot leave out."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.where(x == 0, 0, x)
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def _cut(x: Array, axis: int) -> list[Array]:
    """Parts of equal length along the axis, and the rest, if any."""
    length = x.shape[axis]
    num = min(PARTS, length)
    size = length // num
    stops = [*range(size, num * size + 1, size), length]
    pairs = itertools.pairwise([0, *stops])
    return [lax.slice_in_dim(x, *ends, axis=axis) for ends in pairs if ends[0] < ends[1]]


def _add_equal_parts(parts: list[Array], axis: int) -> Array:
    """The sum of the parts of equal length, with the entries of the rest behind it.

    Parts of one entry are added to two entries, not one, because the last step must be a
    reduction: XLA recomputes any other sum for each entry that reads it.
    """
    num = sum(part.shape == parts[0].shape for part in parts)
    first = num // 2 if parts[0].shape[axis] == 1 else 0
    ends = [0, first, num] if first else [0, num]
    totals = [_add_in_pairs(parts[i:j]) for i, j in itertools.pairwise(ends)]
    return jnp.concatenate([*totals, *parts[num:]], axis)


def _add_in_pairs(terms: list[Array]) -> Array:
    """The sum of terms by a tree of depth log2 of their number."""
    while len(terms) > 1:
        pairs = [operator.add(*terms[i : i + 2]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return terms[0]


def blocked_over_slices(search: Callable[..., Tree]) -> Callable[..., Tree]:
    """Runs `search(slices, entries, *per_slice)` over blocks of slices of large arrays.

    The leaves of `entries` have one number per entry, `per_slice` are one number per slice,
    broadcastable, or None. Leaves of the result are of either kind.
    """

    @functools.wraps(search)
    def blocked(slices: Any, entries: Any, *per_slice: Array | None) -> Tree:
        shape = jax.tree.leaves(entries)[0].shape
        size = math.prod(shape[i] for i in slices.axes)
        is_open = not isinstance(math.prod(shape), int)  # In an export for any size.
        if size == 0 or is_open or slices.mesh_axes or may_be_sharded(entries):
            return search(slices, entries, *per_slice)
        block = max(1, min(ROWS, BLOCK // size))
        if math.prod(shape) <= max(UNCUT, block * size):
            return search(slices, entries, *per_slice)
        return lax.platform_dependent(
            entries,
            *per_slice,
            cpu=lambda *args: _by_block(search, slices, shape, block, *args),
            default=lambda *args: search(slices, *args),
        )

    return blocked


def _by_block(
    search: Callable[..., Tree],
    slices: Any,
    shape: tuple[int, ...],
    block: int,
    entries: Any,
    *per_slice: Array | None,
) -> Tree:
    axes = slices.axes
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    inner = tuple(shape[i] for i in axes)
    kept = slices.kept_shape(shape)
    last = tuple(range(len(shape) - len(axes), len(shape)))

    def flatten(x: Array) -> Array:
        return jnp.moveaxis(x, axes, last).reshape(math.prod(batch), -1)

    def restore(x: Array) -> Array:
        if x.shape[1] == 1 and math.prod(inner) != 1:
            return x.reshape(kept)
        return jnp.moveaxis(x.reshape(batch + inner), last, axes)

    flat = (
        jax.tree.map(flatten, entries),
        *(jax.tree.map(lambda x: flatten(jnp.broadcast_to(x, kept)), x) for x in per_slice),
    )
    # Pad to equal blocks by repeating the first slices: a smaller last block would compile a
    # second search, and sharded searches can deadlock.
    total = math.prod(batch)
    num_blocks = -(-total // block)
    block = -(-total // num_blocks)
    spare = num_blocks * block - total
    if spare:
        flat = jax.tree.map(lambda x: jnp.concatenate([x, x[:spare]]), flat)
    of_block = dataclasses.replace(slices, axes=(0,))
    found = lax.map(lambda args: search(of_block, *args), flat, batch_size=block)
    return jax.tree.map(lambda x: restore(x[:total]), found)
