"""Maps to a budget: k units of weight over the entries, at most one unit on each.

Threshold maps like the others, p = f(z / T - tau), with an f that rises from 0 to 1. Dropped
entries (masked by `where`, or equal to -inf) have weight, and derivative, exactly zero; a slice
with a kept NaN, or with fewer entries than the budget, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._cpu import blocked_over_slices
from softjax._inputs import Axis, per_slice, prepare, resolve_axes
from softjax._mesh import AxisName
from softjax._rootfinding import bracketed_newton, from_ordered, largest_threshold, ordered
from softjax._scores import centre_at
from softjax._slices import AlongAxes
from softjax._threshold import Family, Solution, probs_of, reciprocal

__all__ = ["soft_top_k"]


def _refuse_large_k(given: dict[str, Any]) -> None:
    if given.get("axis_name") is not None:
        return  # This device holds only a part of the slice.
    k, shape = given.get("k"), np.shape(given.get("logits", 0))
    size = math.prod(shape[i] for i in resolve_axes(given.get("axis", -1), len(shape)))
    if isinstance(k, (int, float)) and k > size:
        raise ValueError(f"`k` must be at most the size of a slice, {size}, got {k}.")


@api(
    "kind",
    "axis",
    "axis_name",
    spread=("logits", "where"),
    temperature=NONNEGATIVE,
    k=NONNEGATIVE,
    refuse=_refuse_large_k,
)
def soft_top_k(
    logits: ArrayLike,
    k: ArrayLike,
    *,
    kind: Literal["capped", "sigmoid", "laplace"] = "capped",
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""Spreads k units of weight over the entries, at most one on each.

    .. math:: p_i = f(z_i / T - \tau), \qquad \sum_i p_i = k

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        k: total weight, in [0, number kept], real, one number or one per slice; differentiable.
            Outside of that range the slice is NaN; a slice that keeps nothing is all 0.
        kind: the f that rises from 0 to 1: "capped" clips to [0, 1], the projection onto the
            capped simplex, sparse at both ends; "sigmoid"; or "laplace", the distribution
            function of Laplace's law.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T in [0, inf], as in `softmax`; differentiable. At 0 the k largest
            entries have weight 1, and ties for the last place share it.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Weights in [0, 1], `[*shape]`, in the dtype of `logits`.

    Raises:
        TypeError: as `softmax`.
        ValueError: as `softmax`; also if `kind` is unknown, or `k` a Python number that is
            negative or larger than a slice.

    Example:
        >>> print(soft_top_k(jnp.array([2.0, 1.0, 0.0, 0.5]), 2))
        [1.   0.75 0.   0.25]

    Note:
        Nothing is sorted. Bisection of bit patterns finds the ceil(k)-th largest entry, and
        Newton's method in a bracket finds tau, which lies close to it. Both modes, any order.

    Reference:
        Lou et al. (2024), Sparser is faster and less is more (SparseK), for "capped";
        Struski et al. (2025), LapSum, for "laplace".
    """
    if kind not in _TOP_K:
        raise ValueError(f"`kind` must be one of {', '.join(_TOP_K)}, got {kind!r}.")
    problem = prepare(
        logits, axis=axis, where=where, temperature=temperature, axis_name=axis_name
    )
    budget = per_slice(k, problem.logits, problem.axes, name="k")
    return probs_of(_TOP_K[kind], problem, k=budget)


def _budget_family(
    squash: Callable[[Array], Array],
    slope: Callable[[Array, None], Array],
    quantile: Callable[[Array], Array],
    *,
    is_even: bool = False,
) -> Family:
    """The family of an f that rises from 0 to 1, by its derivative f'(p) and its inverse."""

    @blocked_over_slices
    def solve_budget(
        slices: AlongAxes,
        logits: Array,
        temperature: Array | None,
        _: None,
        budget: Array,
        *__: None,
    ) -> Solution:
        broadcast = slices.broadcast
        kept = logits != -jnp.inf
        unknown = slices.sum(jnp.isnan(logits).astype(logits.dtype)) > 0
        if temperature is not None:
            unknown |= ~(temperature >= 0)
        budget = jnp.where(unknown, jnp.nan, budget)
        num_kept = slices.sum(kept.astype(logits.dtype))
        usual = (budget > 0) & (budget < num_kept)
        # Scores are taken from the ceil(k)-th largest, close to which tau lies, so that
        # neither an offset nor an outlier costs digits there.
        share = jnp.where(usual, budget / jnp.maximum(num_kept, 1), 0.5)
        count = jnp.ceil(jnp.where(usual, budget, 1))
        threshold = largest_threshold(slices, ordered(logits), None, count)
        anchor = from_ordered(threshold, logits.dtype)
        near, errors = centre_at(logits, anchor, temperature)
        highest = slices.max(jnp.where(kept, near, -jnp.inf))
        lowest = -slices.max(jnp.where(kept, -near, -jnp.inf))

        def step(tau: Array) -> tuple[Array, Array]:
            probs = jnp.where(kept, squash(near - broadcast(tau)), 0)
            return slices.sum(probs) - budget, slices.sum(slope(probs, None))

        level = quantile(share)
        low, high = lowest - level, highest - level
        low, high = (jnp.where(usual, bound, 0) for bound in (low, high))
        tau = bracketed_newton(step, low, high, jnp.clip(0, low, high))
        margins = (near - broadcast(tau)) + errors
        probs = jnp.where(kept, squash(margins), 0)
        slopes = slope(probs, None)
        shift = (slices.sum(probs) - budget) * reciprocal(slices.sum(slopes))
        margins = jnp.where(kept, margins - broadcast(shift), -jnp.inf)
        limit = jnp.where(budget == num_kept, 1, jnp.where(budget == 0, 0, jnp.nan))
        probs = jnp.where(
            broadcast(usual), squash(margins), broadcast(limit.astype(probs.dtype))
        )
        probs = jnp.where(kept, probs, 0)
        return Solution(probs, margins, tau + shift)

    return Family(solve_budget, slope=slope, is_even=is_even)


def _capped(t: Array) -> Array:
    return jnp.clip(t, 0, 1)


def _capped_slope(probs: Array, _: None) -> Array:
    return ((probs > 0) & (probs < 1)).astype(probs.dtype)


def _laplace(t: Array) -> Array:
    half = jnp.exp(-jnp.abs(t)) / 2
    return jnp.where(t < 0, half, 1 - half)


def _laplace_quantile(p: Array) -> Array:
    return jnp.where(p < 0.5, jnp.log(2 * p), -jnp.log(2 * (1 - p)))


_TOP_K = {
    "capped": _budget_family(_capped, _capped_slope, lambda share: share, is_even=True),
    "sigmoid": _budget_family(
        jax.nn.sigmoid, lambda p, _: p * (1 - p), lambda share: jnp.log(share / (1 - share))
    ),
    "laplace": _budget_family(_laplace, lambda p, _: jnp.minimum(p, 1 - p), _laplace_quantile),
}
