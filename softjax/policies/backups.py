"""What a state is worth, given the values of its actions, and targets made of it.

    soft_value          T log sum exp(q / T), the best policy's value with an entropy bonus
    mellowmax           the same with a mean for the sum (in `reductions`)
    expected_value      the mean under the policy of `select_action`: expected SARSA
    actor_critic_value  the mean under another policy, with an entropy bonus: soft actor-critic

`bellman_target` makes a target of a reward and any of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, PROBABILITY, api
from softjax._float import where_finite
from softjax._inputs import Axis, broadcast, computing_dtype, per_slice, to_float
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX, normalizer
from softjax._threshold import solve
from softjax.policies.actions import mixture, policy_problem

__all__ = ["actor_critic_value", "bellman_target", "expected_value", "soft_value"]


@api("axis", temperature=NONNEGATIVE)
def soft_value(
    values: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Computes the largest mean value plus temperature times entropy of any policy.

    .. math:: T \log \sum_i m_i e^{q_i / T}
        = \max_\pi \Big( \sum_i \pi_i q_i + T H(\pi) \Big)

    Args:
        values: action values q, `[*shape]`, real or -inf (illegal); differentiable.
        temperature: T in [0, inf], one number or one per slice (broadcastable to `[*shape]`
            with size 1 along `axis`); differentiable. At 0, where it is differentiable too, the
            result is the maximum.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask m of legal actions, bool, broadcastable to `[*shape]`; True is legal.

    Returns:
        One number per slice, in the dtype of `values`; -inf where nothing is legal, inf at an
        infinite temperature if there is a choice.

    Raises:
        TypeError: `values` is not real, or `where` not bool.
        ValueError: `where` or `temperature` does not broadcast as above, `axis` is out of
            range, or `temperature` is a negative Python number.

    Example:
        >>> print(soft_value(jnp.array([1.0, 1.0, -jnp.inf]), temperature=0.5))
        1.3465736

    Note:
        O(n). The derivative in the values is the policy softmax(q / T), in the temperature its
        entropy. Within 4 units in the last place of the larger of the peak and the rest. With a
        mean for the sum it is `mellowmax` with omega = 1 / T. Both modes, any order.

    Reference:
        Haarnoja et al. (2017), Reinforcement learning with deep energy-based policies.
    """
    problem = policy_problem(values, axis, where, temperature)
    value = _soft_maximum(problem.axes, problem.logits, problem.temperature)
    return jnp.squeeze(value, problem.axes).astype(problem.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _soft_maximum(axes: tuple[int, ...], x: Array, temperature: Array | None) -> Array:
    slices = AlongAxes(axes)
    found = normalizer(slices, x, temperature)
    peak, extra = found.peak, found.log_total
    if temperature is not None:
        unlimited = jnp.isinf(temperature)
        peak = jnp.where(unlimited & (extra > 0), jnp.inf, peak)
        extra *= jnp.where(unlimited, 0, temperature)
    return peak + extra


@_soft_maximum.defjvp
def _soft_maximum_jvp(
    axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    # By the envelope theorem, <pi, q'> + H T'. Nothing is divided by the temperature, so that
    # the rule holds at 0, where the policy shares ties, and close to it.
    x, temperature = primals
    x_dot, temperature_dot = tangents
    slices, value = AlongAxes(axes), _soft_maximum(axes, x, temperature)
    solution = solve(LOG_SOFTMAX, slices, x, temperature)
    value_dot = solution.probs * jnp.where(solution.probs != 0, x_dot, 0)
    value_dot = slices.sum_of_tangents(value_dot)
    if temperature is not None:
        logs = jnp.where(solution.probs != 0, solution.margins, 0)
        value_dot += slices.sum(solution.probs * -logs) * temperature_dot
    return value, jnp.where(jnp.isinf(value), 0, value_dot)


@api("axis", temperature=NONNEGATIVE, epsilon=PROBABILITY)
def expected_value(
    values: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Averages action values under the policy of `select_action` (expected SARSA).

    .. math:: \sum_i \pi_i q_i, \qquad \pi_i = (1 - \epsilon) \, \mathrm{softmax}(q / T)_i
        + \epsilon \, m_i \Big/ \sum_j m_j

    Args:
        values: action values q, `[*shape]`, real or -inf (illegal); differentiable, in the
            policy as well.
        temperature: T in [0, inf], one number or one per slice (broadcastable to `[*shape]`
            with size 1 along `axis`); differentiable. 0 is greedy: the target of Q-learning.
        epsilon: probability in [0, 1] of a uniform draw, one number or one per slice;
            differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask m of legal actions, bool, broadcastable to `[*shape]`; True is legal.

    Returns:
        One number per slice, in the dtype of `values`; 0 where nothing is legal, inf where a
        value is.

    Raises:
        TypeError: `values` is not real, or `where` not bool.
        ValueError: as `policy_probs`.

    Example:
        >>> print(expected_value(jnp.array([1.0, 3.0, -jnp.inf]), temperature=0.0, epsilon=0.5))
        2.5

    Note:
        O(n). The distances to the maximum are averaged, so that a large common part of the
        values costs no digits in the derivative. Both modes, any order.

    Reference:
        van Seijen et al. (2009), A theoretical and empirical analysis of expected Sarsa.
    """
    problem = policy_problem(values, axis, where, temperature)
    x, slices = problem.logits, problem.slices
    value = _mean_value(slices, mixture(problem, epsilon).probs, x, x != -jnp.inf)
    return jnp.squeeze(value, problem.axes).astype(problem.dtype)


def _mean_value(slices: AlongAxes, probs: Array, x: Array, counted: Array) -> Array:
    """The mean of the entries that count; inf where one is inf, 0 where none counts.

    It is the peak plus the mean of the distances to it, in a unit of a quarter where a distance
    may overflow.
    """
    peak = lax.stop_gradient(slices.max(jnp.where(counted, x, -jnp.inf)))
    anchor = where_finite(peak)
    unit = jnp.where(anchor > 1, jnp.array(0.25, x.dtype), 1)
    scaled = jnp.where(counted & (x != jnp.inf), x, slices.broadcast(anchor))
    below = scaled * slices.broadcast(unit) - slices.broadcast(anchor * unit)
    mean = (anchor * unit + slices.sum(probs * below)) / unit
    return jnp.where(peak == jnp.inf, peak + mean, mean)


@api("axis", temperature=NONNEGATIVE, policy_temperature=NONNEGATIVE)
def actor_critic_value(
    values: ArrayLike,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    policy_temperature: ArrayLike = 1.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Averages action values under a policy of its own logits, with an entropy bonus.

    .. math:: \sum_i \pi_i (q_i - T \log \pi_i), \qquad \pi = \mathrm{softmax}(z / t)

    Args:
        values: action values q, `[*shape]`, real; differentiable. Those of actions that the
            policy drops do not count, whatever they are.
        logits: scores z of the policy, `[*shape]`, real or -inf (illegal); differentiable.
        temperature: T in [0, inf) of the bonus, one number or one per slice (broadcastable to
            `[*shape]` with size 1 along `axis`); differentiable. It does not divide the logits.
        policy_temperature: t in [0, inf], which does, one number or one per slice: the one that
            `select_action` draws from these logits with; differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.

    Returns:
        One number per slice, in the wider dtype of the two; 0 where nothing is legal, -inf
        where the policy may take an action of value -inf.

    Raises:
        TypeError: `values` or `logits` is not real, or `where` not bool.
        ValueError: the shapes differ, `where` or a temperature does not broadcast as above,
            `axis` is out of range, or a temperature is a negative Python number.

    Example:
        >>> values, logits = jnp.array([1.0, 3.0]), jnp.zeros(2)
        >>> print(actor_critic_value(values, logits, temperature=0.5))
        2.3465736

    Note:
        O(n). It is `soft_value` less T times the divergence of the policy from softmax(q / T).
        Its negative is the actor's loss, with the gradient through `values` stopped. Both
        modes, any order.

    Reference:
        Haarnoja et al. (2018), Soft actor-critic; Christodoulou (2019), Soft actor-critic for
        discrete action settings.
    """
    problem = policy_problem(logits, axis, where, policy_temperature, name="logits")
    x, values_dtype = to_float(values, name="values")
    if x.shape != problem.logits.shape:
        raise ValueError(
            f"`values` of shape {x.shape} must have the shape {problem.logits.shape} of"
            f" `logits`."
        )
    out_dtype = jnp.promote_types(problem.dtype, values_dtype)
    wide = jnp.promote_types(problem.logits.dtype, x.dtype)
    x, scores, slices = x.astype(wide), problem.logits.astype(wide), problem.slices
    if problem.temperature is not None:
        problem = problem._replace(temperature=problem.temperature.astype(wide))
    problem = problem._replace(logits=scores)
    temperature = per_slice(temperature, scores, problem.axes, name="temperature")
    policy = mixture(problem, 0.0)
    possible = policy.probs != 0  # NaN is possible.
    some = jnp.any(scores != -jnp.inf, problem.axes, keepdims=True)
    # Where no action is legal, the bonus is 0 at any temperature, with a gradient of 0.
    bonus = jnp.where(some, temperature, 0) * policy.entropy()
    value = jnp.where(some, _mean_value(slices, policy.probs, x, possible) + bonus, 0)
    return jnp.squeeze(value, problem.axes).astype(out_dtype)


@api()
def bellman_target(rewards: ArrayLike, discounts: ArrayLike, next_values: ArrayLike) -> Array:
    r"""Adds the discounted value of what follows to a reward.

    .. math:: r + \gamma v

    Args:
        rewards: r, broadcastable to `[*shape]`; differentiable.
        discounts: gamma, broadcastable to `[*shape]`, 0 where the episode has ended;
            differentiable.
        next_values: v, `[*shape]`, of the next state, by `soft_value`, `mellowmax`,
            `expected_value`, `actor_critic_value` or a critic; differentiable.

    Returns:
        One target per step, `[*shape]`, in the widest dtype of those that are not integers. A
        discount of 0 leaves the reward, whatever the value is: -inf, say, where no action is
        left.

    Raises:
        TypeError: an argument is not real.
        ValueError: `rewards` or `discounts` does not broadcast to `[*shape]`.

    Example:
        >>> next_values = soft_value(jnp.array([[0.0, 0.0], [-jnp.inf, -jnp.inf]]))
        >>> print(bellman_target(jnp.array([1.0, 2.0]), jnp.array([0.9, 0.0]), next_values))
        [1.6238325 2.       ]

    Note:
        O(number of steps). Both modes, any order.

    Reference:
        Sutton and Barto (2018), Reinforcement learning: an introduction, chapter 6.
    """
    given = {"rewards": rewards, "discounts": discounts, "next_values": next_values}
    arrays = {name: to_float(x, name=name)[0] for name, x in given.items()}
    floats = [x for x in given.values() if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    out_dtype = jnp.result_type(*floats) if floats else jnp.result_type(float)
    wide, shape = computing_dtype(out_dtype), arrays["next_values"].shape
    reward, discount, value = (
        broadcast(x.astype(wide), shape, name=name, target="next_values")
        for name, x in arrays.items()
    )
    # A discount of 0 keeps its derivative, the value, where that is finite.
    counted = jnp.where((discount != 0) | jnp.isfinite(value), value, 0)
    return (reward + discount * counted).astype(out_dtype)
