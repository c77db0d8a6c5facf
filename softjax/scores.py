"""Score transforms: logits in, logits out, to compose before any map.

They cap, scale, shift or bend scores. Dropped (-inf) entries stay dropped.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, api
from softjax._elementary import capped, log1p
from softjax._inputs import Axis, per_class, per_slice, prepare, resolve_one_axis, to_float
from softjax._mesh import AxisName

__all__ = [
    "adjusted_scores",
    "scalable_scores",
    "sigsoftmax_scores",
    "soft_cap",
    "taylor_scores",
]


@api(cap=NONNEGATIVE)
def soft_cap(logits: ArrayLike, cap: ArrayLike) -> Array:
    r"""Bounds logits smoothly.

    .. math:: c \tanh(z / c)

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.
        cap: bound c in [0, inf], broadcastable to `[*shape]`; differentiable inside, with
            derivative 0 at the limits. inf bounds nothing; a negative one in an array gives
            NaN.

    Returns:
        Scores in [-c, c], `[*shape]`, in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not real.
        ValueError: `cap` does not broadcast, or is a negative Python number.

    Example:
        >>> print(soft_cap(jnp.array([1.0, 1000.0]), 50.0))
        [ 0.99986655 50.        ]

    Reference:
        Bello et al. (2016), Neural combinatorial optimization with reinforcement learning.
    """
    x, dtype = to_float(logits, name="logits")
    cap = per_slice(cap, x, (), name="cap")
    kept = x != -jnp.inf
    return jnp.where(kept, capped(jnp.where(kept, x, 0), cap), -jnp.inf).astype(dtype)


@api("axis", "axis_name", spread=("logits", "where"))
def scalable_scores(
    logits: ArrayLike,
    scale: ArrayLike = 1.0,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Scales logits by the logarithm of how many there are (scalable softmax).

    .. math:: s \, z_i \log n, \qquad n = \sum_j m_j

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        scale: factor s, one number or one per slice; differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        axis_name: mesh axis, or axes, over which the slices are spread, inside of
            `jax.shard_map`; None: not spread.

    Returns:
        Scores `[*shape]` in the dtype of `logits`; -inf where dropped.

    Raises:
        TypeError: `logits` is not real, or `where` not bool.
        ValueError: `where` or `scale` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(scalable_scores(jnp.array([1.0, 0.0])))
        [0.6931472 0.       ]

    Reference:
        Nakanishi (2025), Scalable-softmax is superior for attention.
    """
    problem = prepare(logits, axis=axis, where=where, axis_name=axis_name)
    x, slices = problem.logits, problem.slices
    scale = per_slice(scale, x, problem.axes, name="scale")
    kept = x != -jnp.inf
    count = slices.sum(kept.astype(x.dtype))
    factor = scale * jnp.log(jnp.maximum(count, 1))
    infinite = x == jnp.inf
    scores = jnp.where(kept & ~infinite, x, 0) * factor
    # The only kept entry of a slice has factor 0, so its score is 0 even if it is infinite.
    limit = jnp.where(factor > 0, jnp.inf, jnp.where(factor < 0, -jnp.inf, factor))
    scores = jnp.where(infinite, limit, scores)
    return jnp.where(kept, scores, -jnp.inf).astype(problem.dtype)


@api("axis")
def adjusted_scores(logits: ArrayLike, adjustment: ArrayLike, *, axis: int = -1) -> Array:
    r"""Shifts logits by one number per class: logit adjustment for long tails, or a prior.

    .. math:: z_c + a_c

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.
        adjustment: shifts a, `[C]`, real or -inf (drops a class); differentiable.
            `logit_adjustment` makes them from class counts: added in the training loss, they
            teach the logits of equally frequent classes; subtracted from other logits when
            they are used, they correct for the frequencies.
        axis: the one axis of the C classes.

    Returns:
        Scores `[*shape]` in the dtype of `logits`; -inf where dropped.

    Raises:
        TypeError: `logits` or `adjustment` is not real, or `axis` not one int.
        ValueError: `adjustment` is not `[C]`, or `axis` is out of range.

    Example:
        >>> print(adjusted_scores(jnp.array([1.0, 2.0]), jnp.array([0.0, -jnp.inf])))
        [  1. -inf]

    Note:
        O(n). Both modes, any order.

    Reference:
        Menon et al. (2021), Long-tail learning via logit adjustment.
    """
    x, dtype = to_float(logits, name="logits")
    axis = resolve_one_axis(axis, x.ndim)
    shifts = per_class(adjustment, x.shape[axis], x.dtype, name="adjustment")
    shifts = jnp.expand_dims(shifts, tuple(i for i in range(x.ndim) if i != axis))
    kept = (x != -jnp.inf) & (shifts != -jnp.inf)
    scores = jnp.where(kept, x, 0) + jnp.where(kept, shifts, 0)
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)


@api()
def sigsoftmax_scores(logits: ArrayLike) -> Array:
    r"""Bends logits so that their softmax is sigsoftmax, p proportional to exp(z) sigmoid(z).

    .. math:: z + \log \sigma(z) = 2 z - \log(1 + e^z)

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.

    Returns:
        Scores `[*shape]` in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not real.

    Example:
        >>> print(sigsoftmax_scores(jnp.array([0.0])))
        [-0.6931472]

    Reference:
        Kanai et al. (2018), Sigsoftmax: reanalysis of the softmax bottleneck.
    """
    x, dtype = to_float(logits, name="logits")
    kept = x != -jnp.inf
    scores = x + jax.nn.log_sigmoid(jnp.where(kept, x, 0))
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)


@api()
def taylor_scores(logits: ArrayLike) -> Array:
    r"""Bends logits so that their softmax is Taylor softmax, of weights 1 + z + z^2 / 2.

    .. math:: \log(1 + z + z^2 / 2)

    Args:
        logits: scores z, `[*shape]`; differentiable. -inf stays -inf: dropped.

    Returns:
        Scores `[*shape]` in the dtype of `logits`; at least -log 2, as the weights are at
        least 1/2.

    Raises:
        TypeError: `logits` is not real.

    Example:
        >>> print(taylor_scores(jnp.array([0.0, 2.0])))
        [0.        1.609438]

    Reference:
        de Brebisson and Vincent (2016), An exploration of softmax alternatives belonging to
        the spherical loss family.
    """
    x, dtype = to_float(logits, name="logits")
    kept = x != -jnp.inf
    # Away from 0 the square is taken out, because it would overflow.
    far = jnp.abs(x) > 4
    near, inverse = jnp.where(far | ~kept, 0, x), 1 / jnp.where(far & kept, x, 1)
    leading = 2 * jnp.log(jnp.where(far & kept, jnp.abs(x), 1)) - math.log(2)
    large = leading + log1p(2 * inverse + 2 * inverse * inverse)
    scores = jnp.where(far, large, log1p(near + near * near / 2))
    return jnp.where(kept, scores, -jnp.inf).astype(dtype)
