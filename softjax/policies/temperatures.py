"""Temperatures for exploration: by time, by visits, by entropy, by value.

Those made of values are one number per slice, of size 1 along `axis`, ready to be passed as
`temperature` with the same values. Where an equation defines them, it is solved by a search,
and their derivatives are those of its implicit function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._elementary import log1p
from softjax._float import where_finite
from softjax._inputs import Axis, Problem, broadcast, nan_outside, per_slice, prepare, to_float
from softjax._rootfinding import bracketed_newton
from softjax._slices import AlongAxes
from softjax.reductions import mellowmax

__all__ = [
    "exponential_temperature",
    "mellowmax_temperature",
    "target_entropy_temperature",
    "visit_count_temperature",
]


@api(initial=NONNEGATIVE, half_life=NONNEGATIVE, final=NONNEGATIVE)
def exponential_temperature(
    step: ArrayLike, *, initial: ArrayLike, half_life: ArrayLike, final: ArrayLike = 0.0
) -> Array:
    r"""Cools from one temperature to another, halving the distance in equal times.

    .. math:: T_\infty + (T_0 - T_\infty) \, 2^{-t / h}

    Args:
        step: time t >= 0, `[*shape]`, int or real; differentiable.
        initial: T_0 >= 0, broadcastable to `[*shape]`; differentiable.
        half_life: h in [0, inf], broadcastable to `[*shape]`; differentiable inside. inf is the
            constant schedule, 0 is the final temperature from the first step on.
        final: T_inf >= 0, broadcastable to `[*shape]`; differentiable.

    Returns:
        Temperatures `[*shape]`, in the dtype of `step`, or the default float for integers; NaN
        where an option in an array is out of range.

    Raises:
        TypeError: an argument is not real.
        ValueError: an option does not broadcast, or is a negative Python number.

    Example:
        >>> print(exponential_temperature(jnp.array([0, 10, 20]), initial=1.0, half_life=10.0))
        [1.   0.5  0.25]

    Note:
        A half-life keeps its digits in float32, where a factor per step close to 1 would not.

    Reference:
        Kirkpatrick, Gelatt and Vecchi (1983), Optimization by simulated annealing.
    """
    step, dtype = to_float(step, name="step")

    def option(x: ArrayLike, name: str) -> Array:
        value, _ = to_float(x, name=name)
        value = broadcast(value.astype(step.dtype), step.shape, name=name, target="step")
        return nan_outside(value, 0)

    initial, half_life = option(initial, "initial"), option(half_life, "half_life")
    final = option(final, "final")
    lasting = half_life != 0
    kept = jnp.exp2(-step / jnp.where(lasting, half_life, 1))
    kept = jnp.where(lasting, kept, jnp.where(step > 0, 0, 1).astype(step.dtype))
    return (final + (initial - final) * kept).astype(dtype)


@api("axis", counts=NONNEGATIVE)
def visit_count_temperature(
    values: ArrayLike,
    counts: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cools with the visits to a state as fast as still explores each action forever.

    .. math:: T = \frac{\max_i q_i - \min_i q_i}{\log N}

    Args:
        values: action values q, `[*shape]`, real or -inf (illegal); differentiable.
        counts: visits N of the state, one number or one per slice (broadcastable to `[*shape]`
            with size 1 along `axis`), int or real; differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.

    Returns:
        Temperatures, of the shape of `values` with size 1 along `axis`, in its dtype; inf up to
        the first visit; after it, 0 where all values are equal or nothing is legal. NaN where
        `counts` in an array is negative.

    Raises:
        TypeError: `values` or `counts` is not real, or `where` not bool.
        ValueError: `where` or `counts` does not broadcast as above, `counts` is a negative
            Python number, or `axis` is out of range.

    Example:
        >>> import softjax as sj
        >>> values = jnp.array([0.0, 1.0])
        >>> temperature = visit_count_temperature(values, 8)
        >>> print(sj.softmax(values, temperature=temperature).round(4))  # 1 and 8 parts of 9
        [0.1111 0.8889]

    Note:
        Every one of n actions keeps a probability of at least 1 / (n N), whose sum over the
        visits diverges, and the policy is greedy in the limit. The derivative is 0 where the
        temperature is inf. O(n). Both modes, any order.

    Reference:
        Singh, Jaakkola, Littman and Szepesvari (2000), Convergence results for single-step
        on-policy reinforcement-learning algorithms.
    """
    problem = prepare(values, axis=axis, where=where, name="values")
    x, slices = problem.logits, problem.slices
    counts, _ = to_float(counts, name="counts")
    counts = nan_outside(per_slice(counts, x, problem.axes, name="counts"), 0)
    lowest = -slices.max(jnp.where(x == -jnp.inf, -jnp.inf, -x))
    highest = slices.max(x)
    empty = highest == -jnp.inf
    spread = jnp.where(empty | (highest == lowest), 0, highest - lowest)
    visited = ~(counts <= 1)
    logs = jnp.log(jnp.where(visited & ~empty, counts, 2))
    temperature = jnp.where(visited, spread / logs, jnp.inf)
    return jnp.where(empty, 0, temperature).astype(problem.dtype)


@api("axis", target=NONNEGATIVE)
def target_entropy_temperature(
    values: ArrayLike,
    target: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Finds the temperature at which the policy has a given entropy.

    .. math:: T : \quad H(\mathrm{softmax}(q / T)) = h

    Args:
        values: action values q, `[*shape]`, real or -inf (illegal); differentiable.
        target: entropy h in nats, one number or one per slice (broadcastable to `[*shape]` with
            size 1 along `axis`); differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.

    Returns:
        Temperatures, of the shape of `values` with size 1 along `axis`, in its dtype: 0 for
        entropies that ties exceed already (and where nothing is legal, or a value is inf), inf
        from the logarithm of the number of legal actions on. The derivative is 0 there. NaN
        where `target` in an array is negative.

    Raises:
        TypeError: `values` or `target` is not real, or `where` not bool.
        ValueError: `where` or `target` does not broadcast as above, `axis` is out of range, or
            `target` is a negative Python number.

    Example:
        >>> import softjax as sj
        >>> values = jnp.array([1.0, 2.0, 4.0])
        >>> temperature = target_entropy_temperature(values, 0.5)
        >>> print(sj.policy_entropy(values, temperature=temperature).round(6))
        0.5

    Note:
        O(n) per pass, in about 20 passes of a bracketed Newton method in log T. Both modes, any
        order.

    Reference:
        Haarnoja et al. (2018), Soft actor-critic algorithms and applications, for the target.
    """
    problem = prepare(values, axis=axis, where=where, name="values")
    slices = problem.slices
    below, scale = _below(problem, slices)
    target = per_slice(target, problem.logits, problem.axes, name="target")
    num_legal = jnp.maximum(slices.sum((below != -jnp.inf).astype(below.dtype)), 1)
    coldest, hottest = jnp.log(_count_peaks(below, slices)), jnp.log(num_legal)
    cold, hot, unknown = target <= coldest, target >= hottest, ~(target >= 0)
    target = jnp.where(cold | hot, (coldest + hottest) / 2, target)
    temperature = scale * jnp.exp(
        _solve_log_temperature(_missing_entropy, problem.axes, below, target)
    )
    temperature = jnp.where(cold, 0, jnp.where(hot, jnp.inf, temperature))
    temperature = jnp.where(unknown, jnp.nan, temperature)
    return _with_edge_cases(temperature, problem, slices)


def _missing_entropy(
    axes: tuple[int, ...], below: Array, target: Array, log_temperature: Array
) -> Array:
    slices = AlongAxes(axes)
    scores, weights = _boltzmann(below, log_temperature)
    num_peaks, total = _count_peaks(below, slices), slices.sum(weights)
    # This is log(total), and keeps the digits of a total close to the number of peaks.
    others = jax.lax.stop_gradient(slices.sum(jnp.where(below == 0, 0, weights)))
    others = (others + (total - jax.lax.stop_gradient(total))) / num_peaks
    mean = slices.sum(weights * -scores) / (num_peaks * (1 + others))
    return target - (jnp.log(num_peaks) + log1p(others) + mean)


@api("axis")
def mellowmax_temperature(
    values: ArrayLike,
    *,
    omega: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Finds the temperature at which the policy is worth the mellowmax of its values.

    .. math:: T : \quad \sum_i \mathrm{softmax}(q / T)_i \, q_i = \mathrm{mm}_\omega(q)

    Args:
        values: action values q, `[*shape]`, real or -inf (illegal); differentiable.
        omega: inverse scale of `mellowmax`, one number or one per slice (broadcastable to
            `[*shape]` with size 1 along `axis`); differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.

    Returns:
        Temperatures, of the shape of `values` with size 1 along `axis`, in its dtype: inf where
        omega is at most 0; otherwise 0 where it is inf, all values are equal, nothing is legal
        or a value is inf. The derivative is 0 there.

    Raises:
        TypeError: `values` or `omega` is not real, or `where` not bool.
        ValueError: `where` or `omega` does not broadcast as above, or `axis` is out of range.

    Example:
        >>> import softjax as sj
        >>> values = jnp.array([1.0, 2.0, 4.0])
        >>> temperature = mellowmax_temperature(values, omega=5.0)
        >>> print(sj.expected_value(values, temperature=temperature).round(4))
        3.7803
        >>> print(mellowmax(values, omega=5.0).round(4))
        3.7803

    Note:
        This policy has the largest entropy of all that are worth as much. O(n) per pass, in
        about 20 passes of a bracketed Newton method in log T. Its relative error grows as
        1 / (omega times the spread of the values) where that is large. Both modes, any order.

    Reference:
        Asadi and Littman (2017), An alternative softmax operator for reinforcement learning.
    """
    problem = prepare(values, axis=axis, where=where, name="values")
    slices = problem.slices
    below, scale = _below(problem, slices)
    omega = per_slice(omega, problem.logits, problem.axes, name="omega")
    level = slices.max(jnp.where(below == -jnp.inf, -jnp.inf, -below)) <= 0
    cold, hot = (omega == jnp.inf) | level, omega <= 0
    rate = jnp.where(cold | hot, 1, omega) * scale
    value = jnp.expand_dims(mellowmax(below, omega=rate, axis=problem.axes), problem.axes)
    value = jnp.where(jnp.isneginf(value), 0, value)

    temperature = scale * jnp.exp(
        _solve_log_temperature(_spare_value, problem.axes, below, value)
    )
    temperature = jnp.where(hot, jnp.inf, jnp.where(cold, 0, temperature))
    temperature = jnp.where(jnp.isnan(omega), jnp.nan, temperature)
    return _with_edge_cases(temperature, problem, slices)


def _spare_value(
    axes: tuple[int, ...], below: Array, value: Array, log_temperature: Array
) -> Array:
    slices = AlongAxes(axes)
    _, weights = _boltzmann(below, log_temperature)
    legal = jnp.where(below == -jnp.inf, 0, below)
    return slices.sum(weights * (legal - value)) / jnp.maximum(slices.sum(weights), 1)


def _below(problem: Problem, slices: AlongAxes) -> tuple[Array, Array]:
    """Values less the largest, over their spread, in [-1, 0] or -inf; and that spread."""
    # A shift changes nothing and the temperature is proportional to the scale, so both are
    # constants here.
    x = problem.logits
    peak = jax.lax.stop_gradient(where_finite(slices.max(x)))
    legal = (x != -jnp.inf) & (x != jnp.inf)
    # Take eighths, because the difference of huge values may overflow, and its inverse
    # underflow.
    eighths = jnp.where(legal, x, slices.broadcast(peak)) / 8 - slices.broadcast(peak / 8)
    depth = jax.lax.stop_gradient(slices.max(-eighths))
    depth = jnp.where(depth > 0, depth, 0.125)
    below = eighths / slices.broadcast(depth)
    return jnp.where(x == -jnp.inf, -jnp.inf, below), 8 * depth


def _boltzmann(below: Array, log_temperature: Array) -> tuple[Array, Array]:
    """Scores below the peak, 0 where illegal, and their exponentials."""
    legal = below != -jnp.inf
    scores = jnp.where(legal, below, 0) * jnp.exp(-log_temperature)
    return scores, jnp.where(legal, jnp.exp(scores), 0)


def _count_peaks(below: Array, slices: AlongAxes) -> Array:
    return jnp.maximum(slices.sum((below == 0).astype(below.dtype)), 1)


Excess = Callable[[tuple[int, ...], Array, Array, Array], Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solve_log_temperature(
    excess: Excess, axes: tuple[int, ...], below: Array, goal: Array
) -> Array:
    """The log T at which excess(axes, below, goal, log T), which decreases in it, is 0."""

    def step(log_temperature: Array) -> tuple[Array, Array]:
        level = functools.partial(excess, axes, below, goal)
        value, slope = jax.jvp(level, (log_temperature,), (jnp.ones_like(log_temperature),))
        return value, -slope

    reach = 0.9 * math.log(jnp.finfo(below.dtype).max)
    zeros = jnp.zeros_like(goal)
    return bracketed_newton(step, zeros - reach, zeros + reach, zeros)


@_solve_log_temperature.defjvp
def _solve_log_temperature_jvp(
    excess: Excess, axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    # Do not differentiate the search: the implicit function gives the derivative of the root.
    root = _solve_log_temperature(excess, axes, *primals)
    level = functools.partial(excess, axes, *primals)
    _, slope = jax.jvp(level, (root,), (jnp.ones_like(root),))
    below_dot = jnp.where(primals[0] == -jnp.inf, 0, tangents[0])
    at_root = lambda below, goal: excess(axes, below, goal, root)
    _, excess_dot = jax.jvp(at_root, primals, (below_dot, tangents[1]))
    falling = slope < 0
    return root, jnp.where(falling, -excess_dot / jnp.where(falling, slope, 1), 0)


def _with_edge_cases(temperature: Array, problem: Problem, slices: AlongAxes) -> Array:
    """0 where nothing is legal or a value is infinite, NaN where one is NaN."""
    peak = slices.max(problem.logits)
    temperature = jnp.where(jnp.isinf(peak), 0, temperature)
    unknown = slices.max(jnp.isnan(problem.logits).astype(temperature.dtype)) > 0
    return jnp.where(unknown, jnp.nan, temperature).astype(problem.dtype)
