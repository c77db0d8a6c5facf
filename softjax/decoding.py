"""Penalties for decoding: scores that depend on what has been written already."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import POSITIVE, api
from softjax._inputs import (
    nan_unless_positive,
    per_slice,
    prepare,
    resolve_one_axis,
    to_integers,
)

__all__ = ["repetition_penalty"]


@api(penalty=POSITIVE)
def repetition_penalty(
    logits: ArrayLike,
    tokens: ArrayLike,
    penalty: ArrayLike = 1.0,
    *,
    presence: ArrayLike = 0.0,
    frequency: ArrayLike = 0.0,
) -> Array:
    r"""Lowers the logits of tokens that have been written already.

    .. math:: z_i' - a [c_i > 0] - b c_i, \qquad
        z_i' = \begin{cases} z_i / \theta & c_i > 0, z_i > 0 \\
        \theta z_i & c_i > 0, z_i \le 0 \\ z_i & c_i = 0 \end{cases}

    Here c counts how often each token has been written.

    Args:
        logits: scores z, `[*batch, V]`; differentiable. -inf stays -inf: dropped.
        tokens: the tokens written so far, int, `[*batch, L]` or broadcastable to it; a token
            outside [0, V), such as -1 for padding, counts for nothing.
        penalty: theta > 0, one number or one per slice `[*batch, 1]`; 1 changes nothing;
            differentiable. In an array, one out of range makes what has been written NaN.
        presence: a, subtracted once from a token that has been written; one number or one per
            slice, of any sign; differentiable.
        frequency: b, subtracted for each time that a token has been written; likewise.

    Returns:
        Scores `[*batch, V]` in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not real, or `tokens` not integer.
        ValueError: `tokens` or an option does not broadcast, or `penalty` is a Python number
            that is not positive.

    Example:
        >>> print(repetition_penalty(jnp.array([2.0, 1.0, -1.0]), jnp.array([0, 2, 2]), 2.0))
        [ 1.  1. -2.]

    Note:
        O(V + L) per slice. Pad tokens that grow from step to step to one length, so that
        nothing is compiled twice.

    Reference:
        Keskar et al. (2019), CTRL: a conditional transformer language model for controllable
        generation, for the first penalty.
    """
    problem = prepare(logits)
    x, axis = problem.logits, resolve_one_axis(-1, problem.logits.ndim)
    tokens = to_integers(tokens, name="tokens")
    penalty, presence, frequency = (
        per_slice(value, x, (axis,), name=name)
        for name, value in (
            ("penalty", penalty),
            ("presence", presence),
            ("frequency", frequency),
        )
    )
    penalty = nan_unless_positive(penalty)
    count = _count(tokens, x.shape)
    written, kept = count > 0, x != -jnp.inf
    scores = jnp.where(kept, x, 0)
    bent = jnp.where(scores > 0, scores / penalty, scores * penalty)
    lowered = bent - presence - frequency * count.astype(x.dtype)
    scores = jnp.where(written, lowered, scores)
    return jnp.where(kept, scores, -jnp.inf).astype(problem.dtype)


def _count(tokens: Array, shape: tuple[int, ...]) -> Array:
    """Counts how often each of `shape[-1]` tokens has been written, `[*shape]`, int32."""
    *batch, size = shape
    if tokens.ndim == 0 or tokens.ndim > len(shape):
        raise ValueError(
            f"`tokens` of shape {tokens.shape} must be [*batch, L] for `logits` {shape}."
        )
    length = tokens.shape[-1]
    try:
        tokens = jnp.broadcast_to(tokens, (*batch, length))
    except ValueError:
        raise ValueError(
            f"`tokens` of shape {tokens.shape} does not broadcast to {(*batch, length)}, the"
            f" slices of `logits` {shape}."
        ) from None
    # A scatter drops places beyond the end, but counts negative places from the end.
    tokens = jnp.where(tokens < 0, size, tokens).reshape(math.prod(batch), length)
    count = jax.vmap(lambda row: jnp.zeros(size, jnp.int32).at[row].add(1, mode="drop"))
    return count(tokens).reshape(shape)
