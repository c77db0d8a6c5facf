"""What accelerators need for reductions; `_cpu.py` has what a CPU needs.

For a GPU XLA makes one kernel of the sums of a slice and of the map that reads them, if the
slice runs along the last axis, has up to 16384 entries and no temperature. In all other cases,
and on a TPU, each maximum and each sum is a kernel that reads the array once more. An online
reduction finds the largest entry and the sum of the weights together.

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
ONE_KERNEL = 16384  # entries of a slice that one kernel holds


def is_split(x: Array, axes: tuple[int, ...]) -> bool:
    """Whether each reduction over `axes` reads `x` anew."""
    last = tuple(range(x.ndim - len(axes), x.ndim))
    length = math.prod(x.shape[axis] for axis in axes)
    return axes != last or (isinstance(length, int) and length > ONE_KERNEL)


def by_kernels(
    in_one: bool, *args: Any, together: Callable[..., Tree], apart: Callable[..., Tree]
) -> Tree:
    """One of two functions of `args`: `apart` where XLA takes a kernel for each reduction.

    `in_one` says that a GPU takes one kernel for all that `together` does.
    """
    if in_one:
        return lax.platform_dependent(*args, tpu=apart, default=together)
    return lax.platform_dependent(*args, cpu=together, default=apart)


def peak_and_rest(
    x: Array, axes: tuple[int, ...], temperature: Array | None = None
) -> tuple[Array, Array]:
    """The largest entry of each slice, and the sum of exp((x - peak) / T) beside one peak.

    The sum of n entries in a row errs by up to n half units in the last place. An accelerator
    sums some hundred entries in a row, and adds these sums in a tree.
    """
    # A sum is kept less 1, because each part has a peak; a part without weight holds -1. JAX
    # differentiates a reduction of several arrays only if all of them depend on x.
    highest = float(jnp.finfo(x.dtype).max)
    rest = jnp.where(x == -jnp.inf, -1, 0 * jnp.minimum(x, highest))
    parts, start = [x, rest], [-jnp.inf, -1.0]
    if temperature is not None:
        # Halves, because the difference of huge numbers overflows before it is divided.
        temperature = jnp.where(temperature < 0, jnp.nan, temperature / 2)
        parts = [x / 2, rest, jnp.broadcast_to(temperature, x.shape)]
        start.append(-jnp.inf)
    start = [x.dtype.type(value) for value in start]
    peak, rest, *_ = lax.reduce(tuple(parts), tuple(start), _join, axes)
    peak = peak if temperature is None else peak * 2
    rest = jnp.where((peak == -jnp.inf) & (rest == -1), 0, rest)
    return jnp.expand_dims(peak, axes), jnp.expand_dims(rest, axes)


def _join(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    """Peak, rest and temperature of two parts of a slice together; a NaN in either stays."""
    (peak, rest, *warmth), (other_peak, other_rest, *other_warmth) = one, other
    largest, least = jnp.maximum(peak, other_peak), jnp.minimum(peak, other_peak)
    of_largest = lax.select(peak >= other_peak, rest, other_rest)
    of_least = lax.select(peak >= other_peak, other_rest, rest)
    # Equal peaks share the factor 1 also where they are infinite or the temperature is 0.
    apart = (least != largest) & (least != -jnp.inf)
    score = jnp.where(apart, least - largest, 0)
    warmth = [jnp.maximum(*pair) for pair in zip(warmth, other_warmth, strict=True)]
    for temperature in warmth:
        score = jnp.where((score == 0) | (score == -jnp.inf), score, score / temperature)
    return largest, of_largest + jnp.exp(score) * (1 + of_least), *warmth


def store_nothing_before(per_slice: Tree) -> Tree:
    """Numbers per slice, for whose readers XLA forms large arrays anew that it met before.

    Otherwise it stores these arrays. A CPU is faster if it may choose.
    """
    return lax.platform_dependent(
        per_slice, cpu=lambda rows: rows, default=lax.optimization_barrier
    )
