"""Attention under threshold maps: sparsemax, entmax15 and maps of a user's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from softjax.attentions import _threshold_tiles
from softjax.attentions._inputs import cut_into_tiles, with_weigher
from tests import oracles
from tests.helpers import NAN, assert_close, eps
from tests.test_attention import INF, MODES, pairs

B, T, S, N, K, H, W = 1, 7, 9, 2, 1, 4, 3
STREAMED = {"block_size": 3}
NAMES = ("sparsemax", "entmax15")
KEEP = np.tri(T, S, 1, dtype=bool)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, W))
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


@pytest.mark.parametrize("name", NAMES)
def test_values(name):
    """Also of scores so large that the threshold itself could not be told from the peak."""
    call = jax.jit(
        lambda q, k, v, b, **way: sj.attention(
            q, k, v, mask=masks.Causal(1) & ~masks.Prefix(1), bias=b, normalizer=name, **way
        ),
        static_argnames=("block_size", "implementation"),
    )
    queries, keys, values = draw()
    keep = KEEP & (np.arange(S) > 0)
    for way in (STREAMED, {"implementation": "dense"}):
        for scale, shift in ((1.0, 0.0), (1e-3, 0.0), (30.0, 0.0), (4.0, 2.0**30)):
            bias = jnp.full((T, S), shift)
            arrays = (jnp.round(16 * scale * queries) / 16, jnp.round(4 * keys) / 4, values)
            expected, _ = oracles.attention(
                *arrays, keep=keep, bias=shift, weigh=getattr(oracles, name)
            )
            out = call(*arrays, bias, **way)
            assert_close(out, expected, rtol=0, atol=64 * eps("float64"))
            if scale == 30.0:
                assert (np.asarray(sj.attention(*arrays)) != expected).any()


def definition(name):
    def call(queries, keys, values, bias, scale):
        keys, values = (jnp.repeat(x, N // K, 2) for x in (keys, values))
        scores = scale * jnp.einsum("btnh,bsnh->bnts", queries, keys) + bias
        return (jnp.einsum("bnts,bsnw->btnw", getattr(sj, name)(scores, where=KEEP), values),)

    return call


def streamed(name):
    def call(queries, keys, values, bias, scale):
        options = {"mask": masks.Causal(1), "bias": bias, "scale": scale, "normalizer": name}
        return (sj.attention(queries, keys, values, **options, **STREAMED),)

    return call


def arguments(seed):
    bias = jnp.asarray(np.random.default_rng(seed).standard_normal((1, N, T, S)))
    return (*draw(seed), bias, jnp.array(1.5 + 0.1 * seed))


def total(call):
    return lambda *args: jnp.sum(jnp.sin(call(*args)[0]))


SPARSE_MODES = {
    "gradient": lambda call: lambda a, d: jax.grad(total(call), argnums=range(5))(*a),
    "jvp": MODES["jvp"],
    "forward over reverse": lambda call: (
        lambda a, d: jax.jvp(jax.grad(total(call), argnums=range(5)), a, d)[1]
    ),
    "reverse over reverse": lambda call: jax.grad(
        lambda a, d: sum(map(jnp.vdot, jax.grad(total(call), argnums=range(5))(*a), d))
    ),
}
SLOW = ("jvp", "forward over reverse", "reverse over reverse")


@pytest.mark.parametrize(
    ("name", "mode"),
    [*pairs({name: name for name in NAMES}, SPARSE_MODES, slow=SLOW)],
)
def test_derivatives_are_those_of_the_dense_maps(name, mode):
    args, dots = arguments(0), arguments(1)
    got = jax.jit(SPARSE_MODES[mode](streamed(name)))(args, dots)
    expected = jax.jit(SPARSE_MODES[mode](definition(name)))(args, dots)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-11)
        assert jnp.abs(other).max() > 1e-2


@pytest.mark.slow
def test_a_map_of_a_users_own():
    """entmax of a learnt alpha, whose derivative is that of `sj.entmax`; and softmax."""
    queries, keys, values = draw(2)

    def ours(alpha):
        weigh = lambda t: (jnp.where(t > 0, (alpha - 1) * t, 0)) ** (1 / (alpha - 1))
        pair = (weigh, 1 / (alpha - 1))
        return sj.attention(queries, keys, values, normalizer=pair, **STREAMED)

    def theirs(alpha):
        scores = jnp.einsum("btnh,bsnh->bnts", queries, jnp.repeat(keys, N, 2)) / jnp.sqrt(4.0)
        return jnp.einsum("bnts,bsnw->btnw", sj.entmax(scores, alpha), jnp.repeat(values, N, 2))

    alpha, one = jnp.array(1.75), jnp.array(1.0)
    found, expected = (
        jax.jit(lambda a, f=f: jax.jvp(f, (a,), (one,)))(alpha) for f in (ours, theirs)
    )
    assert_close(found[0], expected[0], rtol=0, atol=64 * eps("float64"))
    assert_close(found[1], expected[1], rtol=0, atol=1e-11)
    assert jnp.abs(found[1]).max() > 1e-2
    as_softmax = sj.attention(queries, keys, values, normalizer=(jnp.exp, 0.0), **STREAMED)
    plain = sj.attention(queries, keys, values)
    assert_close(as_softmax, plain, rtol=0, atol=64 * eps("float64"))


@pytest.mark.slow
def test_tiles_without_weight_are_skipped():
    """Two of four blocks of keys lie below the threshold of every query."""
    keys = jnp.zeros((1, 16, 1, 1)).at[:, 5:7].set(3.0).at[:, 12].set(2.75)
    tiled = cut_into_tiles(
        jnp.ones((1, 8, 1, 1)),
        keys,
        jnp.ones((1, 16, 1, 1)),
        mask=None,
        bias=None,
        score=None,
        scale=None,
        soft_cap=None,
        cap_bias=False,
        positions=None,
        dropout_rate=0.0,
        dropout_key=None,
        block_size=(4, 4),
        implementation=None,
    )
    tiled = with_weigher(tiled, _threshold_tiles.MAPS["sparsemax"][0])
    found = _threshold_tiles._threshold(*tiled[:2], jnp.array(1.0))
    np.testing.assert_array_equal(found.kinds, [[0, 2, 0, 2]] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_edges(name):
    """Nothing seen gives 0; what is not seen reaches nothing; a NaN reaches who sees it."""
    queries, keys, values = draw(3)
    call = functools.partial(
        sj.attention,
        mask=masks.Causal(-1) & masks.Lengths(None, 6),
        normalizer=name,
        **STREAMED,
    )
    grad = jax.grad(lambda *a: jnp.sum(call(*a)), argnums=(0, 1, 2))
    run = jax.jit(lambda *a: (call(*a), grad(*a)))
    with jax.debug_nans(True):
        out, bars = run(queries, keys, values)
    assert (out[:, 0] == 0).all()
    assert (bars[0][:, 0] == 0).all()
    assert all((bar != 0).any() for bar in bars)
    for number in (NAN, INF):
        bad = (x.at[:, 6:].set(number) for x in (keys, values))
        spoilt, spoilt_bars = run(queries, *bad)
        for one, other in zip((spoilt, *spoilt_bars), (out, *bars), strict=True):
            np.testing.assert_array_equal(one, other)
    seen = call(queries, keys.at[:, 3].set(NAN), values)
    assert jnp.isnan(seen[:, 4:]).all()
    np.testing.assert_array_equal(seen[:, :4], out[:, :4])


@pytest.mark.slow
def test_dropout_and_score():
    """A soft cap and a score function act before the map, dropout after it."""
    queries, keys, _ = draw(4)
    eye = jnp.eye(S)[None, :, None]
    call = functools.partial(
        sj.attention,
        normalizer="sparsemax",
        soft_cap=2.0,
        score=lambda scores, at: 3 * scores,
        **STREAMED,
    )
    plain = call(queries, keys, eye)
    dropped = call(queries, keys, eye, dropout_rate=0.5, dropout_key=jax.random.key(0))
    kept = np.asarray(dropped) > 0
    assert 0 < kept.sum() < (np.asarray(plain) > 0).sum()
    assert_close(dropped, np.where(kept, 2 * plain, 0), rtol=8 * eps("float64"))
    expected, _ = oracles.attention(
        queries, keys, eye, soft_cap=2.0, score=lambda s, n: 3 * s, weigh=oracles.sparsemax
    )
    assert_close(plain, expected, rtol=0, atol=64 * eps("float64"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalizer": "entmax"}, ValueError, "`normalizer` must be"),
        ({"normalizer": jnp.exp}, TypeError, "a pair of a function and a number"),
        ({"normalizer": (lambda z: z[None], 1.0)}, ValueError, "must keep shape and dtype"),
        ({"normalizer": (sj.sparsemax, 1.0)}, ValueError, "must be elementwise"),
        ({"normalizer": (jnp.exp, 1.0)}, ValueError, "must be 1 at its number, 1.0, got 2.7"),
        ({"normalizer": "sparsemax", "return_lse": True}, ValueError, "`return_lse` needs"),
        ({"normalizer": "sparsemax", "sink": 0.0}, ValueError, "`sink` needs"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        sj.attention(*draw(), **change)


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
def test_blocks_of_half_precision_are_rounded_once(normalizer):
    """Gradients of many blocks lose no more than those of one tile."""
    rng = np.random.default_rng(0)
    exact = [jnp.asarray(rng.standard_normal((1, 40, n, 8))) for n in (2, 1, 1)]
    exact = [x.astype("bfloat16").astype("float64") for x in exact]

    def gradients(dtype, **way):
        def loss(*arrays):
            out = sj.attention(*arrays, mask=masks.Causal(), normalizer=normalizer, **way)
            return jnp.sum(jnp.sin(out.astype("float64")))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in exact))

    truth = gradients("float64", implementation="dense")
    errors = [
        [
            float(jnp.linalg.norm((x.astype("float64") - y).reshape(-1)))
            for x, y in zip(gradients("bfloat16", **way), truth, strict=True)
        ]
        for way in ({"implementation": "dense"}, {"block_size": 4})
    ]
    for stored, streamed in zip(*errors, strict=True):
        assert streamed <= 1.1 * stored
