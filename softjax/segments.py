"""Softmax and logsumexp over ragged groups: the edges of a graph's nodes, packed documents.

Entries that share a segment id belong together. Entries with an id outside [0, num_segments)
are dropped, as are those masked by `where` or equal to -inf: their probability, and every
derivative in them, is exactly zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._inputs import Problem, broadcast, is_static_one, prepare, to_array, to_integers
from softjax._slices import BySegment
from softjax._softmax import LOG_SOFTMAX, SOFTMAX
from softjax._threshold import solve

__all__ = ["segment_logsumexp", "segment_softmax"]


@api("num_segments", temperature=NONNEGATIVE)
def segment_softmax(
    logits: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_segments: int,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    r"""Normalises the entries of each segment, along axis 0.

    .. math:: p_i = m_i e^{z_i / T_s} \Big/ \sum_{j \in s} m_j e^{z_j / T_s},
        \qquad s = \mathrm{segment}(i)

    Args:
        logits: scores z, `[n, *rest]`, real or -inf (dropped); differentiable.
        segment_ids: segment of each row, `[n]`, int, in any order; rows whose id is outside
            [0, num_segments) are dropped.
        num_segments: number of segments, static.
        where: mask m, bool, broadcastable to `[n, *rest]`; True keeps an entry.
        temperature: T in [0, inf], one number or broadcastable to `[num_segments, *rest]`;
            differentiable. Limits as in `softmax`.

    Returns:
        Probabilities `[n, *rest]` in the dtype of `logits`, which sum to one over each
        segment that keeps something; 0 where dropped.

    Raises:
        TypeError: `logits` is not real, `where` not bool, or `segment_ids` not integer.
        ValueError: `segment_ids` is not of shape `[n]`, `num_segments` is negative, or
            `where` or `temperature` does not broadcast.

    Example:
        >>> print(segment_softmax(jnp.zeros(3), jnp.array([0, 1, 0]), num_segments=2))
        [0.5 1.  0.5]

    Note:
        O(n) time and memory. Both modes, any order.
    """
    problem, slices = _prepare(logits, segment_ids, num_segments, where)
    if not is_static_one(temperature):
        rows = (num_segments, *problem.logits.shape[1:])
        row = jnp.asarray(temperature).astype(problem.logits.dtype)
        row = broadcast(row, rows, name="temperature", target="one number per segment")
        row = jnp.concatenate([row, jnp.ones((1, *rows[1:]), row.dtype)])
        problem = problem._replace(temperature=row)
    solution = solve(SOFTMAX, slices, problem.logits, problem.temperature)
    return solution.probs.astype(problem.dtype)


@api("num_segments")
def segment_logsumexp(
    logits: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_segments: int,
    where: ArrayLike | None = None,
) -> Array:
    r"""Sums exponentials over each segment, along axis 0, and takes the logarithm.

    .. math:: \log \sum_{i \in s} m_i e^{z_i}

    Args:
        logits: scores z, `[n, *rest]`, real or -inf (dropped); differentiable.
        segment_ids: segment of each row, `[n]`, int, in any order; rows whose id is outside
            [0, num_segments) are dropped.
        num_segments: number of segments, static.
        where: mask m, bool, broadcastable to `[n, *rest]`; True keeps an entry.

    Returns:
        One number per segment, `[num_segments, *rest]`, in the dtype of `logits`; -inf for a
        segment that keeps nothing.

    Raises:
        TypeError: `logits` is not real, `where` not bool, or `segment_ids` not integer.
        ValueError: `segment_ids` is not of shape `[n]`, `num_segments` is negative, or
            `where` does not broadcast.

    Example:
        >>> print(segment_logsumexp(jnp.zeros(3), jnp.array([0, 1, 0]), num_segments=3))
        [0.6931472 0.             -inf]

    Note:
        O(n) time and memory. The derivative is `segment_softmax`; it is 0 for a segment that
        keeps nothing. Both modes, any order.
    """
    problem, slices = _prepare(logits, segment_ids, num_segments, where)
    peak = slices.max(jax.lax.stop_gradient(problem.logits))
    solution = solve(LOG_SOFTMAX, slices, problem.logits)
    return (peak + solution.threshold)[:num_segments].astype(problem.dtype)


def _prepare(
    logits: ArrayLike, segment_ids: ArrayLike, num_segments: int, where: ArrayLike | None
) -> tuple[Problem, BySegment]:
    """The logits, -inf where dropped, and their segments; an extra one holds ids outside."""
    if not isinstance(num_segments, int) or num_segments < 0:
        raise ValueError(f"`num_segments` must be an int >= 0, got {num_segments!r}.")
    if to_array(logits, name="logits").ndim == 0:
        raise ValueError("`logits` must have at least one dimension, that of `segment_ids`.")
    problem = prepare(logits, axis=0, where=where)
    ids = to_integers(segment_ids, name="segment_ids")
    if ids.shape != problem.logits.shape[:1]:
        raise ValueError(
            f"`segment_ids` of shape {ids.shape} must have the shape"
            f" {problem.logits.shape[:1]}: one id for each of the rows of `logits`."
        )
    inside = (ids >= 0) & (ids < num_segments)
    shape = (-1,) + (1,) * (problem.logits.ndim - 1)
    kept = jnp.where(inside.reshape(shape), problem.logits, -jnp.inf)
    slices = BySegment(jnp.where(inside, ids, num_segments).astype(jnp.int32), num_segments + 1)
    return problem._replace(logits=kept), slices
