"""Samples: from logits to classes, exactly and fast, and the noise that couples them.

Noise and sums are float32 or wider, with 64 random bits per number, whatever the dtype of the
logits. A dropped class (masked by `where`, or -inf) is never drawn; where nothing is kept, or
a kept logit is NaN, the class is -1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softjax import _inverse_cdf, _random
from softjax._api import NONNEGATIVE, api
from softjax._inputs import (
    Problem,
    check_int,
    labels_of,
    prepare,
    resolve_one_axis,
    statically_greater,
)
from softjax._mesh import AxisName
from softjax._scores import centre
from softjax._slices import AlongAxes
from softjax.reductions import log_sum

__all__ = ["gumbel", "gumbel_given_argmax", "sample"]

METHODS = ("inverse", "gumbel")
TIES = ("random", "first")


@api(
    "shape",
    "axis",
    "method",
    "ties",
    "axis_name",
    spread=("logits", "where"),
    temperature=NONNEGATIVE,
)
def sample(
    key: Array,
    logits: ArrayLike,
    *,
    shape: int | Sequence[int] = (),
    axis: int = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    method: Literal["inverse", "gumbel"] = "inverse",
    ties: Literal["random", "first"] = "random",
    axis_name: AxisName = None,
) -> Array:
    r"""Draws classes from the softmax of logits.

    .. math:: P(i) = m_i e^{z_i / T} \Big/ \sum_j m_j e^{z_j / T}

    Args:
        key: random key, one for all draws.
        logits: scores z, `[*shape]`, real or -inf (dropped).
        shape: how many draws from each slice, as leading axes of the result; an int is a
            shape of one axis.
        axis: the one axis of the classes.
        where: mask m, bool, broadcastable to the logits; True keeps an entry.
        temperature: T in [0, inf], one number or one per slice. At 0 the draws are greedy:
            `ties` says which of the largest kept entries is drawn. At inf all kept entries
            share the draws equally.
        method: "inverse" inverts the distribution function, with 64 random bits per draw;
            "gumbel" takes the argmax of scores with Gumbel noise, one number per entry and
            draw, so that draws with the same key from similar logits mostly agree.
        ties: at temperature 0, "random" lets the largest kept entries share the draws equally,
            which is the limit of small temperatures; "first" draws the first of them, whatever
            the key. (In bfloat16 one row in sixty of 32000 random logits has a tie.)
        axis_name: mesh axis, or axes, over which the classes are spread, inside of
            `jax.shard_map`; None: not spread. The draws are the same as from whole slices with
            the same key. "gumbel" is refused, because all devices would draw the same noise.

    Returns:
        Classes, int32, `[*shape, *slices]`, the slices being the axes of the logits without
        `axis`; -1 where nothing is kept, or a kept logit is NaN. Kept +inf entries share the
        draws. There is no derivative: see `ranking_log_prob` and the estimators.

    Raises:
        TypeError: `key` is no random key, `logits` not real, `where` not bool, `axis` not one
            int, or `shape` not of ints.
        ValueError: `where` or `temperature` does not broadcast, `axis` is out of range,
            `temperature` is a negative Python number, `method` or `ties` is unknown,
            `method` is "gumbel" with `axis_name`, or there are more classes than an int32 can
            number.

    Example:
        >>> logits = jnp.array([[0.0, -jnp.inf, -jnp.inf], [-jnp.inf, -jnp.inf, 0.0]])
        >>> print(sample(jax.random.key(0), logits, shape=(3,)))
        [[0 2]
         [0 2]
         [0 2]]

    Note:
        With "inverse", O(n + draws) time and memory per slice, and every probability is right
        to about 1e-6 of itself and 2^-40 of the largest (2^-36 for 2^26 classes). With
        "gumbel", O(n draws).

    Reference:
        Maddison, Tarlow and Minka (2014), A* sampling, for the second method.
    """
    _random.check_key(key)
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    if ties not in TIES:
        raise ValueError(f"`ties` must be one of {TIES}, got {ties!r}.")
    if axis_name is not None and method != "inverse":
        raise ValueError(
            '`method` must be "inverse" with `axis_name`, because all devices would draw the'
            f" same noise for other entries, got {method!r}."
        )
    shape = _sizes(shape)
    problem = prepare(
        logits, axis=axis, where=where, temperature=temperature, axis_name=axis_name
    )
    axis = resolve_one_axis(axis, problem.logits.ndim)
    slices = problem.logits.shape[:axis] + problem.logits.shape[axis + 1 :]
    x, per_row = _as_rows(problem, axis)
    num_draws = math.prod(shape)
    row = AlongAxes((1,), problem.mesh_axes)
    if statically_greater(row.length(x), int(jnp.iinfo(jnp.int32).max)):
        raise ValueError(
            f"`logits` have {row.length(x)} classes, more than an int32 can number."
        )
    if x.size == 0 or num_draws == 0:
        return jnp.full((*shape, *slices), -1, jnp.int32)
    if method == "inverse":
        bits = _random.bits(key, (len(x), num_draws))
        if row.mesh_axes:
            index = _inverse_cdf.draw_over_devices(row, x, per_row, bits).T
        else:
            index = _inverse_cdf.draw(x, per_row, bits).T
    else:
        index = _by_gumbel(key, x, per_row, num_draws)
    if ties == "first" and per_row is not None:
        # A temperature below the normal numbers may be flushed to 0, and counts as 0.
        greedy = (jnp.abs(per_row) < jnp.finfo(x.dtype).tiny)[None] & (index >= 0)
        index = jnp.where(greedy, _first_largest(row, x)[None], index)
    return index.reshape(*shape, *slices)


def _sizes(shape: int | Sequence[int]) -> tuple[int, ...]:
    """A shape as a tuple, which an int is of one axis."""
    if not isinstance(shape, (int, tuple)):
        raise TypeError(f"`shape` must be an int or a tuple of ints, got {shape!r}.")
    sizes = shape if isinstance(shape, tuple) else (shape,)
    return tuple(check_int(size, name="shape", least=0) for size in sizes)


def _first_largest(row: AlongAxes, x: Array) -> Array:
    """The first of the largest entries of each row."""
    # Two plain reductions, because XLA's CPU backend takes an argmax entry by entry.
    places = jnp.where(x == row.max(x), row.places(x, jnp.int32), row.length(x))
    first = jnp.min(places, 1)
    return lax.pmin(first, row.mesh_axes) if row.mesh_axes else first


def _as_rows(problem: Problem, axis: int) -> tuple[Array, Array | None]:
    """Logits as `[rows, n]`, and the temperature of each row."""

    def rows(x: Array) -> Array:
        return jnp.moveaxis(x, axis, -1).reshape(num_rows, x.shape[axis])

    logits, temperature = problem.logits, problem.temperature
    kept = (*logits.shape[:axis], 1, *logits.shape[axis + 1 :])
    num_rows = math.prod(kept)
    if temperature is not None:
        temperature = rows(jnp.broadcast_to(temperature, kept))[:, 0]
    return rows(logits), temperature


def _by_gumbel(key: Array, x: Array, temperature: Array | None, num_draws: int) -> Array:
    peak = jnp.max(x, 1, keepdims=True)
    temperature = None if temperature is None else temperature[:, None]
    scores = centre(x, peak, temperature)
    noise = _random.gumbel(key, (num_draws, *x.shape), x.dtype)
    perturbed = jnp.where(scores.is_far[None], -jnp.inf, scores.near[None] + noise)
    none = jnp.all(scores.is_far, 1) | jnp.any(jnp.isnan(scores.near), 1)
    return jnp.where(none[None], -1, jnp.argmax(perturbed, -1).astype(jnp.int32))


@api("shape", "dtype")
def gumbel(key: Array, shape: int | Sequence[int] = (), *, dtype: DTypeLike = float) -> Array:
    r"""Draws standard Gumbel noise, whose argmax with logits is a sample of their softmax.

    .. math:: P(G \le g) = \exp(-e^{-g})

    Args:
        key: random key.
        shape: the shape of the result; an int is a shape of one axis.
        dtype: float32 or float64; narrower noise would not be random enough (in bfloat16 it
            takes 128 values), so that half precision is refused.

    Returns:
        Noise `[*shape]`, from about -3.8 to 44, to full relative precision of exp(-g): 64
        random bits per number.

    Raises:
        TypeError: `key` is no random key, `shape` not of ints, or `dtype` not one of the two.
        ValueError: `shape` holds a negative number.

    Example:
        >>> noise = gumbel(jax.random.key(0), (1000,))
        >>> print(bool(abs(noise.mean() - 0.5772) < 0.1))
        True

    Reference:
        Gumbel (1954), Statistical theory of extreme values and some practical applications.
    """
    _random.check_key(key)
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"`dtype` must be float32 or float64, got {dtype}.")
    return _random.gumbel(key, _sizes(shape), dtype)


@api("axis")
def gumbel_given_argmax(
    key: Array,
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Draws logits with Gumbel noise whose argmax is known.

    .. math:: z + G \mid \arg\max_i (z_i + G_i) = y

    The largest is a Gumbel variable around the logsumexp of the logits. The others are Gumbel
    variables that are cut off at it.

    Args:
        key: random key.
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable at fixed noise.
        labels: the class y of each slice, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        Noisy logits `[*shape]`, float32 or wider; -inf where dropped, inf where infinite. A
        slice whose label is out of range or dropped, or finite beside an infinite logit, is NaN
        where it is finite.

    Raises:
        TypeError: `key` is no random key, `logits` not real, `labels` not integer, `where`
            not bool, or `axis` not one int.
        ValueError: `labels` is of another shape, `where` does not broadcast, or `axis` is out
            of range.

    Example:
        >>> noisy = gumbel_given_argmax(jax.random.key(0), jnp.zeros((4, 9)), jnp.arange(4))
        >>> print(jnp.argmax(noisy, axis=-1))
        [0 1 2 3]

    Note:
        O(n). If the label comes from `sample`, the result is distributed like logits with fresh
        noise, so that a function of it can be averaged over the noise at a fixed choice.

    Reference:
        Maddison, Tarlow and Minka (2014), A* sampling.
    """
    _random.check_key(key)
    problem = prepare(logits, axis=axis, where=where)
    x, axis = problem.logits, resolve_one_axis(axis, problem.logits.ndim)
    labels = jnp.expand_dims(labels_of(labels, x.shape, axis), axis)
    places = jax.lax.broadcasted_iota(labels.dtype, x.shape, axis)
    noise = _random.gumbel(key, x.shape, x.dtype)
    is_label = (places == labels) & (x != -jnp.inf)
    found = jnp.any(is_label, axis, keepdims=True)
    # The noise at the label becomes the noise of the maximum.
    spare = jnp.sum(jnp.where(is_label, noise, 0), axis, keepdims=True)
    total = log_sum(AlongAxes((axis,)), x)
    unlimited = jnp.any(is_label & (x == jnp.inf), axis, keepdims=True)
    # A finite logit beside an infinite one is never the largest.
    found &= unlimited | (total != jnp.inf)
    top = jnp.where(found, jnp.where(jnp.isinf(total), 0, total) + spare, jnp.nan)
    noisy = jnp.where(is_label, top, _cut_off(x, noise, top))
    infinite = jnp.where(jnp.isfinite(x), x, 0) + noise
    return jnp.where(unlimited, jnp.where(jnp.isinf(x), x, infinite), noisy)


def _cut_off(x: Array, noise: Array, top: Array) -> Array:
    """Logits with noise given that they are less than the top; infinite ones stay."""
    usual = jnp.isfinite(x)
    gap = top - (jnp.where(usual, x, 0) + noise)
    below = jnp.nextafter(jax.lax.stop_gradient(top), -jnp.inf)
    return jnp.where(usual, jnp.minimum(top - jax.nn.softplus(gap), below), x)
