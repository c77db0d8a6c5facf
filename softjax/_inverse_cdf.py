"""Draws by inverse CDF, with 64 random bits per draw and integers for weights.

Each weight is rounded once, to a multiple of about 2^-40 of the largest. From there on all sums
are exact, so that no class gains or loses by its place, and a class of weight 0 is never drawn.
Weights are summed in blocks. A draw finds its block, and then its class in the block, by
bisection.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax import _uint64
from softjax._mesh import vary
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax._uint64 import Wide

FEW_CLASSES = 16  # Up to this many classes are added one by one.
LONGEST = 128  # A block has at most this many entries.


class RowParameters(NamedTuple):
    """The peak and the temperature of each row, which turn its logits into weights."""

    peak: Array
    temperature: Array | None

    def weights(self, x: Array) -> Array:
        """exp((x - peak) / temperature) of logits with the rows along their first axis."""
        grow = lambda row: row.reshape(-1, *(1,) * (x.ndim - 1))
        temperature = None if self.temperature is None else grow(self.temperature)
        scores = centre(x, grow(self.peak), temperature)
        return jnp.where(scores.is_far, 0, jnp.exp(scores.near))


class Parts(NamedTuple):
    """A weight as the integer high 2^shift + low. Blocks of them add up without rounding."""

    high: Array  # whole numbers as floats, because an integer cannot be NaN
    low: Array  # int32, of either sign


class Scale(NamedTuple):
    """How many bits each part of a weight has."""

    high: int
    low: int

    def split(self, weights: Array) -> Parts:
        scaled = weights * 2.0**self.high
        high = jnp.round(scaled)
        return Parts(high, jnp.round((scaled - high) * 2.0**self.low).astype(jnp.int32))

    def join(self, parts: Parts) -> Wide:
        return _uint64.from_parts(parts.high.astype(jnp.int32), parts.low, self.low)


def _scale(size: int, block: int) -> Scale:
    """The scale at which no sum overflows.

    The sum of `high` over a block fits the 24 bits of float32, that of `low` fits 32 bits with
    a sign, and the sum of both over a row fits 63.
    """
    log_block, log_size = (math.ceil(math.log2(n)) for n in (block, size))
    high = 24 - log_block
    return Scale(high, min(31 - log_block, 62 - high - log_size))


def draw(x: Array, temperature: Array | None, bits: Wide) -> Array:
    """Draws classes `[rows, draws]` from logits `[rows, n]`, n > 0; -1 where there is none."""
    if x.shape[1] <= FEW_CLASSES:
        return _draw_of_few(x, temperature, bits)
    rows = RowParameters(jnp.max(x, 1), temperature)
    block = _block_size(x.shape[1])
    spare = -x.shape[1] % block
    if spare:
        x = jnp.pad(x, ((0, 0), (0, spare)), constant_values=-jnp.inf)
    x = x.reshape(len(x), -1, block)
    scale = _scale(x.shape[1] * block, block)
    if bits.low.shape[1] < x.shape[1]:
        return _draw_from_sums(x, rows, scale, bits)
    return _draw_from_prefixes(x, rows, scale, bits)


def draw_over_devices(
    slices: AlongAxes, x: Array, temperature: Array | None, bits: Wide
) -> Array:
    """`draw` from rows that are spread over devices: the same classes, bit for bit.

    The totals of the devices tell which device a draw falls on. That device finds the class.
    """
    size = slices.length(x)
    block = size if size <= FEW_CLASSES else _block_size(size)
    rows = RowParameters(jnp.squeeze(slices.max(x), 1), temperature)
    scale = _scale(size + -size % block, block)
    first = slices.first_place(x.shape[1], jnp.int32)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=-jnp.inf)
    x = x.reshape(len(x), -1, block)
    parts = scale.split(rows.weights(x))
    prefixes = _prefix(scale, parts)
    ends = _uint64.running_sums(Wide(*(a[..., -1] for a in prefixes)))
    has_nan = jnp.isnan(jnp.sum(parts.high, (1, 2))).astype(_uint64.WORD)
    here = lax.axis_index(slices.mesh_axes)
    table = jnp.stack([ends.high[:, -1], ends.low[:, -1], has_nan])[..., None]
    is_here = jnp.arange(slices.num_devices, dtype=here.dtype) == here
    high, low, has_nan = slices.sum_over_devices(jnp.where(is_here, table, 0))
    device, rest, total = _find_block(Wide(high, low), bits)
    which, rest = _locate(ends, vary(rest, x))
    place = _class_at(prefixes, which, rest)
    index = slices.sum_over_devices(jnp.where(device == here, first + place, 0))
    return jnp.where(_uint64.is_zero(total) | jnp.any(has_nan > 0, 1, keepdims=True), -1, index)


def _block_size(size: int) -> int:
    """About the square root of `size`; a divisor if possible, because padding makes a copy."""
    wanted = min(LONGEST, 1 << math.ceil(math.log2(size) / 2))
    for candidate in range(wanted, wanted // 8, -1):
        if size % candidate == 0:
            return candidate
    return wanted


def _draw_of_few(x: Array, temperature: Array | None, bits: Wide) -> Array:
    """Compares each draw with the running sum at every class."""
    columns = [x[:, i] for i in range(x.shape[1])]
    rows = RowParameters(functools.reduce(jnp.maximum, columns), temperature)
    scale = _scale(len(columns), len(columns))
    parts = [scale.split(rows.weights(column)) for column in columns]
    sums = [scale.join(parts[0])]
    for part in parts[1:]:
        sums.append(_uint64.add(sums[-1], scale.join(part)))
    columns_of_sums = [Wide(s.high[:, None], s.low[:, None]) for s in sums]
    target = _uint64.multiply_high(bits, columns_of_sums[-1])
    index = functools.reduce(
        jnp.add, [_uint64.at_most(s, target).astype(jnp.int32) for s in columns_of_sums]
    )
    found = _or_none(
        index, columns_of_sums[-1], functools.reduce(jnp.add, [part.high for part in parts])
    )
    # End in a reduction, because XLA would otherwise recompute the draw for each entry that
    # reads the index: `select_action` of 64 x 6 took four times as long.
    return jnp.sum(jnp.stack([found, jnp.zeros_like(found)]), 0, dtype=found.dtype)


def _draw_from_sums(x: Array, rows: RowParameters, scale: Scale, bits: Wide) -> Array:
    """Sums the blocks, and weighs the entries of those blocks alone that a draw falls into."""
    block = x.shape[2]
    high, low = scale.split(rows.weights(x))
    # One reduction takes both parts, because two would weigh every entry twice, or write all
    # weights out.
    sums = Parts(
        *lax.reduce(
            (high, low),
            (np.zeros((), high.dtype), np.zeros((), low.dtype)),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            (2,),
        )
    )
    which, rest, total = _find_block(scale.join(sums), bits)
    entries = jnp.take_along_axis(x, which[:, :, None], 1)  # [rows, draws, block]
    parts = scale.split(rows.weights(entries))
    prefix = _prefix(scale, parts)
    # The weights of a block, formed again, may sum to a rounding less than before; the last
    # class of the block takes the rest.
    weight = Wide(prefix.high[..., -1], prefix.low[..., -1])
    one = Wide(jnp.zeros_like(weight.high), jnp.ones_like(weight.low))
    rest = _uint64.smaller(rest, _uint64.subtract(weight, one))
    read = lambda array, place: jnp.take_along_axis(array, place[..., None], 2)[..., 0]
    inside = bisect(lambda place: Wide(*(read(a, place) for a in prefix)), block, rest)
    inside = jnp.where(
        _uint64.is_zero(weight), jnp.argmax(entries, -1).astype(inside.dtype), inside
    )
    return _or_none(which * block + inside, total, jnp.sum(sums.high, 1))


def _draw_from_prefixes(x: Array, rows: RowParameters, scale: Scale, bits: Wide) -> Array:
    """Sums the weights of all classes in advance, which pays off for many draws."""
    parts = scale.split(rows.weights(x))
    prefixes = _prefix(scale, parts)
    which, rest, total = _find_block(Wide(*(a[..., -1] for a in prefixes)), bits)
    return _or_none(_class_at(prefixes, which, rest), total, jnp.sum(parts.high, (1, 2)))


def _class_at(prefixes: Wide, which: Array, rest: Wide) -> Array:
    """The class of each draw, from its block and its place in the block."""
    num_rows, _, block = prefixes.low.shape
    flat, start = Wide(*(a.reshape(num_rows, -1) for a in prefixes)), which * block
    return start + bisect(lambda place: _read(flat, start + place), block, rest)


def _find_block(sums: Wide, bits: Wide) -> tuple[Array, Wide, Wide]:
    """For sums `[rows, blocks]`: each draw's block, its place in the block, the row's total."""
    ends = _uint64.running_sums(sums)
    total = Wide(ends.high[:, -1:], ends.low[:, -1:])
    return *_locate(ends, _uint64.multiply_high(bits, total)), total


def _locate(ends: Wide, target: Wide) -> tuple[Array, Wide]:
    """The block that each target falls into, and its place there, for running sums `ends`."""
    size = ends.low.shape[1]
    which = jnp.minimum(bisect(lambda place: _read(ends, place), size, target), size - 1)
    before = _read(ends, jnp.maximum(which - 1, 0))
    before = Wide(*(jnp.where(which > 0, word, 0) for word in before))
    return which, _uint64.subtract(target, before)


def _read(table: Wide, place: Array) -> Wide:
    return Wide(*(jnp.take_along_axis(word, place, 1) for word in table))


def _prefix(scale: Scale, parts: Parts) -> Wide:
    """Running sums of integer weights along the last axis, which is one block."""
    high = parts.high.astype(jnp.int32)
    sums = Parts(*(jnp.cumsum(a, -1, dtype=jnp.int32) for a in (high, parts.low)))
    return scale.join(sums)


def bisect(read: Callable[[Array], Wide], size: int, target: Wide) -> Array:
    """Counts how many of `size` numbers in ascending order are at most the target."""
    num_steps = size.bit_length()

    def step(number: Array, place: Array) -> Array:
        ahead = place + jnp.left_shift(1, num_steps - 1 - number).astype(place.dtype)
        passed = _uint64.at_most(read(jnp.minimum(ahead, size) - 1), target)
        return jnp.where(passed & (ahead <= size), ahead, place)

    start = vary(jnp.zeros(target.low.shape, jnp.int32), target)
    return lax.fori_loop(0, num_steps, step, start)


def _or_none(index: Array, total: Wide, check: Array) -> Array:
    """The index, or -1 where nothing is kept or a weight is NaN, which makes the check NaN."""
    none = _uint64.is_zero(total) | jnp.isnan(check)[:, None]
    return jnp.where(none, -1, index)
