"""The output layer of a large vocabulary: losses and statistics of logits never stored.

The logits of N tokens over V classes, z = features weights^T + bias, are formed block by block
of the vocabulary, and each block is reduced at once to a few numbers a token: softmax over the
union of two blocks is known from what is known of each. The derivative visits the blocks again
in the same way. Nothing of size N x V is kept, in either mode, at any order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from softjax._exact import log1p, where_finite
from softjax._exponential import mark_peaks, split_at_peak
from softjax._inputs import (
    NONNEGATIVE,
    PROBABILITY,
    Classes,
    broadcast,
    check_labels,
    computing_dtype,
    is_one,
    is_zero,
    known_labels,
    public,
    to_float,
)
from softjax._slices import AlongAxes
from softjax.losses import mean_loss, surprise
from softjax.reductions import log_sum

__all__ = ["linear_cross_entropy", "linear_statistics"]

ENTRIES = 2**20  # logits formed at once
TOKENS = 4096  # at most so many tokens are taken at once
DENSE = 2**22  # so many logits, or fewer, are kept for the derivative
LEAST = 256  # classes of a block, at least


class Statistics(NamedTuple):
    """What `linear_statistics` tells of each token, arrays of the shape of the tokens."""

    logsumexp: Array
    entropy: Array
    argmax: Array
    log_prob: Array | None


@public(
    "ignore_index",
    "reduction",
    "block_size",
    temperature=NONNEGATIVE,
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
) -> Array:
    r"""Measures `cross_entropy` of a linear layer whose logits are never stored.

    .. math:: z = x W^\top + b, \qquad s = c \tanh(z / c) / T, \qquad
        L = (1 - \epsilon) w_y (-\log p_y) + \frac{\epsilon}{V} \sum_j w_j (-\log p_j)
        + \lambda (\log Z)^2, \quad p = \mathrm{softmax}(s)

    Args:
        features: x, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of the dtype of `features`; differentiable.
        labels: classes y, int, `[...]`.
        bias: b, `[V]`; differentiable. -inf drops a class.
        temperature: T > 0, one number or one a token; differentiable.
        soft_cap: c > 0, acts on the logits before the temperature divides them; one number,
            differentiable.
        label_smoothing: epsilon in [0, 1], one number or one a token; differentiable.
        z_loss: factor lambda of the squared log-normaliser, one number or one a token;
            differentiable.
        ignore_index: a label, of any value, whose tokens have loss and gradient 0.
        class_weights: factors w, `[V]`; differentiable.
        example_weights: factors of the tokens' losses, `[...]`; differentiable.
        reduction: "mean" divides the sum by that of the example weights times the class weights
            of the labels, over the tokens not ignored (as PyTorch does); "sum"; or None.
        block_size: classes formed at once; chosen from the shapes by default. Given, it also
            holds where the logits would otherwise be small enough to be kept.

    Returns:
        One number, or one loss a token with `reduction=None`; float32 or wider.

    Raises:
        TypeError: an argument is not real, `labels` not integer, or the dtypes of `features`
            and `weights` differ.
        ValueError: shapes do not fit, or `reduction` or `block_size` is none of the above.

    Example:
        >>> print(linear_cross_entropy(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 1])))
        1.3862944

    Note:
        O(N V D) time. Memory: up to 2^22 logits are formed at once and their probabilities
        kept; above, some 2^20 are formed at a time, and the derivative forms them again (four
        matrix products in place of three). Products are taken in the dtype of the
        features and accumulated in float32 or wider, in the derivative too. The loss of a
        confident token and its gradient keep their digits, as in `cross_entropy`. Both modes,
        any order.

    Reference:
        Wijmans et al. (2025), Cut your losses in large-vocabulary language models; the
        derivative by blocks is that of Rabe and Staats (2021), Self-attention does not need
        O(n^2) memory.
    """
    if reduction not in ("mean", "sum", None):
        raise ValueError(f'`reduction` must be "mean", "sum" or None, got {reduction!r}.')
    tokens = _prepare(features, weights, bias, temperature, soft_cap)
    rows = _label_rows(tokens, labels, ignore_index)
    classes = None if class_weights is None else _class_weights(class_weights, tokens)
    layer = tokens.layer._replace(
        features=_without(tokens.layer.features, rows.ignored), classes=classes
    )
    plan = _plan(layer, block_size)._replace(even=not is_zero(label_smoothing))
    found = _statistics(plan, layer, rows.labels)

    loss = found.surprise
    if classes is not None:
        loss *= classes[rows.labels]
    if found.even is not None:
        epsilon = tokens.row(label_smoothing, "label_smoothing")
        total = layer.weights.shape[0] if classes is None else jnp.sum(classes)
        even = (total * found.logsumexp - found.even) / layer.weights.shape[0]
        loss = (1 - epsilon) * loss + epsilon * even
    if not is_zero(z_loss):
        loss += tokens.row(z_loss, "z_loss") * found.logsumexp**2
    loss = rows.finish(loss).reshape(tokens.shape)
    if reduction == "mean":
        return mean_loss(
            loss,
            jnp.broadcast_to(jnp.asarray(labels), tokens.shape),
            ignore_index=ignore_index,
            class_weights=classes,
            example_weights=example_weights,
        )
    if example_weights is not None:
        loss *= tokens.row(example_weights, "example_weights").reshape(tokens.shape)
    return jnp.sum(loss) if reduction == "sum" else loss


@public("block_size", temperature=NONNEGATIVE)
def linear_statistics(
    features: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    block_size: int | None = None,
) -> Statistics:
    r"""Tells what is usually asked of the logits of a linear layer, without storing them.

    .. math:: \log Z = \log \sum_j e^{s_j}, \quad H = -\sum_j p_j \log p_j, \quad
        \arg\max_j s_j, \quad \log p_y

    Args:
        features: x, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of the dtype of `features`; differentiable.
        labels: classes y, int, `[...]`, or None.
        bias: b, `[V]`; differentiable. -inf drops a class.
        temperature: T > 0, one number or one a token; differentiable.
        soft_cap: c > 0, before the temperature, as in `linear_cross_entropy`; differentiable.
        block_size: classes formed at once; chosen from the shapes by default.

    Returns:
        (logsumexp, entropy, argmax, log_prob), each `[...]`: float32 or wider, but argmax int32
        (the first of equals); log_prob is None without labels, and NaN where one is out of
        range.

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
    tokens = _prepare(features, weights, bias, temperature, soft_cap)
    asked = jnp.zeros(tokens.shape, jnp.int32) if labels is None else labels
    rows = _label_rows(tokens, asked, None)
    plan = _plan(tokens.layer, block_size)._replace(dense=False, entropy=True)
    found = _statistics(plan, tokens.layer, rows.labels)
    log_prob = None
    if labels is not None:
        log_prob = -rows.finish(found.surprise).reshape(tokens.shape)
    shaped = lambda x: x.reshape(tokens.shape)
    return Statistics(
        shaped(found.logsumexp), shaped(found.entropy), shaped(found.argmax), log_prob
    )


class _Layer(NamedTuple):
    """The arrays that logits are made of; those that are None play no part."""

    features: Array  # [N, D]
    weights: Array  # [V, D]
    bias: Array | None  # [V]
    temperature: Array | None  # [N]
    soft_cap: Array | None  # []
    classes: Array | None = None  # [V], the weights of the even sum


class _Plan(NamedTuple):
    """How the vocabulary is taken, and what is asked for besides (static)."""

    block: int
    dense: bool
    even: bool = False
    entropy: bool = False


class _Found(NamedTuple):
    """Of each token: what a pass over its logits s has found."""

    surprise: Array  # -log p of the label
    logsumexp: Array
    even: Array | None  # sum(classes * s), over the classes not dropped
    entropy: Array | None
    argmax: Array | None


class _Tokens(NamedTuple):
    layer: _Layer
    shape: tuple[int, ...]  # of the tokens
    dtype: jnp.dtype

    def row(self, option: ArrayLike, name: str) -> Array:
        """An option as one number a token, [N]."""
        value, _ = to_float(option, name=name)
        value = broadcast(value.astype(self.dtype), self.shape, name=name, target="labels")
        return value.reshape(-1)


def _prepare(
    features: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike | None,
    temperature: ArrayLike,
    soft_cap: ArrayLike | None,
) -> _Tokens:
    dtype = computing_dtype(to_float(features, name="features")[1])
    if to_float(weights, name="weights")[1] != to_float(features, name="features")[1]:
        raise TypeError(
            f"`weights` must have the dtype {jnp.asarray(features).dtype} of `features`, got"
            f" {jnp.asarray(weights).dtype}."
        )
    features, weights = jnp.asarray(features), jnp.asarray(weights)
    if not jnp.issubdtype(features.dtype, jnp.floating):
        features, weights = features.astype(dtype), weights.astype(dtype)
    if features.ndim < 1 or weights.ndim != 2 or features.shape[-1] != weights.shape[1]:
        raise ValueError(
            f"`features` must be [..., D] and `weights` [V, D], got {features.shape} and"
            f" {weights.shape}."
        )
    if weights.shape[0] == 0:
        raise ValueError("`weights` must hold at least one class, got 0.")
    tokens = _Tokens(
        _Layer(features.reshape(-1, features.shape[-1]), weights, None, None, None),
        features.shape[:-1],
        dtype,
    )
    if bias is not None:
        bias, _ = to_float(bias, name="bias")
        if bias.shape != weights.shape[:1]:
            raise ValueError(f"`bias` must be [V], {weights.shape[:1]}, got {bias.shape}.")
        bias = bias.astype(dtype)
    if soft_cap is not None:
        soft_cap, _ = to_float(soft_cap, name="soft_cap")
        if soft_cap.ndim:
            raise ValueError(f"`soft_cap` must be one number, got the shape {soft_cap.shape}.")
        soft_cap = soft_cap.astype(dtype)
    layer = tokens.layer._replace(
        bias=bias,
        soft_cap=soft_cap,
        temperature=None if is_one(temperature) else tokens.row(temperature, "temperature"),
    )
    return tokens._replace(layer=layer)


def _label_rows(tokens: _Tokens, labels: ArrayLike, ignore_index: int | None) -> Classes:
    labels = check_labels(labels, (*tokens.shape, 1), len(tokens.shape)).reshape(-1)
    return known_labels(labels, tokens.layer.weights.shape[0], ignore_index)


def _class_weights(class_weights: ArrayLike, tokens: _Tokens) -> Array:
    weights, _ = to_float(class_weights, name="class_weights")
    if weights.shape != tokens.layer.weights.shape[:1]:
        raise ValueError(
            f"`class_weights` must be [V], {tokens.layer.weights.shape[:1]}, got"
            f" {weights.shape}."
        )
    return weights.astype(tokens.dtype)


def _without(features: Array, ignored: Array | None) -> Array:
    """Features of ignored tokens are 0: whatever they hold reaches no gradient."""
    return features if ignored is None else jnp.where(ignored[:, None], 0, features)


def _plan(layer: _Layer, block_size: int | None) -> _Plan:
    num_tokens, num_classes = layer.features.shape[0], layer.weights.shape[0]
    if block_size is not None:
        if block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
        return _Plan(min(block_size, num_classes), dense=False)
    block = max(LEAST, ENTRIES // max(1, min(num_tokens, TOKENS)))
    dense = num_tokens * num_classes <= DENSE
    return _Plan(min(block, num_classes), dense)


def _statistics(plan: _Plan, layer: _Layer, labels: Array) -> _Found:
    if plan.dense:
        return _keep_logits(plan, layer, labels)
    num_tokens = layer.features.shape[0]
    if num_tokens <= TOKENS:
        return _stream(plan, layer, labels)
    rows = (layer.features, layer.temperature, labels)

    def some(rows: tuple[Array, Array | None, Array]) -> _Found:
        features, temperature, labels = rows
        part = layer._replace(features=features, temperature=temperature)
        return _stream(plan, part, labels)

    return _in_parts(some, rows, num_tokens)


def _keep_logits(plan: _Plan, layer: _Layer, labels: Array) -> _Found:
    """The plain way, for few logits: the derivative remembers their probabilities."""
    scores = _scores(layer)
    even = None
    if plan.even:
        even = jnp.sum(jnp.where(scores == -jnp.inf, 0, scores) * _class_row(layer), 1)
    log_total = jnp.squeeze(log_sum(scores, (1,)), 1)
    return _Found(surprise(scores, labels, 1), log_total, even, None, None)


def _in_parts(some: Callable[[Any], _Found], rows: Any, num_tokens: int) -> _Found:
    whole = num_tokens - num_tokens % TOKENS
    shaped = lambda x: x[:whole].reshape(-1, TOKENS, *x.shape[1:])
    found = lax.map(some, jax.tree.map(shaped, rows))
    found = jax.tree.map(lambda x: x.reshape(whole), found)
    if whole == num_tokens:
        return found
    tail = some(jax.tree.map(lambda x: x[whole:], rows))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, tail)


class _Seen(NamedTuple):
    """The online state of some classes: softmax statistics that two parts merge into one."""

    peak: Array  # max(s); -inf where all is dropped
    rest: Array  # sum(exp(s - peak)) over all but one entry equal to the peak
    moment: Array  # sum((s - peak) exp(s - peak)), at most 0
    argmax: Array
    chosen: Array  # s of the label; -inf where it has not been seen
    even: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stream(plan: _Plan, layer: _Layer, labels: Array) -> _Found:
    """One pass over the vocabulary."""
    num_tokens = layer.features.shape[0]
    dtype = computing_dtype(layer.features.dtype)
    low, zero = jnp.full(num_tokens, -jnp.inf, dtype), jnp.zeros(num_tokens, dtype)
    first = jnp.zeros(num_tokens, jnp.int32)
    seen = _Seen(low, zero, zero, first, low, zero if plan.even else None)

    def visit(seen: _Seen, start: Array, block: _Layer) -> _Seen:
        return _merge(seen, _observe(plan, start, block, labels))

    return _finish(plan, _over_blocks(plan.block, visit, seen, layer))


@functools.partial(_stream.defjvp, symbolic_zeros=True)
def _stream_jvp(plan: _Plan, primals: Any, tangents: Any) -> tuple[_Found, _Found]:
    # A rule, for memory: its tangent visits the blocks once more, and each visit is
    # checkpointed, so that the transpose forms the logits again and keeps none. It is linear in
    # the tangents; log p, whose label keeps its digits, comes from the value.
    layer, labels = primals
    found = _stream(plan, layer, labels)
    layer_dot = jax.tree.map(
        lambda dot: None if isinstance(dot, SymbolicZero) else dot,
        tangents[0],
        is_leaf=lambda dot: isinstance(dot, SymbolicZero),
    )
    zero = jnp.zeros_like(found.logsumexp)
    start = _Found(
        zero, zero, zero if plan.even else None, zero if plan.entropy else None, None
    )
    missing = -jnp.expm1(-found.surprise)

    def visit(dots: _Found, start: Array, block: _Layer, dot: _Layer) -> _Found:
        return jax.tree.map(jnp.add, dots, tangent(start, block, dot, labels, found, missing))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(
        start: Array, block: _Layer, dot: _Layer, labels: Array, found: _Found, missing: Array
    ) -> _Found:
        scores, scores_dot = _push(block, dot)
        kept = scores != -jnp.inf
        margins = jnp.where(kept, scores - found.logsumexp[:, None], 0)
        probs = jnp.where(kept, jnp.exp(margins), 0)
        scores_dot = jnp.where(kept, scores_dot, 0)
        places = lax.broadcasted_iota(labels.dtype, scores.shape, 1) + start.astype(
            labels.dtype
        )
        hit = places == labels[:, None]
        pull = jnp.where(hit, -missing[:, None], probs)
        even = entropy = None
        if plan.even:
            even = jnp.sum(scores_dot * _class_row(block), 1)
            if dot.classes is not None:
                even += jnp.sum(jnp.where(kept, scores, 0) * dot.classes[None], 1)
        if found.entropy is not None:
            slope = -probs * (margins + found.entropy[:, None])
            entropy = jnp.sum(slope * scores_dot, 1)
        return _Found(
            jnp.sum(pull * scores_dot, 1), jnp.sum(probs * scores_dot, 1), even, entropy, None
        )

    dots = _over_blocks(plan.block, visit, start, layer, layer_dot)
    if found.argmax is not None:
        dots = dots._replace(argmax=np.zeros(found.argmax.shape, jax.dtypes.float0))
    return found, dots


def _push(block: _Layer, dot: _Layer) -> tuple[Array, Array]:
    """The scores of a block, and their tangent in the arrays that move."""
    moving = {name: x for name, x in dot._asdict().items() if x is not None}
    moving.pop("classes", None)
    if not moving:
        scores = _scores(block)
        return scores, jnp.zeros_like(scores)
    at = {name: getattr(block, name) for name in moving}
    return jax.jvp(lambda moved: _scores(block._replace(**moved)), (at,), (moving,))


def _scores(block: _Layer) -> Array:
    """The logits of a block of classes, [N, B], capped and divided by the temperature."""
    dtype = computing_dtype(block.features.dtype)
    scores = lax.dot_general(
        block.features,
        block.weights,
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    )
    if block.bias is not None:
        scores += block.bias[None]
    if block.soft_cap is not None:
        scores = block.soft_cap * jnp.tanh(scores / block.soft_cap)
        if block.bias is not None:
            scores = jnp.where(block.bias[None] == -jnp.inf, -jnp.inf, scores)
    if block.temperature is not None:
        scores /= block.temperature[:, None]
    return scores


def _class_row(block: _Layer) -> Array:
    if block.classes is None:
        return jnp.ones((1, 1), computing_dtype(block.features.dtype))
    return block.classes[None]


def _observe(plan: _Plan, start: Array, block: _Layer, labels: Array) -> _Seen:
    """The state of one block of classes."""
    # (Behind the barrier, or scores formed twice may not be rounded alike, and miss the peak.)
    scores = lax.optimization_barrier(_scores(block))
    peak = lax.stop_gradient(jnp.max(scores, 1))
    below = scores - where_finite(peak)[:, None]
    weights = jnp.exp(below)
    num_peaks, others = split_at_peak(mark_peaks(weights), AlongAxes((1,)))
    rest = jnp.where(peak == -jnp.inf, 0, jnp.squeeze(others + (num_peaks - 1), 1))
    moment = jnp.zeros_like(peak)
    argmax = jnp.zeros(peak.shape, jnp.int32)
    if plan.entropy:
        moment = jnp.sum(jnp.where(weights > 0, below, 0) * weights, 1)
        argmax = jnp.argmax(scores, 1).astype(jnp.int32) + start.astype(jnp.int32)
    place = labels - start.astype(labels.dtype)
    inside = (place >= 0) & (place < scores.shape[1])
    chosen = jnp.take_along_axis(scores, jnp.where(inside, place, 0)[:, None], 1)[:, 0]
    chosen = jnp.where(inside, chosen, -jnp.inf)
    even = None
    if plan.even:
        even = jnp.sum(jnp.where(scores == -jnp.inf, 0, scores) * _class_row(block), 1)
    return _Seen(peak, rest, moment, argmax, chosen, even)


def _merge(a: _Seen, b: _Seen) -> _Seen:
    peak = jnp.maximum(a.peak, b.peak)
    anchor = where_finite(peak)
    behind = a.peak >= b.peak

    def lowered(part: _Seen) -> tuple[Array, Array, Array]:
        shift = jnp.where(part.peak == -jnp.inf, 0, part.peak - anchor)
        scale = jnp.where(part.peak == -jnp.inf, 0, jnp.exp(shift))
        return scale, scale * part.rest, scale * (part.moment + shift * (1 + part.rest))

    (a_scale, a_rest, a_moment), (b_scale, b_rest, b_moment) = lowered(a), lowered(b)
    return _Seen(
        peak,
        a_rest + b_rest + jnp.where(behind, b_scale, a_scale),
        a_moment + b_moment,
        jnp.where(behind, a.argmax, b.argmax),
        jnp.maximum(a.chosen, b.chosen),
        None if a.even is None or b.even is None else a.even + b.even,
    )


def _finish(plan: _Plan, seen: _Seen) -> _Found:
    log_total = log1p(seen.rest)
    logsumexp = seen.peak + log_total
    empty = seen.peak == -jnp.inf
    surprise = (where_finite(seen.peak) - seen.chosen) + log_total
    surprise = jnp.where(seen.chosen == -jnp.inf, jnp.inf, surprise)
    surprise = jnp.where(jnp.isnan(logsumexp), jnp.nan, surprise)
    entropy = argmax = None
    if plan.entropy:
        entropy = jnp.where(empty, 0, log_total - seen.moment / (1 + seen.rest))
        argmax = seen.argmax
    return _Found(surprise, logsumexp, seen.even, entropy, argmax)


def _over_blocks(block: int, visit: Callable[..., Any], state: Any, *layers: _Layer) -> Any:
    """Visits the classes block by block: visit(state, first class, the block of each layer).

    The layers are all cut alike; the last block may be smaller.
    """
    by_class = ("weights", "bias", "classes")
    num_classes = layers[0].weights.shape[0]
    whole = num_classes - num_classes % block
    cut = [{name: getattr(layer, name) for name in by_class} for layer in layers]

    def visit_cut(state: Any, start: Array, parts: Any) -> Any:
        blocks = [layer._replace(**part) for layer, part in zip(layers, parts, strict=True)]
        return visit(state, start, *blocks)

    def step(state: Any, xs: Any) -> tuple[Any, None]:
        return visit_cut(state, *xs), None

    if whole == block:
        state = visit_cut(state, jnp.array(0), jax.tree.map(lambda x: x[:whole], cut))
    elif whole:
        shaped = lambda x: x[:whole].reshape(-1, block, *x.shape[1:])
        starts = jnp.arange(0, whole, block)
        state = lax.scan(step, state, (starts, jax.tree.map(shaped, cut)))[0]
    if whole < num_classes:
        tail = jax.tree.map(lambda x: x[whole:], cut)
        state = visit_cut(state, jnp.array(whole), tail)
    return state
