"""What a threshold map misses at a label: one value and one derivative rule for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax._elementary import expm1_over
from softjax._slices import AlongAxes
from softjax._threshold import Family, solve
from softjax.entropies import pick


class Found(NamedTuple):
    """A loss, and what its derivatives are made of; with the axis kept but for the loss."""

    loss: Array
    others: Array  # p_j, one an entry, and 0 at the label
    rest: Array  # their sum 1 - p_y
    surprise: Array  # -log p_y, and 0 where p_y is 0


class Regret(NamedTuple):
    """A Fenchel-Young loss (static): its map, and its value from what the map found."""

    family: Family
    value: Callable[..., Found]  # of (solution, logits, labels, axis, alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def regret(kind: Regret, axis: int, logits: Array, labels: Array, alpha: Array) -> Array:
    solution = solve(kind.family, AlongAxes((axis,)), logits, alpha=alpha)
    return kind.value(solution, logits, labels, axis, alpha).loss


@regret.defjvp
def _regret_jvp(kind: Regret, axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # By the envelope theorem p need not be differentiated: the tangent is <p - e_y, z'>, and in
    # alpha that of the entropy at a fixed p. Where the label leads p is as exact as the loss.
    logits, labels, alpha = primals
    logits_dot, _, alpha_dot = tangents
    solution = solve(kind.family, AlongAxes((axis,)), logits, alpha=alpha)
    found = kind.value(solution, logits, labels, axis, alpha)
    # (The loss of a dropped label is infinite, and constant.)
    kept = pick(logits, labels, axis) != -jnp.inf

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pair(others: Array, rest: Array, logits_dot: Array) -> Array:
        slope = jnp.where(hit_by(others, labels, axis), -rest, others)
        slope = jnp.where(jnp.expand_dims(kept, axis), slope, 0)
        terms = jnp.where(slope != 0, slope * logits_dot, 0)
        return jnp.squeeze(AlongAxes((axis,)).sum(terms), axis)

    loss_dot = pair(found.others, found.rest, logits_dot)
    entropy = functools.partial(_tsallis, found.others, found.surprise, axis=axis)
    entropy_dot = jax.jvp(entropy, (alpha,), (alpha_dot,))[1]
    return found.loss, loss_dot + jnp.where(kept, entropy_dot, 0)


def hit_by(x: Array, labels: Array, axis: int) -> Array:
    """Which entries the labels name; fused into what reads it, never an array."""
    places = jax.lax.broadcasted_iota(labels.dtype, x.shape, axis)
    return places == jnp.expand_dims(labels, axis)


def _tsallis(others: Array, surprise: Array, alpha: Array, *, axis: int) -> Array:
    """sum(p - p^alpha) / (alpha (alpha - 1)), by the slice, and Shannon's entropy at 1."""
    logs = jnp.log(jnp.where(others > 0, others, 1))
    terms = -others * logs * expm1_over((alpha - 1) * logs)
    own = jnp.exp(-surprise) * surprise * expm1_over((1 - alpha) * surprise)
    return jnp.squeeze((AlongAxes((axis,)).sum(terms) + own) / alpha, axis)
