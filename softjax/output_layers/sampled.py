"""Sampled softmax: the sum over the vocabulary from a few classes drawn at random."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import POSITIVE, api
from softjax._inputs import check_int
from softjax._random import check_key
from softjax._scan import scan_blocks
from softjax.losses._softmax_stats import nll
from softjax.output_layers._layer import (
    Layer,
    cooled,
    layer_scores,
    prepare_layer,
    shown,
    token_labels,
    without,
)
from softjax.output_layers._stream import ENTRIES

__all__ = ["sampled_cross_entropy"]


@api("num_samples", "ignore_index", temperature=POSITIVE)
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
) -> Array:
    r"""Estimates `cross_entropy` of a linear layer from a few classes, drawn log-uniformly.

    .. math:: \log\Big(e^{s_y} + \sum_{k : c_k \ne y} \frac{e^{s_{c_k}}}{m Q(c_k)}\Big) - s_y,
        \qquad s = (x W^\top + b) / T, \quad Q(c) = \frac{\log(1 + 1 / (c + 1))}{\log(V + 1)}

    Args:
        key: random key.
        features: x, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of the dtype of `features`, sorted by how frequent the classes
            are, the most frequent first; differentiable.
        labels: classes y, int, `[...]`.
        num_samples: m, at least 1: how many classes are drawn, with replacement, once for all
            tokens.
        bias: b, `[V]`; differentiable. -inf drops a class.
        temperature: T > 0, one number or one a token; differentiable.
        ignore_index: a label, of any value, whose tokens have loss and gradient 0.

    Returns:
        One loss a token, `[...]`, float32 or wider, at least 0; NaN for a label out of range.
        `mean_loss` averages them.

    Raises:
        TypeError: `key` is no key, an argument not real, `labels` not integer, or dtypes
            differ.
        ValueError: `key` is not one key, shapes do not fit, or `num_samples` is less than 1.

    Example:
        >>> key = jax.random.key(0)
        >>> features, weights = jnp.ones((2, 3)), jnp.zeros((1, 3))
        >>> print(sampled_cross_entropy(
        ...     key, features, weights, jnp.array([0, 0]), num_samples=8))
        [0. 0.]

    Note:
        The sum inside of the logarithm has no bias: each candidate is divided by how often it
        is expected to be drawn, the label is there with certainty, and drawn once more by
        accident it is left out. Its logarithm has: the loss is too small by about half the
        relative variance of the sum, O(1 / m), and the gradient is biased alike. Train with it,
        and report `linear_cross_entropy`. O(N (m + 1) D) time; O(N + m) numbers beside the
        features and the drawn rows are kept, as the derivative forms the logits again. The
        derivative holds the drawn classes fixed. Both modes, any order.

    Reference:
        Bengio and Senecal (2008), Adaptive importance sampling to accelerate training of a
        neural probabilistic language model; Jean et al. (2015), On using very large target
        vocabulary for neural machine translation.
    """
    check_key(key)
    num_samples = check_int(num_samples, name="num_samples", least=1)
    tokens = prepare_layer(features, weights, bias, temperature, None)
    rows = token_labels(tokens, labels, ignore_index)
    layer = without(tokens.layer, rows.ignored)
    num_classes = layer.weights.shape[0]
    drawn = log_uniform(key, num_samples, num_classes)
    place = drawn.astype(tokens.dtype)
    expected = num_samples * jnp.log1p(1 / (place + 1)) / math.log1p(num_classes)
    surplus = jnp.log(expected)
    candidates = _classes(layer, drawn)

    def visit(_: None, first: Array, block: Any) -> tuple[None, Array]:
        return None, nats_of(candidates, surplus, *block)

    @jax.checkpoint
    def nats_of(
        candidates: _Classes,
        surplus: Array,
        features: Array,
        heat: Array | None,
        labels: Array,
        own: _Classes,
    ) -> Array:
        layer = Layer(features, candidates.weights, candidates.bias, heat, None)
        scores = layer_scores(layer) - surplus[None]
        scores = jnp.where(
            drawn.astype(labels.dtype)[None] == labels[:, None], -jnp.inf, scores
        )
        chosen = jnp.einsum(
            "nd,nd->n", features, own.weights, preferred_element_type=tokens.dtype
        )
        chosen = chosen if own.bias is None else chosen + own.bias
        chosen = chosen if heat is None else cooled(chosen, heat)
        together = jnp.concatenate([chosen[:, None], scores], 1)
        return nll(together, jnp.zeros_like(labels), 1)

    blocks = (layer.features, layer.temperature, rows.labels, _classes(layer, rows.labels))
    nats = scan_blocks(visit, None, blocks, max(1, ENTRIES // num_samples))[1]
    nats = jnp.zeros(rows.labels.shape, tokens.dtype) if nats is None else nats
    return rows.finish(nats).reshape(tokens.shape)


class _Classes(NamedTuple):
    """Some classes of a layer."""

    weights: Array
    bias: Array | None


def _classes(layer: Layer, chosen: Array) -> _Classes:
    bias = None if layer.bias is None else layer.bias[chosen]
    return _Classes(shown(layer.weights[chosen], bias), bias)


def log_uniform(key: Array, num_samples: int, num_classes: int) -> Array:
    """Draws classes c in [0, n) of probability log(1 + 1 / (c + 1)) / log(n + 1)."""
    # c + 1 is the whole part of 2^t for t uniform in [0, log2(n + 1)). A second uniform fills
    # the grid of the first, so that rare classes are drawn as often as they should be.
    first, second = jax.random.uniform(key, (2, num_samples))
    octaves = math.log2(num_classes + 1)
    t = octaves * first
    octave = jnp.floor(t)
    part = (t - octave) + octaves * float(jnp.finfo(t.dtype).eps) * second
    drawn = jnp.floor(jnp.ldexp(jnp.exp2(part), octave.astype(jnp.int32)))
    return jnp.clip(drawn.astype(jnp.int32) - 1, 0, num_classes - 1)
