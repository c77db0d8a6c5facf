"""Dense maps: from logits to strictly positive probabilities.

A slice z is sent to exp(z / T), rescaled to sum to one. Dropped entries (masked by `where`,
or equal to -inf) have probability, and derivative, exactly zero. A slice that keeps nothing
is all zeros; a kept NaN makes its slice NaN; kept +inf entries share all the mass.
"""

import jax
from jax import Array
from jax.typing import ArrayLike

from softjax._exponential import SOFTMAX
from softjax._inputs import NONNEGATIVE, Axis, per_slice, prepare, public
from softjax._slices import AlongAxes
from softjax._threshold import Solution, solve

__all__ = ["log_softmax", "softmax"]


@public("axis", temperature=NONNEGATIVE)
def softmax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
) -> Array:
    r"""Rescales exponentials of the kept logits to sum to one.

    .. math:: p_i = m_i e^{z_i / T} \Big/ \Big(e^{s / T} + \sum_j m_j e^{z_j / T}\Big)
    """
    solution, dtype = _solve(logits, axis, where, temperature, sink)
    return solution.probs.astype(dtype)


@public("axis", temperature=NONNEGATIVE)
def log_softmax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
) -> Array:
    r"""Takes the logarithm of `softmax`, exactly also where it is close to 0."""
    solution, dtype = _solve(logits, axis, where, temperature, sink)
    return solution.margins.astype(dtype)


def _solve(logits, axis, where, temperature, sink) -> tuple[Solution, jax.numpy.dtype]:
    problem = prepare(logits, axis=axis, where=where, temperature=temperature)
    if sink is not None:
        sink = per_slice(sink, problem.logits, problem.axes, name="sink")
    slices = AlongAxes(problem.axes)
    solution = solve(SOFTMAX, slices, problem.logits, problem.temperature, sink=sink)
    return solution, problem.dtype
