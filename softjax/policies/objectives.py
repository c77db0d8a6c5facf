"""Losses that teach a softmax policy which actions were good, one number a step.

The actions lie along the last axis of the logits; all other axes are steps, of any shape. No
mean is taken: `mean_loss` averages, and leaves out steps whose weight is 0. Advantages are
arguments like others: what should not be trained through them (a critic) is for the caller to
stop, by `jax.lax.stop_gradient`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._inputs import is_zero, prepare, to_float
from softjax._slices import AlongAxes
from softjax.policies.actions import Mixture, check_actions, chosen, mixture, per_step

__all__ = ["clipped_surrogate_loss", "policy_gradient_loss"]


@api()
def policy_gradient_loss(
    logits: ArrayLike,
    actions: ArrayLike,
    advantages: ArrayLike,
    *,
    entropy_cost: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Weighs the surprise at each action by its advantage, less a share of the entropy.

    .. math:: -A \log \pi_a - c \, H(\pi), \qquad \pi = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[..., n]`, real or -inf (illegal); differentiable.
        actions: a, int, `[...]`, that were taken.
        advantages: A, broadcastable to `[...]`; differentiable.
        entropy_cost: c, broadcastable to `[...]`; differentiable.
        where: mask of legal actions, bool, broadcastable to `[..., n]`; True is legal.

    Returns:
        One loss a step, `[...]`, float32 or wider. A step with an illegal action has the loss
        A inf, and 0 where A is 0; its gradient holds the entropy's part only. The same holds of
        the gradient of an action outside of [0, n), whose loss is NaN (but for -1 where nothing
        is legal, which is an illegal one): a step that is left out of the mean does no harm.

    Raises:
        TypeError: `logits` is not real, `actions` not integer, or `where` not bool.
        ValueError: an argument does not broadcast as above.

    Example:
        >>> logits = jnp.array([[0.0, 0.0, -jnp.inf]])
        >>> print(policy_gradient_loss(logits, jnp.array([1]), jnp.array([2.0])))
        [1.3862944]

    Note:
        The gradient in the logits is A (pi - e_a) - c dH/dz, whose entry at a nearly certain
        action is minus the sum of the others, not p - 1; it is 0 at illegal actions. O(n).
        Both modes, any order.

    Reference:
        Williams (1992), Simple statistical gradient-following algorithms for connectionist
        reinforcement learning.
    """
    policy, log_probs = _policy(logits, actions, where)
    advantages = _of_steps(advantages, log_probs, "advantages")
    illegal = log_probs == -jnp.inf
    loss = -advantages * jnp.where(illegal, 0, log_probs)
    loss += jnp.where(illegal & (advantages != 0), jnp.inf * jnp.sign(advantages), 0)
    return _finish(loss, policy, entropy_cost, log_probs)


@api(clip=NONNEGATIVE)
def clipped_surrogate_loss(
    logits: ArrayLike,
    actions: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip: ArrayLike = 0.2,
    entropy_cost: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Rewards a policy for better actions, up to a ratio to the policy that took them (PPO).

    .. math:: -\min\big(r A, \, \mathrm{clip}(r, 1 - \delta, 1 + \delta) A\big)
        - c \, H(\pi), \qquad r = \pi_a / \mu_a, \quad \pi = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[..., n]`, real or -inf (illegal); differentiable.
        actions: a, int, `[...]`, that were taken.
        old_log_probs: logarithms of mu, the probabilities that they were taken with, as
            `select_action` gives them, broadcastable to `[...]`; differentiable.
        advantages: A, broadcastable to `[...]`; differentiable.
        clip: distance delta >= 0 of the ratio from 1, broadcastable to `[...]`; differentiable.
        entropy_cost: c, broadcastable to `[...]`; differentiable.
        where: mask of legal actions, bool, broadcastable to `[..., n]`; True is legal.

    Returns:
        One loss a step, `[...]`, float32 or wider. Where the ratio is clipped, and on its bound
        A counts as if it were not, the gradient is that of the entropy alone. An illegal
        action has the ratio 0. NaN as in `policy_gradient_loss`.

    Raises:
        TypeError: `logits` is not real, `actions` not integer, or `where` not bool.
        ValueError: an argument does not broadcast as above, or `clip` is a negative Python
            number.

    Example:
        >>> logits, action, old = jnp.zeros(2), jnp.array(0), jnp.log(0.25)
        >>> print(clipped_surrogate_loss(logits, action, old, 1.0))
        -1.2

    Note:
        O(n). The ratio, computed from the difference of the logarithms, has a relative error
        of about their size in eps. Both modes, any order (almost everywhere).

    Reference:
        Schulman et al. (2017), Proximal policy optimization algorithms.
    """
    policy, log_probs = _policy(logits, actions, where)
    advantages = _of_steps(advantages, log_probs, "advantages")
    clip = _of_steps(clip, log_probs, "clip")
    ratio = _ratio(log_probs, _of_steps(old_log_probs, log_probs, "old_log_probs"))
    # For a gain the ratio counts up to 1 + delta, for a loss down to 1 - delta.
    gain = advantages >= 0
    bound = jnp.where(gain, 1 + clip, 1 - clip)
    beyond = jnp.where(gain, ratio > bound, ratio < bound)
    loss = -advantages * jnp.where(beyond, bound, ratio)
    return _finish(loss, policy, entropy_cost, log_probs)


def _ratio(log_probs: Array, old_log_probs: Array) -> Array:
    """The ratio of the probabilities, finite; 0 where the first is 0."""
    most = math.log(jnp.finfo(log_probs.dtype).max) - 1
    illegal = log_probs == -jnp.inf
    change = jnp.where(illegal, 0, log_probs) - jnp.where(illegal, 0, old_log_probs)
    return jnp.where(illegal, 0, jnp.exp(jnp.minimum(change, most)))


def _policy(
    logits: ArrayLike, actions: ArrayLike, where: ArrayLike | None
) -> tuple[Mixture, Array]:
    """The policy, and the log-probability of the action of every step."""
    problem = prepare(logits, where=where)
    (axis,) = problem.axes
    actions = check_actions(actions, problem.logits.shape, axis, target="logits")
    policy = mixture(problem, 0.0)
    return policy, chosen(policy.log_probs, actions, axis)


def _finish(loss: Array, policy: Mixture, entropy_cost: ArrayLike, log_probs: Array) -> Array:
    """The loss less the bonus."""
    if not is_zero(entropy_cost):
        entropy = policy.entropy(AlongAxes((policy.probs.ndim - 1,)))
        loss -= _of_steps(entropy_cost, log_probs, "entropy_cost") * entropy
    return loss


def _of_steps(x: ArrayLike, log_probs: Array, name: str) -> Array:
    """An option, one number a step, in the dtype that the loss is computed in."""
    value, _ = to_float(x, name=name)
    return per_step(value.astype(log_probs.dtype), log_probs.shape, name, "logits")
