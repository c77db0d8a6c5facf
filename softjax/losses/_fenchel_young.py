"""Fenchel-Young losses of threshold maps: one value and one derivative rule for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax._elementary import expm1_over
from softjax._slices import AlongAxes
from softjax._threshold import Family, solve


class LabelLoss(NamedTuple):
    """A loss, and the parts of its derivatives; all but the loss keep the axis."""

    loss: Array
    other_probs: Array  # p_j, one per entry, and 0 at the label
    one_minus_p: Array  # their sum 1 - p_y
    nll: Array  # -log p_y, and 0 where p_y is 0


class FenchelYoung(NamedTuple):
    """A Fenchel-Young loss (static): its map, and its value from the map's solution."""

    family: Family
    value: Callable[..., LabelLoss]  # takes (solution, logits, labels, slices, alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def fenchel_young(
    kind: FenchelYoung, slices: AlongAxes, logits: Array, labels: Array, alpha: Array
) -> Array:
    solution = solve(kind.family, slices, logits, alpha=alpha)
    return kind.value(solution, logits, labels, slices, alpha).loss


@fenchel_young.defjvp
def _fenchel_young_jvp(
    kind: FenchelYoung, slices: AlongAxes, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    # By the envelope theorem, p is not differentiated: the tangent is <p - e_y, z'>, plus
    # the entropy's derivative in alpha at a fixed p. Where the label leads, p is as exact as
    # the loss.
    (axis,) = slices.axes
    logits, labels, alpha = primals
    logits_dot, _, alpha_dot = tangents
    solution = solve(kind.family, slices, logits, alpha=alpha)
    found = kind.value(solution, logits, labels, slices, alpha)
    # The loss of a dropped label is infinite, and constant, unless the slice keeps a NaN.
    has_label = slices.pick(logits, labels) != -jnp.inf
    kept = has_label | jnp.isnan(found.loss)
    at_label = jnp.where(jnp.expand_dims(has_label, axis), -found.one_minus_p, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pair(other_probs: Array, at_label: Array, logits_dot: Array) -> Array:
        slope = jnp.where(is_label(slices, other_probs, labels), at_label, other_probs)
        slope = jnp.where(jnp.expand_dims(kept, axis), slope, 0)
        terms = jnp.where(slope != 0, slope * logits_dot, 0)
        return jnp.squeeze(slices.sum(terms), axis)

    loss_dot = pair(found.other_probs, at_label, logits_dot)
    entropy = functools.partial(_tsallis, slices, found.other_probs, found.nll)
    entropy_dot = jax.jvp(entropy, (alpha,), (alpha_dot,))[1]
    return found.loss, loss_dot + jnp.where(kept, entropy_dot, 0)


def is_label(slices: AlongAxes, x: Array, labels: Array) -> Array:
    """A mask of the entries that the labels name, which XLA fuses into its reader."""
    return slices.places(x, labels.dtype) == jnp.expand_dims(labels, slices.axes)


def _tsallis(slices: AlongAxes, other_probs: Array, nll: Array, alpha: Array) -> Array:
    """sum(p - p^alpha) / (alpha (alpha - 1)) per slice, and Shannon's entropy at 1."""
    logs = jnp.log(jnp.where(other_probs > 0, other_probs, 1))
    terms = -other_probs * logs * expm1_over((alpha - 1) * logs)
    label_term = jnp.exp(-nll) * nll * expm1_over((1 - alpha) * nll)
    return jnp.squeeze((slices.sum(terms) + label_term) / alpha, slices.axes)
