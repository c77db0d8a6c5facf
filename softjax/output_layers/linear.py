"""Cross-entropy and statistics of the logits of a linear layer, which are never stored."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, POSITIVE, PROBABILITY, api
from softjax._inputs import check_flag, per_class
from softjax._mesh import AxisName, names_of
from softjax.losses._reduction import check_reduction, over_mass, reduce, shares_and_masses
from softjax.output_layers._layer import (
    idle_tokens,
    layout_of,
    prepare_layer,
    token_labels,
    without_idle,
)
from softjax.output_layers._losses import (
    token_losses,
    total_with_gradient,
)
from softjax.output_layers._stream import plan_for, statistics

__all__ = ["linear_cross_entropy", "linear_statistics"]


class Statistics(NamedTuple):
    """The results of `linear_statistics`, arrays of the shape of the tokens."""

    logsumexp: Array
    entropy: Array
    argmax: Array
    log_prob: Array | None


@overload
def linear_cross_entropy(
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
    forward_gradient: bool = False,
    return_z_loss: Literal[False] = False,
    axis_name: AxisName = None,
) -> Array: ...


@overload
def linear_cross_entropy(
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
    forward_gradient: bool = False,
    return_z_loss: Literal[True],
    axis_name: AxisName = None,
) -> tuple[Array, Array]: ...


@overload
def linear_cross_entropy(
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
    forward_gradient: bool = False,
    return_z_loss: bool,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]: ...


@api(
    "ignore_index",
    "reduction",
    "block_size",
    "forward_gradient",
    "return_z_loss",
    "axis_name",
    spread=("weights", "bias", "class_weights"),
    layout=layout_of,
    temperature=POSITIVE,
    soft_cap=POSITIVE,
    z_loss=NONNEGATIVE,
    label_smoothing=PROBABILITY,
)
def linear_cross_entropy(
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
    forward_gradient: bool = False,
    return_z_loss: bool = False,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]:
    r"""Measures `cross_entropy` of a linear layer whose logits are never stored.

    .. math:: z = x W^\top + b, \qquad s = c \tanh(z / c) / T, \qquad
        L = (1 - \epsilon) w_y (-\log p_y) + \frac{\epsilon}{V} \sum_j w_j (-\log p_j)
        + \lambda (\log Z)^2, \quad p = \mathrm{softmax}(s)

    Args:
        features: x, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`; differentiable. Where its dtype is another than that of
            `features`, both are promoted as JAX does, except that bfloat16 features meet
            float32 weights in bfloat16, block by block, and the weights' gradient is float32.
        labels: classes y, int, `[...]`.
        bias: b, `[V]`; differentiable. -inf drops a class, whatever its weights hold.
        temperature: T > 0, one number or one per token; differentiable.
        soft_cap: c > 0, acts on the logits before the temperature divides them; one number;
            inf bounds nothing; differentiable.
        label_smoothing: epsilon in [0, 1], one number or one per token; differentiable.
        z_loss: factor lambda >= 0 of the squared log-normaliser, one number or one per token;
            differentiable.
        ignore_index: a label, of any value, whose tokens have loss and gradient 0, whatever
            they hold.
        class_weights: factors w >= 0, `[V]`; differentiable.
        example_weights: factors of the tokens' losses, `[...]`; differentiable. A token of
            weight 0 does not count, whatever NaN or inf it holds.
        reduction: "mean" divides the sum by that of the example weights times the class weights
            of the labels, over the tokens not ignored (as PyTorch does); "sum"; or None.
        block_size: classes formed at once; chosen from the shapes by default. Given, it also
            holds where the logits would otherwise be small enough to be kept.
        forward_gradient: whether differentiation finds the gradient along with the value, from
            the same logits: three matrix products in place of four. It gives up forward mode
            (JAX raises a TypeError; gradients can be differentiated in both modes) and
            `reduction=None`; `block_size` is then that of the tokens taken at once.
        return_z_loss: whether to return the part of the z-loss too, for a log.
        axis_name: mesh axis, or axes, over which the classes are spread, inside of
            `jax.shard_map`; None: not spread. `weights`, `bias` and `class_weights` are those
            of this device's classes, and the labels count the classes of all devices.
            `reduction` is over this device's tokens, as in `cross_entropy`. It is not needed on
            a mesh of explicit axes, where types tell how tokens and classes are spread, and
            each device takes its own. Types tell nothing on a mesh of automatic axes, where
            weights that are spread are gathered.

    Returns:
        One number, or one loss per token with `reduction=None`; float32 or wider. With
        `return_z_loss`, the pair (loss, z-loss), both reduced alike, of which the first
        contains the second. NaN where an option in an array is out of range.

    Raises:
        TypeError: an argument is not real, `labels` not integer, or `bias` bool.
        ValueError: shapes do not fit, `reduction` or `block_size` is none of the above, or
            `forward_gradient` meets `reduction=None`, `return_z_loss` or `axis_name`.

    Example:
        >>> print(linear_cross_entropy(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 1])))
        1.3862944

    Note:
        O(N V D) time. Memory: up to 2^22 logits are formed at once and their probabilities
        kept; above, some 2^20 are formed at a time, and the derivative forms them again (four
        matrix products in place of three). `forward_gradient` forms them by blocks of D tokens,
        V D at a time. On CPU that saved from 2 % to a fifth of the time and takes twenty times
        the temporary memory (2048 tokens of width 256, 65536 classes: 130 MiB and 6.5), which
        is why it is not the default. Products are taken in the dtype of the features and
        accumulated in float32 or wider, in the derivative too. The loss of a confident token
        and its gradient keep their digits, as in `cross_entropy`; a dropped label has loss inf
        and derivative 0, and a class weight of 0 counts that inf as 0. The derivative in the
        temperature is NaN below 1e-20 in float32, because scores are divided by it. Both modes,
        any order.

    Reference:
        Wijmans et al. (2025), Cut your losses in large-vocabulary language models; the
        derivative by blocks is that of Rabe and Staats (2021), Self-attention does not need
        O(n^2) memory.
    """
    check_reduction(reduction)
    if check_flag(forward_gradient, name="forward_gradient") and reduction is None:
        raise ValueError(
            '`reduction` must be "mean" or "sum" with `forward_gradient`, which knows the'
            " gradient of one number alone, got None."
        )
    if check_flag(return_z_loss, name="return_z_loss") and forward_gradient:
        raise ValueError(
            "`return_z_loss` must be False with `forward_gradient`, which knows the gradient of"
            " one number alone."
        )
    mesh_axes = names_of(axis_name)
    if forward_gradient and mesh_axes:
        raise ValueError(
            "`forward_gradient` must be False with `axis_name`, because it finds the"
            " gradient of each block of tokens before the devices add up their sums."
        )
    layer = prepare_layer(features, weights, bias, temperature, soft_cap)
    head, rows = layer.head, token_labels(layer, labels, ignore_index, mesh_axes)
    if class_weights is not None:
        class_weights = per_class(class_weights, head.weights.shape[0], layer.dtype)
        head = head._replace(class_weights=class_weights)
    shares, masses = shares_and_masses(
        jnp.ones(layer.shape, layer.dtype),
        labels,
        ignore_index=ignore_index,
        class_weights=class_weights,
        example_weights=example_weights,
        class_axes=mesh_axes,
    )
    tokens = layer.tokens._replace(
        label_smoothing=layer.optional(label_smoothing, "label_smoothing", 1),
        z_loss=layer.optional(z_loss, "z_loss"),
        shares=shares.reshape(-1),
    )
    if ignore_index is not None or example_weights is not None:
        idle = idle_tokens(shares.reshape(-1), tokens, known=rows.known)
        idle = idle if rows.ignored is None else idle | rows.ignored
        tokens = without_idle(tokens, idle)
        shares, masses = (jnp.where(idle.reshape(x.shape), 0, x) for x in (shares, masses))
        rows = rows._replace(known=rows.known | idle, ignored=idle)
    plan = plan_for(tokens, head, block_size, axis_name)
    if forward_gradient:
        total = total_with_gradient(block_size, (tokens, head), rows)
        return over_mass(total, masses) if reduction == "mean" else total

    loss, z_term = (
        reduce(x.reshape(layer.shape), shares, masses, reduction)
        for x in token_losses(plan, tokens, head, rows)
    )
    return (loss, z_term) if return_z_loss else loss


@api(
    "block_size",
    "axis_name",
    spread=("weights", "bias"),
    layout=layout_of,
    temperature=POSITIVE,
    soft_cap=POSITIVE,
)
def linear_statistics(
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    block_size: int | None = None,
    axis_name: AxisName = None,
) -> Statistics:
    r"""Computes the usual statistics of the logits of a linear layer, without storing them.

    .. math:: \log Z = \log \sum_j e^{s_j}, \quad H = -\sum_j p_j \log p_j, \quad
        \arg\max_j s_j, \quad \log p_y

    Args:
        features: x, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of any dtype, as in `linear_cross_entropy`; differentiable.
        labels: classes y, int, `[...]`, or None.
        bias: b, `[V]`; differentiable. -inf drops a class.
        temperature: T > 0, one number or one per token; differentiable.
        soft_cap: c > 0, before the temperature, as in `linear_cross_entropy`; differentiable.
        block_size: classes formed at once; chosen from the shapes by default.
        axis_name: as in `linear_cross_entropy`.

    Returns:
        (logsumexp, entropy, argmax, log_prob), each `[...]`: float32 or wider, but argmax int32
        (the first of equals, before the soft cap and the temperature make more of them);
        log_prob is None without labels, and NaN where one is out of range.

    Raises:
        TypeError: as `linear_cross_entropy`.
        ValueError: as `linear_cross_entropy`.

    Example:
        >>> print(linear_statistics(jnp.ones(2), jnp.zeros((4, 2))).entropy)
        1.3862944

    Note:
        One pass over the vocabulary; cost and derivatives as `linear_cross_entropy`. The
        entropy is a sum of terms of one sign, and keeps its digits where it is small.
    """
    layer = prepare_layer(features, weights, bias, temperature, soft_cap)
    asked = jnp.zeros(layer.shape, jnp.int32) if labels is None else labels
    mesh_axes = names_of(axis_name)
    rows = token_labels(layer, asked, None, mesh_axes)
    plan = plan_for(layer.tokens, layer.head, block_size, axis_name)
    plan = plan._replace(dense=False, entropy=True)
    found = statistics(plan, layer.tokens, layer.head, rows.labels)
    log_prob = None if labels is None else -rows.finish(found.nll)
    parts: Any = found.logsumexp, found.entropy, found.argmax, log_prob
    return Statistics(*jax.tree.map(lambda x: x.reshape(layer.shape), parts))
