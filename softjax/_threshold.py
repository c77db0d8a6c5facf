"""Threshold maps: p = f(s - tau), where tau(s) makes the weights of a slice sum to k.

Softmax, entmax, the capped simplex and their kin differ in f alone. A `Family` says what f
is: how its threshold is found, and its slope w = f' in terms of the weights themselves. The
derivative is the same for all. With q = w / sum(w):

    tau' = <q, s'>,   (s - tau)' = s' - tau',   p' = w (s' - tau'),

and terms alike for the entropic index, the budget k and a sink. It is linear in the
tangents, so that its transpose is the VJP; differentiated again it gives the second order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from softjax._blocks import by_one_thread
from softjax._elementary import exp_of_sum
from softjax._inputs import Problem
from softjax._scores import FAR
from softjax._slices import AlongAxes, Slices


class Solution(NamedTuple):
    """What a threshold map finds for scores s = (logits - peak) / temperature."""

    probs: Array  # f(s - tau), one an entry
    margins: Array  # s - tau, one an entry; -inf where dropped
    threshold: Array  # tau, one a slice
    lost: Any = None  # what rounding took from tau
    complement: Array | None = None  # 1 - q of the peak, where the subtraction would cancel
    leak: Array | None = None  # the weight of the sink, one a slice


class Family(NamedTuple):
    """A threshold map (static): what follows is all that differs between two of them."""

    solve: Callable[..., Solution]  # of (slices, logits, temperature, index, budget, sink)
    slope: Callable[..., Array] | None = None  # f' from (probs, index); None if f' = f
    bend: Callable[..., Array] | None = None  # df/dindex at a fixed margin, likewise
    is_even: bool = False  # whether f' is 0 or 1


def weigh(
    family: Family, problem: Problem, index: Array | None = None, budget: Array | None = None
) -> Array:
    """The weights of a problem along axes, in the dtype of its result."""
    slices, temperature = AlongAxes(problem.axes), problem.temperature
    solution = solve(family, slices, problem.logits, temperature, index, budget)
    return solution.probs.astype(problem.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(
    family: Family,
    slices: Slices,
    logits: Array,
    temperature: Array | None = None,
    index: Array | None = None,
    budget: Array | None = None,
    sink: Array | None = None,
) -> Solution:
    """Finds the threshold. Each argument after `logits` is one number a slice, or None."""
    return _traced_once(family, slices, logits, temperature, index, budget, sink)


@functools.partial(jax.jit, static_argnums=0)
def _traced_once(family: Family, *args: Any) -> Solution:
    # A derivative needs the value's trace again: this one is remembered.
    return family.solve(*args)


def _solve_jvp(family: Family, primals: Any, tangents: Any) -> tuple[Solution, Solution]:
    # One rule for every map; see the module. It exists because the search for tau must not
    # be differentiated, a dropped entry must have derivative 0 whatever stands there, and
    # one array is enough to remember: each tangent is checkpointed upon its own output.
    slices, _, temperature, index, _, _ = primals
    solution = solve(family, *primals)
    probs, margins, _, lost, complement, leak = solution
    dots = tuple(None if isinstance(dot, SymbolicZero) else dot for dot in tangents[1:])
    rows = (temperature, index, complement, leak)
    remember = functools.partial(jax.checkpoint, prevent_cse=False)

    @remember
    def from_probs(
        slices: Slices, probs: Array, margins: Any, rows: Any, dots: Any
    ) -> Solution:
        return _tangents(family, slices, probs, probs != 0, margins, True, rows, dots)

    @remember
    def from_margins(
        slices: Slices, probs: Any, margins: Array, rows: Any, dots: Any
    ) -> Solution:
        exact = probs is not None
        if not exact:
            # (In this order: XLA's CPU backend lets a NaN through as the second operand.)
            weigh = lambda margins: exp_of_sum(jnp.maximum(-FAR, margins))
            probs = by_one_thread(weigh, slices, margins)
        live = margins != -jnp.inf
        return _tangents(family, slices, probs, live, margins, exact, rows, dots)

    heated = None if dots[1] is None else margins
    moved = from_probs(slices, probs, heated, rows, dots)
    shape = None if family.slope is None else probs
    margins_dot = from_margins(slices, shape, margins, rows, dots).margins
    still = lambda row: None if row is None else jnp.zeros_like(row)
    moved = moved._replace(lost=still(lost), complement=still(complement))
    return solution, moved._replace(margins=margins_dot)


solve.defjvp(_solve_jvp, symbolic_zeros=True)


def _tangents(
    family: Family,
    slices: Slices,
    probs: Array,
    live: Array,
    margins: Any,
    exact: bool,
    rows: tuple[Any, ...],
    dots: tuple[Any, ...],
) -> Solution:
    """The rule, for tangents `dots` of which those that are None vanish.

    `exact` says that the probabilities are not exponentials of rounded margins.
    """
    temperature, index, complement, leak = rows
    logits_dot, temperature_dot, index_dot, budget_dot, sink_dot = dots
    spread = slices.broadcast
    rate = None if temperature is None else reciprocal(temperature)
    per_mass: Any = 1.0
    if family.slope is None:
        slopes = q = probs
    else:
        slopes = family.slope(probs, index)
        per_mass = reciprocal(slices.sum(slopes))
        q = slopes * spread(per_mass)

    scores_dot = jnp.zeros_like(probs)
    if logits_dot is not None:
        scores_dot = logits_dot if rate is None else logits_dot * spread(rate)
    if temperature_dot is not None:
        # s' = -s T'/T; a shift of s is free, so the margins stand for the scores.
        scores_dot -= jnp.where(live, margins, 0) * spread(temperature_dot * rate)
    unmasked, scores_dot = scores_dot, jnp.where(live, scores_dot, 0)
    sink_score_dot: Any = None
    if leak is not None:
        sink_score_dot = jnp.zeros_like(leak)
        if sink_dot is not None:
            sink_score_dot += sink_dot if rate is None else sink_dot * rate
        if temperature_dot is not None:
            sink_margin = jnp.log(jnp.where(leak > 0, leak, 1))
            sink_score_dot -= sink_margin * temperature_dot * rate
        sink_score_dot = jnp.where(leak > 0, sink_score_dot, 0)

    # In two steps, as in `_project`. If q has the rounding of margins, 1 - q comes from its own
    # sum; even shares need one step. (Selects by slice keep XLA's CPU backend from making one
    # slow kernel of all this.)
    poisoned = None if complement is None else jnp.isnan(complement)
    pulled = q * scores_dot
    mean = jnp.zeros_like(per_mass) if family.is_even else slices.sum(pulled)
    if leak is not None:
        mean += leak * sink_score_dot
    mean = _poison(mean, poisoned)
    moved = scores_dot - spread(mean)
    step = slices.sum(slopes * moved) * per_mass
    if leak is not None:
        step += leak * (sink_score_dot - mean)
    bend_dot, pressed = None, jnp.zeros_like(step)
    if index_dot is not None and family.bend is not None:
        bend_dot = family.bend(probs, index) * spread(index_dot)
        pressed += slices.sum(bend_dot) * per_mass
    if budget_dot is not None:
        pressed -= budget_dot * per_mass
    step = _poison(step + pressed, poisoned)

    if leak is None:
        weighing = (slices, slopes, per_mass, poisoned)
        projected = functools.partial(_projected, family.is_even, *weighing)
        probs_dot = _project(projected, slopes, unmasked)
    else:
        probs_dot = jnp.where(live, slopes * (moved - spread(step)), 0)
    if bend_dot is not None or budget_dot is not None:
        rest_dot = -slopes * spread(pressed)
        probs_dot += jnp.where(live, rest_dot if bend_dot is None else rest_dot + bend_dot, 0)
    margins_dot = moved - spread(step)
    if complement is not None and not exact:
        rest = _one_minus(q, spread(complement))
        margins_dot = rest * scores_dot - (spread(mean) - pulled)
    # For the transpose: the cotangent of a dropped entry, NaN perhaps, ends here.
    margins_dot = jnp.where(live, margins_dot, 0)
    leak_dot = None if leak is None else leak * (sink_score_dot - mean - step)

    return Solution(probs_dot, margins_dot, mean + step, leak=leak_dot)


def _poison(row: Array, poisoned: Array | None) -> Array:
    return row if poisoned is None else jnp.where(poisoned, jnp.nan, row)


def _project(projected: Callable[[Array], Array], slopes: Array, v: Array) -> Array:
    """Computes w (v - <q, v>), by which the weights move along scores that move by v.

    It is its own transpose, so that both form their terms in the sums and write none out.
    """
    # Up to a shift it solves x / w = v, by which JAX knows its derivative in w. (As x / w0 over
    # w / w0, which is 1: the square of a small w would be 0.)
    still = lax.stop_gradient(slopes)
    inverse = jnp.where(still != 0, 1 / jnp.where(still != 0, still, 1), 0)
    ratio = 1 + (slopes - still) * inverse
    solve = lambda _, v: projected(v)
    return lax.custom_linear_solve(lambda x: x * inverse / ratio, v, solve, symmetric=True)


@functools.partial(jax.jit, static_argnums=0)
def _projected(
    is_even: bool,
    slices: Slices,
    slopes: Array,
    per_mass: Any,
    poisoned: Array | None,
    v: Array,
) -> Array:
    # In two steps, as a shift of v is free: where q is nearly 1 and nearly nothing is left, the
    # second finds what the first rounded away. What v holds where w is 0 goes no further.
    def pull(w: Array, v: Array, *means: Array) -> Array:
        return jnp.where(w != 0, w * functools.reduce(jnp.subtract, means, v), 0)

    def mean(*means: Array) -> Array:
        total = slices.sum_of(pull, (slopes, v), *means, least=None)
        return _poison(total * per_mass, poisoned)

    first = mean()
    means = (first,) if is_even else (first, mean(first))
    return pull(slopes, v, *map(slices.broadcast, means))


@jax.custom_jvp
def _one_minus(q: Array, complement: Array) -> Array:
    """1 - q, read from `complement` where the subtraction would cancel."""
    return jnp.where(q > 0.5, complement, 1 - q)


@_one_minus.defjvp
def _one_minus_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # The complement is the same number, not another variable.
    return _one_minus(*primals), -tangents[0]


def reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0, subnormal or infinite: no derivative goes that way."""
    usable = (jnp.abs(x) >= jnp.finfo(x.dtype).tiny) & jnp.isfinite(x)
    return jnp.where(usable, 1 / jnp.where(usable, x, 1), 0)
