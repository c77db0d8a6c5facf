"""Adaptive softmax: a head of frequent classes, and clusters of rare ones behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import api
from softjax._inputs import Classes, computing_dtype, known_labels, labels_of, to_float
from softjax._mesh import vary
from softjax._scan import scan_blocks
from softjax.output_layers._layer import Layer, prepare_layer, without
from softjax.output_layers._stream import plan_for, statistics

__all__ = ["adaptive_log_softmax"]

_TOGETHER = 256  # tokens, of neighbouring clusters, that are taken at once


def _check_tails(given: dict[str, Any]) -> None:
    several, tails = (tuple, list), given.get("tails")
    pairs = isinstance(tails, several) and all(
        isinstance(tail, several) and len(tail) == 2 for tail in tails
    )
    if not pairs:
        raise TypeError(f"`tails` must be pairs of a projection and weights, got {tails!r}.")


@api("ignore_index", "block_size", refuse=_check_tails)
def adaptive_log_softmax(
    features: ArrayLike,
    head_weights: ArrayLike,
    tails: Sequence[tuple[ArrayLike, ArrayLike]],
    labels: ArrayLike,
    *,
    head_bias: ArrayLike | None = None,
    ignore_index: int | None = None,
    block_size: int | None = None,
) -> Array:
    r"""Reads the log-probability of labels from clusters of classes, the frequent ones first.

    .. math:: \log p_y = \log h_y \; (y < S), \qquad
        \log p_y = \log h_{S + i} + \log c^i_{y - l_i} \; (l_i \le y < l_{i + 1}), \qquad
        h = \mathrm{softmax}(x H^\top + b), \; c^i = \mathrm{softmax}(x P_i^\top W_i^\top)

    Args:
        features: x, `[..., D]`, real; differentiable.
        head_weights: H, `[S + K, D]`, of the dtype of `features`: of the S most frequent
            classes, then one row a cluster; differentiable.
        tails: K pairs (P, W), one a cluster, of the dtype of `features`: a projection
            `[D_i, D]` and the weights `[C_i, D_i]` of its classes; differentiable.
        labels: classes y, int, `[...]`, in [0, S + sum(C)), sorted by frequency: those of the
            head, then those of the first cluster, and so on.
        head_bias: b, `[S + K]`; differentiable.
        ignore_index: a label, of any value, whose tokens have log-probability and gradient 0.
        block_size: classes formed at once; chosen from the shapes by default.

    Returns:
        One log-probability a label, `[...]`, float32 or wider, at most 0; NaN for a label out
        of range.

    Raises:
        TypeError: an argument is not real, `labels` not integer, or dtypes differ.
        ValueError: shapes do not fit, `tails` is empty, or `block_size` is less than 1.

    Example:
        >>> tail = (jnp.ones((1, 2)), jnp.zeros((4, 1)))
        >>> print(adaptive_log_softmax(jnp.ones(2), jnp.zeros((2, 2)), [tail], jnp.array(3)))
        -2.0794415

    Note:
        The conventions of PyTorch's AdaptiveLogSoftmaxWithLoss, whose parameters these are.
        Tokens are sorted by cluster, and a group of 256 visits the clusters of its labels
        alone: O(N (S + K) D) time and the sum over clusters of O(N_i C_i D_i), exactly, with
        no bound on how many tokens a cluster may get. (Under `vmap` a group visits all
        clusters.) Nothing of tokens x classes is kept: the derivative forms the logits again.
        Both modes, any order.

    Reference:
        Grave et al. (2017), Efficient softmax approximation for GPUs.
    """
    if len(tails) == 0:
        raise ValueError("`tails` must hold at least one cluster, got none.")
    tokens = prepare_layer(features, head_weights, head_bias, 1.0, None, prefix="head_")
    layer = tokens.layer
    clusters = [_cluster(i, layer, *tail) for i, tail in enumerate(tails)]
    num_frequent = layer.weights.shape[0] - len(clusters)
    if num_frequent < 0:
        raise ValueError(
            f"`head_weights` must hold a row for each of {len(clusters)} clusters, got"
            f" {layer.weights.shape[0]} rows."
        )
    ends = [num_frequent]
    for _, weights in clusters:
        ends.append(ends[-1] + weights.shape[0])
    labels = labels_of(labels, (*tokens.shape, 1), len(tokens.shape)).reshape(-1)
    rows = known_labels(labels, ends[-1], ignore_index)
    layer = without(layer, rows.ignored)

    index = sum((rows.labels >= end).astype(jnp.int32) for end in ends[:-1])
    assert isinstance(index, Array)
    in_head = jnp.where(
        index == 0,
        rows.labels,
        num_frequent + jnp.maximum(index, 1).astype(rows.labels.dtype) - 1,
    )
    nats = statistics(plan_for(layer, block_size), layer, in_head).surprise
    nats += _in_clusters(clusters, ends, layer.features, rows, index, block_size)
    return -rows.finish(nats).reshape(tokens.shape)


def _cluster(
    place: int, layer: Layer, projection: ArrayLike, weights: ArrayLike
) -> tuple[Array, Array]:
    """The arrays of a cluster, checked."""
    name = f"tails[{place}]"
    dtype = layer.features.dtype
    arrays = []
    for array in (projection, weights):
        given = to_float(array, name=name)[1]
        if given != dtype:
            raise TypeError(f"`{name}` must have the dtype {dtype} of `features`, got {given}.")
        arrays.append(jnp.asarray(array).astype(dtype))
    first, second = arrays
    width = layer.features.shape[1]
    fit = first.ndim == second.ndim == 2 and first.shape[1] == width
    if not fit or second.shape[1] != first.shape[0] or second.shape[0] == 0:
        raise ValueError(
            f"`{name}` must be a projection [D_i, {width}] and weights [C_i, D_i], got"
            f" {first.shape} and {second.shape}."
        )
    return first, second


def _in_clusters(
    clusters: list[tuple[Array, Array]],
    ends: list[int],
    features: Array,
    rows: Classes,
    index: Array,
    block_size: int | None,
) -> Array:
    """-log c of each label in its cluster, and 0 where it is in the head."""
    order = jnp.argsort(index)
    sorted_rows = (features[order], rows.labels[order], index[order])

    def visit(state: None, first: Array, some: Any) -> tuple[None, Array]:
        features, labels, index = some
        nats = jnp.zeros(labels.shape, computing_dtype(features.dtype))
        for i, (projection, weights) in enumerate(clusters):
            mine = index == i + 1
            at = jnp.where(mine, labels - ends[i], 0)

            # (Checkpointed inside of the branch, or a branch not taken would cost memory.)
            @jax.checkpoint
            def seen(
                features: Array, projection: Array, weights: Array, mine: Array, at: Array
            ) -> Array:
                hidden = lax.dot_general(
                    features,
                    projection,
                    (((1,), (1,)), ((), ())),
                    preferred_element_type=computing_dtype(features.dtype),
                )
                # (Not rounded to a narrow dtype in between.)
                layer = Layer(hidden, weights.astype(hidden.dtype), None, None, None)
                found = statistics(plan_for(layer, block_size), layer, at)
                return jnp.where(mine, found.surprise, 0)

            nats += lax.cond(
                jnp.any(mine),
                seen,
                lambda features, *_: vary(
                    jnp.zeros(features.shape[:1], computing_dtype(features.dtype)), features
                ),
                *(features, projection, weights, mine, at),
            )
        return state, nats

    size = min(_TOGETHER, max(1, features.shape[0]))
    nats = scan_blocks(visit, None, sorted_rows, size)[1]
    if nats is None:
        return jnp.zeros(index.shape, computing_dtype(features.dtype))
    return nats[jnp.argsort(order)]
