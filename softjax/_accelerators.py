"""Reductions on accelerators; `_cpu.py` has those of a CPU.

XLA fuses the reductions of a softmax with the map that follows into one GPU kernel if slices
run along the last axes, have at most 16384 entries, and are not divided by a temperature. Else,
and on a TPU, each reduction is a kernel that reads the array once more. An online reduction
reads the array once for both the maximum and the sum of the weights.

Reference:
    Milakov and Gimelshein (2018), Online normalizer calculation for softmax,
    https://arxiv.org/abs/1805.02867.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array, lax

Tree = TypeVar("Tree")
LARGE = 2**17  # entries of an array whose passes are worth a second branch to trace
LONGEST_FUSED = 16384  # entries of the longest slice that XLA fuses into one GPU kernel


def is_fused(x: Array, axes: tuple[int, ...]) -> bool:
    """Whether XLA may fuse reductions over `axes` into one GPU kernel."""
    last = tuple(range(x.ndim - len(axes), x.ndim))
    length = math.prod(x.shape[axis] for axis in axes)
    return axes == last and not (isinstance(length, int) and length > LONGEST_FUSED)


def by_platform(
    fused_on_gpu: bool, *args: Any, fused: Callable[..., Tree], separate: Callable[..., Tree]
) -> Tree:
    """Calls `fused` on a CPU, for a small array, and with `fused_on_gpu` on a GPU.

    Elsewhere it calls `separate`, because each reduction of `fused` would read the whole array
    again. The array is the first of `args`.
    """
    size = args[0].size
    if isinstance(size, int) and size < LARGE:
        return fused(*args)
    if fused_on_gpu:
        return lax.platform_dependent(*args, tpu=separate, default=fused)
    return lax.platform_dependent(*args, cpu=fused, default=separate)


def peak_and_rest(
    x: Array, axes: tuple[int, ...], temperature: Array | None = None
) -> tuple[Array, Array]:
    """The largest entry of each slice, and the sum of exp((x - peak) / T) but for one peak.

    The error grows with the number of entries that are added one after another. An accelerator
    adds some hundred of them so, and their sums in a tree. Entries whose difference overflows
    count as infinitely far apart.
    """
    # JAX before 0.12 may differentiate this by itself, without the rules of its callers. So
    # peaks are constants, and the sum that one entry starts with is exp((x - constant x) / T)
    # less 1, which is 0.
    dropped = x == -jnp.inf
    finite = jnp.where(jnp.isinf(x), 0, x)
    moved = finite - lax.stop_gradient(finite)
    if temperature is not None:
        temperature = jnp.where(temperature < 0, jnp.nan, jnp.abs(temperature))
        is_usual = (temperature != 0) & (temperature != jnp.inf)
        moved = moved / jnp.where(is_usual, temperature, 1)
    # JAX differentiates a reduction of several arrays only if all of them have a tangent.
    zero = 0 * moved
    parts = [lax.stop_gradient(x) + zero, jnp.where(dropped, -1, jnp.expm1(moved))]
    start = [-jnp.inf, -1.0]
    if temperature is not None:
        parts.append(temperature + zero)
        start.append(-jnp.inf)
    start = [x.dtype.type(value) for value in start]
    peak, rest, *_ = (
        jnp.expand_dims(found, axes)
        for found in lax.reduce(tuple(parts), tuple(start), _merge_parts, axes)
    )
    if temperature is not None:
        rest = jnp.where(jnp.isnan(temperature), jnp.nan, rest)
    return peak, jnp.where((peak == -jnp.inf) & ~(rest > -1), 0, rest)


def _merge_parts(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    """Peak, rest and temperature of two parts of a slice together.

    `rest` is the sum of the weights less 1, because the peak of each part has the weight 1. It
    is -1 for a part whose entries are all -inf.
    """
    (peak, rest, *temperatures), (other_peak, other_rest, *other_temperatures) = one, other
    largest, least = jnp.maximum(peak, other_peak), jnp.minimum(peak, other_peak)
    of_largest = lax.select(peak >= other_peak, rest, other_rest)
    of_least = lax.select(peak >= other_peak, other_rest, rest)
    # Equal peaks have the score 0, also where inf - inf or 0 / 0 would give NaN.
    score = jnp.where(jnp.isinf(least), 0, least - largest)
    pairs = zip(temperatures, other_temperatures, strict=True)
    temperatures = [jnp.maximum(*pair) for pair in pairs]
    for temperature in temperatures:
        is_cold = (temperature == 0) | (score == -jnp.inf)
        divided = score / jnp.where(is_cold, 1, temperature)
        score = jnp.where(is_cold & (score != 0), -jnp.inf, divided)
    return largest, of_largest + jnp.exp(score) * (1 + of_least), *temperatures


def recompute_after(per_slice: Tree) -> Tree:
    """The same numbers, behind a barrier on accelerators.

    Otherwise XLA would share large arrays between kernels before and after it, and store them
    for that. A CPU is faster without the barrier.
    """
    return lax.platform_dependent(
        per_slice, cpu=lambda rows: rows, default=lax.optimization_barrier
    )
