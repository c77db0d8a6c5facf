"""Losses that teach a softmax policy which actions were good, one number per step.

The actions lie along the last axis of the logits; all other axes are steps, of any shape. A
step whose mask keeps no action is left out: its loss is 0, and whatever stands in it reaches
neither the loss nor a gradient. No mean is taken: `mean_loss` averages, with weights of 0 for
the steps that are left out. Advantages are differentiable as the other arguments are: the
caller stops the gradient of a critic, by `jax.lax.stop_gradient`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._inputs import Problem, is_static_zero, mask, nan_outside, to_float
from softjax.policies.actions import (
    Mixture,
    check_actions,
    chosen,
    mixture,
    per_step,
    policy_problem,
)

__all__ = ["clipped_surrogate_loss", "policy_gradient_loss"]


@api(temperature=NONNEGATIVE)
def policy_gradient_loss(
    logits: ArrayLike,
    actions: ArrayLike,
    advantages: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    entropy_cost: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Weighs log-probabilities of actions by their advantages, less a share of the entropy.

    .. math:: -A \log \pi_a - c \, H(\pi), \qquad \pi = \mathrm{softmax}(z / T)

    Args:
        logits: scores z, `[..., n]`, real or -inf (illegal); differentiable.
        actions: a, int, `[...]`, that were taken.
        advantages: A, broadcastable to `[...]`; differentiable.
        temperature: T in [0, inf] of the policy, one number or one per step (broadcastable to
            `[..., 1]`): the one that `select_action` drew with; differentiable, with derivative
            0 at the limits, where the logits have none either.
        entropy_cost: c, broadcastable to `[...]`; differentiable.
        where: mask of legal actions, bool, broadcastable to `[..., n]`; True is legal. A step
            without any is left out (`steps[..., None]` is a mask of steps alone).

    Returns:
        One loss per step, `[...]`, float32 or wider; 0, with gradients of 0, in a step that is
        left out. An illegal action, or one that the policy never takes at temperature 0, has
        the loss A inf, and 0 where A is 0; the gradient of its step is that of the entropy
        alone. So is the gradient for an action outside of [0, n), whose loss is NaN. Where
        nothing is legal, -1 counts as an illegal action.

    Raises:
        TypeError: `logits` is not real, `actions` not integer, or `where` not bool.
        ValueError: an argument does not broadcast as above, or `temperature` is a negative
            Python number.

    Example:
        >>> logits = jnp.array([[0.0, 0.0, -jnp.inf]])
        >>> print(policy_gradient_loss(logits, jnp.array([1]), jnp.array([2.0])))
        [1.3862944]

    Note:
        The gradient in the logits is A (pi - e_a) / T - c dH/dz. Its entry at a nearly certain
        action is minus the sum of the others, which keeps the digits that p - 1 would lose; it
        is 0 at illegal actions. O(n). Both modes, any order.

    Reference:
        Williams (1992), Simple statistical gradient-following algorithms for connectionist
        reinforcement learning.
    """
    steps = _Steps.of(logits, actions, temperature, where)
    policy, log_probs = steps.policy()
    advantages = steps.option(advantages, "advantages")
    illegal = log_probs == -jnp.inf
    loss = -advantages * jnp.where(illegal, 0, log_probs)
    loss += jnp.where(illegal & (advantages != 0), jnp.inf * jnp.sign(advantages), 0)
    return loss - steps.bonus(policy, entropy_cost)


@api(clip=NONNEGATIVE, temperature=NONNEGATIVE)
def clipped_surrogate_loss(
    logits: ArrayLike,
    actions: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip: ArrayLike = 0.2,
    temperature: ArrayLike = 1.0,
    entropy_cost: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Rewards a policy for better actions, up to a ratio to the policy that took them (PPO).

    .. math:: -\min\big(r A, \, \mathrm{clip}(r, 1 - \delta, 1 + \delta) A\big)
        - c \, H(\pi), \qquad r = \pi_a / \mu_a, \quad \pi = \mathrm{softmax}(z / T)

    Args:
        logits: scores z, `[..., n]`, real or -inf (illegal); differentiable.
        actions: a, int, `[...]`, that were taken.
        old_log_probs: logarithms of mu, the probabilities that they were taken with, as
            `select_action` gives them, broadcastable to `[...]`; differentiable.
        advantages: A, broadcastable to `[...]`; differentiable.
        clip: distance delta >= 0 of the ratio from 1, broadcastable to `[...]`; differentiable.
            A negative one in an array gives NaN.
        temperature: T in [0, inf] of the policy, one number or one per step (broadcastable to
            `[..., 1]`): the one that `select_action` drew with; differentiable, with derivative
            0 at the limits, where the logits have none either.
        entropy_cost: c, broadcastable to `[...]`; differentiable.
        where: mask of legal actions, bool, broadcastable to `[..., n]`; True is legal. A step
            without any is left out (`steps[..., None]` is a mask of steps alone).

    Returns:
        One loss per step, `[...]`, float32 or wider; 0, with gradients of 0, in a step that is
        left out. Where the ratio is clipped, the gradient is that of the entropy alone; a ratio
        on its bound is not clipped. An illegal action, or one that the policy never takes at
        temperature 0, has the ratio 0. NaN as in `policy_gradient_loss`.

    Raises:
        TypeError: `logits` is not real, `actions` not integer, or `where` not bool.
        ValueError: an argument does not broadcast as above, or `clip` or `temperature` is a
            negative Python number.

    Example:
        >>> logits, action, old = jnp.zeros(2), jnp.array(0), jnp.log(0.25)
        >>> print(clipped_surrogate_loss(logits, action, old, 1.0))
        -1.2

    Note:
        O(n). The ratio, computed from the difference of the logarithms, has a relative error
        of about their size in eps. r A and its gradient are formed from logarithms: they keep
        their digits where r alone overflows, and stop at a third of the largest number where
        they would. Both modes, any order (almost everywhere).

    Reference:
        Schulman et al. (2017), Proximal policy optimization algorithms.
    """
    steps = _Steps.of(logits, actions, temperature, where)
    policy, log_probs = steps.policy()
    advantages = steps.option(advantages, "advantages")
    clip = nan_outside(steps.option(clip, "clip"), 0)
    old_log_probs = steps.option(old_log_probs, "old_log_probs")
    # For a gain the ratio counts up to 1 + delta, for a loss down to 1 - delta.
    gain = advantages >= 0
    bound = jnp.where(gain, 1 + clip, 1 - clip)
    ratio = _times_exp(jnp.ones_like(bound), _change(log_probs, old_log_probs))
    beyond = jnp.where(gain, ratio > bound, ratio < bound) | jnp.isnan(bound)
    weighed = _weighed_ratio(
        advantages,
        old_log_probs,
        steps.problem.logits,
        steps.problem.temperature,
        steps.actions,
        policy.probs,
        policy.log_probs,
    )
    bounded = _times_exp(advantages, jnp.zeros_like(ratio), jnp.where(beyond, bound, 0))
    loss = -jnp.where(beyond, bounded, weighed)
    return loss - steps.bonus(policy, entropy_cost)


class _Steps(NamedTuple):
    """Steps whose logits and actions are checked, and which of them count."""

    problem: Problem
    actions: Array  # [...]; -1 in a step that is left out
    kept: Array  # bool, [...]

    @classmethod
    def of(
        cls,
        logits: ArrayLike,
        actions: ArrayLike,
        temperature: ArrayLike,
        where: ArrayLike | None,
    ) -> _Steps:
        problem = policy_problem(logits, -1, where, temperature, name="logits")
        shape, (axis,) = problem.logits.shape, problem.axes
        actions = check_actions(actions, shape, axis, target="logits")
        if where is None:
            return cls(problem, actions, jnp.ones(actions.shape, jnp.bool_))
        kept = jnp.any(mask(where, shape), axis)
        return cls(problem, jnp.where(kept, actions, -1), kept)

    def policy(self) -> tuple[Mixture, Array]:
        """The policy, and the log-probability of the action of each step."""
        policy = mixture(self.problem, 0.0)
        return policy, chosen(policy.log_probs, self.actions, self.problem.axes[0])

    def option(self, x: ArrayLike, name: str) -> Array:
        """An option, one number per step; 0 in a step that is left out."""
        value, _ = to_float(x, name=name)
        value = value.astype(self.problem.logits.dtype)
        return jnp.where(self.kept, per_step(value, self.kept.shape, name, "logits"), 0)

    def bonus(self, policy: Mixture, entropy_cost: ArrayLike) -> Array | float:
        """The entropy times its cost."""
        if is_static_zero(entropy_cost):
            return 0.0
        entropy = policy.entropy()
        return self.option(entropy_cost, "entropy_cost") * jnp.squeeze(entropy, -1)


def _change(log_probs: Array, old_log_probs: Array) -> Array:
    """The logarithm of the ratio: -inf for an illegal action."""
    illegal = log_probs == -jnp.inf
    change = jnp.where(illegal, 0, log_probs) - jnp.where(illegal, 0, old_log_probs)
    return jnp.where(illegal, -jnp.inf, change)


@jax.custom_jvp
def _weighed_ratio(
    advantages: Array,
    old_log_probs: Array,
    logits: Array,
    temperature: Array | None,
    actions: Array,
    probs: Array,
    log_probs: Array,
) -> Array:
    """A pi_a / mu_a, where `probs` and `log_probs` are the policy of the logits."""
    del logits, temperature, probs
    return _times_exp(advantages, _change(chosen(log_probs, actions, -1), old_log_probs))


@_weighed_ratio.defjvp
def _weighed_ratio_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # The ratio may overflow where its product with a tiny derivative does not, so the factors
    # are multiplied before anything else. A gradient that would still overflow stays finite,
    # because inf would meet a 0 on its way back and become NaN.
    advantages, old_log_probs, logits, temperature, actions, probs, log_probs = primals
    advantages_dot, old_dot, logits_dot, temperature_dot = tangents[:4]
    # An action outside of [0, n) counts as illegal here, so that it changes no gradient.
    inside = (actions >= 0) & (actions < logits.shape[-1])
    own = jnp.where(inside, chosen(log_probs, actions, -1), -jnp.inf)
    change = _change(own, old_log_probs)
    dot = _times_exp(jnp.ones_like(change), change) * advantages_dot
    dot -= _times_exp(advantages, change) * old_dot
    # d log pi_a = sum_j (e_a - pi)_j dz_j / T - (log pi_a + H) dT / T
    places = lax.broadcasted_iota(actions.dtype, logits.shape, logits.ndim - 1)
    is_own = places == actions[..., None]
    legal = log_probs != -jnp.inf
    known = jnp.where(own == -jnp.inf, 0, own)
    slope = jnp.where(is_own, -jnp.expm1(known)[..., None], -probs)
    exponent = change[..., None]
    if temperature is not None:
        sharp = (temperature >= jnp.finfo(logits.dtype).tiny) & (temperature < jnp.inf)
        log_temperature = jnp.log(jnp.where(sharp, temperature, 1))
        exponent = jnp.where(sharp, exponent - log_temperature, -jnp.inf)
        logs = jnp.where(legal, log_probs, 0)
        entropy = jnp.sum(probs * -logs, -1, keepdims=True)
        by_temperature = _times_exp(advantages[..., None], exponent, known[..., None] + entropy)
        dot -= jnp.squeeze(by_temperature * temperature_dot, -1)
    by_logits = jnp.where(legal, _times_exp(advantages[..., None], exponent, slope), 0)
    return _weighed_ratio(*primals), dot + jnp.sum(
        by_logits * jnp.where(legal, logits_dot, 0), -1
    )


def _times_exp(factor: Array, exponent: Array, slope: Array | None = None) -> Array:
    """Computes factor * slope * exp(exponent), and stops at a third of the largest number."""
    limits = jnp.finfo(factor.dtype)
    highest, most = float(limits.max), math.log(limits.max) - 1
    factor = jnp.clip(factor, -highest, highest)
    slope = jnp.ones_like(factor) if slope is None else jnp.clip(slope, -highest, highest)

    def size(x: Array) -> Array:
        return jnp.log(jnp.maximum(jnp.abs(lax.stop_gradient(x)), float(limits.tiny)))

    room = jnp.minimum(most - size(factor) - size(slope), 2 * most)
    half = jnp.exp(jnp.minimum(exponent, room) / 2)
    # No partial product overflows, because half of the exponential is multiplied at a time.
    return slope * half * factor * half
