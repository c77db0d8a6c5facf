"""Dense maps: from logits to strictly positive probabilities.

A slice z is sent to exp(z / T), rescaled to sum to one. Dropped entries (masked by `where`,
or equal to -inf) have probability, and derivative, exactly zero. A slice that keeps nothing
is all zeros; a kept NaN makes its slice NaN; kept +inf entries share all the mass.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._inputs import Axis, per_slice, prepare
from softjax._mesh import AxisName
from softjax._softmax import LOG_SOFTMAX, SOFTMAX
from softjax._threshold import Family, Solution, solve

__all__ = ["log_softmax", "softmax"]


@api("axis", "axis_name", spread=("logits", "where"), temperature=NONNEGATIVE)
def softmax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Rescales exponentials of the kept logits to sum to one.

    .. math:: p_i = m_i e^{z_i / T} \Big/ \Big(e^{s / T} + \sum_j m_j e^{z_j / T}\Big)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T in [0, inf], one number or one per slice (broadcastable to `[*shape]`
            with size 1 along `axis`); differentiable, with derivative 0 at the limits. At 0
            the largest kept entries share the mass; at inf all kept entries do.
        sink: score s of an entry that takes weight and is not returned, one number or one
            per slice, divided by T like the others; differentiable.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Probabilities `[*shape]` in the dtype of `logits` (half precision is computed in
        float32 and rounded once). They sum to one, or to less with a sink; all zeros in a
        slice that keeps nothing. Kept +inf entries share the mass; a kept NaN makes its
        slice NaN.

    Raises:
        TypeError: `logits` is not real, `where` not bool, or `axis` not of integers.
        ValueError: `where`, `temperature` or `sink` does not broadcast as above, `axis` is
            out of range, or `temperature` is a negative Python number.

    Example:
        >>> print(softmax(jnp.array([0.0, 0.0, -jnp.inf])))
        [0.5 0.5 0. ]

        Spread over devices, each of which holds some of the columns:

        >>> import jax
        >>> mesh, columns = jax.make_mesh((1,), ("classes",)), jax.P(None, "classes")
        >>> call = lambda z: softmax(z, axis_name="classes")
        >>> split = jax.shard_map(call, mesh=mesh, in_specs=columns, out_specs=columns)
        >>> print(split(jax.device_put(jnp.zeros((1, 2)), jax.NamedSharding(mesh, columns))))
        [[0.5 0.5]]

    Note:
        Within 4.2 units in the last place on CPUs, wherever the result is a normal number. O(n)
        time; the result is all that is kept for the derivative. Temporary memory of a large
        array on CPUs: a quarter of it, with the gradient too (with JAX 0.12 one array more);
        one where slices run along an axis between others. Both modes, any order.

    Reference:
        Bridle (1990), Training stochastic model recognition algorithms as networks can lead
        to maximum mutual information estimation of parameters.
    """
    solution, dtype = _solution(SOFTMAX, logits, axis, where, temperature, sink, axis_name)
    return solution.probs.astype(dtype)


@api("axis", "axis_name", spread=("logits", "where"), temperature=NONNEGATIVE)
def log_softmax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Takes the logarithm of `softmax`, to full precision also where it is close to 0.

    .. math:: \log p_i = z_i / T - \log\Big(e^{s / T} + \sum_j m_j e^{z_j / T}\Big)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T in [0, inf], as in `softmax`; differentiable.
        sink: score s of an entry that is not returned, as in `softmax`; differentiable.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Log-probabilities `[*shape]` in the dtype of `logits`; -inf where dropped.

    Raises:
        TypeError: as `softmax`.
        ValueError: as `softmax`.

    Example:
        >>> print(log_softmax(jnp.array([50.0, 0.0])))
        [-1.9287499e-22 -5.0000000e+01]

    Note:
        Within 4 units in the last place on CPUs: the sum runs over all but the peak, which
        enters through log1p. There is one exception: weights below the smallest normal number
        may be flushed to 0, so a log-probability closer to 0 than n times that number loses
        them. O(n) time; the result alone is kept for the derivative, whose entry at a confident
        peak is the sum of the others, not 1 - p. In forward mode that entry is the difference
        of two sums, with an error of a few eps of the largest tangent. Temporary memory as
        `softmax`, but two arrays for the gradient. Both modes, any order.

    Reference:
        Blanchard, Higham and Higham (2021), Accurately computing the log-sum-exp and softmax
        functions, algorithm 4.1.
    """
    solution, dtype = _solution(LOG_SOFTMAX, logits, axis, where, temperature, sink, axis_name)
    return solution.margins.astype(dtype)


def _solution(
    family: Family,
    logits: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    temperature: ArrayLike,
    sink: ArrayLike | None,
    axis_name: AxisName,
) -> tuple[Solution, jnp.dtype]:
    problem = prepare(
        logits, axis=axis, where=where, temperature=temperature, axis_name=axis_name
    )
    if sink is not None:
        sink = per_slice(sink, problem.logits, problem.axes, name="sink")
    slices = problem.slices
    solution = solve(family, slices, problem.logits, problem.temperature, sink=sink)
    return solution, problem.dtype
