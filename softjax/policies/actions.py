"""Choosing actions: a softmax of the values, mixed with uniform exploration.

    pi_i = (1 - epsilon) softmax(q / T)_i + epsilon m_i / sum(m)

Only legal actions count: those that `where` keeps and whose value is not -inf. An illegal one
has probability 0 under exploration too. Temperature 0 is greedy, so that epsilon-greedy,
Boltzmann and uniform policies are one function; `ties` says whether the largest values share
that greedy choice or the first of them has it alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, PROBABILITY, api
from softjax._elementary import log1p
from softjax._inputs import (
    Axis,
    Problem,
    equal,
    is_static_zero,
    mask,
    nan_outside,
    per_slice,
    prepare,
    resolve_one_axis,
    to_integers,
)
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX
from softjax._threshold import solve
from softjax.entropies import softmax_entropy
from softjax.sampling import TIES, sample

__all__ = ["policy_entropy", "policy_log_prob", "policy_probs", "select_action"]

Ties = Literal["random", "first"]


def _check_ties(given: dict[str, Any]) -> None:
    if given.get("ties", "random") not in TIES:
        raise ValueError(f"`ties` must be one of {TIES}, got {given['ties']!r}.")


_policy = api("axis", "ties", refuse=_check_ties, temperature=NONNEGATIVE, epsilon=PROBABILITY)


@_policy
def select_action(
    key: Array,
    values: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    ties: Ties = "random",
) -> tuple[Array, Array]:
    r"""Draws one action per slice, and gives its log-probability.

    .. math:: a \sim \pi, \qquad \pi_i = (1 - \epsilon) \, \mathrm{softmax}(q / T)_i
        + \epsilon \, m_i \Big/ \sum_j m_j

    Args:
        key: random key.
        values: action values, or logits of a policy, q, `[*shape]`, real or -inf (illegal); the
            log-probability is differentiable in them.
        temperature: T in [0, inf], one number or one per slice (broadcastable to `[*shape]`
            with size 1 along `axis`); differentiable, with derivative 0 at the limits. 0 is
            greedy; inf is uniform.
        epsilon: probability in [0, 1] of a uniform draw among the legal actions, one number or
            one per slice; differentiable.
        axis: the one axis of the actions.
        where: mask m of legal actions, bool, broadcastable to `[*shape]`; True is legal.
        ties: which of the largest values is taken at temperature 0. With "random" they share
            the probability; with "first" the first one has it all, so that the same row gives
            the same action with any key (where `epsilon` is 0).

    Returns:
        Actions, int32, and their log-probabilities under the mixture, float32 or wider, both
        of the shape of `values` without `axis`. An action is -1, with log-probability -inf,
        where nothing is legal, and with NaN where a legal value is NaN.

    Raises:
        TypeError: `key` is no random key, `values` not real, `where` not bool, or `axis` not
            one int.
        ValueError: `where`, `temperature` or `epsilon` does not broadcast as above, `axis` is
            out of range, `temperature` or `epsilon` is a Python number out of its range, or
            `ties` is not one of its names.

    Example:
        >>> import jax
        >>> key, values = jax.random.key(0), jnp.array([1.0, 2.0, -jnp.inf])
        >>> action, log_prob = select_action(key, values, temperature=0.0)
        >>> print(action, log_prob)
        1 0.0

    Note:
        O(n). Epsilon-greedy is `temperature=0`. Drawn by `sample`, with 64 random bits per
        action; the log-probability has the precision of `policy_log_prob`. Both modes, any
        order; no derivative goes through the choice.

    Reference:
        Sutton and Barto (2018), Reinforcement learning: an introduction, chapter 2.
    """
    problem = policy_problem(values, axis, where, temperature)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    log_probs = mixture(problem, epsilon, ties).log_probs
    if is_static_zero(epsilon):
        # Sample from the logits, because XLA would recompute the log-probabilities in each pass
        # of `sample`.
        x, given = lax.stop_gradient((problem.logits, problem.temperature))
        divisor = 1.0 if given is None else given
        actions = sample(key, x, axis=axis, temperature=divisor, ties=ties)
    else:
        actions = sample(key, lax.stop_gradient(log_probs), axis=axis)
    return actions, chosen(log_probs, actions, axis)


@_policy
def policy_log_prob(
    values: ArrayLike,
    actions: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    ties: Ties = "random",
) -> Array:
    r"""Reads the log-probability of one action per slice under the policy of `select_action`.

    .. math:: \log \pi_a

    Args:
        values: q, `[*shape]`, as in `select_action`; differentiable.
        actions: a, int, of the shape of `values` without `axis`.
        temperature: T in [0, inf], as in `select_action`; differentiable.
        epsilon: in [0, 1], as in `select_action`; differentiable, also at 0 and 1.
        axis: the one axis of the actions.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.
        ties: "random" or "first", as in `select_action`.

    Returns:
        One number per action, float32 or wider because a ratio of probabilities needs the
        digits: -inf for an illegal action, and for -1 where nothing is legal; NaN for any other
        action outside of [0, n).

    Raises:
        TypeError: as `select_action`; also if `actions` is not of integers.
        ValueError: as `select_action`; also if `actions` does not broadcast.

    Example:
        >>> values = jnp.array([1.0, 2.0, -jnp.inf])
        >>> print(policy_log_prob(values, jnp.array(0), temperature=0.0, epsilon=0.5))
        -1.3862944

    Note:
        O(n). The mixture is formed from the logarithms, so that neither a tiny nor a nearly
        certain probability loses digits. The derivative is 0 where the result is -inf. Both
        modes, any order.
    """
    problem = policy_problem(values, axis, where, temperature)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    actions = check_actions(actions, problem.logits.shape, axis)
    return chosen(mixture(problem, epsilon, ties).log_probs, actions, axis)


@_policy
def policy_probs(
    values: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    ties: Ties = "random",
) -> Array:
    r"""Computes the probabilities of all actions under the policy of `select_action`.

    .. math:: \pi_i = (1 - \epsilon) \, \mathrm{softmax}(q / T)_i
        + \epsilon \, m_i \Big/ \sum_j m_j

    Args:
        values: q, `[*shape]`, as in `select_action`; differentiable.
        temperature: T in [0, inf], as in `select_action`; differentiable.
        epsilon: in [0, 1], as in `select_action`; differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.
        ties: "random" or "first", as in `select_action`.

    Returns:
        Probabilities `[*shape]` in the dtype of `values`; 0 for illegal actions, and all 0
        where nothing is legal.

    Raises:
        TypeError: `values` is not real, or `where` not bool.
        ValueError: as `select_action`.

    Example:
        >>> print(policy_probs(jnp.array([1.0, 2.0, -jnp.inf]), temperature=0.0, epsilon=0.5))
        [0.25 0.75 0.  ]

    Note:
        O(n). Both modes, any order.
    """
    problem = policy_problem(values, axis, where, temperature)
    return mixture(problem, epsilon, ties).probs.astype(problem.dtype)


@_policy
def policy_entropy(
    values: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    ties: Ties = "random",
) -> Array:
    r"""Computes the entropy of the policy of `select_action`, in nats.

    .. math:: H(\pi) = -\sum_i \pi_i \log \pi_i

    Args:
        values: q, `[*shape]`, as in `select_action`; differentiable.
        temperature: T in [0, inf], as in `select_action`; differentiable.
        epsilon: in [0, 1], as in `select_action`; differentiable.
        axis: axis, axes, or None for all, along which the actions lie.
        where: mask of legal actions, bool, broadcastable to `[*shape]`; True is legal.
        ties: "random" or "first", as in `select_action`.

    Returns:
        One number per slice, float32 or wider, at least 0; 0 where nothing is legal.

    Raises:
        TypeError: `values` is not real, or `where` not bool.
        ValueError: as `select_action`.

    Example:
        >>> print(policy_entropy(jnp.array([1.0, 2.0, -jnp.inf]), epsilon=1.0))
        0.6931472

    Note:
        O(n). Illegal actions count as 0 log 0 = 0, in derivatives too. Both modes, any order.
    """
    problem = policy_problem(values, axis, where, temperature)
    entropy = mixture(problem, epsilon, ties).entropy()
    return jnp.squeeze(entropy, problem.axes)


def policy_problem(
    values: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    temperature: ArrayLike | None,
    *,
    name: str = "values",
) -> Problem:
    """Prepared values, whose temperature is 1 in the slices that `where` leaves out."""
    problem = prepare(values, axis=axis, where=where, temperature=temperature, name=name)
    if where is None or problem.temperature is None:
        return problem
    # A NaN here would reach the gradients of the whole array, because NaN * 0 is NaN.
    kept = jnp.any(mask(where, problem.logits.shape), problem.axes, keepdims=True)
    return problem._replace(temperature=jnp.where(kept, problem.temperature, 1))


class Mixture(NamedTuple):
    """A policy over the actions of each slice."""

    probs: Array  # [*shape]
    log_probs: Array  # [*shape]; -inf where illegal
    entropy: Callable[[], Array]  # per slice, with the axes kept; traced only if it is called


def mixture(problem: Problem, epsilon: ArrayLike, ties: Ties = "random") -> Mixture:
    """The policy of prepared values: their softmax, mixed with the uniform one."""
    slices, x = problem.slices, problem.logits
    if ties == "first" and problem.temperature is not None:
        cold = jnp.abs(problem.temperature) < jnp.finfo(x.dtype).tiny
        x = jnp.where(cold & ~_is_first_peak(x, problem.axes), -jnp.inf, x)
    solution = solve(LOG_SOFTMAX, slices, x, problem.temperature)
    if is_static_zero(epsilon):
        entropy = functools.partial(softmax_entropy, slices, x, problem.temperature)
        return Mixture(solution.probs, solution.margins, entropy)
    legal = problem.logits != -jnp.inf
    # Count in integers, because float32 has no odd number above 2^24.
    count = jnp.sum(legal, problem.axes, dtype=jnp.int32, keepdims=True).astype(x.dtype)
    epsilon = per_slice(epsilon, problem.logits, problem.axes, name="epsilon")
    epsilon = nan_outside(epsilon, 0, 1)
    epsilon = jnp.where(count > 1, epsilon, 0)  # With one action there is nothing to mix.
    count = jnp.maximum(count, 1)
    probs = jnp.where(legal, (1 - epsilon) * solution.probs + epsilon / count, 0)
    logs = _log_mixture(solution.probs, solution.margins, epsilon, count)
    log_probs = jnp.where(legal, logs, -jnp.inf)
    finite = lambda: jnp.where(log_probs == -jnp.inf, 0, log_probs)
    return Mixture(probs, log_probs, lambda: slices.sum(probs * -finite()))


def _is_first_peak(x: Array, axes: tuple[int, ...]) -> Array:
    """Whether an entry is the first of the largest in its slice, or a NaN of it."""
    broken = jnp.isnan(x)
    peak = jnp.max(jnp.where(broken, -jnp.inf, x), axes, keepdims=True, initial=-jnp.inf)
    first = x == peak
    # Go axis by axis, because a slice of many axes may hold more entries than int32 counts.
    for axis in axes:
        others = tuple(a for a in axes if a != axis)
        found = jnp.any(first, others, keepdims=True)
        places = lax.broadcasted_iota(jnp.int32, found.shape, axis)
        last = found.shape[axis]
        place = jnp.min(jnp.where(found, places, last), axis, keepdims=True, initial=last)
        first &= places == place
    return first | broken


def _log_mixture(probs: Array, log_probs: Array, epsilon: Array, count: Array) -> Array:
    """log((1 - epsilon) p + epsilon / n): the logarithm of the larger term, and log1p.

    The smaller term is divided by the larger one, never by a number that may be 0, so that
    derivatives in epsilon exist at 0 and at 1.
    """
    by_value = (1 - epsilon) * probs >= epsilon / count
    certain, never = epsilon == 1, epsilon == 0
    # exp(-log p), because the derivative of 1 / p divides by p^2, which may underflow.
    most = math.log(jnp.finfo(probs.dtype).max) - 1
    exponent = jnp.where(by_value & (log_probs != -jnp.inf), -log_probs, 0)
    inverse = jnp.exp(jnp.minimum(exponent, most))
    less = jnp.where(certain, 0, epsilon)
    by_chance = jnp.where(never, 1, epsilon) / count
    odds = epsilon / ((1 - less) * count)
    ratio = jnp.where(by_value, odds * inverse, (1 - epsilon) * probs / by_chance)
    larger = jnp.where(by_value, log_probs + log1p(-less), jnp.log(by_chance))
    impossible = by_value & (log_probs == -jnp.inf)
    return jnp.where(impossible, -jnp.inf, larger + log1p(ratio))


def check_actions(
    actions: ArrayLike, shape: tuple[int, ...], axis: int, *, target: str = "values"
) -> Array:
    """Integer actions, one per slice along `axis` of an array of the given shape."""
    actions = to_integers(actions, name="actions")
    wanted = shape[:axis] + shape[axis + 1 :]
    return per_step(actions, wanted, "actions", target)


def per_step(x: Array, shape: tuple[int, ...], name: str, target: str) -> Array:
    """`x` broadcast to one number per step, which it may not enlarge."""
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"`{name}` of shape {x.shape} does not broadcast to the shape {shape} of"
            f" `{target}` without the axis of the actions."
        ) from None


def chosen(log_probs: Array, actions: Array, axis: int) -> Array:
    """The log-probability of each action; -1 stands for none where there is none."""
    nothing = jnp.all(log_probs == -jnp.inf, axis) & equal(actions, -1)
    return jnp.where(nothing, -jnp.inf, AlongAxes((axis,)).pick(log_probs, actions))
