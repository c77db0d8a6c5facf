"""Score transforms: logits in, logits out, to compose before any map.

They cap, scale or bend scores, or drop entries by setting them to -inf. Filters keep the
original logits of what they keep; they find their threshold by a search over reductions, never
by sorting, and derivatives pass through what is kept. Dropped (-inf) entries stay dropped.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._exponential import SOFTMAX
from softjax._inputs import NONNEGATIVE, PROBABILITY, Axis, per_slice, prepare, public, to_float
from softjax._search import largest_threshold
from softjax._slices import AlongAxes
from softjax._threshold import solve

__all__ = [
    "min_p_filter",
    "scalable_scores",
    "sigsoftmax_scores",
    "soft_cap",
    "taylor_scores",
    "top_k_filter",
    "top_p_filter",
    "typical_filter",
]


@public(cap=NONNEGATIVE)
def soft_cap(logits: ArrayLike, cap: ArrayLike) -> Array:
    x, dtype = to_float(logits, name="logits")
    cap = per_slice(cap, x, (), name="cap")
    kept = x != -jnp.inf
    usable = (cap > 0) & (cap < jnp.inf)
    limit = jnp.where(usable, cap, 1)
    capped = limit * jnp.tanh(jnp.where(kept, x, 0) / limit)
    capped = jnp.where(
        usable, capped, jnp.where(cap == jnp.inf, x, jnp.where(cap == 0, 0, jnp.nan))
    )
    return jnp.where(kept, capped, -jnp.inf).astype(dtype)


@public("axis", k=NONNEGATIVE)
def top_k_filter(logits: ArrayLike, k: ArrayLike, *, axis: Axis = -1) -> Array:
    return _filter(logits, axis, lambda x, slices: (x, None, k), "k")


@public("axis", p=PROBABILITY)
def top_p_filter(logits: ArrayLike, p: ArrayLike, *, axis: Axis = -1) -> Array:
    return _filter(logits, axis, lambda x, slices: (x, solve(SOFTMAX, slices, x).probs, p), "p")


@public("axis", mass=PROBABILITY)
def typical_filter(logits: ArrayLike, mass: ArrayLike, *, axis: Axis = -1) -> Array:
    def by_surprise(x, slices):
        probs, log_probs, _, _, _ = solve(SOFTMAX, slices, x)
        safe = jnp.where(log_probs == -jnp.inf, 0, log_probs)
        entropy = -slices.sum(probs * safe)
        return jnp.where(x == -jnp.inf, -jnp.inf, -jnp.abs(entropy + safe)), probs, mass

    return _filter(logits, axis, by_surprise, "mass")


def _filter(logits, axis, rank, name) -> Array:
    """Keeps the entries of highest rank that together reach an amount."""
    problem = prepare(logits, axis=axis)
    x, slices = problem.logits, AlongAxes(problem.axes)
    keys, weights, amount = rank(jax.lax.stop_gradient(x), slices)
    amount = per_slice(amount, x, problem.axes, name=name)
    row = slices.max(x)
    amount = jnp.broadcast_to(jax.lax.stop_gradient(amount), row.shape)
    threshold = largest_threshold(keys, weights, amount, slices)
    kept = ~(keys < slices.spread(threshold))
    return jnp.where(kept, x, -jnp.inf).astype(problem.dtype)


@public("axis", min_p=PROBABILITY)
def min_p_filter(logits: ArrayLike, min_p: ArrayLike, *, axis: Axis = -1) -> Array:
    problem = prepare(logits, axis=axis)
    x, slices = problem.logits, AlongAxes(problem.axes)
    min_p = jax.lax.stop_gradient(per_slice(min_p, x, problem.axes, name="min_p"))
    peak = jax.lax.stop_gradient(slices.max(x))
    kept = ~(x - jnp.where(jnp.isfinite(peak), peak, 0) < jnp.log(min_p))
    return jnp.where(kept, x, -jnp.inf).astype(problem.dtype)


@public("axis")
def scalable_scores(
    logits: ArrayLike,
    scale: ArrayLike = 1.0,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    problem = prepare(logits, axis=axis, where=where)
    x, slices = problem.logits, AlongAxes(problem.axes)
    scale = per_slice(scale, x, problem.axes, name="scale")
    kept = x != -jnp.inf
    count = slices.sum(kept.astype(x.dtype))
    factor = scale * jnp.log(jnp.maximum(count, 1))
    return jnp.where(kept, jnp.where(kept, x, 0) * factor, -jnp.inf).astype(problem.dtype)


@public()
def sigsoftmax_scores(logits: ArrayLike) -> Array:
    x, dtype = to_float(logits, name="logits")
    kept = x != -jnp.inf
    scores = x + jax.nn.log_sigmoid(jnp.where(kept, x, 0))
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)


@public()
def taylor_scores(logits: ArrayLike) -> Array:
    x, dtype = to_float(logits, name="logits")
    kept = x != -jnp.inf
    x = jnp.where(kept, x, 0)
    return jnp.where(kept, jnp.log1p(x + x * x / 2), -jnp.inf).astype(dtype)
