"""Samples that can be differentiated: one-hot or relaxed, each with its own estimate.

All estimate the gradient of E f(D), where D is a one-hot sample from the softmax of logits. A
relaxed sample has a true derivative, but of another expectation; a one-hot sample has none and
carries an estimate instead. Each docstring names the estimate, how far its mean is off (bias),
and how it scatters. `score_function` and `weighted_subset` have no bias at all.
"""

from __future__ import annotations

from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _random
from softjax._api import NONNEGATIVE, POSITIVE, api
from softjax._autodiff import with_gradient_of
from softjax._inputs import check_flag, check_int, prepare, resolve_one_axis, to_float
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX, SOFTMAX
from softjax._threshold import solve
from softjax.sampling import gumbel_given_argmax, sample

__all__ = ["gumbel_softmax", "rao_blackwell_gumbel_softmax", "reinmax", "relaxed_log_density"]


@overload
def gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = ...,
    hard: bool = ...,
    axis: int = ...,
    where: ArrayLike | None = ...,
    return_log: Literal[False] = ...,
) -> Array: ...


@overload
def gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = ...,
    hard: bool = ...,
    axis: int = ...,
    where: ArrayLike | None = ...,
    return_log: Literal[True],
) -> tuple[Array, Array]: ...


@overload
def gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = ...,
    hard: bool = ...,
    axis: int = ...,
    where: ArrayLike | None = ...,
    return_log: bool,
) -> Array | tuple[Array, Array]: ...


@api("hard", "axis", "return_log", temperature=NONNEGATIVE)
def gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    hard: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
    return_log: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Draws relaxed one-hot samples: the softmax of logits with Gumbel noise.

    .. math:: y = \mathrm{softmax}((z + G) / T)

    Args:
        key: random key.
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        temperature: T in [0, inf], one number or one per slice; differentiable. Towards 0 the
            samples become one-hot, distributed as `sample` is, and their derivative vanishes.
        hard: whether to return the one-hot sample of the largest entry, with the derivative
            of the relaxed one (straight through).
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.
        return_log: whether to return the logarithms of the relaxed samples too, as
            `relaxed_log_density` takes them.

    Returns:
        Samples `[*shape]` in the dtype of `logits`, which sum to one along `axis`; zeros in a
        slice that keeps nothing. With `return_log` a pair: these, and the logarithms of the
        relaxed samples (with `hard` too), `[*shape]`, float32 or wider, -inf where dropped.

    Raises:
        TypeError: `key` is no random key, `logits` not real, `where` not bool, `return_log` no
            flag, or `axis` not one int.
        ValueError: `where` or `temperature` does not broadcast, `axis` is out of range, or
            `temperature` is a negative Python number.

    Example:
        >>> y = gumbel_softmax(jax.random.key(0), jnp.zeros((2, 3)), temperature=0.5)
        >>> print(jnp.sum(y, axis=-1))
        [1. 1.]
        >>> key, z = jax.random.key(0), jnp.zeros(3)
        >>> y, log_y = gumbel_softmax(key, z, temperature=1e-3, return_log=True)
        >>> print(jnp.sum(y == 0), jnp.isfinite(log_y))
        2 [ True  True  True]

    Note:
        Gradient: the true one of E f(y), without bias. It differs from that of E f(D) by a bias
        of order T, and its variance grows as 1 / T. With `hard`, f is taken at D and its
        gradient goes to y: the bias stays as T falls, unless f is linear. The noise is float32
        or wider for logits of any dtype. At a low T samples round to 0, and their logarithms
        do not. Both modes, any order.

    Reference:
        Jang, Gu and Poole (2017), Categorical reparameterization with Gumbel-softmax;
        Maddison, Mnih and Teh (2017), The concrete distribution.
    """
    _random.check_key(key)
    return_log = check_flag(return_log, name="return_log")
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    scores = _random.centred(problem.logits, axis)
    noisy = scores + _random.gumbel(key, scores.shape, scores.dtype)
    family = LOG_SOFTMAX if return_log else SOFTMAX
    solution = solve(family, AlongAxes((axis,)), noisy, problem.temperature)
    samples = solution.probs
    if hard:
        largest = jnp.argmax(noisy, axis).astype(jnp.int32)
        samples = with_gradient_of(samples, _one_hot(largest, scores, axis))
    samples = samples.astype(problem.dtype)
    return (samples, solution.margins) if return_log else samples


def _one_hot(labels: Array, logits: Array, axis: int) -> Array:
    """1 at the label of each slice if the label is kept, 0 elsewhere; NaN if a logit is NaN."""
    places = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    hard = (places == jnp.expand_dims(labels, axis)) & (logits != -jnp.inf)
    broken = jnp.any(jnp.isnan(logits), axis, keepdims=True)
    return jnp.where(broken, jnp.nan, hard.astype(logits.dtype))


def _fixed(value: Array, x: Array) -> Array:
    """The value, with the derivative of x where it is kept."""
    kept = x != -jnp.inf
    return jnp.where(
        kept, with_gradient_of(jnp.where(kept, x, 0), lax.stop_gradient(value)), -jnp.inf
    )


@api("axis", temperature=POSITIVE)
def relaxed_log_density(
    logits: ArrayLike,
    log_samples: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Computes the log-density of relaxed one-hot samples on the simplex.

    .. math:: \log \Gamma(n) + (n - 1) \log T + \sum_i \big( \log
        \mathrm{softmax}(z - T \log y)_i - \log y_i \big)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        log_samples: logarithms of the samples y, of the same shape, finite where kept;
            differentiable. `gumbel_softmax(..., return_log=True)` gives them; the samples
            themselves may round to 0.
        temperature: T in (0, inf), one number or one per slice; differentiable.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One number per slice, float32 or wider: the density in all but one of the n kept
        entries. 0 for a slice that keeps one entry or none.

    Raises:
        TypeError: an argument is not real, `where` not bool, or `axis` not one int.
        ValueError: shapes differ, `where` or `temperature` does not broadcast, `axis` is out
            of range, or `temperature` is a Python number that is not positive.

    Example:
        >>> uniform = jnp.log(jnp.array([0.2, 0.8]))
        >>> print(relaxed_log_density(jnp.zeros(2), uniform, temperature=1.0))
        0.0

    Note:
        Its gradient is the true one. O(n); both modes, any order.

    Reference:
        Maddison, Mnih and Teh (2017), The concrete distribution, equation 10.
    """
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    x, axis = problem.logits, resolve_one_axis(axis, problem.logits.ndim)
    log_y, _ = to_float(log_samples, name="log_samples")
    if log_y.shape != x.shape:
        raise ValueError(
            f"`log_samples` of shape {log_y.shape} must have the shape {x.shape} of `logits`."
        )
    temperatures = problem.temperature
    if temperatures is None:
        temperatures = jnp.ones((1,) * x.ndim, x.dtype)
    kept = x != -jnp.inf
    log_y = jnp.where(kept, log_y.astype(x.dtype), 0)
    scores = jnp.where(kept, jnp.where(kept, x, 0) - temperatures * log_y, -jnp.inf)
    margins = solve(LOG_SOFTMAX, AlongAxes((axis,)), scores).margins
    total = jnp.sum(jnp.where(kept, jnp.where(kept, margins, 0) - log_y, 0), axis)
    num = jnp.sum(kept, axis)
    # A table of factorials is right to the last digit; XLA's lgamma is 1e-6 off in float32.
    log_factorials = np.cumsum(np.log(np.maximum(1, np.arange(x.shape[axis] + 1))))
    log_gamma = jnp.asarray(log_factorials, x.dtype)[jnp.maximum(num, 1) - 1]
    log_temperature = jnp.log(jnp.squeeze(temperatures, axis))
    volume = log_gamma + (num - 1).astype(x.dtype) * log_temperature
    return jnp.where(num > 1, volume + total, 0)


@api("num_samples", "axis", temperature=NONNEGATIVE)
def rao_blackwell_gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    *,
    num_samples: int = 10,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Draws one-hot samples, with straight-through gradients averaged over their noise.

    .. math:: D, \qquad \partial D = \frac1K \sum_k \partial
        \, \mathrm{softmax}((z + G_k) / T), \quad \arg\max (z + G_k) = D

    Args:
        key: random key.
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        num_samples: K, how many draws of the noise, given the sample, are averaged; static.
        temperature: T in [0, inf], one number or one per slice; differentiable.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One-hot samples `[*shape]` in the dtype of `logits`; zeros in a slice that keeps
        nothing.

    Raises:
        TypeError: as `gumbel_softmax`.
        ValueError: as `gumbel_softmax`, or `num_samples` is less than 1.

    Example:
        >>> y = rao_blackwell_gumbel_softmax(jax.random.key(0), jnp.zeros((2, 3)))
        >>> print(jnp.sum(y, axis=-1))
        [1. 1.]

    Note:
        Gradient: it has the mean, and so the bias, of `gumbel_softmax` with `hard`. Its
        variance is smaller, and falls as K grows; f is evaluated once. O(K n) memory. Both
        modes.

    Reference:
        Paulus, Maddison and Krause (2021), Rao-Blackwellizing the straight-through
        Gumbel-softmax gradient estimator.
    """
    _random.check_key(key)
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    scores = _random.centred(problem.logits, axis)
    class_key, noise_key = jax.random.split(key)
    labels = sample(class_key, scores, axis=axis)
    hard = _one_hot(labels, scores, axis)

    def relaxed(key: Array) -> Array:
        noisy = gumbel_given_argmax(key, lax.stop_gradient(scores), labels, axis=axis)
        noisy = jnp.where(jnp.isnan(scores), jnp.nan, noisy)
        slices = AlongAxes((axis,))
        return solve(SOFTMAX, slices, _fixed(noisy, scores), problem.temperature).probs

    num_samples = check_int(num_samples, name="num_samples", least=1)
    soft = jnp.mean(jax.vmap(relaxed)(jax.random.split(noise_key, num_samples)), 0)
    return with_gradient_of(soft, hard).astype(problem.dtype)


@api("axis", temperature=NONNEGATIVE)
def reinmax(
    key: Array,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Draws one-hot samples, with gradients that are accurate to second order.

    .. math:: D, \qquad \partial D = 2 J(\pi) - \tfrac12 J(p), \quad
        \pi = \tfrac12 (D + \mathrm{softmax}(z / T)), \quad J(q) = \mathrm{diag}(q) - q q^\top

    Args:
        key: random key.
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        temperature: T of the probabilities that are mixed with the sample, one number or one
            per slice; no derivative goes through it. 1 and more is usual.
        axis: the one axis of the classes.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One-hot samples of softmax(z), `[*shape]`, in the dtype of `logits`; zeros in a slice
        that keeps nothing.

    Raises:
        TypeError: as `gumbel_softmax`.
        ValueError: as `gumbel_softmax`.

    Example:
        >>> y = reinmax(jax.random.key(0), jnp.zeros((2, 3)))
        >>> print(jnp.sum(y, axis=-1))
        [1. 1.]

    Note:
        Gradient at T = 1: it has no bias where f is quadratic, by Heun's rule for the
        differences between classes. Elsewhere the bias is of third order in the size of f,
        where that of straight through is of second. Another T trades bias for variance. Both
        modes.

    Reference:
        Liu et al. (2023), Bridging discrete and backpropagation: straight-through and beyond.
    """
    _random.check_key(key)
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    scores, slices = _random.centred(problem.logits, axis), AlongAxes((axis,))
    hard = _one_hot(sample(key, scores, axis=axis), scores, axis)
    fixed = lax.stop_gradient((scores, problem.temperature))
    # log((D + softmax) / 2), which is finite wherever an entry is kept.
    margins = solve(LOG_SOFTMAX, slices, *fixed).margins
    mixed = jnp.where(hard == 1, jnp.log1p(jnp.exp(margins)), margins)
    twice = 2 * solve(SOFTMAX, slices, _fixed(mixed, scores)).probs
    soft = twice - solve(SOFTMAX, slices, scores).probs / 2
    return with_gradient_of(soft, hard).astype(problem.dtype)
