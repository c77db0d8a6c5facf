"""Adaptive softmax: a head of frequent classes, and clusters of rare ones behind it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import api
from softjax._inputs import Classes, computing_dtype, known_labels, labels_of
from softjax._mesh import vary
from softjax._scan import scan_blocks
from softjax.output_layers._layer import (
    Head,
    Tokens,
    common_dtype,
    match_dtypes,
    prepare_layer,
    products,
    real_array,
    without_idle,
)
from softjax.output_layers._stream import plan_for, statistics

__all__ = ["adaptive_log_softmax"]

_TOGETHER = 256  # tokens, sorted by cluster, that are taken at once


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
        head_weights: H, `[S + K, D]`, of any dtype, as in `linear_cross_entropy`: the rows of
            the S most frequent classes, then one row per cluster; differentiable.
        tails: K pairs (P, W), one per cluster: a projection `[D_i, D]` and the weights
            `[C_i, D_i]` of its classes; differentiable. x meets P as it meets H, and the
            result, float32 or wider, meets W in the wider dtype of the two.
        labels: classes y, int, `[...]`, in [0, S + sum(C)), sorted by frequency: those of the
            head, then those of the first cluster, and so on.
        head_bias: b, `[S + K]`; differentiable.
        ignore_index: a label, of any value, whose tokens have log-probability and gradient 0.
        block_size: classes formed at once; chosen from the shapes by default.

    Returns:
        One log-probability per label, `[...]`, float32 or wider, at most 0; NaN for a label out
        of range.

    Raises:
        TypeError: an argument is not real, `labels` not integer, or `head_bias` bool.
        ValueError: shapes do not fit, `tails` is empty, or `block_size` is less than 1.

    Example:
        >>> tail = (jnp.ones((1, 2)), jnp.zeros((4, 1)))
        >>> print(adaptive_log_softmax(jnp.ones(2), jnp.zeros((2, 2)), [tail], jnp.array(3)))
        -2.0794415

    Note:
        The conventions of PyTorch's AdaptiveLogSoftmaxWithLoss, whose parameters these are.
        Tokens are sorted by cluster, and a group of 256 visits the clusters of its labels
        alone: O(N (S + K) D) time and the sum over clusters of O(N_i C_i D_i), exactly, with
        no bound on how many tokens a cluster may get. Under `vmap` a group visits all
        clusters. Nothing of tokens x classes is kept: the derivative forms the logits again.
        Both modes, any order.

    Reference:
        Grave et al. (2017), Efficient softmax approximation for GPUs.
    """
    if len(tails) == 0:
        raise ValueError("`tails` must hold at least one cluster, got none.")
    layer = prepare_layer(features, head_weights, head_bias, 1.0, None, prefix="head_")
    head, width = layer.head, layer.tokens.features.shape[1]
    clusters = [_cluster(f"tails[{i}]", width, *tail) for i, tail in enumerate(tails)]
    num_frequent = head.weights.shape[0] - len(clusters)
    if num_frequent < 0:
        raise ValueError(
            f"`head_weights` must hold a row for each of {len(clusters)} clusters, got"
            f" {head.weights.shape[0]} rows."
        )
    sizes = [num_frequent, *(weights.shape[0] for _, weights in clusters)]
    ends = list(itertools.accumulate(sizes))
    labels = labels_of(labels, (*layer.shape, 1), len(layer.shape)).reshape(-1)
    rows = known_labels(labels, ends[-1], ignore_index)
    tokens = without_idle(layer.tokens, rows.ignored)
    starts = jnp.array(ends[:-1], labels.dtype)
    index = jnp.sum(rows.labels[:, None] >= starts[None], 1, dtype=labels.dtype)
    in_head = jnp.where(index == 0, rows.labels, num_frequent + index - 1)
    nll = statistics(plan_for(tokens, head, block_size), tokens, head, in_head).nll
    tail = _in_clusters(clusters, ends[:-1], tokens.features, rows, index, block_size)
    dtype = common_dtype(nll, tail)
    return -rows.finish(nll.astype(dtype) + tail.astype(dtype)).reshape(layer.shape)


def _cluster(
    name: str, width: int, projection: ArrayLike, weights: ArrayLike
) -> tuple[Array, Array]:
    """The arrays of a cluster, checked."""
    first, second = real_array(projection, name=name), real_array(weights, name=name)
    fit = first.ndim == second.ndim == 2 and first.shape[1] == width
    if not fit or second.shape[1] != first.shape[0] or second.shape[0] == 0:
        raise ValueError(
            f"`{name}` must be a projection [D_i, {width}] and weights [C_i, D_i], got"
            f" {first.shape} and {second.shape}."
        )
    return first, second


def _in_clusters(
    clusters: list[tuple[Array, Array]],
    starts: list[int],
    features: Array,
    rows: Classes,
    index: Array,
    block_size: int | None,
) -> Array:
    """-log c of each label in its cluster, and 0 where it is in the head."""
    order = jnp.argsort(index)
    dtype = computing_dtype(common_dtype(features, *jax.tree.leaves(clusters)))

    # Checkpoint inside of the branch, because a branch not taken would cost memory otherwise.
    @jax.checkpoint
    def seen(
        features: Array, cluster: tuple[Array, Array], is_mine: Array, labels: Array
    ) -> Array:
        projection, weights = cluster
        # The product stays in float32 between the two, and is not rounded to a narrow dtype.
        hidden = products(*match_dtypes(features, projection))
        hidden, weights = match_dtypes(hidden, weights)
        tokens, head = Tokens(hidden), Head(weights)
        found = statistics(plan_for(tokens, head, block_size), tokens, head, labels)
        return jnp.where(is_mine, found.nll.astype(dtype), 0)

    def unseen(features: Array, *_: Any) -> Array:
        return vary(jnp.zeros(features.shape[:1], dtype), features)

    def visit(state: None, first: Array, some: Any) -> tuple[None, Array]:
        features, labels, index = some
        nll = unseen(features)
        for i, cluster in enumerate(clusters):
            is_mine = index == i + 1
            at = jnp.where(is_mine, labels - starts[i], 0)
            nll += lax.cond(jnp.any(is_mine), seen, unseen, features, cluster, is_mine, at)
        return state, nll

    size = min(_TOGETHER, max(1, features.shape[0]))
    sorted_rows = features[order], rows.labels[order], index[order]
    nll = scan_blocks(visit, None, sorted_rows, size)[1]
    return unseen(features) if nll is None else nll[jnp.argsort(order)]
