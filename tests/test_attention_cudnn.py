"""Attention by cuDNN, with stubs for its kernels: values, derivatives, NaN and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from tests.helpers import INF, NAN, assert_close, assert_same

B, T, N, K, H = 2, 12, 4, 2, 8
MASKS = {"full": None, "causal": masks.Causal()}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def draw(seed=0, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    return tuple(jnp.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def kernels(queries, keys, values, is_causal, scale):
    """Like cuDNN: a value and a gradient that JAX cannot differentiate."""
    return kernels_fwd(queries, keys, values, is_causal, scale)[0]


def plain(queries, keys, values, is_causal, scale):
    keys, values = (jnp.repeat(x, N // K, 2) for x in (keys, values))
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) * (scale or H**-0.5)
    # The masked weights are 0, and 0 times NaN is NaN: what is not cleaned is everywhere.
    weights = jax.nn.softmax(jnp.where(np.tri(T) > 0, scores, -1e9) if is_causal else scores)
    return jnp.einsum("bnts,bsnh->btnh", weights, values)


@jax.custom_jvp
def opaque(x):
    return x


@opaque.defjvp
def opaque_jvp(primals, tangents):
    raise AssertionError("a kernel is differentiated")


def kernels_fwd(queries, keys, values, is_causal, scale):
    arrays = [opaque(x).astype("float64") for x in (queries, keys, values)]
    out = plain(*arrays, is_causal, scale).astype(queries.dtype)
    return opaque(out), (queries, keys, values)


def kernels_bwd(is_causal, scale, arrays, bar):
    wide = [opaque(x).astype("float64") for x in arrays]
    pullback = jax.vjp(lambda *a: plain(*a, is_causal, scale), *wide)[1]
    bars = pullback(opaque(bar).astype("float64"))
    return tuple(g.astype(x.dtype) for g, x in zip(bars, arrays, strict=True))


kernels.defvjp(kernels_fwd, kernels_bwd)


@pytest.fixture
def on_gpu(monkeypatch):
    """The stubs, where the default device seems to be a GPU."""

    def attend(queries, keys, values, *, is_causal, scale, implementation):
        assert implementation == "cudnn"
        return kernels(queries, keys, values, is_causal, scale)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    yield
    jax.clear_caches()  # Programs with stubs.


def both(mask, **options):
    call = functools.partial(sj.attention, mask=mask, **options)
    return (functools.partial(call, implementation=way) for way in ("cudnn", "streamed"))


def gradient(f):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a).astype("float32"))), (0, 1, 2))


MODES = {
    "value": lambda f, dots: lambda *a: f(*a),
    "jvp": lambda f, dots: lambda *a: jax.jvp(f, a, dots)[1],
    "gradient": lambda f, dots: gradient(f),
    "gradient in keys": lambda f, dots: (
        lambda *a: (
            gradient(lambda k: f(a[0], k, a[2]))
            and jax.grad(lambda k: jnp.sum(f(a[0], k, a[2]).astype("float32")))(a[1])
        )
    ),
    "forward over reverse": lambda f, dots: lambda *a: jax.jvp(gradient(f), a, dots)[1],
    "reverse over reverse": lambda f, dots: jax.grad(
        lambda *a: sum(jnp.vdot(g, dot) for g, dot in zip(gradient(f)(*a), dots, strict=True)),
        (0, 1, 2),
    ),
    "remat": lambda f, dots: gradient(jax.checkpoint(f)),
    "vmap": lambda f, dots: (
        lambda *a: jax.vmap(gradient(f))(*(jnp.stack([x, 2 * x]) for x in a))
    ),
}


COMMON = ("value", "jvp", "gradient", "forward over reverse")


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        pytest.param(masks.Causal(), COMMON, id="causal"),
        pytest.param(masks.Causal(), MODES, id="causal, all", marks=pytest.mark.slow),
        pytest.param(None, MODES, id="full, all", marks=pytest.mark.slow),
    ],
)
def test_every_mode(on_gpu, mask, names):
    args, dots = draw(0), draw(1)
    found, expected = (
        jax.jit(lambda *a, f=f: {name: MODES[name](f, dots)(*a) for name in names})(*args)
        for f in both(mask, scale=0.3)
    )
    for name in names:
        for one, other in zip(
            *map(jax.tree.leaves, (found[name], expected[name])), strict=True
        ):
            assert one.dtype == other.dtype
            size = float(jnp.abs(other).max())
            assert_close(
                one.astype("float64"), other.astype("float64"), rtol=0, atol=0.03 * size
            )


@every_mask
def test_bad_tokens_reach_only_who_sees_them(on_gpu, mask):
    """Values as in the streamed form; gradients are NaN for all that is seen together with it.

    A query, key or value at 7 of the first sequence is bad, in the second head.
    """
    arrays = list(draw(0))
    cudnn, streamed = both(mask)

    @jax.jit
    def run(*args):
        out, pullback = jax.vjp(cudnn, *args)
        return out, streamed(*args), pullback(jnp.ones_like(out))

    clean, _, clean_bars = run(*arrays)
    after = np.arange(T) >= 7
    for place, number in [(0, NAN), (0, INF), (1, NAN), (1, INF), (2, NAN), (2, INF)]:
        spoilt = list(arrays)
        spoilt[place] = arrays[place].at[0, 7, 1, 2].set(number)
        if place == 0:  # The query at 7, in a head of the first key head.
            heads, key_head = [1], 0
            sees = np.arange(T) == 7
            keys = np.ones(T, bool) if mask is None else ~after | sees
            queries = np.zeros(T, bool)
        else:
            heads, key_head = [2, 3], 1
            sees = queries = np.ones(T, bool) if mask is None else after
            keys = np.arange(T) != 7
        out, other, bars = run(*spoilt)
        expected = np.zeros((B, T, N, H), bool)
        expected[0][np.ix_(sees, heads)] = True
        assert_same(jnp.isnan(out), jnp.asarray(expected))
        assert_same(jnp.isnan(other), jnp.asarray(expected))
        assert_same(out[~expected], clean[~expected])
        for i, (bar, before) in enumerate(zip(bars, clean_bars, strict=True)):
            expected = np.zeros(bar.shape, bool)
            if i == 0:
                expected[0][np.ix_(queries, heads)] = True
            else:
                expected[0, keys, key_head] = True
            assert_same(jnp.isnan(bar), jnp.asarray(expected))
            assert_same(bar[1], before[1])
        assert (bars[place][0, 7, 1] == 0).all()  # A bad token is a constant.


REFUSED = [
    ({"dtype": "float32"}, "bfloat16 and float16"),
    ({"bias": jnp.zeros((T, T))}, "no place for `bias`"),
    ({"soft_cap": 30.0}, "no place for `soft_cap`"),
    ({"sink": 0.0}, "no place for `sink`"),
    ({"score": lambda s, at: s}, "no place for `score`"),
    ({"positions": jnp.arange(T)}, "no place for `positions`"),
    ({"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}, "no place for `dropout_key`"),
    ({"block_size": 4}, "no place for `block_size`"),
    ({"return_lse": True}, "log-sum-exp"),
    ({"normalizer": "sparsemax"}, "softmax alone"),
    ({"scale": jnp.ones(N)}, "`scale` is an array"),
    ({"mask": masks.Causal(1)}, "no masks but"),
    ({"mask": masks.Window(3)}, "no masks but"),
    ({"mask": masks.Causal() & masks.Prefix(3)}, "no masks but"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_it_tells_why_it_cannot_serve(on_gpu, options, reason):
    options = dict(options)
    arrays = draw(0, options.pop("dtype", "bfloat16"))
    with pytest.raises(ValueError, match=reason):
        sj.attention(*arrays, implementation="cudnn", **options)
    assert reason.split(" ")[0] in sj.explain_attention(*arrays, **options).splitlines()[0]


def test_shapes_that_it_cannot_serve(on_gpu):
    queries, keys, values = draw(0)
    run = functools.partial(sj.attention, implementation="cudnn")
    for arrays, reason in [
        ((queries[..., :5], keys[..., :5], values[..., :5]), "no multiple of 8"),
        ((queries, keys, values[..., :4]), "differ in their widths"),
        ((queries[:, :0], keys, values), "no tokens"),
    ]:
        with pytest.raises(ValueError, match=reason):
            run(*arrays)
    with pytest.raises(ValueError, match="as many queries as keys"):
        run(queries[:, :3], keys, values, mask=masks.Causal())


def test_without_a_gpu():
    with pytest.raises(ValueError, match="because the default device is no GPU"):
        sj.attention(*draw(0), implementation="cudnn")
