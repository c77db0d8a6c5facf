"""The vocabulary in one pass: block by block, each reduced at once to a few numbers per token.

One score per token stands apart from the sum of the others: the label's in a loss, the largest
in the statistics. So a small loss or entropy, which is nearly that sum, keeps its digits. The
others are an online softmax state, which two disjoint sets of classes merge into one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal
from jax.sharding import PartitionSpec

from softjax import _online as online
from softjax._autodiff import nonzero
from softjax._elementary import log1p
from softjax._float import where_finite
from softjax._inputs import check_int, computing_dtype
from softjax._mesh import AxisName, Layout, names_of, num_devices, vary
from softjax._scan import scan_blocks
from softjax._slices import AlongAxes
from softjax._softmax_stats import row_statistics
from softjax.output_layers._layer import Head, Tokens, layer_scores, leaves_of, replaced

ENTRIES = 2**20  # logits formed at once
TOKENS = 4096  # tokens taken at once, at most
DENSE = 2**22  # logits that are kept for the derivative, at most
LEAST = 256  # classes of a block, at least
SCALE = 2.0**-32  # With it the sum of 2^32 scores is at most the largest number.


class Plan(NamedTuple):
    """The size of the blocks, and which statistics the pass finds; all static."""

    block: int
    dense: bool
    uniform: bool = False
    entropy: bool = False
    mesh_axes: tuple[str, ...] = ()  # over which the classes are spread
    layout: Layout | None = None  # on an explicit mesh

    @property
    def slices(self) -> AlongAxes:
        return AlongAxes((1,), self.mesh_axes)


class Found(NamedTuple):
    """What a pass over the logits s of each token has found."""

    nll: Array  # -log p of the label
    logsumexp: Array
    uniform_nll: Array | None = None  # mean(-c log p) over the classes not dropped
    mass: Array | None = None  # sum(c) over these, with c their weights
    num_kept: Array | None = None
    entropy: Array | None = None
    argmax: Array | None = None
    peak: Array | None = None  # max(s), a constant
    log_total: Array | None = None  # log(sum(exp(s - peak)))


def plan_for(
    tokens: Tokens, head: Head, block_size: int | None, axis_name: AxisName | Layout = None
) -> Plan:
    num_tokens, num_classes = tokens.features.shape[0], head.weights.shape[0]
    plan = Plan(num_classes, dense=False, mesh_axes=names_of(axis_name))
    if isinstance(axis_name, Layout):
        plan = plan._replace(layout=axis_name)
        mesh = jax.sharding.get_abstract_mesh()
        num_tokens //= num_devices(axis_name.tokens, mesh)
        num_classes //= num_devices(axis_name.classes, mesh)
    if block_size is not None:
        size = check_int(block_size, name="block_size", least=1)
        return plan._replace(block=min(size, num_classes))
    block = max(LEAST, ENTRIES // max(1, min(num_tokens, TOKENS)))
    dense = num_tokens * num_classes <= DENSE
    return plan._replace(block=min(block, num_classes), dense=dense)


def statistics(plan: Plan, tokens: Tokens, head: Head, labels: Array) -> Found:
    """The statistics of the logits of a layer that `plan` asks for, at labels in [0, V)."""
    if plan.layout is not None:
        return _on_devices(plan, plan.layout, tokens, head, labels)
    if plan.mesh_axes:
        # This comes before all loops, because its transpose sums the tokens' gradient over
        # devices.
        tokens = vary(tokens, head)
    if plan.dense:
        # For few logits the derivative keeps their weights, and forms no logits again.
        scores, _ = layer_scores(tokens, head)
        weights = class_row(head, scores.dtype) if plan.uniform else None
        found = row_statistics(plan.slices, scores, labels, weights)
        return Found(found.nll, found.logsumexp, found.uniform_nll)
    return by_tokens(lambda some: _stream(plan, some[0], head, some[1]), (tokens, labels))


def _on_devices(plan: Plan, layout: Layout, tokens: Tokens, head: Head, labels: Array) -> Found:
    """The same where each device takes its tokens and its classes, so that none is gathered."""
    plan = plan._replace(layout=None, mesh_axes=layout.classes)
    run = lambda *args: statistics(plan, *vary(args, but=layout.classes))
    per_token, per_class = PartitionSpec(layout.tokens), PartitionSpec(layout.classes)
    return jax.shard_map(
        run,
        in_specs=(per_token, per_class, per_token),
        out_specs=per_token,
        axis_names={*layout.tokens, *layout.classes},
    )(tokens, head, labels)


def by_tokens(function: Callable[[Any], Any], arrays: Any) -> Any:
    """`function` of arrays that have one entry per token, for `TOKENS` at a time."""
    if jax.tree.leaves(arrays)[0].shape[0] <= TOKENS:
        return function(arrays)
    return scan_blocks(lambda _, __, some: (None, function(some)), None, arrays, TOKENS)[1]


def by_classes(block: int, visit: Callable[..., Any], state: Any, heads: Any) -> Any:
    """The state after visit(state, first class, heads of a block) has seen all blocks."""
    step = lambda state, first, heads: (visit(state, first, heads), None)
    return scan_blocks(step, vary(state, heads), heads, block)[0]


class _Uniform(NamedTuple):
    """Sums over the classes not dropped, with c their weights."""

    costs: Array  # of c (peak - s)
    mass: Array  # of c
    num_kept: Array


class _Leader(NamedTuple):
    raw: Array  # the largest score before the cap and the temperature, where none tie
    argmax: Array
    chosen: Array  # s of the label; -inf where it has not been seen


class _Seen(NamedTuple):
    """The state of some classes, from which that of more classes can be merged."""

    apart: Array  # the score that stands apart; -inf where it has not been seen
    others: online.OnlineState  # all others, with SCALE times their scores as values
    leader: _Leader | None
    uniform: _Uniform | None

    @property
    def peak(self) -> Array:
        return lax.stop_gradient(jnp.maximum(self.apart, self.others.peak))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stream(plan: Plan, tokens: Tokens, head: Head, labels: Array) -> Found:
    """One pass over the vocabulary."""
    dtype = jax.eval_shape(layer_scores, tokens, head)[0].dtype
    zero = jnp.zeros(labels.shape, dtype)
    low = zero - jnp.inf
    seen = _Seen(
        low,
        online.init(labels.shape, int(plan.entropy), dtype),
        _Leader(low, zero.astype(jnp.int32), low) if plan.entropy else None,
        _Uniform(zero, zero, zero) if plan.uniform else None,
    )

    if plan.mesh_axes:
        labels -= plan.slices.first_place(head.weights.shape[0], labels.dtype)

    def visit(seen: _Seen, start: Array, some: Head) -> _Seen:
        return _merge(seen, _observe(plan, start, tokens, some, labels))

    seen = by_classes(plan.block, visit, vary(seen, tokens), head)
    if plan.mesh_axes:
        seen = _merge_devices(plan, head.weights.shape[0], seen)
    return _finish(seen)


def _observe(plan: Plan, start: Array, tokens: Tokens, head: Head, labels: Array) -> _Seen:
    """The state of one block of classes."""
    scores, raw = layer_scores(tokens, head)
    scores = _clip(scores)
    place = labels - start.astype(labels.dtype)
    place = jnp.where((place >= 0) & (place < scores.shape[1]), place, -1)
    pick = lambda x, at: jnp.take_along_axis(x, jnp.maximum(at, 0)[:, None], 1)[:, 0]
    apart = jnp.where(place < 0, -jnp.inf, pick(scores, place))
    leader = uniform = None
    values = jnp.zeros((*scores.shape, 0), scores.dtype)
    if plan.entropy:
        place = jnp.argmax(raw, 1).astype(jnp.int32)
        leader = _Leader(pick(raw, place), place + start.astype(jnp.int32), apart)
        apart, values = pick(scores, place), (SCALE * scores)[..., None]
    is_apart = lax.broadcasted_iota(place.dtype, scores.shape, 1) == place[:, None]
    others = online.observe(jnp.where(is_apart, -jnp.inf, scores), values)
    seen = _Seen(apart, others, leader, uniform)
    if plan.uniform:
        kept, weights = scores != -jnp.inf, class_row(head, scores.dtype)
        costs = _gap(seen.peak[:, None], scores) * weights
        uniform = _Uniform(
            jnp.sum(jnp.where(kept & (weights != 0), costs, 0), 1),
            jnp.sum(jnp.where(kept, weights, 0), 1),
            jnp.sum(kept, 1, dtype=scores.dtype),
        )
    return seen._replace(uniform=uniform)


def _merge(a: _Seen, b: _Seen) -> _Seen:
    others, apart = online.merge(a.others, b.others), jnp.maximum(a.apart, b.apart)
    leader = uniform = None
    if a.leader is not None and b.leader is not None:
        # The lesser of two leaders joins the others.
        is_first = a.leader.raw >= b.leader.raw
        choose = lambda x, y: jnp.where(is_first, x, y)
        leader = jax.tree.map(choose, a.leader, b.leader)
        leader = leader._replace(chosen=jnp.maximum(a.leader.chosen, b.leader.chosen))
        apart, lesser = choose(a.apart, b.apart), choose(b.apart, a.apart)
        values = (SCALE * lesser)[:, None, None]
        others = online.merge(others, online.observe(lesser[:, None], values))
    seen = _Seen(apart, others, leader, uniform)
    if a.uniform is not None and b.uniform is not None:
        raised = lambda x, u: u.costs + jnp.where(u.mass == 0, 0, _gap(seen.peak, x)) * u.mass
        uniform = jax.tree.map(jnp.add, a.uniform, b.uniform)._replace(
            costs=raised(a.peak, a.uniform) + raised(b.peak, b.uniform)
        )
    return seen._replace(uniform=uniform)


def _merge_devices(plan: Plan, length: int, seen: _Seen) -> _Seen:
    """The state of the classes of all devices, each of which has `length` of them."""
    mesh_axes = plan.mesh_axes
    total = functools.partial(lax.psum, axis_name=mesh_axes)
    highest = functools.partial(lax.pmax, axis_name=mesh_axes)

    def from_owner(owns: Array, score: Array) -> Array:
        """The score of the one device that owns it; -inf where none does."""
        owners, score = total((owns.astype(score.dtype), jnp.where(owns, score, 0)))
        return jnp.where(owners > 0, score, -jnp.inf)

    apart, others, leader, uniform = seen
    if leader is None:
        apart = from_owner(apart != -jnp.inf, apart)
    else:
        # The first of the devices whose leaders tie owns the leader of all. The leaders of the
        # other devices are added to `others`. A NaN counts as a leader.
        raw = highest(leader.raw)
        here = leader.argmax + plan.slices.first_place(length, leader.argmax.dtype)
        none = jnp.iinfo(here.dtype).max
        argmax = lax.pmin(jnp.where(leader.raw < raw, none, here), mesh_axes)
        owns = argmax == here
        lesser = jnp.where(owns, -jnp.inf, apart)
        values = (SCALE * lesser)[:, None, None]
        others = online.merge(others, online.observe(lesser[:, None], values))
        apart = from_owner(owns, apart)
        chosen = from_owner(leader.chosen != -jnp.inf, leader.chosen)
        leader = _Leader(raw, argmax, chosen)
    peak = highest(others.peak)
    scale = jnp.exp(others.peak - where_finite(peak))
    sums = total((others.total * scale, others.sums * scale[:, None]))
    merged = _Seen(apart, online.OnlineState(peak, *sums), leader, None)
    if uniform is not None:
        raised = jnp.where(uniform.mass == 0, 0, _gap(merged.peak, seen.peak)) * uniform.mass
        uniform = _Uniform(*total(uniform._replace(costs=uniform.costs + raised)))
    return merged._replace(uniform=uniform)


def _finish(seen: _Seen) -> Found:
    apart, others, leader, uniform = seen
    top = seen.peak
    anchor, is_empty = where_finite(top), top == -jnp.inf
    own, rest = jnp.exp(apart - anchor), others.total * jnp.exp(others.peak - anchor)
    # Where the score apart leads, own - 1 is 0, and `rest` is all that counts.
    log_total = jnp.where(is_empty, 0, log1p(rest + (own - 1)))
    chosen = apart if leader is None else leader.chosen
    logsumexp = jnp.where(top == _highest(top), jnp.inf, top) + log_total
    found = Found(_gap(top, chosen) + log_total, logsumexp, peak=top, log_total=log_total)
    if uniform is not None:
        num_kept = jnp.maximum(uniform.num_kept, 1)
        uniform_nll = (uniform.costs + uniform.mass * log_total) / num_kept
        found = found._replace(uniform_nll=uniform_nll, mass=uniform.mass, num_kept=num_kept)
    if leader is not None:
        average = online.finish(others)[0][:, 0] / SCALE
        below = jnp.where(rest == 0, 0, rest * (anchor - average))
        below += jnp.where(own == 0, 0, own * (anchor - apart))
        entropy = log_total + below / jnp.where(is_empty, 1, own + rest)
        found = found._replace(entropy=entropy, argmax=leader.argmax)
    return found


def _highest(x: Array) -> float:
    return float(jnp.finfo(x.dtype).max)


def _clip(scores: Array) -> Array:
    """Infinite scores become the largest number, whose differences are no NaN."""
    # Keep this order, because XLA's CPU backend lets a NaN through as the second operand.
    return jnp.minimum(_highest(scores), scores)


def _gap(peak: Array, scores: Array) -> Array:
    """How far clipped scores are below a peak; infinitely far if it alone is infinite."""
    highest = _highest(scores)
    far = (peak == highest) & (scores < highest)
    return jnp.where(far, jnp.inf, where_finite(peak) - scores)


@functools.partial(_stream.defjvp, symbolic_zeros=True)
def _stream_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Found, Found]:
    # This is a rule to save memory: its tangent visits the blocks once more, and each visit is
    # checkpointed, so that the transpose forms the logits again and keeps none. It is linear in
    # the tangents. The label's 1 - p comes from the value, because 1 - exp(log p) would cancel.
    tokens, head, labels = primals
    found = _stream(plan, *primals)
    if plan.mesh_axes:
        labels -= plan.slices.first_place(head.weights.shape[0], labels.dtype)
    tokens_dot, head_dot = nonzero(tangents[:2])
    is_finite = (found.nll != jnp.inf)[:, None]  # An infinite loss is constant.
    missing = jnp.where(is_finite[:, 0], -jnp.expm1(-found.nll), 0)
    fixed = tokens, wide_tangents(tokens_dot), labels, found._replace(argmax=None), missing
    fixed = vary(fixed, head) if plan.mesh_axes else fixed

    def visit(dots: Found, start: Array, heads: Any) -> Found:
        return jax.tree.map(jnp.add, dots, tangent(start, heads, fixed))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(start: Array, heads: Any, fixed: Any) -> Found:
        (head, head_dot), (tokens, tokens_dot, labels, found, missing) = heads, fixed
        scores, scores_dot = push(tokens, head, (tokens_dot, head_dot))
        scores = _clip(scores)
        kept = scores != -jnp.inf
        below = (scores - where_finite(found.peak)[:, None]) - found.log_total[:, None]
        probs = jnp.where(kept, jnp.exp(below), 0)
        scores_dot = jnp.where(kept, scores_dot, 0)
        total = lambda slope: jnp.sum(slope * scores_dot, 1)
        places = lax.broadcasted_iota(labels.dtype, scores.shape, 1)
        is_label = places + start.astype(labels.dtype) == labels[:, None]
        pull = jnp.where(is_label, -missing[:, None], jnp.where(is_finite, probs, 0))
        zero, log_total = jnp.zeros_like(missing), total(probs)
        dots = Found(total(pull), log_total, peak=zero, log_total=log_total)
        if plan.uniform:
            weights = jnp.where(kept, class_row(head, scores.dtype), 0)
            uniform_nll, mass = total(found.mass[:, None] * probs - weights), zero
            if head_dot.class_weights is not None:
                mass_dot = jnp.where(kept, head_dot.class_weights[None], 0)
                mass = jnp.sum(mass_dot, 1)
                uniform_nll -= jnp.sum(jnp.where(kept, below, 0) * mass_dot, 1)
            uniform_nll /= found.num_kept
            dots = dots._replace(uniform_nll=uniform_nll, mass=mass, num_kept=zero)
        if plan.entropy:
            margins = jnp.where(probs == 0, 0, below)
            entropy = -total(probs * (margins + found.entropy[:, None]))
            dots = dots._replace(entropy=entropy)
        return dots

    start = jax.tree.map(jnp.zeros_like, found._replace(argmax=None))
    dots: Found = by_classes(plan.block, visit, vary(start, tokens), (head, head_dot))
    dots = jax.tree.map(plan.slices.sum_over_devices, dots)
    return found, dots._replace(argmax=zero_from_primal(found.argmax, symbolic_zeros=True))


def wide_tangents(tokens_dot: Tokens) -> Tokens:
    """Tangents of which the cotangents, one per block, are added up in float32 or wider."""
    return jax.tree.map(lambda dot: dot.astype(computing_dtype(dot.dtype)), tokens_dot)


def push(tokens: Tokens, head: Head, dots: Any) -> tuple[Array, Array]:
    """The scores of a block, and their tangent in the arrays that have one."""
    at = (tokens, head)
    moved = {i: dot for i, dot in enumerate(leaves_of(dots)) if dot is not None}
    primals = {i: x.astype(moved[i].dtype) for i, x in enumerate(leaves_of(at)) if i in moved}
    narrow = tokens.features.dtype

    def scores_at(moved: dict[int, Array]) -> Array:
        tokens, head = replaced(at, moved)
        return layer_scores(tokens, head, narrow)[0]

    return jax.jvp(scores_at, (primals,), (moved,))


def class_row(head: Head, dtype: jnp.dtype) -> Array:
    """The class weights, or 1, to broadcast against logits."""
    weights = head.class_weights
    return jnp.ones((1, 1), dtype) if weights is None else weights[None]
