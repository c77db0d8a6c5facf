"""Filters: score transforms that keep some logits as they are and drop the rest to -inf.

Thresholds among the entries are found by a search over reductions, never by sorting.
Derivatives pass through what is kept. Dropped (-inf) entries stay dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, PROBABILITY, api
from softjax._cpu import blocked_over_slices
from softjax._float import where_finite
from softjax._inputs import Axis, check_int, per_slice, prepare, to_array, to_integers
from softjax._mesh import AxisName
from softjax._rootfinding import first_of_ties, largest_threshold, ordered, size_of_slice
from softjax._slices import AlongAxes
from softjax._softmax import LOG_SOFTMAX, SOFTMAX
from softjax._threshold import solve

# It takes slices, entries and the option per slice; it returns the kept entries and the keys.
Rule = Callable[[AlongAxes, Array, Array], tuple[Array, Array]]

__all__ = [
    "epsilon_filter",
    "eta_filter",
    "min_p_filter",
    "top_k_filter",
    "top_n_sigma_filter",
    "top_p_filter",
    "typical_filter",
]

FILTER_TIES = ("keep", "first")


def _check_filter_ties(given: dict[str, Any]) -> None:
    if given.get("ties", "keep") not in FILTER_TIES:
        raise ValueError(f"`ties` must be one of {FILTER_TIES}, got {given['ties']!r}.")


def _check_least(given: dict[str, Any]) -> None:
    check_int(given.get("min_tokens_to_keep", 1), name="min_tokens_to_keep", least=1)


@api("axis", "ties", "axis_name", spread=("logits",), k=NONNEGATIVE, refuse=_check_filter_ties)
def top_k_filter(
    logits: ArrayLike,
    k: ArrayLike,
    *,
    axis: Axis = -1,
    ties: Literal["keep", "first"] = "keep",
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the k largest logits of each slice, and drops the rest to -inf.

    .. math:: \{ i : z_i \ge z_{(k)} \}

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        k: how many to keep, one number or one per slice, traced or not; not differentiable.
            A fraction counts as the next whole number; more than there are keeps all; 0
            keeps none.
        axis: axis, axes, or None for all, along which a slice runs.
        ties: what becomes of entries that tie with the k-th largest: "keep" keeps all of
            them; "first" keeps those that come first, so that exactly k are kept.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `k` is out of range.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `k` does not broadcast or is a negative Python number, `axis` is out of
            range, `ties` is unknown, or "first" with several axes and `axis_name`, or a slice
            has more entries than an integer can count.

    Example:
        >>> print(top_k_filter(jnp.array([1.0, 3.0, 2.0]), 2))
        [-inf   3.   2.]
        >>> print(top_k_filter(jnp.array([1.0, 1.0, 1.0]), 2, ties="first"))
        [  1.   1. -inf]

    Note:
        Nothing is sorted: 32 counting passes (64 in float64) halve the range of bit patterns.
        To find the first of ties takes log2(n) more. Counts are integers, exact at every size.
    """
    problem = prepare(logits, axis=axis, axis_name=axis_name)
    x, slices = problem.logits, problem.slices
    size_of_slice(slices, x)
    if ties == "first" and slices.mesh_axes and len(slices.axes) > 1:
        raise ValueError(
            '`ties` must be "keep" with `axis_name` and several axes, because the entries of'
            f" different devices have no order, got 'first' and the axes {slices.axes}."
        )

    @blocked_over_slices
    def keep(slices: AlongAxes, x: Array, k: Array) -> Array:
        keys = ordered(x)
        threshold = largest_threshold(slices, keys, None, k)
        if ties == "first":
            return first_of_ties(slices, keys, threshold, k)
        return keys >= slices.broadcast(threshold)

    count = _count_per_slice(k, x, problem.axes)
    kept = keep(slices, jax.lax.stop_gradient(x), count)
    return _drop(x.astype(problem.dtype), kept, slices.broadcast(count >= 0))


def _count_per_slice(k: ArrayLike, x: Array, axes: tuple[int, ...]) -> Array:
    """How many to keep per slice; integers stay, because float32 may not hold them."""
    row = jax.lax.stop_gradient(per_slice(k, x, axes, name="k"))
    if not jnp.issubdtype(to_array(k, name="k").dtype, jnp.integer):
        return row
    return to_integers(k, name="k").reshape(row.shape)


@api(
    "axis",
    "min_tokens_to_keep",
    "axis_name",
    spread=("logits",),
    p=PROBABILITY,
    refuse=_check_least,
)
def top_p_filter(
    logits: ArrayLike,
    p: ArrayLike,
    *,
    axis: Axis = -1,
    min_tokens_to_keep: int = 1,
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the smallest set of largest logits that holds a mass p, the nucleus.

    .. math:: \{ i : z_i \ge v \}, \qquad
        v = \max \Big\{ v : \sum_{z_j \ge v} \mathrm{softmax}(z)_j \ge p \Big\}

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        p: probability in [0, 1] that the kept entries reach, one number or one per slice,
            traced or not; not differentiable. The largest logit is always kept.
        axis: axis, axes, or None for all, along which a slice runs.
        min_tokens_to_keep: how many of the largest entries are kept in any case, with ties,
            an int from 1 on.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `p` is out of range.
        Ties with the smallest one kept are kept.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `p` does not broadcast or is a Python number outside [0, 1],
            `min_tokens_to_keep` is less than 1, or `axis` is out of range.

    Example:
        >>> print(top_p_filter(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.7))
        [-0.6931472 -1.2039728       -inf]

    Note:
        Nothing is sorted: 32 summing passes (64 in float64) halve the range of bit patterns.

    Reference:
        Holtzman et al. (2020), The curious case of neural text degeneration.
    """
    rule = _by_mass(lambda slices, x: (x, solve(SOFTMAX, slices, x).probs))
    return _filter(logits, axis, "p", p, min_tokens_to_keep, rule, axis_name, searches=True)


@api(
    "axis",
    "min_tokens_to_keep",
    "axis_name",
    spread=("logits",),
    mass=PROBABILITY,
    refuse=_check_least,
)
def typical_filter(
    logits: ArrayLike,
    mass: ArrayLike,
    *,
    axis: Axis = -1,
    min_tokens_to_keep: int = 1,
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the entries whose information is closest to the entropy, up to a mass.

    Entries are ranked by :math:`|-\log p_i - H|`, least first, and kept until their
    probabilities reach the mass.

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        mass: probability in [0, 1] that the kept entries reach, one number or one per slice,
            traced or not; not differentiable. The most typical entry is always kept.
        axis: axis, axes, or None for all, along which a slice runs.
        min_tokens_to_keep: how many of the most typical entries are kept in any case, with
            ties, an int from 1 on.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `mass` is out of range.
        Ties with the last one kept are kept.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `mass` does not broadcast or is a Python number outside [0, 1],
            `min_tokens_to_keep` is less than 1, or `axis` is out of range.

    Example:
        >>> print(typical_filter(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.3))
        [      -inf -1.2039728       -inf]

    Note:
        Nothing is sorted: 32 summing passes (64 in float64) halve the range of bit patterns.

    Reference:
        Meister et al. (2023), Locally typical sampling.
    """
    rule = _by_mass(_typicality)
    return _filter(
        logits, axis, "mass", mass, min_tokens_to_keep, rule, axis_name, searches=True
    )


def _typicality(slices: AlongAxes, x: Array) -> tuple[Array, Array]:
    """-|-log p - H|, and the probabilities."""
    log_probs, probs, entropy = _information(slices, x)
    keys = -jnp.abs(log_probs + slices.broadcast(entropy))
    return jnp.where(log_probs == -jnp.inf, -jnp.inf, keys), probs


def _information(slices: AlongAxes, x: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities, probabilities and the entropy."""
    solution = solve(LOG_SOFTMAX, slices, x)
    log_probs, probs = solution.margins, solution.probs
    terms = probs * jnp.where(log_probs == -jnp.inf, 0, log_probs)
    return log_probs, probs, -slices.sum(terms)


@api(
    "axis",
    "min_tokens_to_keep",
    "axis_name",
    spread=("logits",),
    min_p=PROBABILITY,
    refuse=_check_least,
)
def min_p_filter(
    logits: ArrayLike,
    min_p: ArrayLike,
    *,
    axis: Axis = -1,
    min_tokens_to_keep: int = 1,
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the logits whose probability is at least a fraction of the largest one.

    .. math:: p_i \ge \mathrm{min\_p} \cdot \max_j p_j

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        min_p: the fraction, in [0, 1], one number or one per slice, traced or not; not
            differentiable. 0 keeps all, 1 only the largest.
        axis: axis, axes, or None for all, along which a slice runs.
        min_tokens_to_keep: how many of the largest entries are kept in any case, with ties,
            an int from 1 on.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `min_p` is out of range.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `min_p` does not broadcast or is a Python number outside [0, 1],
            `min_tokens_to_keep` is less than 1, or `axis` is out of range.

    Example:
        >>> print(min_p_filter(jnp.array([0.0, -1.0, -5.0]), 0.1))
        [  0.  -1. -inf]

    Reference:
        Nguyen et al. (2024), Turning up the heat: min-p sampling.
    """
    return _filter(logits, axis, "min_p", min_p, min_tokens_to_keep, _kept_by_min_p, axis_name)


def _kept_by_min_p(slices: AlongAxes, x: Array, min_p: Array) -> tuple[Array, Array]:
    peak = slices.max(x)
    if slices.mesh_axes:  # A maximum over devices may drop a NaN.
        peak += slices.sum(jnp.where(jnp.isnan(x), x, 0))
    finite = slices.broadcast(where_finite(peak))
    gap = jnp.where(slices.broadcast(peak) == jnp.inf, -jnp.inf, x - finite)
    gap = jnp.where(x == slices.broadcast(peak), 0, gap)
    return ~(gap < slices.broadcast(jnp.log(min_p))), x


@api(
    "axis",
    "min_tokens_to_keep",
    "axis_name",
    spread=("logits",),
    epsilon=PROBABILITY,
    refuse=_check_least,
)
def epsilon_filter(
    logits: ArrayLike,
    epsilon: ArrayLike,
    *,
    axis: Axis = -1,
    min_tokens_to_keep: int = 1,
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the logits whose probability is at least a constant.

    .. math:: p_i \ge \epsilon

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        epsilon: the least probability, in [0, 1], one number or one per slice, traced or not;
            not differentiable. 0 keeps all. Published values are 3e-4 to 2e-3.
        axis: axis, axes, or None for all, along which a slice runs.
        min_tokens_to_keep: how many of the largest entries are kept in any case, with ties,
            an int from 1 on.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `epsilon` is out of range.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `epsilon` does not broadcast or is a Python number outside [0, 1],
            `min_tokens_to_keep` is less than 1, or `axis` is out of range.

    Example:
        >>> print(epsilon_filter(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.25))
        [-0.6931472 -1.2039728       -inf]

    Reference:
        Hewitt, Manning and Liang (2022), Truncation sampling as language model desmoothing,
        https://arxiv.org/abs/2210.15191.
    """
    return _filter(
        logits, axis, "epsilon", epsilon, min_tokens_to_keep, _by_probability, axis_name
    )


def _by_probability(slices: AlongAxes, x: Array, epsilon: Array) -> tuple[Array, Array]:
    log_probs = solve(LOG_SOFTMAX, slices, x).margins
    return ~(log_probs < slices.broadcast(jnp.log(epsilon))), x


@api(
    "axis",
    "min_tokens_to_keep",
    "axis_name",
    spread=("logits",),
    epsilon=PROBABILITY,
    refuse=_check_least,
)
def eta_filter(
    logits: ArrayLike,
    epsilon: ArrayLike,
    *,
    axis: Axis = -1,
    min_tokens_to_keep: int = 1,
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the logits whose probability is at least a bound that falls with the entropy.

    .. math:: p_i \ge \min\big(\epsilon, \sqrt{\epsilon}\, e^{-H}\big), \qquad
        H = -\sum_j p_j \log p_j

    Args:
        logits: scores z, `[*shape]`; differentiable where kept.
        epsilon: the largest bound, in [0, 1], one number or one per slice, traced or not; not
            differentiable. 0 keeps all. Published values are 3e-4 to 4e-3.
        axis: axis, axes, or None for all, along which a slice runs.
        min_tokens_to_keep: how many of the largest entries are kept in any case, with ties,
            an int from 1 on.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `epsilon` is out of range.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `epsilon` does not broadcast or is a Python number outside [0, 1],
            `min_tokens_to_keep` is less than 1, or `axis` is out of range.

    Example:
        >>> print(eta_filter(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.25))
        [-0.6931472 -1.2039728 -1.609438 ]

    Note:
        The bound is epsilon where the entropy is small, and falls below it where the entropy
        exceeds half of -log(epsilon), so that flat distributions keep more.

    Reference:
        Hewitt, Manning and Liang (2022), Truncation sampling as language model desmoothing,
        https://arxiv.org/abs/2210.15191.
    """
    return _filter(logits, axis, "epsilon", epsilon, min_tokens_to_keep, _by_entropy, axis_name)


def _by_entropy(slices: AlongAxes, x: Array, epsilon: Array) -> tuple[Array, Array]:
    log_probs, _, entropy = _information(slices, x)
    bound = jnp.minimum(jnp.log(epsilon), jnp.log(epsilon) / 2 - entropy)
    return ~(log_probs < slices.broadcast(bound)), x


@api(
    "axis",
    "min_tokens_to_keep",
    "axis_name",
    spread=("logits",),
    n=NONNEGATIVE,
    refuse=_check_least,
)
def top_n_sigma_filter(
    logits: ArrayLike,
    n: ArrayLike,
    *,
    axis: Axis = -1,
    min_tokens_to_keep: int = 1,
    axis_name: AxisName = None,
) -> Array:
    r"""Keeps the logits that lie within n standard deviations of the largest one.

    .. math:: z_i \ge \max_j z_j - n \sigma, \qquad
        \sigma^2 = \frac{1}{m} \sum_j (z_j - \bar z)^2

    Args:
        logits: scores z, `[*shape]`; differentiable where kept. The m entries above -inf
            count in the mean and in the deviation.
        n: number of standard deviations, in [0, inf], one number or one per slice, traced or
            not; not differentiable. 0 keeps only the largest, inf all.
        axis: axis, axes, or None for all, along which a slice runs.
        min_tokens_to_keep: how many of the largest entries are kept in any case, with ties,
            an int from 1 on.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Logits `[*shape]`; -inf where dropped, NaN in a slice whose `n` is out of range.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `n` does not broadcast or is a negative Python number,
            `min_tokens_to_keep` is less than 1, or `axis` is out of range.

    Example:
        >>> print(top_n_sigma_filter(jnp.array([4.0, 3.0, 0.0, 0.0, 0.0]), 1.0))
        [  4.   3. -inf -inf -inf]

    Note:
        The same entries are kept at every temperature.

    Reference:
        Tang et al. (2024), Top-n sigma: not all logits are you need,
        https://arxiv.org/abs/2411.07641.
    """
    rule, highest = _by_deviation, math.inf
    return _filter(logits, axis, "n", n, min_tokens_to_keep, rule, axis_name, highest=highest)


def _by_deviation(slices: AlongAxes, x: Array, n: Array) -> tuple[Array, Array]:
    counted = x != -jnp.inf
    peak = slices.max(x)
    bottom = -slices.max(jnp.where(counted, -x, -jnp.inf))
    # Gaps are divided by the largest, because a square may overflow. All logits are divided by
    # 16 before, because a difference may overflow too, and because XLA may multiply by the
    # inverse of the largest gap, which is 0 if it is subnormal.
    usual = jnp.isfinite(peak) & jnp.isfinite(bottom)
    reach = jnp.where(usual, peak / 16 - bottom / 16, 1)
    anchor = slices.broadcast(jnp.where(usual, peak / 16, 0))
    gap = jnp.where(counted, anchor - x / 16, 0)
    gap /= slices.broadcast(jnp.where(reach > 0, reach, 1))
    count = jnp.maximum(slices.sum(counted.astype(x.dtype)), 1)
    mean = slices.sum(gap) / count
    moved = jnp.where(counted, gap - slices.broadcast(mean), 0)
    sigma = jnp.sqrt(slices.sum(moved * moved) / count)
    # No finite logit lies within a finite distance of an infinite one.
    beyond = (x != slices.broadcast(peak)) & slices.broadcast((peak == jnp.inf) & (n < jnp.inf))
    return ~(gap > slices.broadcast(n * sigma)) & ~beyond, x


def _by_mass(rank: Callable[[AlongAxes, Array], tuple[Array, Array]]) -> Rule:
    """Keeps the entries of the largest keys that together have a mass."""

    def rule(slices: AlongAxes, x: Array, mass: Array) -> tuple[Array, Array]:
        keys, probs = rank(slices, x)
        # A mass of 1 keeps every entry, whatever the sum rounds to.
        mass = jnp.where(mass >= 1, jnp.inf, mass)
        threshold = largest_threshold(slices, ordered(keys), probs, mass)
        return ordered(keys) >= slices.broadcast(threshold), keys

    return rule


def _filter(
    logits: ArrayLike,
    axis: Axis,
    name: str,
    option: ArrayLike,
    least: int,
    rule: Rule,
    axis_name: AxisName,
    *,
    highest: float = 1.0,
    searches: bool = False,
) -> Array:
    """Keeps what a rule keeps, and in any case the entries of the `least` largest keys.

    A slice whose option is not in [0, highest] becomes NaN.
    """
    problem = prepare(logits, axis=axis, axis_name=axis_name)
    slices = problem.slices
    x = jax.lax.stop_gradient(problem.logits)
    row = jax.lax.stop_gradient(per_slice(option, x, problem.axes, name=name))

    def keep(slices: AlongAxes, x: Array, row: Array) -> Array:
        kept, keys = rule(slices, x, row)
        if least == 1:
            return kept | (keys == slices.broadcast(slices.max(keys)))
        keys = ordered(keys)
        threshold = largest_threshold(slices, keys, None, jnp.array(least))
        return kept | (keys >= slices.broadcast(threshold))

    keep = blocked_over_slices(keep) if searches or least > 1 else keep
    known = slices.broadcast((row >= 0) & (row <= highest))
    return _drop(problem.logits.astype(problem.dtype), keep(slices, x, row), known)


@jax.custom_jvp
def _drop(logits: Array, kept: Array, known: Array) -> Array:
    """The kept logits, and -inf elsewhere. NaN where an option out of range tells not which."""
    kept = jnp.where(known, kept, logits != -jnp.inf)
    return jnp.where(kept, jnp.where(known, logits, jnp.nan), -jnp.inf)


@_drop.defjvp
def _drop_jvp(primals: tuple[Array, Array, Array], tangents: Any) -> tuple[Array, Array]:
    # A rule to save memory: the result shows which entries are kept, so no mask is stored.
    filtered = _drop(*primals)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pass_through(filtered: Array, logits_dot: Array) -> Array:
        return jnp.where(filtered == -jnp.inf, 0, logits_dot)

    return filtered, pass_through(filtered, tangents[0])
