"""The Jensen-Shannon divergence of two linear layers over one vocabulary, without their logits.

One pass over both layers finds their normalisers, and a second one sums the terms, because the
mixture of the two distributions needs both normalisers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._api import POSITIVE, PROBABILITY, api
from softjax._divergence import divergence_terms
from softjax._inputs import computing_dtype
from softjax._mesh import vary
from softjax.entropies import jensen_shannon_divergence, mixture_log_ratios
from softjax.losses._reduction import check_reduction, reduce
from softjax.output_layers._layer import Tokens
from softjax.output_layers._stream import by_classes, by_tokens, plan_for
from softjax.output_layers.distillation import (
    TwoHeads,
    TwoTokens,
    anchor_of,
    compare,
    match_pair,
    pair_scores,
    prepare_pair,
    probs_and_ratio,
)

__all__ = ["linear_jensen_shannon_divergence"]


@api("reduction", "block_size", weight=PROBABILITY, temperature=POSITIVE)
def linear_jensen_shannon_divergence(
    features: ArrayLike,
    weights: ArrayLike,
    teacher_features: ArrayLike,
    teacher_weights: ArrayLike,
    *,
    weight: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    where: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
) -> Array:
    r"""Computes `jensen_shannon_divergence` of two linear layers whose logits are never stored.

    .. math:: w D(p \,\|\, m) + (1 - w) D(q \,\|\, m), \qquad m = w p + (1 - w) q, \quad
        p = \mathrm{softmax}(t / T), \; q = \mathrm{softmax}(s / T)

    Args:
        features: x of the student, `[..., D]`, real; s = x W^T + b; differentiable.
        weights: W, `[V, D]`, of any dtype, as in `linear_cross_entropy`; differentiable.
        teacher_features: x' of the teacher, `[..., D']`, real; t = x' W'^T + b';
            differentiable.
        teacher_weights: W', `[V, D']`, of any dtype; differentiable.
        weight: w of the teacher's p in the mixture m, in [0, 1], one number or one per token;
            differentiable.
        temperature: T in (0, inf], one number or one per token; differentiable. Unlike
            `linear_distillation_loss`, the divergence is not multiplied by T^2.
        bias: b, `[V]`; differentiable. -inf drops a class.
        teacher_bias: b', `[V]`; differentiable. -inf drops a class.
        soft_cap: c > 0 of c tanh(s / c), before the temperature; one number, differentiable.
        teacher_soft_cap: the same for t.
        where: mask of the tokens, bool, `[...]`; False leaves one out, whatever it holds.
        example_weights: factors of the tokens' divergences, `[...]`; differentiable. A token of
            weight 0 does not count, whatever NaN or inf it holds.
        reduction: "mean" divides the sum by that of the example weights; "sum"; or None.
        block_size: classes formed at once; chosen from the shapes by default. Given, it also
            holds where the logits would otherwise be small enough to be kept.

    Returns:
        One number, or one per token with `reduction=None`; float32 or wider, at least 0, and at
        most the entropy of (w, 1 - w); 0 where either layer keeps nothing.

    Raises:
        TypeError: an argument is not real, `where` not bool, or a bias bool.
        ValueError: shapes do not fit, `reduction` or `block_size` is none of the above,
            `temperature` is a Python number that is not positive, or `weight` one outside of
            [0, 1].

    Example:
        >>> print(linear_jensen_shannon_divergence(
        ...     jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.ones((2, 1)), jnp.zeros((4, 1))))
        0.0

    Note:
        O(N V (D + D')) time. Nothing of the size N V is kept, in either mode, at any order, but
        for up to 2^22 logits, as in `linear_cross_entropy`: two passes over both layers, and
        two more for the derivative. Where both are close, the small divergence keeps its
        digits, as far as the logits have them.

    Reference:
        Lin (1991), Divergence measures based on the Shannon entropy; Agarwal et al. (2024),
        On-policy distillation of language models.
    """
    check_reduction(reduction)
    student, teacher = prepare_pair(
        (features, weights, bias, temperature, soft_cap),
        (teacher_features, teacher_weights, teacher_bias, temperature, teacher_soft_cap),
    )
    tokens, heads, shares = match_pair(student, teacher, where, example_weights)
    weight = student.per_token(weight, "weight").astype(shares.dtype)
    weight = jnp.where((shares.reshape(-1) == 0) & ~jnp.isfinite(weight), 0.5, weight)
    plan = plan_for(student.tokens, student.head, block_size)
    if plan.dense:
        # For few logits the derivative keeps them, and forms none again.
        nats = jensen_shannon_divergence(
            *pair_scores(tokens, heads), weight=weight[:, None], axis=1
        )
    else:
        nats = by_tokens(
            lambda some: _stream_divergence(plan.block, some[0], some[1], heads),
            (tokens, weight),
        )
    return reduce(nats.reshape(student.shape), shares, shares, reduction)


def _stream_divergence(block: int, tokens: TwoTokens, weight: Array, heads: TwoHeads) -> Array:
    found, anchor = compare(block, tokens, heads), anchor_of(tokens, heads)
    # The cotangents of the features, one per block, are added up in float32 or wider.
    narrow = [some.features.dtype for some in tokens]
    known = jax.tree.map(lambda x: x[:, None], (found, weight, anchor))
    fixed = tuple(map(_widened, tokens)), known

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def part(heads: TwoHeads, fixed: Any) -> tuple[Array, ...]:
        tokens, (found, weight, anchor) = fixed
        t, s = pair_scores(tokens, heads, narrow)
        taught, learned = t != -jnp.inf, s != -jnp.inf
        p, q, ratio = probs_and_ratio(t, s, found, anchor)
        ratio = jnp.where(taught & learned, ratio, jnp.where(taught, jnp.inf, -jnp.inf))
        return tuple(jnp.sum(x, 1) for x in (*_terms(p, q, ratio, weight), p, q))

    def visit(sums: Any, start: Array, heads: TwoHeads) -> Any:
        return jax.tree.map(jnp.add, sums, part(heads, fixed))

    zero = jnp.zeros_like(weight)
    sums = by_classes(block, visit, vary((zero,) * 4, (tokens, weight)), heads)
    to_p, to_q, p_total, q_total = sums
    # An infinite divergence has weight 0.
    to_p, to_q = (jnp.where(x == jnp.inf, 0, x) for x in (to_p, to_q))
    nats = weight * to_p + (1 - weight) * to_q
    return jnp.where((p_total == 0) | (q_total == 0), 0, nats)


@jax.custom_jvp
def _terms(p: Array, q: Array, ratio: Array, weight: Array) -> tuple[Array, Array]:
    """The terms p log(p / m) + m - p and q log(q / m) + m - q, from log(p / q)."""
    mixture = weight * p + (1 - weight) * q
    term = lambda p, log: jnp.where(
        jnp.isinf(log), jnp.inf, divergence_terms(p, mixture, jnp.where(jnp.isinf(log), 0, log))
    )
    log_p, log_q = _logs(p, q, ratio, weight)
    return term(p, log_p), term(q, log_q)


@_terms.defjvp
def _terms_jvp(primals: Any, tangents: Any) -> Any:
    # A rule to save memory: the derivative of a term is p' log(p / m) + m' (1 - p / m), and m'
    # where p is 0. An infinite term is constant.
    (p, q, _, weight), (p_dot, q_dot, _, weight_dot) = primals, tangents
    mixture_dot = weight * p_dot + (1 - weight) * q_dot + weight_dot * (p - q)

    def dot(p: Array, p_dot: Array, log: Array) -> Array:
        finite = jnp.where(jnp.isinf(log), 0, log)
        change = p_dot * finite - mixture_dot * jnp.where(p == 0, -1, jnp.expm1(finite))
        return jnp.where(jnp.isinf(log), 0, change)

    log_p, log_q = _logs(*primals)
    return _terms(*primals), (dot(p, p_dot, log_p), dot(q, q_dot, log_q))


def _logs(p: Array, q: Array, ratio: Array, weight: Array) -> tuple[Array, Array]:
    """log(p / m) and log(q / m), and 0 where p or q is 0."""
    log_p, log_q = mixture_log_ratios(ratio, weight)
    return jnp.where(p == 0, 0, log_p), jnp.where(q == 0, 0, log_q)


def _widened(tokens: Tokens) -> Tokens:
    dtype = computing_dtype(tokens.features.dtype)
    return tokens._replace(features=tokens.features.astype(dtype))
