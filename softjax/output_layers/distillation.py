"""Distillation between two linear layers over one vocabulary; neither's logits are stored."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from softjax import _online as online
from softjax._api import POSITIVE, api
from softjax._elementary import expm1_over_twice, log1p
from softjax._inputs import Problem
from softjax._scan import scan_blocks
from softjax.entropies import divergence
from softjax.losses.means import over_mass, shares_and_masses, sum_of_counted
from softjax.output_layers._layer import (
    Layer,
    Tokens,
    idle_tokens,
    layer_scores,
    prepare_layer,
    without,
)
from softjax.output_layers._stream import TOKENS, Plan, over_blocks, plan_for, push

__all__ = ["linear_distillation_loss"]

_FIRST = 8  # classes that tell about how far the logits are apart


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
    example_weights: ArrayLike | None = None,
    reduction: str | None = "mean",
    block_size: int | None = None,
) -> Array:
    r"""Measures `distillation_loss` of two linear layers whose logits are never stored.

    .. math:: T^2 D\big(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\big), \qquad
        s = x W^\top + b, \; t = x' W'^\top + b'

    Args:
        features: x of the student, `[..., D]`, real; differentiable.
        weights: W, `[V, D]`, of the dtype of `features`; differentiable.
        teacher_features: x' of the teacher, `[..., D']`, real; differentiable.
        teacher_weights: W', `[V, D']`, of the dtype of `teacher_features`; differentiable.
        temperature: T in (0, inf], one number or one a token; differentiable. From 2^38 on
            (in float64 2^57) the loss is its limit, half the variance of s - t over the
            classes, as far as logits smaller by 10^7 differ.
        bias: b, `[V]`; differentiable. -inf drops a class.
        teacher_bias: b', `[V]`; differentiable. -inf drops a class.
        soft_cap: c > 0 of c tanh(s / c), before the temperature; one number, differentiable.
        teacher_soft_cap: the same for t.
        example_weights: factors of the tokens' losses, `[...]`; differentiable. A token of
            weight 0 does not count, whatever NaN or inf it holds, or its loss.
        reduction: "mean" divides the sum by that of the example weights; "sum"; or None.
        block_size: classes formed at once; chosen from the shapes by default. Given, it also
            holds where the logits would otherwise be small enough to be kept.

    Returns:
        One number, or one loss a token with `reduction=None`; float32 or wider, at least 0;
        inf, and constant, where the student drops what the teacher keeps.

    Raises:
        TypeError: an argument is not real, or the dtypes of features and weights differ.
        ValueError: shapes do not fit, `reduction` or `block_size` is none of the above, or
            `temperature` is a Python number that is not positive.

    Example:
        >>> print(linear_distillation_loss(
        ...     jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.ones((2, 1)), jnp.zeros((4, 1)),
        ...     temperature=2.0))
        0.0

    Note:
        O(N V (D + D')) time. Nothing of the size N V is kept, in either mode, at any order
        (beyond 2^22 logits, as in `linear_cross_entropy`): one pass over both layers, and one
        more for the derivative. Where both are close the small divergence keeps its digits, as
        far as the logits have them. Wrap the teacher in `jax.lax.stop_gradient` to save its
        part of the derivative.

    Reference:
        Hinton, Vinyals and Dean (2015), Distilling the knowledge in a neural network.
    """
    if reduction not in ("mean", "sum", None):
        raise ValueError(f'`reduction` must be "mean", "sum" or None, got {reduction!r}.')
    student = prepare_layer(features, weights, bias, temperature, soft_cap)
    teacher = prepare_layer(
        teacher_features,
        teacher_weights,
        teacher_bias,
        temperature,
        teacher_soft_cap,
        prefix="teacher_",
        features_name="teacher_features",
    )
    _check_alike(student, teacher)
    student, teacher = _no_hotter(student), _no_hotter(teacher)
    shares, masses = shares_and_masses(
        jnp.ones(student.shape, jnp.promote_types(student.dtype, teacher.dtype)),
        None,
        ignore_index=None,
        class_weights=None,
        example_weights=example_weights,
    )
    layers = teacher.layer, student.layer
    if example_weights is not None:
        by_token = (student.layer.temperature, *(layer.features for layer in layers))
        idle = idle_tokens(shares.reshape(-1), *by_token)
        shares = masses = jnp.where(idle.reshape(shares.shape), 0, shares)
        layers = without(teacher.layer, idle), without(student.layer, idle)
    plan = plan_for(student.layer, block_size)
    nats = _divergence(plan, *layers)
    heat = layers[1].temperature
    if heat is not None:
        heat = heat.astype(nats.dtype)
        # (In this order nothing overflows where the loss does not.)
        nats = heat * nats * heat
    loss = nats.reshape(student.shape)
    if reduction is None:
        return loss if example_weights is None else shares * loss
    total = sum_of_counted(loss, shares)
    return over_mass(total, masses) if reduction == "mean" else total


def _no_hotter(tokens: Tokens) -> Tokens:
    """Temperatures up to where the loss no longer depends on them."""
    heat = tokens.layer.temperature
    if heat is None:
        return tokens
    hot = jnp.minimum(heat, 2.0**57 if heat.dtype == jnp.float64 else 2.0**38)
    return tokens._replace(layer=tokens.layer._replace(temperature=hot))


def _check_alike(student: Tokens, teacher: Tokens) -> None:
    if teacher.shape != student.shape:
        raise ValueError(
            f"`teacher_features` must hold the tokens {student.shape} of `features`, got"
            f" {teacher.shape}."
        )
    sizes = [tokens.layer.weights.shape[0] for tokens in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher_weights` must hold the {sizes[0]} classes of `weights`, got {sizes[1]}."
        )


def _divergence(plan: Plan, teacher: Layer, student: Layer) -> Array:
    """D(teacher || student) of each token, [N]."""
    if plan.dense:
        scores = [layer_scores(layer) for layer in (teacher, student)]
        problems = [Problem(x, (1,), None, x.dtype) for x in scores]
        return divergence(*problems, name="features", target="teacher_features")[:, 0]
    rows = [(layer.features, layer.temperature) for layer in (teacher, student)]

    def visit(_: None, first: Array, rows: Any) -> tuple[None, Array]:
        parts = [
            layer._replace(features=features, temperature=temperature)
            for layer, (features, temperature) in zip((teacher, student), rows, strict=True)
        ]
        return None, _stream(plan.block, *parts).nats

    if student.features.shape[0] <= TOKENS:
        return visit(None, jnp.array(0), rows)[1]
    nats: Array = scan_blocks(visit, None, rows, TOKENS)[1]
    return nats


class _Found(NamedTuple):
    """Of each token: the divergence, and the log-sums of both.

    Where all classes are close, log(p / q) is x + shift, and not a difference of logarithms.
    """

    nats: Array
    teacher: Array
    student: Array
    shift: Array
    close: Array  # 1, or 0


class _Seen(NamedTuple):
    """Of some classes: both online states, the teacher's with averages of how far apart."""

    teacher: online.OnlineState  # of x = t - s - anchor, and of e^-x - 1 + x where |x| < 1
    student: online.OnlineState
    widest: Array  # max |x|; inf where only one of the two drops a class
    missing: Array  # 1 where the student drops what the teacher keeps


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stream(block: int, teacher: Layer, student: Layer) -> _Found:
    """One pass over the vocabulary of both."""
    anchor = _anchor(teacher, student)
    shape, dtype = anchor.shape, anchor.dtype
    zero = jnp.zeros(shape, dtype)
    seen = _Seen(online.init(shape, 2, dtype), online.init(shape, 0, dtype), zero, zero)

    def visit(seen: _Seen, start: Array, teacher: Layer, student: Layer) -> _Seen:
        t, s = layer_scores(teacher).astype(dtype), layer_scores(student).astype(dtype)
        taught, learned = t != -jnp.inf, s != -jnp.inf
        both = taught & learned
        apart = jnp.where(both, t, 0) - jnp.where(both, s, 0)
        apart = jnp.where(both, apart - anchor[:, None], 0)
        size = jnp.where(taught == learned, jnp.abs(lax.stop_gradient(apart)), jnp.inf)
        close = jnp.where(size < 1, apart, 0)
        curve = close * close * expm1_over_twice(-close)
        return _Seen(
            online.update(seen.teacher, t, jnp.stack([apart, curve], -1)),
            online.update(seen.student, s, jnp.zeros((*s.shape, 0), dtype)),
            jnp.maximum(seen.widest, jnp.max(size, 1)),
            jnp.maximum(seen.missing, jnp.max((taught & ~learned).astype(dtype), 1)),
        )

    seen = over_blocks(block, visit, seen, teacher, student)
    averages, teacher_total = online.finish(seen.teacher)
    totals = teacher_total, online.finish(seen.student)[1]
    mean, curve = averages[..., 0], averages[..., 1]
    # With E over the teacher, D = log E[e^-x] + E[x]; near, as a difference of two small
    # numbers that are not negative.
    close = seen.widest < 1
    shift = log1p(jnp.where(close, curve - mean, 0))
    near = curve - shift * shift * expm1_over_twice(shift)
    none = (seen.teacher.total == 0) | (seen.student.total == 0)
    log_ratio = jnp.where(none, 0, totals[1]) - jnp.where(none, 0, totals[0])
    far = log_ratio + (mean + anchor)
    nats = jnp.where(close, near, far)
    nats = jnp.where(seen.teacher.total == 0, 0, jnp.where(seen.missing > 0, jnp.inf, nats))
    return _Found(nats, totals[0], totals[1], shift, close.astype(dtype))


def _anchor(teacher: Layer, student: Layer) -> Array:
    """About how far the scores of teacher and student are apart, from a few classes."""

    def few(layer: Layer) -> Array:
        bias = None if layer.bias is None else layer.bias[:_FIRST]
        part = layer._replace(weights=layer.weights[:_FIRST], bias=bias)
        return lax.stop_gradient(layer_scores(part))

    t, s = few(teacher), few(student)
    dtype = jnp.promote_types(t.dtype, s.dtype)
    both = jnp.isfinite(t) & jnp.isfinite(s)
    apart = jnp.where(both, t, 0).astype(dtype) - jnp.where(both, s, 0).astype(dtype)
    return jnp.sum(apart, 1) / jnp.maximum(jnp.sum(both, 1, dtype=dtype), 1)


@functools.partial(_stream.defjvp, symbolic_zeros=True)
def _stream_jvp(block: int, primals: Any, tangents: Any) -> tuple[_Found, _Found]:
    # A rule, for memory: the tangent visits the blocks once more, each visit checkpointed.
    found = _stream(block, *primals)
    dots = jax.tree.map(
        lambda dot: None if isinstance(dot, SymbolicZero) else dot,
        tangents,
        is_leaf=lambda dot: isinstance(dot, SymbolicZero),
    )
    finite = found.nats != jnp.inf
    known = _Found(*(jnp.where(jnp.isinf(row), 0, row)[:, None] for row in found))
    anchor = _anchor(*primals)[:, None]

    def visit(state: tuple[Array, ...], start: Array, *layers: Layer) -> tuple[Array, ...]:
        return jax.tree.map(jnp.add, state, tangent(layers, known))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(layers: tuple[Layer, ...], known: _Found) -> tuple[Array, ...]:
        teacher, student, teacher_dot, student_dot = layers
        dtype = known.nats.dtype
        t, t_dot = (x.astype(dtype) for x in push(teacher, teacher_dot))
        s, s_dot = (x.astype(dtype) for x in push(student, student_dot))
        taught, learned = t != -jnp.inf, s != -jnp.inf
        t_log = jnp.where(taught, t, 0) - known.teacher
        s_log = jnp.where(learned, s, 0) - known.student
        p = jnp.where(taught, jnp.exp(jnp.where(taught, t_log, 0)), 0)
        q = jnp.where(learned, jnp.exp(jnp.where(learned, s_log, 0)), 0)
        t_dot, s_dot = jnp.where(taught, t_dot, 0), jnp.where(learned, s_dot, 0)
        both = taught & learned
        close = both & (known.close == 1)
        apart = jnp.where(close, t, 0) - jnp.where(close, s, 0)
        apart = jnp.where(close, (apart - anchor) + known.shift, 0)
        ratio = jnp.where(close, apart, jnp.where(both, t_log - s_log, 0))
        more = jnp.where(close, p * jnp.expm1(-apart), q - p)
        terms = p * (ratio - known.nats) * t_dot + more * s_dot
        terms = jnp.where(finite[:, None], terms, 0)
        return jnp.sum(terms, 1), jnp.sum(p * t_dot, 1), jnp.sum(q * s_dot, 1)

    zero = jnp.zeros_like(found.nats)
    nats, taught, learned = over_blocks(block, visit, (zero,) * 3, *primals, *dots)
    return found, _Found(nats, taught, learned, learned - taught, zero)
