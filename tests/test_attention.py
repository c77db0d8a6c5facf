"""Attention: against its definition, in every mode, and where rivals go wrong."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from softjax import masks
from softjax.attentions.attend import Options
from tests import oracles
from tests.helpers import INF, NAN, assert_close, assert_same, eps

B, T, S, N, K, H, W = 2, 9, 11, 4, 2, 5, 3
STREAMED = {"block_size": (4, 3)}
DENSE = {"implementation": "dense"}
WAYS = {"dense": DENSE, "streamed": STREAMED}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
mostly_streamed = pytest.mark.parametrize(
    "way",
    [
        pytest.param(DENSE, id="dense", marks=pytest.mark.slow),
        pytest.param(STREAMED, id="streamed"),
    ],
)


def mostly_slow(cases, default):
    """Ways and cases, of which the streamed ones that are named are run by default."""
    for name, way in WAYS.items():
        for case in cases:
            marks = [] if name == "streamed" and case in default else [pytest.mark.slow]
            yield pytest.param(way, case, marks=marks, id=f"{name}-{case}")


SLOW_MODES = ("reverse over forward", "reverse over reverse")


def pairs(ways, modes, slow=SLOW_MODES):
    """All of both, of which some modes are slow."""
    for name, way in ways.items():
        for mode in modes:
            rare = mode in slow or (name in ("dense", "sparsemax") and mode != "gradient")
            marks = [pytest.mark.slow] if rare else []
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
    "soft cap of the sum": (
        {"soft_cap": 1.5, "cap_bias": True, "bias": np.where(np.tri(T, S) > 0, 0.5, -INF)},
    )
    * 2,
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


@pytest.mark.parametrize(
    ("way", "mask"), [*mostly_slow(MASKS, ("documents", "lengths", "dense", "function"))]
)
def test_masks(way, mask):
    check_value(way, MASKS[mask], {}, {})


@pytest.mark.parametrize(
    ("way", "name"),
    [*mostly_slow(OPTIONS, ("bias with -inf", "soft cap", "soft cap of the sum", "sink"))],
)
def test_options(way, name):
    check_value(way, MASKS["causal"], *OPTIONS[name])


@pytest.mark.parametrize(
    "block_size",
    [
        1,
        pytest.param((2, 11), marks=pytest.mark.slow),
        pytest.param((9, 4), marks=pytest.mark.slow),
        (100, 100),
        pytest.param(7, id="padded"),
    ],
)
def test_block_sizes_change_nothing(block_size):
    arrays = draw(1)
    call = functools.partial(sj.attention, *arrays, mask=masks.Window(3, 2))
    assert_close(call(block_size=block_size), call(**DENSE), rtol=0, atol=16 * eps("float64"))


def test_numpy_ints_are_ints():
    arrays = draw(1)
    call = functools.partial(sj.attention, *arrays, mask=masks.Causal(np.int64(1)))
    assert_same(call(block_size=np.int64(4)), call(block_size=(4, np.int32(4))))


def test_a_soft_cap_of_the_product_alone():
    """A bias of -1e9 hides a key as a mask does, by default; under the cap it leaks."""
    arrays, bias = draw(2), jnp.asarray(np.where(np.tri(T, S) > 0, 0.0, -1e9))
    hidden = sj.attention(*arrays, bias=bias, soft_cap=50.0)
    masked = sj.attention(*arrays, mask=bias == 0, soft_cap=50.0)
    assert_close(hidden, masked, rtol=0, atol=16 * eps("float64"))
    ones = [jnp.ones_like(x) for x in arrays]
    lse = lambda **options: sj.attention(
        *ones, bias=bias, soft_cap=4.0, return_lse=True, **options
    )[1]
    leak = jnp.exp(lse(cap_bias=True) - lse()) - 1
    assert leak[0, 0, 0] > 1e-3
    assert_same(
        sj.attention(*arrays, bias=bias, cap_bias=True), sj.attention(*arrays, bias=bias)
    )


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


@pytest.mark.slow
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
    scores = column(scale) * jnp.einsum("btnh,bsnh->bnts", queries, keys)
    scores = column(soft_cap) * jnp.tanh(scores / column(soft_cap)) + bias
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


@pytest.mark.optimized  # Without, the definition has NaN where nothing is seen.
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


# Edges.


@mostly_streamed
def test_what_is_not_seen_reaches_nothing(way):
    """NaN and inf in unseen queries, keys, values and biases: no output, no gradient."""
    queries, keys, values, *_ = args = draw(6)
    seen = np.array([T - 3, 4])
    mask = masks.Causal(2) & masks.Lengths(seen, seen)

    def spoil(x, number):
        return jnp.stack([one.at[n:].set(number) for one, n in zip(x, seen, strict=True)])

    keep = np.asarray(mask.array(T, S, batch=(B,)))
    bias = RNG.standard_normal((B, 1, T, S))

    def run(queries, keys, values, bias):
        call = lambda *a: sj.attention(*a[:3], bias=a[3], mask=mask, return_lse=True, **way)
        (out, lse), pullback = jax.vjp(call, queries, keys, values, bias)
        bars = jnp.cos(out), jnp.where(lse == -INF, 0, 1.0)
        dots = tuple(jnp.sin(jnp.arange(float(x.size))).reshape(x.shape) for x in args)
        push = lambda q, k, v: call(q, k, v, bias)
        out_dot, lse_dot = jax.jvp(push, (queries, keys, values), dots)[1]
        return out, lse, *pullback(bars), out_dot, lse_dot

    run = jax.jit(run)
    clean = run(queries, keys, values, jnp.asarray(bias))
    for number in (NAN, INF):
        spoilt = run(
            *(spoil(x, number) for x in (queries, keys, values)),
            jnp.asarray(np.where(keep, bias, number)),
        )
        for one, other in zip(spoilt, clean, strict=True):
            assert_same(one, other)
    out, lse, *bars, out_dot, lse_dot = clean
    for place, n in enumerate(seen):
        assert (out[place, n:] == 0).all()
        assert (lse[place, n:] == -INF).all()
        for x in (*bars[:3], out_dot, lse_dot):
            assert (x[place, n:] == 0).all()
            assert (x[place, :n] != 0).any()


@pytest.mark.slow
@mostly_streamed
@pytest.mark.parametrize("squashed", ["soft cap", "score"])
def test_a_bias_of_minus_inf_hides_what_stands_there(way, squashed):
    """Below a cap or a score function too: their derivatives there, and NaN in both tokens."""
    queries, keys, values = draw(16)
    dropped = np.zeros((T, S), bool)
    dropped[2], dropped[:, 5] = True, True  # A query that sees nothing, a key nobody sees.
    dropped |= RNG.random((T, S)) < 0.3
    mask = np.ones((T, S), bool)
    mask[4, 7] = False  # What stands there in the bias plays no part.
    bias = np.where(dropped, -INF, 1.0)
    options = {
        "soft cap": lambda c: {"soft_cap": 1 + c, "cap_bias": True},
        "score": lambda c: {"score": lambda z, at: c * z**2 - z},
    }[squashed]

    def run(call):
        def total(queries, keys, values, bias, c):
            return jnp.sum(jnp.sin(call(queries, keys, values, bias, c)))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4)))

    def ours(queries, keys, values, bias, c):
        return sj.attention(queries, keys, values, bias=bias, mask=mask, **options(c), **way)

    def definition(queries, keys, values, bias, c):
        drop = dropped | ~mask
        scores = jnp.einsum("btkgh,bskh->bkgts", queries.reshape(B, T, K, -1, H), keys)
        scores = scores / jnp.sqrt(H) + jnp.where(drop, 0, bias)[None, None, None]
        cap = 1 + c
        scores = (
            cap * jnp.tanh(scores / cap) if squashed == "soft cap" else c * scores**2 - scores
        )
        weights = jax.nn.softmax(jnp.where(drop, -1e9, scores))
        weights = jnp.where(drop, 0, weights)
        return jnp.einsum("bkgts,bskw->btkgw", weights, values).reshape(B, T, N, W)

    c = jnp.asarray(0.5)
    expected = run(definition)(queries, keys, values, jnp.asarray(bias), c)
    for number in (0.0, NAN, INF):
        spoilt = bias.copy()
        spoilt[4, 7] = number
        found = run(ours)(
            queries.at[:, 2].set(number),
            keys.at[:, 5].set(number),
            values.at[:, 5].set(number),
            jnp.asarray(spoilt),
            c,
        )
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_key_behind_all_queries():
    """NaN in it reaches nothing, though a block of queries is filled up."""
    queries, keys, values = draw(17)

    def run(keys, values):
        call = lambda *a: jnp.sum(jnp.sin(sj.attention(*a, mask=masks.Causal(), block_size=4)))
        return jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2)))(queries, keys, values)

    expected = run(keys, values)
    for one, other in zip(
        jax.tree.leaves(run(keys.at[:, T].set(NAN), values.at[:, T + 1].set(INF))),
        jax.tree.leaves(expected),
        strict=True,
    ):
        assert_same(one, other)


@every_way
def test_a_nan_is_seen_by_who_sees_it(way):
    """A bad key or value in the middle: queries before it, and other heads, are untouched."""
    queries, keys, values = draw(7, shape=(1, T, T, N, K, H, W))
    call = functools.partial(sj.attention, mask=masks.Causal(), **way)
    plain = call(queries, keys, values)
    for place, bad in ((1, keys.at[0, 5, 0, 1].set(NAN)), (2, values.at[0, 5, 0, 1].set(INF))):
        arrays = [queries, keys, values]
        arrays[place] = bad
        out = call(*arrays)
        assert jnp.isnan(out[0, 5:, :2]).all()  # The two heads that share the bad one.
        assert_same(out[0, :5], plain[0, :5])
        assert_same(out[:, :, 2:], plain[:, :, 2:])


@pytest.mark.parametrize("bad", ["query", "key", "value"])
@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
@every_way
def test_gradients_of_a_nan_end_where_nobody_sees_it(way, normalizer, bad):
    """A query that sees a bad token gives NaN to all that it sees, and to nobody else."""
    arrays = list(draw(7, shape=(1, T, T, N, K, H, W)))
    seen = np.tri(T, dtype=bool) & ~np.tri(T, k=-3, dtype=bool)  # [query, key]
    call = functools.partial(sj.attention, mask=masks.Window(2), normalizer=normalizer, **way)
    slope = jax.grad(lambda *arrays: call(*arrays).sum(), argnums=(0, 1, 2))
    plain = slope(*arrays)
    number = ["query", "key", "value"].index(bad)
    arrays[number] = arrays[number].at[0, 4, 0, 1].set(NAN)
    affected = seen[:, 4] if bad != "query" else np.arange(T) == 4
    reached = seen[affected].any(0)
    for found, expected, rows in zip(
        slope(*arrays), plain, (affected, reached, reached), strict=True
    ):
        assert_same(found[0, ~rows], expected[0, ~rows])
        sharing = N // K if found.shape[2] == N and bad != "query" else 1  # heads, the first
        assert_same(found[:, :, sharing:], expected[:, :, sharing:])
    if normalizer == "softmax":
        queries, keys, values = (jnp.isnan(x[0, :, 0]).any(-1) for x in slope(*arrays))
        assert queries[affected].all()
        # The gradients of a bad value itself are left out, because it plays no part in them.
        counts = (np.arange(T) != 4) | (bad != "value")
        assert keys[reached & counts].all()
        assert values[reached & counts].all()


@pytest.mark.slow
@mostly_streamed
def test_quiet_under_debug_nans(way):
    arrays = draw(8)
    mask = masks.Causal(-2)  # The first two queries see nothing.
    bias = jnp.asarray(np.where(np.arange(S) == 1, -INF, 0.0))[None]
    call = lambda *a: sj.attention(*a, mask=mask, bias=bias, return_lse=True, **way)
    total = lambda *a: jnp.sum(call(*a)[0])
    with jax.debug_nans(True):
        out, lse = call(*arrays)
        grads = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    assert (out[:, :2] == 0).all()
    assert (lse[:, :2] == -INF).all()
    assert all((g[:, :2] == 0).all() == (i == 0) for i, g in enumerate(grads))
    assert all(jnp.isfinite(g).all() for g in grads)


@every_way
def test_large_scores(way):
    """No overflow, and the limit where scores are infinite."""
    queries, keys, values = draw(9)
    for size in (1e3, 1e150):
        out = sj.attention(size * queries, keys, values, **way)
        best = jnp.argmax(
            jnp.einsum("btkgh,bskh->btkgs", queries.reshape(B, T, K, -1, H), keys), -1
        )
        heads = jnp.arange(K)[None, None, :, None]
        expected = values[jnp.arange(B)[:, None, None, None], best, heads]
        assert_close(out, expected.reshape(out.shape), rtol=0, atol=1e-3 if size == 1e3 else 0)
    bias = jnp.zeros((T, S)).at[:, 3].set(INF).at[:, 8].set(INF)
    out, lse = sj.attention(queries, keys, values, bias=bias, return_lse=True, **way)
    shared = jnp.repeat((values[:, 3] + values[:, 8]) / 2, N // K, 1)[:, None]
    assert_close(out, jnp.broadcast_to(shared, out.shape), rtol=0, atol=4 * eps("float64"))
    assert (lse == INF).all()
    slope = jax.grad(lambda v: sj.attention(queries, keys, v, bias=bias, **way).sum())(values)
    halves = jnp.zeros(S).at[jnp.array([3, 8])].set(T * N / K / 2)
    wanted = jnp.broadcast_to(halves[:, None, None], slope.shape)
    assert_close(slope, wanted, rtol=0, atol=T * N * eps("float64"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_types_lose_no_more_than_the_naive_way(dtype):
    """The largest errors, of values and gradients, against those of plain code in that type."""
    shape = (1, 40, 40, 2, 1, 16, 16)
    arrays = draw(10, dtype, shape)
    mask = np.tri(40, dtype=bool)

    def naive(queries, keys, values):
        keys, values = (jnp.repeat(x, 2, 2) for x in (keys, values))
        scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) / jnp.asarray(4, dtype)
        weights = jax.nn.softmax(jnp.where(mask, scores, -INF).astype("float32"))
        return jnp.einsum("bnts,bsnw->btnw", weights.astype(dtype), values)

    def run(call, arrays):
        out, pullback = jax.vjp(call, *arrays)
        return out, *pullback(
            jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(out.dtype)
        )

    exact = run(
        lambda *a: sj.attention(*a, mask=mask, **DENSE), [x.astype("float64") for x in arrays]
    )
    theirs = jax.jit(functools.partial(run, naive))(arrays)
    norms = []
    for way in (DENSE, {"block_size": 4}):
        ours = jax.jit(
            functools.partial(run, lambda *a, way=way: sj.attention(*a, mask=mask, **way))
        )(arrays)
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == jnp.dtype(dtype)
            error = lambda x, truth=truth: float(jnp.abs(x.astype("float64") - truth).max())
            unit = eps(dtype) * float(jnp.abs(truth).max())
            assert error(mine) <= error(other) + unit  # One rounding more at most.
        off = lambda found: [
            float(jnp.linalg.norm((x.astype("float64") - y).reshape(-1)))
            for x, y in zip(found, exact, strict=True)
        ]
        norms.append((off(ours), off(theirs)))
    # Blocks add up in float32, and their sums are rounded once, as those of one tile.
    for stored, (streamed, naive) in zip(norms[0][0], zip(*norms[1], strict=True), strict=True):
        assert dtype == "float32" or streamed <= 1.1 * min(stored, naive)
    _, lse = sj.attention(*arrays, mask=mask, return_lse=True)
    assert lse.dtype == jnp.float32  # And not rounded to half precision:
    exact_lse = sj.attention(*(x.astype("float64") for x in arrays), mask=mask, return_lse=True)
    assert_close(lse, exact_lse[1], rtol=0, atol=64 * eps("float32"))


# Transformations and memory.


@pytest.mark.slow
def test_vmap_over_all_and_over_some():
    """Also over arrays that a mask or a score function holds."""
    stacks = [jnp.stack([x, 2 * x]) for x in draw(11)]
    lengths = jnp.array([[4, S], [7, 2]])
    slopes = jnp.stack([jnp.asarray(SLOPES), -jnp.asarray(SLOPES)])

    def call(queries, keys, values, lengths, slopes):
        mask = masks.Lengths(None, lengths) & masks.Function(
            lambda at: at.key + lengths[0].astype("int32") > at.query
        )
        score = lambda scores, at: alibi(slopes, scores, at)
        return sj.attention(queries, keys, values, mask=mask, score=score, **STREAMED)

    args = (*stacks, lengths, slopes)
    for axes in ((0, 0, 0, 0, 0), (0, None, None, None, None), (None, None, 0, 0, 0)):
        pick = [x if axis == 0 else x[0] for x, axis in zip(args, axes, strict=True)]
        out = jax.vmap(call, axes)(*pick)
        for i in range(2):
            one = [x[i] if axis == 0 else x for x, axis in zip(pick, axes, strict=True)]
            assert_close(out[i], call(*one), rtol=0, atol=16 * eps("float64"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gradient", "reverse over reverse"])
def test_inside_a_scan_of_remat(mode):
    """Layers that share their weights; the second derivative too."""
    _, keys, values = draw(12, shape=(1, 4, 6, 2, 1, 3, 3))
    queries = draw(13, shape=(1, 4, 6, 2, 1, 3, 3))[0]
    slopes = jnp.array([0.1, 0.2])

    def layers(attend, queries, keys, values, slopes):
        layer = lambda x: x + attend(x, keys, values, slopes)
        return jax.lax.scan(
            lambda x, _: (jax.checkpoint(layer)(x), None), queries, None, length=2
        )[0]

    def streamed(q, k, v, slopes):
        score = lambda scores, at: alibi(slopes, scores, at)
        return sj.attention(q, k, v, mask=masks.Causal(1), score=score, block_size=2)

    def plain(q, k, v, slopes):
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        gap = jnp.abs(jnp.subtract.outer(jnp.arange(4.0), jnp.arange(6.0)))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(3.0)
        scores -= slopes[None, :, None, None] * gap[None, None]
        weights = jax.nn.softmax(jnp.where(np.tri(4, 6, 1) > 0, scores, -1e9))
        return jnp.einsum("bnts,bsnw->btnw", weights, v)

    args = (queries, keys, values, slopes)
    found = []
    for attend in (streamed, plain):
        total = lambda *a, attend=attend: jnp.sum(jnp.sin(layers(attend, *a)))
        grad = jax.grad(total, argnums=(0, 1, 2, 3))
        if mode != "gradient":
            inner = lambda a, grad=grad: sum(jnp.sum(jnp.cos(g)) for g in grad(*a))
            grad = lambda *a, inner=inner: jax.grad(inner)(a)
        found.append(jax.jit(grad)(*args))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


MEASURED = {
    "value": lambda call, bar: call,
    "gradient": lambda call, bar: lambda *a: jax.vjp(call, *a)[1](bar),
    "jvp": lambda call, bar: lambda *a: jax.jvp(call, a, a)[1],
    "forward over reverse": lambda call, bar: (
        lambda *a: jax.jvp(lambda *b: jax.vjp(call, *b)[1](bar), a, a)[1]
    ),
}


def temporary_bytes(call, mode, length):
    tokens = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
    run = lambda bar, *a: MEASURED[mode](call, bar)(*a)
    compiled = jax.jit(run).lower(tokens, tokens, tokens, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
def test_memory_of_the_gradient():
    """Less than a tenth of that of the scores, and no more than linear in the length."""
    call = functools.partial(sj.attention, mask=masks.Causal())
    small, large = (temporary_bytes(call, "gradient", n) for n in (1024, 4096))
    assert large <= 4.5 * small
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    assert large <= temporary_bytes(theirs, "gradient", 4096) / 10


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("mode", MEASURED)
def test_memory_grows_with_the_length(mode):
    call = functools.partial(sj.attention, mask=masks.Causal())
    small, middle, large = (temporary_bytes(call, mode, n) for n in (1024, 4096, 16384))
    assert middle <= 4.5 * small
    assert large <= 4.5 * middle


# Dropout.


@pytest.mark.slow
def test_dropout():
    """The same weights are dropped in every way and mode; the others make up for it."""
    arrays = draw(14, shape=(2, 16, 16, 2, 1, 3, 16))
    values = jnp.broadcast_to(jnp.eye(16)[None, :, None], (2, 16, 1, 16))
    key, rate = jax.random.key(0), 0.25
    call = functools.partial(sj.attention, mask=masks.Causal(), block_size=5)
    dropping = functools.partial(call, dropout_rate=rate, dropout_key=key)
    plain, dropped = call(*arrays[:2], values), dropping(*arrays[:2], values)
    kept = np.asarray(dropped) != 0
    assert_close(dropped, np.where(kept, plain / (1 - rate), 0), rtol=8 * eps("float64"))
    seen = np.asarray(plain) > 0
    share = 1 - kept[seen].mean()
    assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / seen.sum())
    dense = sj.attention(
        *arrays[:2], values, mask=masks.Causal(), dropout_rate=rate, dropout_key=key, **DENSE
    )
    assert_close(dense, dropped, rtol=0, atol=16 * eps("float64"))
    other = functools.partial(call, dropout_rate=rate, dropout_key=jax.random.key(1))
    assert (np.asarray(other(*arrays[:2], values) != 0) != kept).any()
    assert_same(call(*arrays, dropout_rate=0.0, dropout_key=key), call(*arrays))
    assert (call(*arrays, dropout_rate=1.0, dropout_key=key) == 0).all()
    for wrong in (-0.1, 1.5):  # What an array holds cannot be refused: it shows.
        out = call(*arrays, dropout_rate=jnp.asarray(wrong), dropout_key=key)
        assert jnp.isnan(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gradient", "jvp"])
def test_derivatives_under_dropout(mode):
    """Those of attention with the dropped weights fixed to 0."""
    arrays = draw(14, shape=(2, 16, 16, 2, 1, 3, 16))
    values = jnp.broadcast_to(jnp.eye(16)[None, :, None], (2, 16, 1, 16))
    rate = 0.25
    dropping = functools.partial(
        sj.attention,
        mask=masks.Causal(),
        block_size=5,
        dropout_rate=rate,
        dropout_key=jax.random.key(0),
    )
    kept = dropping(*arrays[:2], values) != 0
    fixed = jnp.where(kept, 1 / (1 - rate), 0)

    def definition(queries, keys, values):
        scores = jnp.einsum("btnh,bsh->btns", queries, keys[:, :, 0]) / jnp.sqrt(3.0)
        causal = np.tri(16, dtype=bool)[:, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)) * fixed
        return jnp.einsum("btns,bsw->btnw", weights, values[:, :, 0])

    dots = draw(15, shape=(2, 16, 16, 2, 1, 3, 16))
    found = []
    for fn in (dropping, definition):
        total = lambda *a, fn=fn: jnp.sum(jnp.sin(fn(*a)))
        push = lambda *a, fn=fn: (jax.jvp(fn, a, dots)[1],)
        run = push if mode == "jvp" else jax.grad(total, argnums=(0, 1, 2))
        found.append(jax.jit(run)(*arrays))
    for one, two in zip(*found, strict=True):
        assert_close(one, two, rtol=0, atol=1e-12)


# Refusals.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": jnp.ones((B, S, K, H + 1))}, ValueError, "`queries` must be"),
        (
            {"keys": jnp.ones((B, S, 3, H)), "values": jnp.ones((B, S, 3, W))},
            ValueError,
            "4 and 3",
        ),
        ({"values": jnp.ones((B, S + 1, K, W))}, ValueError, "`values`"),
        ({"keys": jnp.ones((B, S, K, H), "float32")}, TypeError, "dtype float64 of `queries`"),
        ({"queries": jnp.ones((B, T, N, H), complex)}, TypeError, "`queries` must be real"),
        ({"mask": jnp.ones((T, S))}, TypeError, "`mask` must be bool"),
        ({"mask": jnp.ones((S, T), bool)}, ValueError, "`mask` of shape"),
        ({"mask": lambda at: at.key > 0}, TypeError, r"masks\.Function"),
        ({"bias": jnp.ones((3, T, S))}, ValueError, "`bias` of shape"),
        ({"bias": jnp.ones((T, S), bool)}, TypeError, "`bias` must hold numbers, got bool"),
        ({"bias": True}, TypeError, "`bias` must hold numbers, got bool"),
        ({"scale": jnp.ones(3)}, ValueError, "`scale` must be one number"),
        ({"soft_cap": jnp.ones((N, 1))}, ValueError, "`soft_cap` must be one number"),
        ({"sink": jnp.ones(3)}, ValueError, "`sink` must be one number"),
        ({"score": lambda s, at: s[0]}, ValueError, "`score` must give scores of the shape"),
        ({"score": lambda s, at: s > 0}, TypeError, "`score` must give real scores"),
        ({"positions": jnp.zeros(T)}, TypeError, "`positions` must be integers"),
        ({"positions": jnp.zeros(T, int)}, ValueError, r"`positions` must be .*\(2, 11\)"),
        ({"positions": (None,)}, ValueError, "`positions`"),
        ({"dropout_rate": 0.5}, ValueError, "needs a `dropout_key`"),
        ({"dropout_rate": 1.5}, ValueError, r"in \[0, 1\], got 1\.5"),
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1"),
        ({"block_size": 2.0}, TypeError, r"`block_size` must be an int, got 2\.0"),
        ({"cap_bias": 1}, TypeError, "`cap_bias` must be True or False"),
        ({"return_lse": 1}, TypeError, "`return_lse` must be True or False"),
        ({"dropout_key": 0}, TypeError, "`dropout_key` must be a key of jax.random, got int"),
        ({"block_size": (2, 3, 4)}, ValueError, "`block_size`"),
        ({"block_size": 2, "implementation": "dense"}, ValueError, "no meaning"),
        ({"implementation": "flash"}, ValueError, "`implementation` must be"),
    ],
)
def test_errors(change, error, message):
    given = dict(zip(("queries", "keys", "values"), draw(), strict=True)) | change
    arrays = [given.pop(name) for name in ("queries", "keys", "values")]
    with pytest.raises(error, match=message):
        sj.attention(*arrays, **given)


@pytest.mark.slow
@every_way
def test_no_sink_and_nothing_seen(way):
    queries, keys, values = draw(0)
    call = lambda q: sj.attention(
        q, keys, values, mask=masks.Causal(-1), sink=jnp.full(q.shape[-2], -INF), **way
    )
    plain = sj.attention(queries, keys, values, mask=masks.Causal(-1), **way)
    assert_close(call(queries), plain, rtol=8 * eps("float64"), atol=8 * eps("float64"))
    assert (call(queries)[:, 0] == 0).all()
    assert jnp.isfinite(jax.grad(lambda q: jnp.sum(call(q)))(queries)).all()


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_gradient_of_vmap(normalizer):
    """The kinds of tiles are those of the whole batch, or no branch would have a transpose."""
    queries = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 1, 4)))
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, 12)), -1))

    def loss(q, ids):
        mask = masks.Segments(ids) & masks.Causal()
        out = sj.attention(30 * q, q, q, mask=mask, normalizer=normalizer, block_size=4)
        return jnp.sum(jnp.sin(out))

    over_all = jax.grad(lambda q: jnp.sum(jax.vmap(loss)(q, ids)))(queries)
    one_by_one = [jax.grad(loss)(q, i) for q, i in zip(queries, ids, strict=True)]
    assert_close(over_all, jnp.stack(one_by_one), rtol=1e-12, atol=1e-12)


def test_a_soft_cap_of_inf_bounds_nothing():
    queries, keys, values = draw()
    call = lambda q, **options: jnp.sum(jnp.sin(sj.attention(q, keys, values, **options)))
    expected = jax.grad(call)(queries)
    got = jax.grad(functools.partial(call, soft_cap=jnp.inf))(queries)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_options_are_those_of_the_signature():
    """The overloads, by which type checkers know the result, name all of them."""
    parameters = inspect.signature(sj.attention).parameters.values()
    names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {*Options.__annotations__, "return_lse"} == names
    assert len(typing.get_overloads(inspect.unwrap(sj.attention))) == 3
