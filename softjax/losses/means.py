"""The mean of losses over the examples that count, and weights for classes of unequal size."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._exact import expm1_over, long_sum
from softjax._inputs import (
    PROBABILITY,
    broadcast,
    check_labels,
    equal,
    per_class,
    public,
    to_float,
)

__all__ = ["class_balanced_weights", "mean_loss"]


@public("ignore_index")
def mean_loss(
    losses: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
) -> Array:
    r"""Averages losses over the examples that count.

    .. math:: \sum_i a_i L_i \Big/ \sum_i a_i w_{y_i}

    Args:
        losses: one loss L an example, `[*shape]`, already multiplied by the class weights (as
            `cross_entropy` does); differentiable.
        labels: classes y, int, `[*shape]`; needed with `ignore_index` and `class_weights`.
        ignore_index: a label whose examples do not count.
        class_weights: the factors w, `[n]`, that the losses were computed with (1 without).
        example_weights: factors a, broadcastable to `[*shape]`; differentiable. An example of
            weight 0 does not count, whatever its loss.

    Returns:
        One number, in the dtype of `losses` (float32 or wider); 0 where nothing counts, where
        PyTorch has NaN.

    Raises:
        TypeError: `losses` is not real or `labels` not integer.
        ValueError: an argument does not broadcast, or `labels` is missing where needed.

    Example:
        >>> print(mean_loss(jnp.array([1.0, 3.0, 0.0]), jnp.array([0, 2, -1]), ignore_index=-1))
        2.0

    Note:
        O(number of examples). Divides by the weights of the labels, as PyTorch's mean does.
    """
    losses, _ = to_float(losses, name="losses")
    shares = jnp.ones_like(losses)
    if example_weights is not None:
        example_weights, _ = to_float(example_weights, name="example_weights")
        shares = broadcast(
            example_weights.astype(losses.dtype),
            losses.shape,
            name="example_weights",
            target="losses",
        )
    if labels is None and not (ignore_index is None and class_weights is None):
        raise ValueError("`labels` must be given with `ignore_index` or `class_weights`.")
    masses = shares
    if labels is not None:
        labels = check_labels(labels, (*losses.shape, 1), losses.ndim)
        if ignore_index is not None:
            shares = jnp.where(equal(labels, ignore_index), 0, shares)
        masses = shares
        if class_weights is not None:
            weights = per_class(class_weights, None, losses.dtype)
            known = (labels >= 0) & (labels < weights.size)
            chosen = weights[jnp.where(known, labels, 0)]
            masses = shares * jnp.where(known, chosen, 1)
    # (A weight of 0 has its derivative, if the loss that it weighs is a number.)
    counted = jnp.where((shares != 0) | jnp.isfinite(losses), losses, 0)
    total, mass = _sum_of_all(shares * counted), _sum_of_all(masses)
    return total / jnp.where(mass == 0, 1, mass)


def _sum_of_all(x: Array) -> Array:
    # In blocks of its own: XLA may run a plain sum through all of them one by one.
    return jnp.sum(long_sum(x.reshape(-1, 1), (0,)))


@public(beta=PROBABILITY)
def class_balanced_weights(counts: ArrayLike, *, beta: ArrayLike) -> Array:
    r"""Weighs classes by the inverse of their effective numbers of examples.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    Args:
        counts: numbers of examples n, `[C]`, at least 0.
        beta: in [0, 1]: 0 weighs all classes alike, 1 by 1 / n; differentiable.

    Returns:
        Weights `[C]`, of mean one over the classes that have examples; 0 for the others.

    Raises:
        TypeError: `counts` is not real.
        ValueError: `beta` is a Python number outside of [0, 1].

    Example:
        >>> print(class_balanced_weights(jnp.array([100, 1]), beta=1.0))
        [0.01980198 1.980198  ]

    Reference:
        Cui et al. (2019), Class-balanced loss based on effective number of samples.
    """
    counts, dtype = to_float(counts, name="counts")
    beta = jnp.asarray(beta).astype(counts.dtype)
    seen = counts > 0
    safe = jnp.where(seen, counts, 1)
    # (1 - beta^n) / (1 - beta) = n phi(n log beta) / phi(log beta), phi(v) = (e^v - 1) / v.
    rate = jnp.log(jnp.where(beta > 0, beta, 1))
    effective = safe * expm1_over(safe * rate) / expm1_over(rate)
    effective = jnp.where(beta > 0, effective, 1)
    weights = jnp.where(seen, 1 / effective, 0)
    mean = jnp.sum(weights) / jnp.maximum(jnp.sum(seen, dtype=counts.dtype), 1)
    return (weights / jnp.where(mean == 0, 1, mean)).astype(dtype)
