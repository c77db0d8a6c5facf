"""Threshold maps: p = f(s - tau), where tau(s) makes the weights of a slice sum to k.

Softmax, entmax, the capped simplex and their kin differ in f alone. A `Family` holds f: how
its threshold is found, and its slope w = f' in terms of the probabilities. The derivative rule
is the same for all. With q = w / sum(w):

    tau' = <q, s'>,   (s - tau)' = s' - tau',   p' = w (s' - tau'),

and similar terms for the entropic index, the sum k and a sink. The rule is linear in the
tangents, so its transpose is the VJP; differentiated again it gives the second order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax import _accelerators
from softjax._autodiff import nonzero
from softjax._inputs import Problem
from softjax._mesh import vary
from softjax._slices import AlongAxes, Slices


class Solution(NamedTuple):
    """The result of a threshold map for scores s = (logits - peak) / temperature."""

    probs: Array  # f(s - tau), one per entry
    margins: Any = None  # s - tau, one per entry; -inf where dropped
    threshold: Any = None  # tau, one per slice
    sink_prob: Array | None = None  # the weight of the sink, one per slice


class Family(NamedTuple):
    """A threshold map (static): everything in which two of them differ."""

    solve: Callable[..., Solution]  # (slices, logits, temperature, alpha, k, sink)
    slope: Callable[..., Array] | None = None  # f' from (probs, alpha); None if f' = f
    df_dalpha: Callable[..., Array] | None = None  # from (probs, alpha), at a fixed margin
    is_even: bool = False  # whether f' is 0 or 1


def probs_of(
    family: Family, problem: Problem, alpha: Array | None = None, k: Array | None = None
) -> Array:
    """The probabilities of a problem along axes, in the dtype of its result."""
    slices, temperature = problem.slices, problem.temperature
    solution = solve(family, slices, problem.logits, temperature, alpha, k)
    return solution.probs.astype(problem.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)  # A derivative reuses the trace of the value.
def solve(
    family: Family,
    slices: Slices,
    logits: Array,
    temperature: Array | None = None,
    alpha: Array | None = None,
    k: Array | None = None,
    sink: Array | None = None,
) -> Solution:
    """Finds the threshold. Each argument after `logits` is one number per slice, or None."""
    return family.solve(slices, logits, temperature, alpha, k, sink)


def _solve_jvp(family: Family, primals: Any, tangents: Any) -> tuple[Solution, Solution]:
    # A rule for three reasons: the search for tau must not be differentiated, a dropped entry
    # has derivative 0 whatever stands there, and it saves memory, because the tangents of the
    # probabilities and of the margins each recompute what they need from that one array.
    slices, _, temperature, alpha, _, _ = primals
    solution = solve(family, *primals)
    dots = nonzero(tangents[1:])
    per_slice = (temperature, alpha, solution.sink_prob)
    recompute = functools.partial(jax.checkpoint, prevent_cse=False)

    @recompute
    def from_probs(
        slices: Slices, probs: Array, margins: Any, per_slice: Any, dots: Any
    ) -> Solution:
        return _tangents(family, slices, probs, probs != 0, margins, per_slice, dots)

    @recompute
    def from_margins(
        slices: Slices, probs: Any, margins: Array, per_slice: Any, dots: Any
    ) -> Solution:
        probs = jnp.exp(margins) if probs is None else probs
        live = margins != -jnp.inf
        return _tangents(family, slices, probs, live, margins, per_slice, dots)

    by_temperature = None if dots[1] is None or family.slope is None else solution.margins
    moved = from_probs(slices, solution.probs, by_temperature, per_slice, dots)
    if solution.margins is None:
        return solution, Solution(moved.probs, sink_prob=moved.sink_prob)
    shape = None if family.slope is None else solution.probs
    margins_dot = from_margins(slices, shape, solution.margins, per_slice, dots).margins
    return solution, moved._replace(margins=margins_dot)


solve.defjvp(_solve_jvp, symbolic_zeros=True)


def _tangents(
    family: Family,
    slices: Slices,
    probs: Array,
    live: Array,
    margins: Any,
    per_slice: tuple[Any, ...],
    dots: tuple[Any, ...],
) -> Solution:
    """The rule, for tangents `dots`, where None stands for one that vanishes."""
    temperature, alpha, sink_prob = per_slice
    logits_dot, temperature_dot, alpha_dot, k_dot, sink_dot = dots
    broadcast = slices.broadcast
    rate = None if temperature is None else reciprocal(temperature)
    per_mass: Any = 1.0
    if family.slope is None:
        slopes = q = probs
    else:
        slopes = family.slope(probs, alpha)
        per_mass = reciprocal(slices.sum(slopes))
        q = slopes * broadcast(per_mass)

    scores_dot = jnp.zeros_like(probs)
    if logits_dot is not None:
        scores_dot = logits_dot if rate is None else logits_dot * broadcast(rate)
    if temperature_dot is not None:
        # s' = -s T'/T; the margins may stand for the scores, because a shift changes nothing.
        if margins is None:
            margins = jnp.log(jnp.where(live, probs, 1))
        scores_dot -= jnp.where(live, margins, 0) * broadcast(temperature_dot * rate)
    unmasked, scores_dot = scores_dot, jnp.where(live, scores_dot, 0)
    sink_score_dot: Any = None
    if sink_prob is not None:
        sink_score_dot = jnp.zeros_like(sink_prob)
        if sink_dot is not None:
            sink_score_dot += sink_dot if rate is None else sink_dot * rate
        if temperature_dot is not None:
            sink_margin = jnp.log(jnp.where(sink_prob > 0, sink_prob, 1))
            sink_score_dot -= sink_margin * temperature_dot * rate
        sink_score_dot = jnp.where(sink_prob > 0, sink_score_dot, 0)

    # Subtract the mean twice: the second pass removes the first's rounding error. Uniform
    # weights need one pass.
    pulled = q * scores_dot
    mean = jnp.zeros_like(per_mass) if family.is_even else slices.sum_of_tangents(pulled)
    if sink_prob is not None:
        mean += sink_prob * sink_score_dot
    moved = scores_dot - broadcast(mean)
    step = slices.sum_of_tangents(slopes * moved) * per_mass
    if sink_prob is not None:
        step += sink_prob * (sink_score_dot - mean)
    df, pressed = None, jnp.zeros_like(step)
    if alpha_dot is not None and family.df_dalpha is not None:
        df = family.df_dalpha(probs, alpha) * broadcast(alpha_dot)
        pressed += slices.sum_of_tangents(df) * per_mass
    if k_dot is not None:
        pressed -= k_dot * per_mass
    step += pressed

    if sink_prob is None:
        # `custom_linear_solve` makes all arrays that it closes over vary alike, and then traces
        # the function again. So these arrays must vary alike before the call.
        inverse = vary(per_mass, slopes)
        project = functools.partial(_projected, family.is_even, slices, slopes, inverse)
        probs_dot = _project(project, slopes, unmasked)
    else:
        probs_dot = jnp.where(live, slopes * (moved - broadcast(step)), 0)
    if df is not None or k_dot is not None:
        rest_dot = -slopes * broadcast(pressed)
        probs_dot += jnp.where(live, rest_dot if df is None else rest_dot + df, 0)
    margins_dot = moved - broadcast(step)
    if family.slope is None and margins is not None:
        # The margins of softmax: (1 - q) s' - (<q, s'> - q s') cancels nothing at a peak. Both
        # sums share one array, so that the transpose adds its cotangents before it scales them.
        missing = -jnp.expm1(jnp.where(live, margins, 0))
        margins_dot = missing * scores_dot - (broadcast(mean) - pulled)
    # Mask again so that a NaN cotangent of a dropped entry stops here in reverse mode.
    margins_dot = jnp.where(live, margins_dot, 0)
    sink_dot = None if sink_prob is None else sink_prob * (sink_score_dot - mean - step)
    return Solution(probs_dot, margins_dot, mean + step, sink_prob=sink_dot)


def _project(project: Callable[[Array], Array], slopes: Array, v: Array) -> Array:
    """Computes w (v - <q, v>), the motion of the weights along scores that move by v.

    It is its own transpose, so neither mode stores the terms of its sums.
    """
    # The projection solves x / w = v up to a shift, so `custom_linear_solve` can differentiate
    # it in w. The ratio w / w0 is 1; 1 / w^2 would overflow for a small w.
    still = lax.stop_gradient(slopes)
    inverse = jnp.where(still != 0, 1 / jnp.where(still != 0, still, 1), 0)
    ratio = 1 + (slopes - still) * inverse
    solve = lambda _, v: project(v)
    return lax.custom_linear_solve(lambda x: x * inverse / ratio, v, solve, symmetric=True)


def _projected(is_even: bool, slices: Slices, slopes: Array, per_mass: Any, v: Array) -> Array:
    def pull(w: Array, v: Array, *means: Array) -> Array:
        return w * functools.reduce(jnp.subtract, means, jnp.where(w != 0, v, 0))

    def less_means(num: int, first: Sequence[Array], w: Array, v: Array, scale: Any) -> Array:
        means = [*first]
        for _ in range(num):
            means.append(slices.sum_of(pull, (w, v), *means) * scale)
        return pull(w, v, *map(slices.broadcast, means))

    num, args = 1 if is_even else 2, (slopes, v, per_mass)
    if not isinstance(slices, AlongAxes) or slices.mesh_axes:
        return less_means(num, (), *args)
    # Subtract the mean twice, as in `_tangents`, but once where XLA cannot fuse the sums,
    # because each mean reads both arrays again. The error is then the weight times a few
    # roundings of the largest |v|.
    return _accelerators.by_platform(
        _accelerators.is_fused(v, slices.axes),
        *args,
        fused=lambda w, v, scale: less_means(
            num, [slices.zero(jnp.where(w != 0, v, 0))], w, v, scale
        ),
        separate=functools.partial(less_means, 1, ()),
    )


def reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0, subnormal or infinite: no derivative goes that way."""
    usable = (jnp.abs(x) >= jnp.finfo(x.dtype).tiny) & jnp.isfinite(x)
    return jnp.where(usable, 1 / jnp.where(usable, x, 1), 0)
