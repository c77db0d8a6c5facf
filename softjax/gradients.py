"""Gradients by choice: values pass unchanged, and the derivative is another one.

No function here has the derivative that its value suggests. Each docstring says which
derivative it has instead, and in which modes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._autodiff import with_gradient_of
from softjax._inputs import (
    Axis,
    broadcast,
    nan_outside,
    per_slice,
    resolve_axes,
    resolve_one_axis,
    to_float,
)

__all__ = ["clip_gradient", "reverse_gradient", "score_function", "straight_through"]


@api()
def straight_through(soft: ArrayLike, hard: ArrayLike) -> Array:
    r"""Returns hard values with the derivative of soft ones.

    .. math:: y = h, \qquad \partial y = \partial s

    Args:
        soft: s, `[*shape]`, differentiable.
        hard: h, of the same shape; no derivative goes through it.

    Returns:
        The hard values, exactly, in the dtype of `soft`.

    Raises:
        TypeError: an argument is not real.
        ValueError: the shapes differ.

    Example:
        >>> half = lambda x: straight_through(x, jnp.round(x))
        >>> print(half(0.7), jax.grad(half)(0.7))
        1.0 1.0

    Note:
        Gradient: that of f at the hard values, passed on to the soft ones. For a one-hot
        sample and its probabilities it is exact where f is linear, and biased by terms of
        second order elsewhere. Both modes; its own derivative is that of `soft`.

    Reference:
        Bengio, Leonard and Courville (2013), Estimating or propagating gradients through
        stochastic neurons for conditional computation.
    """
    soft, dtype = to_float(soft, name="soft")
    hard, _ = to_float(hard, name="hard")
    if soft.shape != hard.shape:
        raise ValueError(
            f"`hard` of shape {hard.shape} must have the shape {soft.shape} of `soft`."
        )
    return with_gradient_of(soft, hard.astype(soft.dtype)).astype(dtype)


@api("axis")
def score_function(
    values: ArrayLike,
    log_probs: ArrayLike,
    baseline: ArrayLike | None = None,
    *,
    axis: int = 0,
) -> Array:
    r"""Averages values of samples, with an unbiased gradient of their expectation.

    .. math:: \frac1K \sum_k f_k, \qquad
        \frac1K \sum_k \big( \partial f_k + (f_k - b_k) \, \partial \log p_k \big)

    Args:
        values: f, one per sample, `[*shape]`; differentiable.
        log_probs: log p of the samples, `[*shape]`; differentiable.
        baseline: b, broadcastable to `[*shape]`, which must not depend on its own sample; no
            derivative goes through it. None: the mean of the other values (leave one out),
            for which there must be two samples at least. 0.0 stands for no baseline.
        axis: the one axis of the samples, which are independent.

    Returns:
        The mean of the values, of the shape without `axis`, float32 or wider.

    Raises:
        TypeError: an argument is not real, or `axis` not one int.
        ValueError: shapes differ, `baseline` does not broadcast, or one sample is to have
            the mean of the others as its baseline.

    Example:
        >>> logits, f = jnp.array([0.0, 1.0]), jnp.array([3.0, 5.0])
        >>> draws = jnp.array([0, 1, 1])  # as `sample` gives them
        >>> log_p = lambda z: jnp.log(jax.nn.softmax(z))[draws]
        >>> print(jax.grad(lambda z: score_function(f[draws], log_p(z)))(logits).round(4))
        [-0.6667  0.6667]

    Note:
        Gradient: unbiased, and so are all further derivatives, in both modes. Its variance
        is that of f - b: without a baseline it grows with the square of the mean of f; leaving
        one out takes the mean away, at a factor of K / (K - 1) on the rest. For `values` that
        were drawn with `sample`, and `log_probs` as `log_prob` gives them.

    Reference:
        Williams (1992), Simple statistical gradient-following algorithms; Kool, van Hoof and
        Welling (2019), Buy 4 REINFORCE samples, get a baseline for free!; Foerster et al.
        (2018), DiCE, for the form that can be differentiated again.
    """
    values, _ = to_float(values, name="values")
    log_probs, _ = to_float(log_probs, name="log_probs")
    if values.shape != log_probs.shape:
        raise ValueError(
            f"`log_probs` of shape {log_probs.shape} must have the shape {values.shape} of"
            " `values`."
        )
    dtype = jnp.promote_types(values.dtype, log_probs.dtype)
    values, log_probs = values.astype(dtype), log_probs.astype(dtype)
    axis = resolve_one_axis(axis, values.ndim)
    num = values.shape[axis]
    if baseline is None:
        if num < 2:
            raise ValueError(f"To leave one sample out takes two at least, got {num}.")
        level = _mean_of_others(values, axis)
    else:
        level, _ = to_float(baseline, name="baseline")
        level = broadcast(level.astype(dtype), values.shape, name="baseline", target="values")
    # Its value is 1 and its logarithm has the derivative of log p, of every order.
    box = jnp.exp(_zero_with_gradient_of(log_probs))
    level = lax.stop_gradient(level)
    # The baseline's term is 0, also where the baseline is infinite.
    surrogate = with_gradient_of(values * box - level * (box - 1), values * box)
    return _mean_without_overflow(surrogate, axis)


def _zero_with_gradient_of(x: Array) -> Array:
    """0 with the derivative of x, where x - stop_gradient(x) would be NaN for an infinite x."""
    return with_gradient_of(x, jnp.where(jnp.isnan(x), jnp.nan, jnp.zeros_like(x)))


def _mean_without_overflow(x: Array, axis: int) -> Array:
    """The mean along an axis, whose sum does not overflow."""
    num, highest = x.shape[axis], float(jnp.finfo(x.dtype).max)
    largest = jnp.max(jnp.abs(lax.stop_gradient(x)), axis, keepdims=True, initial=0)
    # Divide first where the sum may overflow, and last elsewhere, because tiny quotients
    # would be flushed to 0.
    first = jnp.where(largest > highest / max(num, 1), num, 1).astype(x.dtype)
    return jnp.sum(x / first, axis) * (jnp.squeeze(first, axis) / num)


def _mean_of_others(x: Array, axis: int) -> Array:
    """The mean of all other entries along an axis.

    It sums from both ends, because subtracting an entry from the sum of all would lose the
    digits of the others, and would give NaN for an infinite entry.
    """
    num, highest = x.shape[axis], float(jnp.finfo(x.dtype).max)
    largest = jnp.max(jnp.abs(x), axis, keepdims=True)
    first = jnp.where(largest > highest / num, num, 1).astype(x.dtype)
    scaled = x / first
    before = jnp.cumsum(lax.slice_in_dim(scaled, 0, num - 1, axis=axis), axis)
    after = lax.cumsum(lax.slice_in_dim(scaled, 1, num, axis=axis), axis, reverse=True)
    zero = jnp.zeros_like(lax.slice_in_dim(scaled, 0, 1, axis=axis))
    total = jnp.concatenate([zero, before], axis) + jnp.concatenate([after, zero], axis)
    return total * (first / (num - 1))


@api()
def reverse_gradient(x: ArrayLike, scale: ArrayLike = 1.0) -> Array:
    r"""Passes values on, and reverses their gradient.

    .. math:: y = x, \qquad \partial y = -c \, \partial x

    Args:
        x: values, `[*shape]`; differentiable.
        scale: c, one number; no derivative goes through it.

    Returns:
        The same values, in their dtype.

    Raises:
        TypeError: `x` is not real.
        ValueError: `scale` is not one number.

    Example:
        >>> print(jax.grad(lambda x: reverse_gradient(x, 0.5) ** 2)(3.0))
        -3.0

    Note:
        What comes before maximises the loss that what comes after minimises: put before a map
        as in `softmax(reverse_gradient(logits))`. It is linear: both modes, and any order.

    Reference:
        Ganin and Lempitsky (2015), Unsupervised domain adaptation by backpropagation.
    """
    wide, dtype = to_float(x, name="x")
    scale = per_slice(scale, wide, tuple(range(wide.ndim)), name="scale").reshape(())
    return _reversed(wide, lax.stop_gradient(scale)).astype(dtype)


@jax.custom_jvp
def _reversed(x: Array, scale: Array) -> Array:
    del scale
    return x


@_reversed.defjvp
def _reversed_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, scale = primals
    return _reversed(x, scale), -scale * tangents[0]


@api("axis", max_norm=NONNEGATIVE)
def clip_gradient(x: ArrayLike, max_norm: ArrayLike, *, axis: Axis = -1) -> Array:
    r"""Passes values on, and shortens gradients that are too long.

    .. math:: y = x, \qquad \bar x = \bar y \min(1, c / \lVert \bar y \rVert)

    Args:
        x: values, `[*shape]`; differentiable.
        max_norm: the largest norm c in [0, inf], one number or one per slice; no derivative
            goes through it. In an array, one out of range gives NaN gradients.
        axis: axis, axes, or None for all, of one gradient: its norm is Euclid's.

    Returns:
        The same values, in their dtype.

    Raises:
        TypeError: `x` is not real.
        ValueError: `max_norm` does not broadcast or is a negative Python number, or `axis` is
            out of range.

    Example:
        >>> loss = lambda x: jnp.sum(jnp.array([3.0, 4.0]) * clip_gradient(x, 1.0))
        >>> print(jax.grad(loss)(jnp.zeros(2)))
        [0.6 0.8]

    Note:
        Gradient: it has the same direction, and is biased towards 0 where it is cut. Reverse
        mode alone, because a tangent cannot depend on its cotangent; the gradient may be
        differentiated again, in reverse mode.

    Reference:
        Pascanu, Mikolov and Bengio (2013), On the difficulty of training recurrent neural
        networks.
    """
    wide, dtype = to_float(x, name="x")
    axes = resolve_axes(axis, wide.ndim)
    max_norm = nan_outside(per_slice(max_norm, wide, axes, name="max_norm"), 0)
    return _clipped(axes, wide, lax.stop_gradient(max_norm)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _clipped(axes: tuple[int, ...], x: Array, max_norm: Array) -> Array:
    del axes, max_norm
    return x


def _clipped_fwd(axes: tuple[int, ...], x: Array, max_norm: Array) -> tuple[Array, Array]:
    return _clipped(axes, x, max_norm), max_norm


def _clipped_bwd(axes: tuple[int, ...], max_norm: Array, bar: Array) -> tuple[Array, Array]:
    # The largest entry divides first, because squares may overflow.
    largest = jnp.max(jnp.abs(lax.stop_gradient(bar)), axes, keepdims=True, initial=0)
    # XLA multiplies by the inverse of the unit, and would flush that of a larger unit to 0.
    highest = float(jnp.finfo(bar.dtype).max) / 8
    unit = jnp.where((largest > 0) & (largest < jnp.inf), jnp.minimum(largest, highest), 1)
    scaled = bar / unit
    squares = jnp.sum(jnp.square(scaled), axes, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    long = (squares > 0) & ~(length <= max_norm / unit)  # NaN is not hidden.
    factor = jnp.where(long, max_norm, 1) / length
    return jnp.where(long, scaled * factor, bar), jnp.zeros_like(max_norm)


_clipped.defvjp(_clipped_fwd, _clipped_bwd)
