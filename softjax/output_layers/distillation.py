"""Distillation between two linear layers over one vocabulary; neither's logits are stored."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softjax import _online as online
from softjax._api import POSITIVE, api
from softjax._autodiff import nonzero
from softjax._elementary import expm1_over_twice, log1p
from softjax._float import where_finite
from softjax._inputs import Problem, mask
from softjax._mesh import vary
from softjax.entropies import divergence
from softjax.losses._reduction import check_reduction, reduce, shares_and_masses
from softjax.output_layers._layer import (
    Head,
    Layer,
    Tokens,
    common_dtype,
    idle_tokens,
    layer_scores,
    prepare_layer,
    without_idle,
)
from softjax.output_layers._stream import (
    by_classes,
    by_tokens,
    plan_for,
    push,
    wide_tangents,
)

__all__ = ["linear_distillation_loss"]

TwoTokens = tuple[Tokens, Tokens]  # the teacher's, then the student's, as in all pairs below
TwoHeads = tuple[Head, Head]

_FIRST = 8  # classes from which the distance of the logits is estimated


@api("reduction", "block_size", temperature=POSITIVE)
def linear_distillation_loss(
    features: ArrayLike,
    weights: ArrayLike,
    teacher_features: ArrayLike,
    teacher_weights: ArrayLike,
    *,
    temperature: ArrayLike,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    where: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
) -> Array:
    r"""Measures `distillation_loss` of two linear layers whose logits are never stored.

    .. math:: T^2 D\big(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\big), \qquad
        s = x W^\top + b, \; t = x' W'^\top + b'

    Args:
        features: x of the student, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of any dtype, as in `linear_cross_entropy`; differentiable.
        teacher_features: x' of the teacher, `[..., D']`, real; differentiable.
        teacher_weights: W', `[V, D']`, of any dtype; differentiable.
        temperature: T in (0, inf], one number or one per token; differentiable. From 2^38 on
            (in float64 2^57) the loss is its limit, half the variance of s - t over the
            classes, as far as logits smaller by 10^7 differ.
        bias: b, `[V]`; differentiable. -inf drops a class.
        teacher_bias: b', `[V]`; differentiable. -inf drops a class.
        soft_cap: c > 0 of c tanh(s / c), before the temperature; one number, differentiable.
        teacher_soft_cap: the same for t.
        where: mask of the tokens, bool, `[...]`; False leaves one out, whatever it holds.
        example_weights: factors of the tokens' losses, `[...]`; differentiable. A token of
            weight 0 does not count, whatever NaN or inf it holds, or its loss.
        reduction: "mean" divides the sum by that of the example weights; "sum"; or None.
        block_size: classes formed at once; chosen from the shapes by default. Given, it also
            holds where the logits would otherwise be small enough to be kept.

    Returns:
        One number, or one loss per token with `reduction=None`; float32 or wider, at least 0;
        inf, and constant, where the student drops what the teacher keeps.

    Raises:
        TypeError: an argument is not real, `where` not bool, or a bias bool.
        ValueError: shapes do not fit, `reduction` or `block_size` is none of the above, or
            `temperature` is a Python number that is not positive.

    Example:
        >>> print(linear_distillation_loss(
        ...     jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.ones((2, 1)), jnp.zeros((4, 1)),
        ...     temperature=2.0))
        0.0

    Note:
        O(N V (D + D')) time. Nothing of the size N V is kept, in either mode, at any order, but
        for up to 2^22 logits, as in `linear_cross_entropy`: one pass over both layers, and one
        more for the derivative. Where both are close, the small divergence keeps its digits, as
        far as the logits have them. Logits of +inf do not share the mass here, so they make the
        loss 0, infinite or NaN. Wrap the teacher in `jax.lax.stop_gradient` to save its part of
        the derivative.

    Reference:
        Hinton, Vinyals and Dean (2015), Distilling the knowledge in a neural network.
    """
    check_reduction(reduction)
    student, teacher = prepare_pair(
        (features, weights, bias, temperature, soft_cap),
        (teacher_features, teacher_weights, teacher_bias, temperature, teacher_soft_cap),
    )
    student, teacher = map(_no_hotter, (student, teacher))
    tokens, heads, shares = match_pair(student, teacher, where, example_weights)
    dtype = shares.dtype
    plan = plan_for(student.tokens, student.head, block_size)
    if plan.dense:
        # For few logits the derivative keeps them, and forms none again.
        scores = pair_scores(tokens, heads)
        problems = [Problem(x, (1,), None, dtype) for x in scores]
        nats = divergence(*problems)[:, 0]
    else:
        nats = by_tokens(lambda some: compare(plan.block, some, heads).nats, tokens)
    if tokens[1].temperature is not None:
        factor = tokens[1].temperature.astype(dtype)
        finite = jnp.where(jnp.isinf(nats), 0, nats)  # An infinite loss is constant.
        # In this order nothing overflows where the loss does not.
        nats = jnp.where(jnp.isinf(nats), nats, factor * finite * factor)
    return reduce(nats.reshape(student.shape), shares, shares, reduction)


def _no_hotter(layer: Layer) -> Layer:
    """The layer, with temperatures cut off where the loss no longer depends on them."""
    temperature = layer.tokens.temperature
    if temperature is None:
        return layer
    limit = 2.0**57 if temperature.dtype == jnp.float64 else 2.0**38
    temperature = jnp.minimum(temperature, limit)
    return layer._replace(tokens=layer.tokens._replace(temperature=temperature))


def prepare_pair(student: Iterable[Any], teacher: Iterable[Any]) -> tuple[Layer, Layer]:
    """Both layers, from the arguments of `prepare_layer` for each."""
    taught = prepare_layer(*teacher, prefix="teacher_", features_name="teacher_features")
    return prepare_layer(*student), taught


def match_pair(
    student: Layer,
    teacher: Layer,
    where: ArrayLike | None,
    example_weights: ArrayLike | None,
) -> tuple[TwoTokens, TwoHeads, Array]:
    """The tokens and the heads of both, and the factors of the tokens' losses.

    Tokens that are left out reach no gradient, whatever they hold.
    """
    _check_alike(student, teacher)
    shares, _ = shares_and_masses(
        jnp.ones(student.shape, common_dtype(student.dtype, teacher.dtype)),
        None,
        ignore_index=None,
        class_weights=None,
        example_weights=example_weights,
    )
    tokens = teacher.tokens, student.tokens
    if where is not None or example_weights is not None:
        idle = idle_tokens(shares.reshape(-1), *tokens)
        if where is not None:
            idle |= ~mask(where, student.shape, name="tokens").reshape(-1)
        shares = jnp.where(idle.reshape(shares.shape), 0, shares)
        tokens = without_idle(tokens[0], idle), without_idle(tokens[1], idle)
    return tokens, (teacher.head, student.head), shares


def _check_alike(student: Layer, teacher: Layer) -> None:
    if teacher.shape != student.shape:
        raise ValueError(
            f"`teacher_features` must hold the tokens {student.shape} of `features`, got"
            f" {teacher.shape}."
        )
    sizes = [layer.head.weights.shape[0] for layer in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher_weights` must hold the {sizes[0]} classes of `weights`, got {sizes[1]}."
        )


class Divergences(NamedTuple):
    """The divergence of each token, and the log-sums of both layers.

    Where all classes are close, log(p / q) is x + shift, and not a difference of logarithms.
    """

    nats: Array
    teacher: Array
    student: Array
    shift: Array
    close: Array  # 1, or 0


class _PairState(NamedTuple):
    """Both online states, the teacher's with averages of how far the two are apart."""

    teacher: online.OnlineState  # of x = t - s - anchor, and of e^-x - 1 + x where |x| < 1
    student: online.OnlineState
    widest: Array  # max |x|; inf where only one of the two drops a class
    missing: Array  # 1 where the student drops what the teacher keeps


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def compare(block: int, tokens: TwoTokens, heads: TwoHeads) -> Divergences:
    """One pass over the vocabulary of both."""
    anchor = anchor_of(tokens, heads)
    shape, dtype = anchor.shape, anchor.dtype
    zero = jnp.zeros(shape, dtype)
    seen = _PairState(online.init(shape, 2, dtype), online.init(shape, 0, dtype), zero, zero)

    def visit(seen: _PairState, start: Array, heads: TwoHeads) -> _PairState:
        t, s = pair_scores(tokens, heads)
        taught, learned, both = _kept_masks(t, s)
        apart = jnp.where(both, t, 0) - jnp.where(both, s, 0)
        apart = jnp.where(both, apart - anchor[:, None], 0)
        size = jnp.where(taught == learned, jnp.abs(lax.stop_gradient(apart)), jnp.inf)
        close = jnp.where(size < 1, apart, 0)
        curve = close * close * expm1_over_twice(-close)
        return _PairState(
            online.update(seen.teacher, t, jnp.stack([apart, curve], -1)),
            online.update(seen.student, s, jnp.zeros((*s.shape, 0), dtype)),
            jnp.maximum(seen.widest, jnp.max(size, 1)),
            jnp.maximum(seen.missing, jnp.max((taught & ~learned).astype(dtype), 1)),
        )

    seen = by_classes(block, visit, vary(seen, tokens), heads)
    (average, teacher), (_, student) = online.finish(seen.teacher), online.finish(seen.student)
    mean, curve = average[:, 0], average[:, 1]
    # With E over the teacher, D = log E[e^-x] + E[x]; where all are close, it is the difference
    # of two small numbers that are not negative.
    close = seen.widest < 1
    shift = log1p(jnp.where(close, curve - mean, 0))
    near = curve - shift * shift * expm1_over_twice(shift)
    far = (where_finite(student) - where_finite(teacher)) + (mean + anchor)
    nats = jnp.where(close, near, far)
    endless = (seen.missing > 0) & ~jnp.isnan(nats)
    nats = jnp.where(seen.teacher.total == 0, 0, jnp.where(endless, jnp.inf, nats))
    return Divergences(
        nats, where_finite(teacher), where_finite(student), shift, close.astype(dtype)
    )


def pair_scores(
    tokens: TwoTokens, heads: TwoHeads, narrow: Iterable[DTypeLike | None] = (None, None)
) -> tuple[Array, Array]:
    """The scores of both, in one dtype; `narrow` as in `layer_scores`."""
    t, s = (layer_scores(*each)[0] for each in zip(tokens, heads, narrow, strict=True))
    dtype = common_dtype(t, s)
    return t.astype(dtype), s.astype(dtype)


def _kept_masks(t: Array, s: Array) -> tuple[Array, Array, Array]:
    """What the teacher keeps, what the student keeps, and what both keep."""
    taught, learned = t != -jnp.inf, s != -jnp.inf
    return taught, learned, taught & learned


def anchor_of(tokens: TwoTokens, heads: TwoHeads) -> Array:
    """About how far the scores of teacher and student are apart, from a few classes."""
    few = jax.tree.map(lambda x: x[:_FIRST], heads)
    t, s = map(lax.stop_gradient, pair_scores(tokens, few))
    both = jnp.isfinite(t) & jnp.isfinite(s)
    apart = jnp.where(both, t, 0) - jnp.where(both, s, 0)
    return jnp.sum(apart, 1) / jnp.maximum(jnp.sum(both, 1, dtype=apart.dtype), 1)


@functools.partial(compare.defjvp, symbolic_zeros=True)
def _compare_jvp(block: int, primals: Any, tangents: Any) -> tuple[Divergences, Divergences]:
    # This is a rule to save memory: the tangent visits the blocks once more, and each visit is
    # checkpointed.
    tokens, heads = primals
    found = compare(block, *primals)
    tokens_dots, heads_dots = nonzero(tangents)
    is_finite = (found.nats != jnp.inf)[:, None]
    known = Divergences(*(jnp.where(jnp.isinf(x), 0, x)[:, None] for x in found))
    fixed = tokens, wide_tangents(tokens_dots), known, anchor_of(*primals)[:, None]

    def visit(state: Any, start: Array, heads: Any) -> Any:
        return jax.tree.map(jnp.add, state, tangent(heads, fixed))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(heads: Any, fixed: Any) -> tuple[Array, ...]:
        (heads, heads_dots), (tokens, tokens_dots, known, anchor) = heads, fixed
        pushed = map(push, tokens, heads, zip(tokens_dots, heads_dots, strict=True))
        (t, t_dot), (s, s_dot) = (
            (x.astype(anchor.dtype), dot.astype(anchor.dtype)) for x, dot in pushed
        )
        taught, learned, both = _kept_masks(t, s)
        p, q, ratio = probs_and_ratio(t, s, known, anchor)
        t_dot, s_dot = jnp.where(taught, t_dot, 0), jnp.where(learned, s_dot, 0)
        close = both & (known.close == 1)
        more = jnp.where(close, p * jnp.expm1(-jnp.where(close, ratio, 0)), q - p)
        terms = p * (ratio - known.nats) * t_dot + more * s_dot
        terms = jnp.where(is_finite, terms, 0)
        return jnp.sum(terms, 1), jnp.sum(p * t_dot, 1), jnp.sum(q * s_dot, 1)

    zero = jnp.zeros_like(found.nats)
    state = vary((zero,) * 3, tokens)
    nats, taught, learned = by_classes(block, visit, state, (heads, heads_dots))
    return found, Divergences(nats, taught, learned, learned - taught, zero)


def probs_and_ratio(
    t: Array, s: Array, known: Divergences, anchor: Array
) -> tuple[Array, Array, Array]:
    """Both probabilities of some classes, and log(p / q), which is 0 if either is dropped."""
    taught, learned, both = _kept_masks(t, s)
    t_log = jnp.where(taught, t, 0) - known.teacher
    s_log = jnp.where(learned, s, 0) - known.student
    p = jnp.where(taught, jnp.exp(jnp.where(taught, t_log, 0)), 0)
    q = jnp.where(learned, jnp.exp(jnp.where(learned, s_log, 0)), 0)
    close = both & (known.close == 1)
    apart = jnp.where(close, t, 0) - jnp.where(close, s, 0)
    apart = jnp.where(close, (apart - anchor) + known.shift, 0)
    return p, q, jnp.where(close, apart, jnp.where(both, t_log - s_log, 0))
