"""What a threshold map misses at a label: one value and one derivative rule for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax._exact import expm1_over
from softjax._slices import AlongAxes
from softjax._threshold import Family, solve
from softjax.entropies import pick


class Regret(NamedTuple):
    """A Fenchel-Young loss (static): its map, and its value from what the map found."""

    family: Family
    value: Callable[..., Array]  # of (solution, logits, labels, axis, alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def regret(kind: Regret, axis: int, logits: Array, labels: Array, alpha: Array) -> Array:
    solution = solve(kind.family, AlongAxes((axis,)), logits, index=alpha)
    return kind.value(solution, logits, labels, axis, alpha)


@regret.defjvp
def _regret_jvp(kind: Regret, axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # By the envelope theorem p need not be differentiated: the tangent is <p - e_y, z'>, and in
    # alpha that of the entropy at a fixed p. 1 - p_y is not computed by that subtraction.
    logits, labels, alpha = primals
    logits_dot, _, alpha_dot = tangents
    solution = solve(kind.family, AlongAxes((axis,)), logits, index=alpha)
    loss = kind.value(solution, logits, labels, axis, alpha)
    # (The loss of a dropped label is infinite, and constant.)
    kept = pick(logits, labels, axis) != -jnp.inf
    by_row = functools.partial(jnp.expand_dims, axis=axis)
    others = jnp.where(hit_by(solution.probs, labels, axis), 0, solution.probs)
    missing = jnp.where(kept, jnp.squeeze(AlongAxes((axis,)).sum(others), axis), 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pair(probs: Array, missing: Array, logits_dot: Array) -> Array:
        hit = hit_by(probs, labels, axis)
        slope = jnp.where(hit, -by_row(missing), jnp.where(by_row(kept), probs, 0))
        terms = jnp.where(slope != 0, slope * logits_dot, 0)
        return jnp.squeeze(AlongAxes((axis,)).sum(terms), axis)

    loss_dot = pair(solution.probs, missing, logits_dot)
    entropy = functools.partial(_tsallis, solution.probs, axis=axis)
    entropy_dot = jax.jvp(entropy, (alpha,), (alpha_dot,))[1]
    return loss, loss_dot + jnp.where(kept, entropy_dot, 0)


def hit_by(x: Array, labels: Array, axis: int) -> Array:
    """Which entries the labels name; fused into what reads it, never an array."""
    places = jax.lax.broadcasted_iota(labels.dtype, x.shape, axis)
    return places == jnp.expand_dims(labels, axis)


def _tsallis(probs: Array, alpha: Array, *, axis: int) -> Array:
    """sum(p - p^alpha) / (alpha (alpha - 1)), by the slice, and Shannon's entropy at 1."""
    some = probs > 0
    logs = jnp.log(jnp.where(some, probs, 1))
    terms = -probs * logs * expm1_over((alpha - 1) * logs)
    return jnp.squeeze(AlongAxes((axis,)).sum(terms) / alpha, axis)
