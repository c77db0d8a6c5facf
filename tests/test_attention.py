"""Attention: against its definition, in every mode, and where rivals go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from softjax import masks
from tests import oracles
from tests.helpers import INF, assert_close, assert_same, eps

B, T, S, N, K, H, W = 2, 9, 11, 4, 2, 5, 3
STREAMED = {"block_size": (4, 3)}
DENSE = {"implementation": "dense"}
WAYS = {"dense": DENSE, "streamed": STREAMED}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
# The two share the scores and the masks: the whole list is run for one of them by default.
mostly_streamed = pytest.mark.parametrize(
    "way",
    [
        pytest.param(DENSE, marks=pytest.mark.slow, id="dense"),
        pytest.param(STREAMED, id="streamed"),
    ],
)
SLOW_MODES = ("reverse over forward", "reverse over reverse")


def pairs(ways, modes):
    """All of both, of which some are slow."""
    for name, way in ways.items():
        for mode in modes:
            marks = [pytest.mark.slow] if mode in SLOW_MODES else []
            yield pytest.param(way, mode, marks=marks, id=f"{name}-{mode}")


def draw(seed=0, dtype="float64", shape=(B, T, S, N, K, H, W)):
    b, t, s, n, k, h, w = shape
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype)))
    return normal(b, t, n, h), normal(b, s, k, h), normal(b, s, k, w)


RNG = np.random.default_rng(7)
IDS = np.sort(RNG.integers(0, 3, (B, S)), -1)
MASKS = {
    "none": None,
    "causal": masks.Causal(S - T),
    "window": masks.Window(2, 1),
    "documents": masks.Segments(IDS[:, :T], IDS) & masks.Causal(),
    "lengths": masks.Lengths(np.array([T, 5]), np.array([4, S])),
    "prefix": masks.Causal() | masks.Prefix(4),
    "dense": RNG.random((N, T, S)) < 0.6,
    "function": masks.Function(lambda at: (at.key + at.head) % 3 != at.query % 2),
}
SLOPES = 2.0 ** -np.arange(1.0, N + 1)


def far(at):
    return jnp.abs(at.query - at.key).astype(jnp.result_type(float))


def alibi(slopes, scores, at):
    return scores - slopes[None, :, None, None] * far(at)


OPTIONS = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "scale a head": ({"scale": SLOPES}, {"scale": SLOPES}),
    "bias": ({"bias": RNG.standard_normal((N, T, S))},) * 2,
    "bias, one row": ({"bias": RNG.standard_normal((B, 1, 1, S))},) * 2,
    "bias, one column": ({"bias": RNG.standard_normal((T, 1))},) * 2,
    "bias with -inf": ({"bias": np.where(RNG.random((T, S)) < 0.5, -INF, 1.0)},) * 2,
    "soft cap": ({"soft_cap": 1.5, "bias": np.where(np.tri(T, S) > 0, 0.5, -INF)},) * 2,
    "sink": ({"sink": RNG.standard_normal(N)},) * 2,
    "score": (
        {"score": functools.partial(alibi, jnp.asarray(SLOPES))},
        {"score": lambda s, n: s - SLOPES[n] * np.abs(np.subtract.outer(range(T), range(S)))},
    ),
}


def check_value(way, mask, ours, theirs, seed=0):
    arrays = draw(seed)
    options = {k: jnp.asarray(v) if np.ndim(v) else v for k, v in ours.items()}
    out, lse = sj.attention(*arrays, mask=mask, return_lse=True, **options, **way)
    keep = True
    if mask is not None:
        as_array = masks.as_mask(mask).array
        keep = np.asarray(as_array(T, S, num_heads=N, batch=(B,)))
    expected_out, expected_lse = oracles.attention(*arrays, keep=keep, **theirs)
    # Sums of a dozen terms of order one.
    assert_close(out, expected_out, rtol=0, atol=32 * eps("float64"))
    assert_close(lse, expected_lse, rtol=0, atol=32 * eps("float64"))
    assert out.dtype == lse.dtype == jnp.float64


@mostly_streamed
@pytest.mark.parametrize("mask", MASKS)
def test_masks(way, mask):
    check_value(way, MASKS[mask], {}, {})


@mostly_streamed
@pytest.mark.parametrize("name", OPTIONS)
def test_options(way, name):
    check_value(way, MASKS["causal"], *OPTIONS[name])


@pytest.mark.parametrize(
    "block_size", [1, (2, 11), (9, 4), (9, 11), (100, 100), pytest.param(7, id="padded")]
)
def test_block_sizes_change_nothing(block_size):
    arrays = draw(1)
    call = functools.partial(sj.attention, *arrays, mask=masks.Window(3, 2))
    assert_close(call(block_size=block_size), call(**DENSE), rtol=0, atol=16 * eps("float64"))


def test_layouts():
    """No batch, several axes of it, one query, one key, and nothing at all."""
    arrays = [x[0] for x in draw(2)]
    one = sj.attention(*arrays)
    assert_close(one, oracles.attention(*arrays)[0], rtol=0, atol=32 * eps("float64"))
    many = [jnp.stack([jnp.stack([x, -x]), jnp.stack([x, 2 * x])]) for x in arrays]
    out = sj.attention(*many, block_size=5)
    for place in np.ndindex(2, 2):
        expected = oracles.attention(*(x[place] for x in many))[0]
        assert_close(out[place], expected, rtol=0, atol=32 * eps("float64"))
    queries, keys, values = draw(3)
    one_key = sj.attention(queries, keys[:, :1], values[:, :1])
    expected = jnp.broadcast_to(jnp.repeat(values[:, :1], N // K, 2), one_key.shape)
    assert_same(one_key, expected)
    for t, s in ((0, S), (T, 0)):
        call = functools.partial(sj.attention, return_lse=True, sink=jnp.arange(float(N)))
        out, lse = call(queries[:, :t], keys[:, :s], values[:, :s])
        assert out.shape == (B, t, N, W)
        assert (out == 0).all()
        assert_same(lse, jnp.broadcast_to(jnp.arange(float(N)), (B, t, N)))


def test_positions():
    """Tokens in another order give the same averages, in that order."""
    queries, _, _ = draw(4)
    _, keys, values = draw(5, shape=(B, T, T, N, K, H, W))
    order = np.random.default_rng(0).permutation(T)
    slopes = jnp.asarray(SLOPES)
    call = functools.partial(
        sj.attention,
        mask=masks.Causal() & masks.Window(4),
        score=lambda s, at: alibi(slopes, s, at),
        block_size=2,
    )
    plain = call(queries, keys, values)
    dealt = call(queries[:, order], keys[:, order], values[:, order], positions=order)
    assert_close(dealt, plain[:, order], rtol=0, atol=16 * eps("float64"))
    pair = call(queries[:, order], keys, values, positions=(order, None))
    assert_close(pair, plain[:, order], rtol=0, atol=16 * eps("float64"))


# Derivatives.

KEEP = np.asarray((masks.Causal(2) & ~masks.Prefix(1)).array(T, S))


def definition(queries, keys, values, bias, scale, soft_cap, sink, slopes):
    """Plain, dense and in float64; its derivatives are those of JAX."""
    keys, values = (jnp.repeat(x, N // K, 2) for x in (keys, values))
    column = lambda x: x[None, :, None, None]
    scores = column(scale) * jnp.einsum("btnh,bsnh->bnts", queries, keys) + bias
    scores = column(soft_cap) * jnp.tanh(scores / column(soft_cap))
    distance = np.abs(np.subtract.outer(np.arange(T), np.arange(S))).astype(float)
    scores = jnp.where(KEEP, scores - column(slopes) * distance[None, None], -1e9)
    peak = jnp.maximum(jnp.max(scores, -1, keepdims=True), column(sink))
    weights = jnp.where(KEEP, jnp.exp(scores - peak), 0)
    total = jnp.sum(weights, -1, keepdims=True) + jnp.exp(column(sink) - peak)
    lse = jnp.moveaxis((peak + jnp.log(total))[..., 0], 1, -1)
    return jnp.einsum("bnts,bsnw->btnw", weights / total, values), lse


def everything(way):
    def call(queries, keys, values, bias, scale, soft_cap, sink, slopes):
        return sj.attention(
            queries,
            keys,
            values,
            mask=masks.Causal(2) & ~masks.Prefix(1),
            bias=bias,
            scale=scale,
            soft_cap=soft_cap,
            sink=sink,
            score=lambda scores, at: alibi(slopes, scores, at),
            return_lse=True,
            **way,
        )

    return call


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    more = (
        rng.standard_normal((1, N, T, S)),
        rng.uniform(0.3, 0.6, N),
        rng.uniform(1.0, 2.0, N),
        rng.standard_normal(N),
        rng.uniform(0.1, 0.3, N),
    )
    return (*draw(seed), *map(jnp.asarray, more))


def loss(call):
    def of(*args):
        out, lse = call(*args)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return of


EVERY = tuple(range(8))


def gradient(call):
    return jax.grad(loss(call), argnums=EVERY)


def forward_over_reverse(call):
    grad = gradient(call)
    return lambda args, dots: jax.jvp(grad, args, dots)[1]


def reverse_over_reverse(call):
    grad = gradient(call)
    inner = lambda args, dots: sum(map(jnp.vdot, grad(*args), dots))
    return jax.grad(inner)


def reverse_over_forward(call):
    return jax.grad(lambda args, dots: jax.jvp(loss(call), args, dots)[1])


MODES = {
    "value": lambda call: lambda args, dots: call(*args),
    "gradient": lambda call: lambda args, dots: gradient(call)(*args),
    "jvp": lambda call: lambda args, dots: jax.jvp(call, args, dots)[1],
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "reverse over reverse": reverse_over_reverse,
}


@pytest.mark.parametrize(("way", "mode"), [*pairs(WAYS, MODES)])
def test_derivatives_are_those_of_the_definition(way, mode):
    """In queries, keys, values, bias, scale, cap, sink and what a score function captures."""
    args, dots = arguments(0), arguments(1)
    got = jax.jit(MODES[mode](everything(way)))(args, dots)
    expected = jax.jit(MODES[mode](definition))(args, dots)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)
        assert jnp.abs(other).max() > 1e-2  # A flat point would prove nothing.


@pytest.mark.slow
@every_way
def test_two_orders_by_differences(way):
    small = (1, 3, 4, 2, 1, 2, 2)
    fn = lambda q, k, v, c: sj.attention(
        q,
        k,
        v,
        mask=masks.Causal(1),
        soft_cap=c,
        return_lse=True,
        **({"block_size": 2} if "block_size" in way else way),
    )
    args = (*draw(0, shape=small), jnp.array(1.5))
    check_grads(fn, args, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)
