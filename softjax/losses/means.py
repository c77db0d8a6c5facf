"""The mean over the examples that count, and weights for classes of unequal size."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import PROBABILITY, api
from softjax._elementary import expm1_over
from softjax._inputs import computing_dtype, nan_outside, one_number, per_class, to_float
from softjax._mesh import AxisName, names_of
from softjax.losses._reduction import over_mass, shares_and_masses, sum_of_counted

__all__ = ["class_balanced_weights", "logit_adjustment", "mean_loss"]


@api("ignore_index", "axis_name", spread=("losses", "labels", "example_weights"))
def mean_loss(
    losses: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Averages losses over the examples that count.

    .. math:: \sum_i a_i L_i \Big/ \sum_i a_i w_{y_i}

    Args:
        losses: one loss L per example, `[*shape]`, already multiplied by the class weights (as
            `cross_entropy` does); differentiable.
        labels: classes y, int, `[*shape]`; given with `ignore_index` or `class_weights`, and
            only then.
        ignore_index: a label whose examples do not count.
        class_weights: the factors w >= 0, `[n]`, that the losses were computed with; a negative
            one is NaN. Without them w is 1.
        example_weights: factors a, broadcastable to `[*shape]`; differentiable. An example of
            weight 0 does not count, whatever its loss.
        axis_name: mesh axis, or axes, over which the examples are spread, inside of
            `jax.shard_map`; None: not spread. The mean of the devices' means differs from this
            if they count different numbers of examples.

    Returns:
        One number, in the dtype of `losses` (float32 or wider); 0 where nothing counts, where
        PyTorch has NaN.

    Raises:
        TypeError: `losses` is not real or `labels` not integer.
        ValueError: `labels` is of another shape, missing with an option that uses it or given
            without one, or `example_weights` does not broadcast.

    Example:
        >>> losses, labels = jnp.array([1.0, 3.0, 0.0]), jnp.array([0, 2, -1])
        >>> print(mean_loss(losses, labels, ignore_index=-1))
        2.0
        >>> weights = jnp.array([1.0, 3.0, 5.0])
        >>> print(mean_loss(losses, labels, ignore_index=-1, example_weights=weights))
        2.5

    Note:
        O(number of examples). Divides by the weights of the labels, as PyTorch's mean does.
        A loss that does not count has cotangent 0, so an unknown label reaches neither the
        value nor a gradient. But a loss that has been computed cannot be mended: NaN or inf in
        the logits of such an example makes 0 * NaN in the derivative of its loss, and reaches
        the gradients of all parameters. Leave such an example out of the loss itself, by its
        `ignore_index`, `where` or `example_where` and its `reduction="mean"`.
    """
    losses, _ = to_float(losses, name="losses")
    is_used = ignore_index is not None or class_weights is not None
    if labels is None and is_used:
        raise ValueError("`labels` must be given with `ignore_index` or `class_weights`.")
    if labels is not None and not is_used:
        raise ValueError(
            "`labels` must come with `ignore_index` or `class_weights`, got neither, and no"
            " other option uses them."
        )
    shares, masses = shares_and_masses(
        losses,
        labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        example_weights=example_weights,
    )
    mesh_axes = names_of(axis_name)
    return over_mass(sum_of_counted(losses, shares, mesh_axes), masses, mesh_axes)


@api(beta=PROBABILITY)
def class_balanced_weights(counts: ArrayLike, *, beta: ArrayLike) -> Array:
    r"""Weighs classes by the inverse of their effective numbers of examples.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    Args:
        counts: numbers of examples n, `[C]`, at least 0.
        beta: one number in [0, 1]: 0 weighs all classes alike, 1 by 1 / n; differentiable. An
            array out of range gives NaN.

    Returns:
        Weights `[C]`, of mean one over the classes that have examples; 0 for the others.

    Raises:
        TypeError: `counts` or `beta` is not real.
        ValueError: `counts` is not a vector, or `beta` not one number, or a Python number
            outside of [0, 1].

    Example:
        >>> print(class_balanced_weights(jnp.array([100, 1]), beta=1.0))
        [0.01980198 1.980198  ]

    Reference:
        Cui et al. (2019), Class-balanced loss based on effective number of samples.
    """
    dtype = to_float(counts, name="counts")[1]
    counts = per_class(counts, None, computing_dtype(dtype), name="counts")
    beta = nan_outside(one_number(beta, name="beta"), 0, 1).astype(counts.dtype)
    seen = ~(counts <= 0)  # Keep NaN, so that it shows in the result.
    endless = counts == jnp.inf
    safe = jnp.where(seen & ~endless, counts, 1)
    # (1 - beta^n) / (1 - beta), and near 1 n phi(n log beta) / phi(log beta), where
    # phi(v) = (e^v - 1) / v.
    small = beta < 0.5
    low, rate = jnp.where(small, beta, 0), jnp.log(jnp.where(small, 1, beta))
    near_one = safe * expm1_over(safe * rate) / expm1_over(rate)
    effective = jnp.where(small, (1 - low**safe) / (1 - low), near_one)
    weights = jnp.where(seen, jnp.where(endless, 1 - beta, 1 / effective), 0)
    mean = jnp.sum(weights) / jnp.maximum(jnp.sum(seen, dtype=counts.dtype), 1)
    return (weights / jnp.where(mean == 0, 1, mean)).astype(dtype)


@api()
def logit_adjustment(counts: ArrayLike, *, scale: ArrayLike = 1.0) -> Array:
    r"""Takes logarithms of class frequencies, to add to logits in the loss of a long tail.

    .. math:: a_c = s \log \Big( n_c \Big/ \sum_d n_d \Big)

    Args:
        counts: numbers of examples n, `[C]`, at least 0; differentiable.
        scale: s, one number, 1 for the consistent loss; differentiable.

    Returns:
        Shifts `[C]` for `adjusted_scores`, in the dtype of `counts`; -inf for a class without
        examples, which that drops.

    Raises:
        TypeError: `counts` or `scale` is not real.
        ValueError: `counts` is not a vector, or `scale` not one number.

    Example:
        >>> print(logit_adjustment(jnp.array([75, 25, 0])))
        [-0.2876821 -1.3862944       -inf]

    Note:
        `cross_entropy(adjusted_scores(z, a), y)` is the loss whose minimum has the least
        balanced error: it asks a rare class for a larger margin.

    Reference:
        Menon et al. (2021), Long-tail learning via logit adjustment.
    """
    dtype = to_float(counts, name="counts")[1]
    counts = per_class(counts, None, computing_dtype(dtype), name="counts")
    scale = one_number(scale, name="scale")
    seen = ~(counts <= 0)  # Keep NaN, so that it shows in the result.
    total = jnp.sum(jnp.where(seen, counts, 0))
    shares = jnp.where(seen, counts / jnp.where(total == 0, 1, total), 1)
    return jnp.where(seen, scale.astype(counts.dtype) * jnp.log(shares), -jnp.inf).astype(dtype)
