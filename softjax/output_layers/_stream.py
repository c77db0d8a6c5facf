"""The vocabulary in one pass: block by block, each reduced at once to a few numbers a token."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softjax._elementary import log1p
from softjax._float import where_finite
from softjax._inputs import check_int, computing_dtype
from softjax._mesh import vary
from softjax._scan import scan_blocks
from softjax._scores import FAR
from softjax.losses._softmax_stats import below_peak
from softjax.losses._softmax_stats import statistics as row_statistics
from softjax.output_layers._layer import Layer, layer_scores

ENTRIES = 2**20  # logits formed at once
TOKENS = 4096  # at most so many tokens are taken at once
DENSE = 2**22  # so many logits, or fewer, are kept for the derivative
LEAST = 256  # classes of a block, at least


class Plan(NamedTuple):
    """How the vocabulary is taken, and what is asked for besides (static)."""

    block: int
    dense: bool
    even: bool = False
    entropy: bool = False


class Found(NamedTuple):
    """Of each token: what a pass over its logits s has found."""

    surprise: Array  # -log p of the label
    peak: Array  # max(s), a constant
    log_total: Array  # log(sum(exp(s - peak)))
    even: Array | None = None  # mean(-c log p) over the classes not dropped
    mass: Array | None = None  # sum(c) over these, with c their weights
    num_kept: Array | None = None  # how many they are
    entropy: Array | None = None
    argmax: Array | None = None

    @property
    def logsumexp(self) -> Array:
        return self.peak + self.log_total


def plan_for(layer: Layer, block_size: int | None) -> Plan:
    num_tokens, num_classes = layer.features.shape[0], layer.weights.shape[0]
    if block_size is not None:
        size = check_int(block_size, name="block_size", least=1)
        return Plan(min(size, num_classes), dense=False)
    block = max(LEAST, ENTRIES // max(1, min(num_tokens, TOKENS)))
    dense = num_tokens * num_classes <= DENSE
    return Plan(min(block, num_classes), dense)


def statistics(plan: Plan, layer: Layer, labels: Array) -> Found:
    """What is asked for of the logits of a layer, at labels in [0, V)."""
    if plan.dense:
        return _keep_logits(plan, layer, labels)
    rows = (layer.features, layer.temperature, labels)

    def visit(_: None, first: Array, rows: Any) -> tuple[None, Found]:
        features, temperature, labels = rows
        part = layer._replace(features=features, temperature=temperature)
        return None, _stream(plan, part, labels)

    num_tokens = layer.features.shape[0]
    if num_tokens <= TOKENS:
        return visit(None, jnp.array(0), rows)[1]
    found: Found = scan_blocks(visit, None, rows, TOKENS)[1]
    return found


def _keep_logits(plan: Plan, layer: Layer, labels: Array) -> Found:
    """The plain way, for few logits: the derivative remembers their weights."""
    classes = _class_row(layer) if plan.even else None
    found = row_statistics(1, layer_scores(layer), labels, classes)
    return Found(found.nll, found.logsumexp, jnp.zeros(()), found.uniform_nll)


class _Even(NamedTuple):
    """Sums over the classes not dropped, with c their weights."""

    costs: Array  # of c (peak - s)
    mass: Array  # of c
    num_kept: Array


class _Seen(NamedTuple):
    """The online state of some classes: softmax statistics that two parts merge into one."""

    peak: Array  # max(s); -inf where all is dropped
    rest: Array  # sum(exp(s - peak)) over all but one entry equal to the peak
    moment: Array  # sum((s - peak) exp(s - peak)), at most 0
    argmax: Array
    chosen: Array  # s of the label; -inf where it has not been seen
    even: _Even | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stream(plan: Plan, layer: Layer, labels: Array) -> Found:
    """One pass over the vocabulary."""
    num_tokens = layer.features.shape[0]
    dtype = computing_dtype(layer.features.dtype)
    low, zero = jnp.full(num_tokens, -jnp.inf, dtype), jnp.zeros(num_tokens, dtype)
    first = jnp.zeros(num_tokens, jnp.int32)
    even = _Even(zero, zero, zero) if plan.even else None
    seen = _Seen(low, zero, zero, first, low, even)

    def visit(seen: _Seen, start: Array, block: Layer) -> _Seen:
        return _merge(seen, _observe(plan, start, block, labels))

    return _finish(plan, over_blocks(plan.block, visit, seen, layer))


@functools.partial(_stream.defjvp, symbolic_zeros=True)
def _stream_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Found, Found]:
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
    zero = jnp.zeros_like(found.peak)
    start = _Dots(zero, zero, zero, zero, zero)
    finite = found.surprise != jnp.inf  # An infinite surprise is constant.
    missing = jnp.where(finite, -jnp.expm1(-found.surprise), 0)

    def visit(dots: _Dots, start: Array, block: Layer, dot: Layer) -> _Dots:
        return jax.tree.map(jnp.add, dots, tangent(start, block, dot, labels, found, missing))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(
        start: Array, block: Layer, dot: Layer, labels: Array, found: Found, missing: Array
    ) -> _Dots:
        scores, scores_dot = push(block, dot)
        kept = scores != -jnp.inf
        below = _lower(scores, found.peak) - found.log_total[:, None]
        probs = jnp.where(kept, jnp.exp(below), 0)
        margins = jnp.where(probs == 0, 0, below)
        scores_dot = jnp.where(kept, scores_dot, 0)
        places = lax.broadcasted_iota(labels.dtype, scores.shape, 1) + start.astype(
            labels.dtype
        )
        hit = places == labels[:, None]
        pull = jnp.where(hit, -missing[:, None], jnp.where(finite[:, None], probs, 0))
        even = mass = entropy = zero
        if found.mass is not None and found.num_kept is not None:
            slope = jnp.where(kept, found.mass[:, None] * probs - _class_row(block), 0)
            even = jnp.sum(slope * scores_dot, 1)
            if dot.classes is not None:
                costs = jnp.where(kept & (below != -jnp.inf), -below, 0)
                even += jnp.sum(costs * dot.classes[None], 1)
                mass = jnp.sum(jnp.where(kept, dot.classes[None], 0), 1)
            even /= found.num_kept
        if found.entropy is not None:
            slope = -probs * (margins + found.entropy[:, None])
            entropy = jnp.sum(slope * scores_dot, 1)
        return _Dots(
            jnp.sum(pull * scores_dot, 1), jnp.sum(probs * scores_dot, 1), even, mass, entropy
        )

    dots: _Dots = over_blocks(plan.block, visit, start, layer, layer_dot)
    return found, Found(
        dots.surprise,
        peak=zero,
        log_total=dots.log_total,
        even=dots.even if plan.even else None,
        mass=dots.mass if plan.even else None,
        num_kept=zero if plan.even else None,
        entropy=dots.entropy if plan.entropy else None,
        argmax=zero_from_primal(found.argmax, symbolic_zeros=True),
    )


class _Dots(NamedTuple):
    """The tangents of what a pass has found, where there are any; else zeros."""

    surprise: Array
    log_total: Array
    even: Array
    mass: Array
    entropy: Array


def push(block: Layer, dot: Layer) -> tuple[Array, Array]:
    """The scores of a block, and their tangent in the arrays that move."""
    moving = {name: x for name, x in dot._asdict().items() if x is not None}
    moving.pop("classes", None)
    if not moving:
        scores = layer_scores(block)
        return scores, jnp.zeros_like(scores)
    at = {name: getattr(block, name) for name in moving}
    return jax.jvp(lambda moved: layer_scores(block._replace(**moved)), (at,), (moving,))


def _class_row(block: Layer) -> Array:
    if block.classes is None:
        return jnp.ones((1, 1), computing_dtype(block.features.dtype))
    return block.classes[None]


def _observe(plan: Plan, start: Array, block: Layer, labels: Array) -> _Seen:
    """The state of one block of classes."""
    # (Behind the barrier, or scores formed twice may not be rounded alike, and miss the peak.)
    scores = lax.optimization_barrier(layer_scores(block))
    peak = lax.stop_gradient(jnp.max(scores, 1))
    below = _lower(scores, peak)
    weights = jnp.exp(below)
    is_peak = below == 0
    num_peaks = jnp.sum(is_peak, 1, dtype=peak.dtype)
    share = jnp.where(is_peak, (1 / jnp.maximum(num_peaks, 1))[:, None], 0)
    rest = jnp.sum(weights - share, 1)
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
        kept, classes = scores != -jnp.inf, _class_row(block)
        costs = below_peak(peak[:, None], scores) * classes
        even = _Even(
            jnp.sum(jnp.where(kept & (classes != 0), costs, 0), 1),
            jnp.sum(jnp.where(kept, classes, 0), 1),
            jnp.sum(kept, 1, dtype=peak.dtype),
        )
    return _Seen(peak, rest, moment, argmax, chosen, even)


def _lower(scores: Array, peak: Array) -> Array:
    """Scores less the peak of their row, at most 0; infinite ones are at a peak of inf."""
    # (In this order: XLA's CPU backend lets a NaN through as the second operand.)
    high = float(jnp.finfo(scores.dtype).max)
    anchor = jnp.where(peak == jnp.inf, high, where_finite(peak))
    return jnp.minimum(high, scores) - anchor[:, None]


def _merge(a: _Seen, b: _Seen) -> _Seen:
    peak = jnp.maximum(a.peak, b.peak)
    behind = a.peak >= b.peak

    def lowered(part: _Seen) -> tuple[Array, Array, Array]:
        shift = jnp.maximum(-FAR, _lower(part.peak[:, None], peak)[:, 0])
        scale = jnp.where(part.peak == -jnp.inf, 0, jnp.exp(shift))
        return scale, scale * part.rest, scale * (part.moment + shift * (1 + part.rest))

    def raised(part: _Seen, even: _Even) -> _Even:
        rise = jnp.where(even.mass == 0, 0, below_peak(peak, part.peak))
        return even._replace(costs=even.costs + rise * even.mass)

    (a_scale, a_rest, a_moment), (b_scale, b_rest, b_moment) = lowered(a), lowered(b)
    even = None
    if a.even is not None and b.even is not None:
        even = jax.tree.map(jnp.add, raised(a, a.even), raised(b, b.even))
    return _Seen(
        peak,
        a_rest + b_rest + jnp.where(behind, b_scale, a_scale),
        a_moment + b_moment,
        jnp.where(behind, a.argmax, b.argmax),
        jnp.maximum(a.chosen, b.chosen),
        even,
    )


def _finish(plan: Plan, seen: _Seen) -> Found:
    log_total = log1p(seen.rest)
    surprise = below_peak(seen.peak, seen.chosen) + log_total
    surprise = jnp.where(seen.chosen == -jnp.inf, jnp.inf, surprise)
    surprise = jnp.where(jnp.isnan(log_total), jnp.nan, surprise)
    found = Found(surprise, seen.peak, log_total)
    if seen.even is not None:
        costs, mass, count = seen.even
        count = jnp.maximum(count, 1)
        even = (costs + mass * log_total) / count
        found = found._replace(even=even, mass=mass, num_kept=count)
    if plan.entropy:
        entropy = log_total - seen.moment / (1 + seen.rest)
        found = found._replace(entropy=entropy, argmax=seen.argmax)
    return found


def over_blocks(block: int, visit: Callable[..., Any], state: Any, *layers: Layer) -> Any:
    """Visits the classes block by block: visit(state, first class, the block of each layer).

    The layers are all cut alike.
    """
    by_class = ("weights", "bias", "classes")
    cut = [{name: getattr(layer, name) for name in by_class} for layer in layers]

    def visit_cut(state: Any, first: Array, parts: Any) -> tuple[Any, None]:
        blocks = [layer._replace(**part) for layer, part in zip(layers, parts, strict=True)]
        return visit(state, first, *blocks), None

    return scan_blocks(visit_cut, vary(state, layers), cut, block)[0]
