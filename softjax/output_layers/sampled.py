"""Sampled softmax: the sum over the vocabulary from a few classes drawn at random."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _inverse_cdf, _uint64
from softjax._api import POSITIVE, api
from softjax._inputs import check_int
from softjax._random import bits, check_key
from softjax._scan import scan_blocks
from softjax._softmax_stats import nll
from softjax._uint64 import WORD, Wide
from softjax.losses._labels import reduce_rows
from softjax.losses._reduction import check_reduction
from softjax.output_layers._layer import (
    Head,
    Tokens,
    layer_scores,
    prepare_layer,
    token_labels,
    without_dropped,
    without_idle,
)
from softjax.output_layers._stream import ENTRIES

__all__ = ["sampled_cross_entropy"]

LOG_BUCKETS = 12
BUCKETS = 2**LOG_BUCKETS  # of an octave of classes
POINT = 58  # binary digits of a place among the octaves that stand behind the point


@api("num_samples", "ignore_index", "reduction", temperature=POSITIVE)
def sampled_cross_entropy(
    key: Array,
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    *,
    num_samples: int,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    ignore_index: int | None = None,
    reduction: str | None = None,
) -> Array:
    r"""Estimates `cross_entropy` of a linear layer from a few classes, drawn log-uniformly.

    .. math:: \log\Big(e^{s_y} + \sum_{k : c_k \ne y} \frac{e^{s_{c_k}}}{m Q(c_k)}\Big) - s_y,
        \qquad s = (x W^\top + b) / T, \quad Q(c) = \frac{\log(1 + 1 / (c + 1))}{\log(V + 1)}

    Args:
        key: random key.
        features: x, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of any dtype, as in `linear_cross_entropy`, sorted by how frequent
            the classes are, the most frequent first; differentiable.
        labels: classes y, int, `[...]`.
        num_samples: m, at least 1: how many classes are drawn, with replacement, once for all
            tokens.
        bias: b, `[V]`; differentiable. -inf drops a class.
        temperature: T > 0, one number or one per token; differentiable.
        ignore_index: a label, of any value, whose tokens have loss and gradient 0, whatever
            they hold.
        reduction: "mean" over the tokens that are not ignored, "sum", or None.

    Returns:
        One loss per token, `[...]`, or one number with `reduction`; float32 or wider, at least
        0; NaN for a label out of range.

    Raises:
        TypeError: `key` is no key, an argument not real, `labels` not integer, or dtypes
            differ.
        ValueError: `key` is not one key, shapes do not fit, `num_samples` is less than 1, or
            `reduction` is none of the above.

    Example:
        >>> key = jax.random.key(0)
        >>> features, weights = jnp.ones((2, 3)), jnp.zeros((1, 3))
        >>> print(sampled_cross_entropy(
        ...     key, features, weights, jnp.array([0, 0]), num_samples=8))
        [0. 0.]

    Note:
        The sum inside of the logarithm has no bias: each candidate is divided by how often it
        is expected to be drawn, and the label is there with certainty, so it is left out where
        it is drawn as well. Classes are drawn in integers of 64 bits, so that every one of up
        to 2^31 has its share. The logarithm of the sum is biased: the loss is too small by
        about half the relative variance of the sum, O(1 / m), and the gradient is biased alike.
        Train with it, and report `linear_cross_entropy`.

        O(N (m + 1) D) time; O(N + m) numbers beside the features and the drawn rows are kept,
        because the derivative forms the logits again. The derivative holds the drawn classes
        fixed. Both modes, any order.

    Reference:
        Bengio and Senecal (2008), Adaptive importance sampling to accelerate training of a
        neural probabilistic language model; Jean et al. (2015), On using very large target
        vocabulary for neural machine translation.
    """
    check_key(key)
    check_reduction(reduction)
    num_samples = check_int(num_samples, name="num_samples", least=1)
    layer = prepare_layer(features, weights, bias, temperature, None)
    rows = token_labels(layer, labels, ignore_index)
    tokens, head = without_idle(layer.tokens, rows.ignored), layer.head
    num_classes = head.weights.shape[0]
    drawn = log_uniform(key, num_samples, num_classes)
    place = drawn.astype(layer.dtype)
    expected = num_samples * jnp.log1p(1 / (place + 1)) / math.log1p(num_classes)
    surplus = jnp.log(expected)
    candidates = _classes(head, drawn)

    def visit(_: None, first: Array, block: Any) -> tuple[None, Array]:
        return None, nats_of(candidates, surplus, *block)

    @jax.checkpoint
    def nats_of(
        candidates: Head, surplus: Array, tokens: Tokens, labels: Array, label_classes: Head
    ) -> Array:
        scores = layer_scores(tokens, candidates)[0] - surplus[None]
        scores = jnp.where(
            drawn.astype(labels.dtype)[None] == labels[:, None], -jnp.inf, scores
        )
        by_one = jax.tree.map(lambda x: x[:, None], (tokens, label_classes))
        chosen = jax.vmap(layer_scores)(*by_one)[0][:, 0, 0]
        together = jnp.concatenate([chosen[:, None], scores], 1)
        return nll(together, jnp.zeros_like(labels), 1)

    blocks = (tokens, rows.labels, _classes(head, rows.labels))
    nats = scan_blocks(visit, None, blocks, max(1, ENTRIES // num_samples))[1]
    nats = jnp.zeros(rows.labels.shape, layer.dtype) if nats is None else nats
    return reduce_rows(
        rows.finish(nats).reshape(layer.shape),
        labels,
        ignore_index=ignore_index,
        class_weights=None,
        reduction=reduction,
    )


def _classes(head: Head, chosen: Array) -> Head:
    """Some classes of a layer."""
    bias = None if head.bias is None else head.bias[chosen]
    return Head(without_dropped(head.weights[chosen], bias), bias)


def log_uniform(key: Array, num_samples: int, num_classes: int) -> Array:
    """Draws classes c in [0, n) of probability log(1 + 1 / (c + 1)) / log(n + 1)."""
    return log_uniform_of_bits(bits(key, (num_samples,)), num_classes)


def log_uniform_of_bits(random: Wide, num_classes: int) -> Array:
    """The log-uniform classes that 64 random bits each stand for.

    c + 1 is the whole part of 2^t, for t uniform in [0, log2(n + 1)). Both are fixed-point
    integers, because float32 holds no odd number above 2^24. An octave is cut into `BUCKETS`.
    In one of them 2^t = 2^octave (bucket + f) / BUCKETS, where f is linear in t but for a part
    so small that float32 holds it to 2^-36.
    """
    t = _uint64.multiply_high(
        random, _uint64.constant(int(math.log2(num_classes + 1) * 2.0**POINT))
    )
    octave = t.high >> (POINT - 32)
    place = Wide(t.high & (2 ** (POINT - 32) - 1), t.low)
    starts = Wide(*map(jnp.asarray, _bucket_starts()))
    read = lambda index: Wide(*(word[index] for word in starts))
    index = _inverse_cdf.bisect(read, BUCKETS, place) - 1
    bucket = (index + BUCKETS).astype(WORD)
    # The distance of t from the start of its bucket, times log 2, in units of 2^-75.
    rest = _uint64.shift_left(_uint64.subtract(place, read(index)), 75 - POINT)
    x = _uint64.multiply_high(rest, _uint64.constant(int(math.log(2) * 2.0**64)))
    # f = bucket (e^x - 1) in units of 2^-62, where x is at most 1 / BUCKETS.
    linear = _uint64.multiply_high(x, Wide(bucket << 19, jnp.zeros_like(bucket)))
    near = x.high.astype(jnp.float32) * 2.0**-43
    curve = bucket.astype(jnp.float32) * near * near * (1 + near / 3) / 2
    f = _uint64.add(linear, _uint64.shifted((curve * 2.0**43).astype(WORD), 62 - 43))
    digits = jnp.minimum(f.high, 2**30 - 1)  # the first 30 of f
    more = jnp.maximum(octave, LOG_BUCKETS) - LOG_BUCKETS  # digits that stand before the point
    fewer = LOG_BUCKETS - jnp.minimum(octave, LOG_BUCKETS)
    drawn = ((bucket >> fewer) << more) + (digits >> (30 - more))
    return jnp.clip(drawn.astype(jnp.int32) - 1, 0, num_classes - 1)


@functools.cache
def _bucket_starts() -> tuple[np.ndarray, np.ndarray]:
    """Where in an octave its buckets start, in units of 2^-POINT: two words each."""
    starts = [int(math.log2(1 + i / BUCKETS) * 2.0**POINT) for i in range(BUCKETS)]
    words = np.array([divmod(start, 2**32) for start in starts], np.uint32)
    return words[:, 0], words[:, 1]
