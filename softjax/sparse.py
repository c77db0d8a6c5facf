"""Sparse maps: from logits to probabilities of which many are exactly zero.

All are threshold maps, p = f(z / T - tau). `entmax` bends from softmax (alpha = 1) over
`entmax15` to `sparsemax` (alpha = 2); `soft_top_k` spreads k units of weight, at most one an
entry. Dropped entries (masked by `where`, or equal to -inf) have weight, and derivative,
exactly zero; a slice that keeps nothing is all zeros; a kept NaN makes its slice NaN.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._exact import centre, centre_at, expm1_over, expm1_over_twice, log1p_over
from softjax._inputs import NONNEGATIVE, Axis, per_slice, prepare, public, resolve_axes
from softjax._search import bracketed_newton, climb, largest_threshold
from softjax._slices import AlongAxes, Slices
from softjax._threshold import Family, Solution, reciprocal, solve

__all__ = ["entmax", "entmax15", "soft_top_k", "sparsemax"]


@public("axis", temperature=NONNEGATIVE)
def sparsemax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    slices = AlongAxes(problem.axes)
    solution = solve(SPARSEMAX, slices, problem.logits, problem.temperature)
    return solution.probs.astype(problem.dtype)


def _solve_sparsemax(slices: Slices, logits: Array, temperature: Array | None, *_: None):
    peak = slices.max(logits)
    scores = centre(logits, peak, temperature, slices.spread)
    spread = slices.spread

    def step(tau: Array) -> tuple[Array, Array]:
        above = jnp.maximum(scores.values - spread(tau), 0)
        return slices.sum(above) - 1, slices.sum(jnp.sign(above))

    tau = climb(step, jnp.where(jnp.isnan(peak), jnp.nan, -1))
    margins = (scores.values - spread(tau)) + scores.errors
    inside = margins > 0
    excess = slices.sum(jnp.where(inside, margins, 0)) - 1
    count = slices.sum(inside.astype(logits.dtype))
    shift = jnp.where(peak == -jnp.inf, 0, excess / jnp.maximum(count, 1))
    margins -= spread(shift)
    probs = jnp.where(margins < 0, 0, margins)
    return Solution(probs, margins, tau + shift)


SPARSEMAX = Family(_solve_sparsemax, slope=lambda probs, _: (probs > 0).astype(probs.dtype))


@public("axis", temperature=NONNEGATIVE)
def entmax15(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    slices = AlongAxes(problem.axes)
    solution = solve(ENTMAX15, slices, problem.logits, problem.temperature)
    return solution.probs.astype(problem.dtype)


def _solve_entmax15(slices: Slices, logits: Array, temperature: Array | None, *_: None):
    peak = slices.max(logits)
    scores = centre(logits, peak, temperature, slices.spread)
    halves, spread = scores.values / 2, slices.spread

    def step(tau: Array) -> tuple[Array, Array]:
        above = jnp.maximum(halves - spread(tau), 0)
        return slices.sum(above * above) - 1, 2 * slices.sum(above)

    tau = climb(step, jnp.where(jnp.isnan(peak), jnp.nan, -1))
    roots = (halves - spread(tau)) + scores.errors / 2
    inside = roots > 0
    kept = jnp.where(inside, roots, 0)
    # On a known support the sum of squares is quadratic in tau, and is solved at once.
    excess, first = slices.sum(kept * kept) - 1, slices.sum(kept)
    count = slices.sum(inside.astype(logits.dtype))
    bent = jnp.sqrt(jnp.maximum(first * first - count * excess, 0))
    shift = excess / jnp.where(peak == -jnp.inf, 1, first + bent)
    roots -= spread(shift)
    probs = jnp.where(roots < 0, 0, roots * roots)
    return Solution(probs, 2 * roots, 2 * (tau + shift))


def _root(probs: Array, _: None) -> Array:
    positive = probs > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, probs, 1)), 0)


ENTMAX15 = Family(_solve_entmax15, slope=_root)


@public("axis", temperature=NONNEGATIVE, alpha=(1, math.inf))
def entmax(
    logits: ArrayLike,
    alpha: ArrayLike = 1.5,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    alpha = per_slice(alpha, problem.logits, problem.axes, name="alpha")
    slices = AlongAxes(problem.axes)
    solution = solve(ENTMAX, slices, problem.logits, problem.temperature, alpha)
    return solution.probs.astype(problem.dtype)


def _solve_entmax(
    slices: Slices, logits: Array, temperature: Array | None, alpha: Array, *_: None
) -> Solution:
    # With b = alpha - 1 and c = exp(b rise), the weights relative to the peak's are
    # r_i = (1 + b c s_i)_+^(1/b), exp(s_i) at b = 0, and they are consistent where
    # log(sum r) = rise. That has slope -sum(r^(1-b)) / sum(r) <= -1 in the rise, and
    # p = r / sum(r) is accurate for every alpha.
    peak = slices.max(logits)
    scores = centre(logits, peak, temperature, slices.spread)
    spread = slices.spread
    bend = jnp.where(alpha >= 1, alpha - 1, jnp.nan)

    def log_ratios(rise: Array) -> tuple[Array, Array]:
        scaled = scores.near * spread(jnp.exp(bend * rise))
        reach = spread(bend) * scaled
        inside = ~(scores.dead | (reach <= -1))
        return jnp.where(inside, scaled * log1p_over(jnp.where(inside, reach, 0)), 0), inside

    def step(rise: Array) -> tuple[Array, Array]:
        logs, inside = log_ratios(rise)
        total = slices.sum(jnp.where(inside, jnp.exp(logs), 0))
        slope = slices.sum(jnp.where(inside, jnp.exp((1 - spread(bend)) * logs), 0))
        total = jnp.where(total == 0, 1, total)
        return jnp.log(total) - rise, slope / total

    low = jnp.zeros_like(peak)
    high = jnp.log(jnp.maximum(slices.sum((~scores.dead).astype(logits.dtype)), 1))
    rise = bracketed_newton(step, low, high, low)
    logs, inside = log_ratios(rise)
    stretch = spread(jnp.exp(bend * rise))
    ratios = jnp.where(inside, jnp.exp(logs), 0)
    slopes = jnp.where(inside, jnp.exp((1 - spread(bend)) * logs), 0)
    ratios = jnp.maximum(ratios + slopes * stretch * scores.errors, 0)
    total = slices.sum(ratios)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    probs = ratios / spread(total)
    threshold = rise * expm1_over(-bend * rise)  # (1 - exp(-b rise)) / b
    margins = jnp.where(scores.dead, -jnp.inf, scores.values - spread(threshold))
    return Solution(probs, margins, threshold)


def _entmax_slope(probs: Array, alpha: Array) -> Array:
    """p^(2 - alpha) on the support."""
    positive = probs > 0
    return jnp.where(positive, jnp.where(positive, probs, 1) ** (2 - alpha), 0)


def _entmax_bend(probs: Array, alpha: Array) -> Array:
    """df/dalpha = -p (ln p)^2 phi((1 - alpha) ln p), phi(v) = (e^v - 1 - v) / v^2."""
    positive = probs > 0
    logs = jnp.log(jnp.where(positive, probs, 1))
    return -probs * logs * logs * expm1_over_twice((1 - alpha) * logs)


ENTMAX = Family(_solve_entmax, slope=_entmax_slope, bend=_entmax_bend)


def _refuse_large_k(given: dict[str, Any]) -> None:
    k, shape = given.get("k"), jnp.shape(given.get("logits"))
    size = math.prod(shape[i] for i in resolve_axes(given.get("axis", -1), len(shape)))
    if isinstance(k, (int, float)) and k > size:
        raise ValueError(f"`k` must be at most the size of a slice, {size}, got {k}.")


@public("kind", "axis", temperature=NONNEGATIVE, k=NONNEGATIVE, refuse=_refuse_large_k)
def soft_top_k(
    logits: ArrayLike,
    k: ArrayLike,
    *,
    kind: Literal["capped", "sigmoid", "laplace"] = "capped",
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    if kind not in _TOP_K:
        raise ValueError(f"`kind` must be one of {', '.join(_TOP_K)}, got {kind!r}.")
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    budget = per_slice(k, problem.logits, problem.axes, name="k")
    slices = AlongAxes(problem.axes)
    family = _TOP_K[kind]
    solution = solve(family, slices, problem.logits, problem.temperature, None, budget)
    return solution.probs.astype(problem.dtype)


def _budget_family(squash, slope, quantile) -> Family:
    """The family of an f that rises from 0 to 1, by its derivative f'(p) and its inverse."""

    def solve_budget(slices, logits, temperature, _, budget, *__):
        spread = slices.spread
        kept = logits != -jnp.inf
        num_kept = slices.sum(kept.astype(logits.dtype))
        usual = (budget > 0) & (budget < num_kept)
        # Scores are taken from the ceil(k)-th largest, close to which tau lies, so that
        # neither an offset nor an outlier costs digits there.
        share = jnp.where(usual, budget / jnp.maximum(num_kept, 1), 0.5)
        anchor = largest_threshold(logits, None, jnp.ceil(jnp.where(usual, budget, 1)), slices)
        near, errors = centre_at(logits, anchor, temperature, spread)
        highest = slices.max(jnp.where(kept, near, -jnp.inf))
        lowest = -slices.max(jnp.where(kept, -near, -jnp.inf))

        def step(tau: Array) -> tuple[Array, Array]:
            probs = jnp.where(kept, squash(near - spread(tau)), 0)
            return slices.sum(probs) - budget, slices.sum(slope(probs, None))

        level = quantile(share)
        low, high = lowest - level, highest - level
        low, high = (jnp.where(usual, bound, 0) for bound in (low, high))
        tau = bracketed_newton(step, low, high, jnp.clip(0, low, high))
        margins = (near - spread(tau)) + errors
        probs = jnp.where(kept, squash(margins), 0)
        slopes = slope(probs, None)
        shift = (slices.sum(probs) - budget) * reciprocal(slices.sum(slopes))
        margins = jnp.where(kept, margins - spread(shift), -jnp.inf)
        limit = jnp.where(budget == num_kept, 1, jnp.where(budget == 0, 0, jnp.nan))
        probs = jnp.where(spread(usual), squash(margins), spread(limit.astype(probs.dtype)))
        probs = jnp.where(kept, probs, 0)
        return Solution(probs, margins, tau + shift)

    return Family(solve_budget, slope=slope)


def _laplace(t: Array) -> Array:
    half = jnp.exp(-jnp.abs(t)) / 2
    return jnp.where(t < 0, half, 1 - half)


def _laplace_quantile(p: Array) -> Array:
    return jnp.where(p < 0.5, jnp.log(2 * p), -jnp.log(2 * (1 - p)))


_TOP_K = {
    "capped": _budget_family(
        lambda t: jnp.clip(t, 0, 1),
        lambda p, _: ((p > 0) & (p < 1)).astype(p.dtype),
        lambda share: share,
    ),
    "sigmoid": _budget_family(
        jax.nn.sigmoid, lambda p, _: p * (1 - p), lambda share: jnp.log(share / (1 - share))
    ),
    "laplace": _budget_family(_laplace, lambda p, _: jnp.minimum(p, 1 - p), _laplace_quantile),
}
