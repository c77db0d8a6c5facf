"""Arrays a part at a time, so that what is formed of a part is small or stays in cache.

`scan_blocks` cuts an axis into whole blocks and a tail. `in_blocks` takes a few slices at a
time: on a CPU a search that reads its slices ten times should read them from memory once, and
should not wait for the slowest slice of all. `by_one_thread` keeps a small array from being
shared among threads. Accelerators take all slices at once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._mesh import is_sharded
from softjax._slices import AlongAxes, Slices

BLOCK = 2**18  # entries of slices taken together: 1 MB in float32
ROWS = 2048  # slices taken together: all wait for the slowest
SHARED = 1536  # entries from which on XLA shares exponentials among threads
ALONE = 16384  # entries up to which one thread is as fast
Tree = TypeVar("Tree")


def in_blocks(search: Callable[..., Tree]) -> Callable[..., Tree]:
    """Runs `search(slices, entries, *rows)` over blocks of slices, where that is faster.

    `entries` are arrays of one number an entry, `rows` one a slice, broadcastable, or None;
    so are the leaves of the result, told apart by their sizes along the axes.
    """

    @functools.wraps(search)
    def blocked(slices: Slices, entries: Any, *rows: Array | None) -> Tree:
        shape = jax.tree.leaves(entries)[0].shape
        if not isinstance(slices, AlongAxes):
            return search(slices, entries, *rows)
        size, whole = math.prod(shape[i] for i in slices.axes), math.prod(shape)
        is_open = not isinstance(whole, int)  # In an export for any size.
        if is_open or size == 0 or is_sharded(entries):
            return search(slices, entries, *rows)
        block = max(1, min(ROWS, BLOCK // size))
        if whole <= max(ALONE, block * size):
            return search(slices, entries, *rows)
        return lax.platform_dependent(
            entries,
            *rows,
            cpu=lambda *args: _by_rows(search, slices, shape, block, *args),
            default=lambda *args: search(slices, *args),
        )

    return blocked


def _by_rows(
    search: Callable[..., Tree],
    slices: AlongAxes,
    shape: tuple[int, ...],
    block: int,
    entries: Any,
    *rows: Array | None,
) -> Tree:
    axes = slices.axes
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    inner = tuple(shape[i] for i in axes)
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    last = tuple(range(len(shape) - len(axes), len(shape)))

    def flatten(x: Array) -> Array:
        return jnp.moveaxis(x, axes, last).reshape(math.prod(batch), -1)

    def restore(x: Array) -> Array:
        if x.shape[1] == 1 and math.prod(inner) != 1:
            return x.reshape(kept)
        return jnp.moveaxis(x.reshape(batch + inner), last, axes)

    flat = (
        jax.tree.map(flatten, entries),
        *(jax.tree.map(lambda row: flatten(jnp.broadcast_to(row, kept)), row) for row in rows),
    )
    # In equal blocks, with the first slices once more at the end: a tail would be a second
    # search, and where XLA runs both at once on sharded slices, they may wait for each other.
    total = math.prod(batch)
    num_blocks = -(-total // block)
    block = -(-total // num_blocks)
    spare = num_blocks * block - total
    if spare:
        flat = jax.tree.map(lambda x: jnp.concatenate([x, x[:spare]]), flat)
    found = lax.map(lambda args: search(AlongAxes((0,)), *args), flat, batch_size=block)
    return jax.tree.map(lambda x: restore(x[:total]), found)


def by_one_thread(
    form: Callable[..., Array], slices: Slices, x: Array, *rows: Array | None
) -> Array:
    """`form(x, *rows)`, entry by entry, of the dtype of `x`; `rows` are as in `in_blocks`.

    XLA's CPU backend shares a loop over few exponentials among threads, although to wake one
    takes as long as tens of thousands of them. A loop that updates an array in place it does
    not: so each half of a small array is one.
    """
    whole = math.prod(x.shape)
    is_small = isinstance(whole, int) and SHARED <= whole <= ALONE
    if not is_small or not isinstance(slices, AlongAxes) or is_sharded((x, rows)):
        return form(x, *rows)
    axis = next(i for i, n in enumerate(x.shape) if n > 1)

    def by_halves(x: Array, *rows: Array | None) -> Array:
        out, half = x, x.shape[axis] // 2
        for part in (slice(half), slice(half, None)):
            place = (slice(None),) * axis + (part,)
            cut = lambda a, place=place: a if a.shape[axis] == 1 else a[place]
            formed = form(*jax.tree.map(cut, (x, *rows)))
            out = lax.dynamic_update_slice_in_dim(out, formed, part.start or 0, axis)
        return out

    # Of a batch of small arrays, which may be large, threads share the work.
    is_batch = _is_batch(lax.stop_gradient(x))
    return lax.platform_dependent(
        x,
        *rows,
        cpu=lambda *args: lax.cond(is_batch, form, by_halves, *args),
        default=form,
    )


@jax.custom_batching.custom_vmap
def _is_batch(x: Array) -> Array:
    """Whether `vmap` has added an axis: a constant, by which XLA chooses a branch."""
    del x
    return jnp.array(False)


@_is_batch.def_vmap
def _(axis_size: int, in_batched: Any, x: Array) -> tuple[Array, bool]:
    del axis_size, in_batched, x
    return jnp.array(True), False


def scan_blocks(
    visit: Callable[[Any, Array, Any], tuple[Any, Any]], state: Any, arrays: Any, size: int
) -> tuple[Any, Any]:
    """`lax.scan` over blocks of the first axis: the last state, and all outputs joined.

    `visit(state, first, block)` gets the place of the block's first entry, and the block
    of every array; the last block may be smaller. Its outputs are one entry an entry.
    """
    length = jax.tree.leaves(arrays)[0].shape[0]
    whole = length - length % size
    outs = []
    if whole == size:
        head = jax.tree.map(lambda x: x[:whole], arrays)
        state, out = visit(state, jnp.array(0), head)
        outs.append(out)
    elif whole:
        head = jax.tree.map(
            lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), arrays
        )
        step = lambda state, xs: visit(state, *xs)
        state, out = lax.scan(step, state, (jnp.arange(0, whole, size), head))
        outs.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out))
    if whole < length:
        tail = jax.tree.map(lambda x: x[whole:], arrays)
        state, out = visit(state, jnp.array(whole), tail)
        outs.append(out)
    if len(outs) < 2:
        return state, outs[0] if outs else None
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
