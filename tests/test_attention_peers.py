"""Attention in the hands of others: tokamax's own test suite, flax and equinox."""

import contextlib
import functools
import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from tests.helpers import assert_close


def contexts():
    """JAX as it comes: 32 bits, and dtypes and ranks that are promoted."""
    return (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    )


@pytest.fixture
def as_users_run():
    with contextlib.ExitStack() as stack:
        for context in contexts():
            stack.enter_context(context)
        yield


# tokamax.

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from tokamax._src.ops.attention import base as tokamax_base
        from tokamax._src.ops.attention import test_base as tokamax_tests
    except ImportError:
        tokamax_tests = None


def adapter(
    queries,
    keys,
    values,
    *,
    bias=None,
    mask=None,
    is_causal=False,
    logits_scale=None,
    logits_soft_cap=None,
    q_indices=None,
    k_indices=None,
    return_residuals=False,
    normalize_output=True,
):
    """`sj.attention` with the signature of tokamax; of options it lacks, a TypeError."""
    seen = masks.Causal() if is_causal else None
    if mask is not None:
        if isinstance(mask, tokamax_base.Mask):
            sizes = (queries.shape[-3], keys.shape[-3])
            given = zip((q_indices, k_indices), sizes, strict=True)
            mask = mask.as_array(*(n if at is None else at for at, n in given))
        seen = masks.Dense(mask) if seen is None else seen & masks.Dense(mask)
    if not normalize_output and not return_residuals:
        raise TypeError("averages are normalised")
    out, lse = sj.attention(
        queries,
        keys,
        values,
        mask=seen,
        bias=bias,
        scale=logits_scale,
        soft_cap=logits_soft_cap,
        positions=(q_indices, k_indices),
        return_lse=True,
    )
    if not return_residuals:
        return out
    # The residuals are a peak and a total below it: with the log-sum-exp as peak it is 1.
    peak = jnp.swapaxes(lse, -1, -2)
    return out, (peak, jnp.ones_like(peak))


if tokamax_tests is None:

    def test_tokamax():
        pytest.skip("tokamax is not installed")

else:

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    class TestTokamax(tokamax_tests.AttentionTestBase):
        """All of its cases, at its tolerances, but for what is not offered here."""

        def __init__(self, *args):
            lacking = ("dropout", "precisions", "logits_dtype")
            super().__init__(
                *args,
                attention_fn=adapter,
                **{f"supports_{name}": False for name in lacking},
            )

        def setUp(self):
            super().setUp()
            for context in contexts():
                self.enterContext(context)
            name = self._testMethodName
            if "quantized" in name or "normalize_output" in name:
                self.skipTest("quantised arrays and unnormalised averages are not offered")


# flax: the recipe in the docstring of `attentions`, beside flax's own attention.


def flax_recipe():
    """The function of the docstring."""
    blocks = re.findall(r"```python\n(.*?)```", sj.attentions.__doc__, re.S)
    (block,) = (block for block in blocks if "def attention_fn" in block)
    names = {}
    exec(block, names)
    return names["attention_fn"]


def tokens(seed=0, shape=(3, 7, 8)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def check_alike(found, expected, tolerance=2e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x).astype("float64") for x in (one, other))
        largest = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest)


SEEN = np.random.default_rng(1).random((3, 1, 7, 7)) < 0.5
SEEN[..., 0] = True
CAUSAL = np.tri(7)[None, None]
FLAX_MASKS = {"none": None, "bools": SEEN, "floats": CAUSAL, "keys": SEEN[:, :, :1]}
FLAX_CALLS = {
    **{f"mask of {name}": ({}, {"mask": mask}) for name, mask in FLAX_MASKS.items()},
    "bfloat16": ({"dtype": jnp.bfloat16}, {"mask": CAUSAL}),
    "normalised": ({"normalize_qk": True}, {}),
    "deterministic": ({"dropout_rate": 0.5}, {"deterministic": True}),
}
NNX_CALLS = FLAX_CALLS | {
    "causal": ({}, {"is_causal": True}),
    "causal and a mask": ({}, {"is_causal": True, "mask": SEEN}),
    "shared heads": ({"num_kv_heads": 1}, {"is_causal": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FLAX_CALLS)
def test_flax_linen(name, as_users_run):
    nn = pytest.importorskip("flax.linen")
    made, called = FLAX_CALLS[name]
    x, other = tokens(), tokens(1)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, **made)
    ours = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=flax_recipe(), **made)
    params = theirs.init(jax.random.key(0), x, **called)

    def run(layer):
        apply = lambda p, x: layer.apply(p, x, other, **called)
        loss = lambda p, x: jnp.sum(jnp.sin(apply(p, x).astype(jnp.float32)))
        return apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

    check_alike(run(ours), run(theirs), 3e-2 if "dtype" in made else 2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NNX_CALLS)
def test_flax_nnx(name, as_users_run):
    nnx = pytest.importorskip("flax.nnx")
    made, called = NNX_CALLS[name]
    x = tokens()

    def run(**rest):
        options = {"decode": False, "rngs": nnx.Rngs(0), **made, **rest}
        try:
            layer = nnx.MultiHeadAttention(2, 8, **options)
        except TypeError:
            pytest.skip("an option that this version of flax lacks")
        loss = lambda layer, x: jnp.sum(jnp.sin(layer(x, **called).astype(jnp.float32)))
        return layer(x, **called), nnx.grad(loss, argnums=(0, 1))(layer, x)

    found, expected = run(attention_fn=flax_recipe()), run()
    check_alike(found, expected, 3e-2 if "dtype" in made else 2e-5)
    if called.get("is_causal"):
        later = x.at[:, -1].set(0)
        layer = nnx.MultiHeadAttention(
            2, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=flax_recipe(), **made
        )
        before, after = (layer(t, **called)[:, :-1] for t in (x, later))
        np.testing.assert_array_equal(before, after)


@pytest.mark.filterwarnings("ignore")
def test_flax_decoding(as_users_run):
    """Token by token with flax's cache, in both of its interfaces."""
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    x = tokens()

    def linen(**rest):
        layer = nn.MultiHeadDotProductAttention(num_heads=2, decode=True, **rest)
        variables = layer.init(jax.random.key(0), x)
        cache, outs = {"cache": variables["cache"]}, []
        for t in range(x.shape[1]):
            given = {"params": variables["params"], **cache}
            out, cache = layer.apply(given, x[:, t : t + 1], mutable=["cache"])
            outs.append(out)
        return jnp.concatenate(outs, 1)

    def nnx_(**rest):
        layer = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0), **rest)
        layer.init_cache(x.shape)
        return jnp.concatenate([layer(x[:, t : t + 1]) for t in range(x.shape[1])], 1)

    for run in (linen, nnx_):
        check_alike(run(attention_fn=flax_recipe()), run())


@pytest.mark.filterwarnings("ignore")
def test_flax_functions(as_users_run):
    """The function alone beside both of flax's: a bias, a dtype, batch axes or none."""
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    attention_fn = flax_recipe()
    for batch in ((), (3,), (2, 3)):
        q, k, v = (tokens(seed, (*batch, 7, 4, 8)) for seed in range(3))
        bias = tokens(3, (*batch, 4, 7, 7))
        mask = CAUSAL[0]
        for options in ({"bias": bias}, {"bias": bias, "mask": mask}, {"dtype": "bfloat16"}):
            theirs = nn.dot_product_attention(q, k, v, **options)
            tolerance = 3e-2 if "dtype" in options else 2e-5
            check_alike(attention_fn(q, k, v, **options), theirs, tolerance)
    promote = nnx.nn.dtypes.promote_dtype
    options = {"promote_dtype": promote, "dtype": jnp.float32, "is_causal": True}
    q = q.astype(jnp.bfloat16)
    theirs = nnx.dot_product_attention(q[0], k[0], v[0], **options)
    check_alike(attention_fn(q[0], k[0], v[0], **options), theirs)


@pytest.mark.filterwarnings("ignore")
def test_flax_dropout(as_users_run):
    """The mean over many draws is what comes without dropout."""
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    attention_fn, x = flax_recipe(), tokens()
    options = {"dropout_rate": 0.5, "broadcast_dropout": False, "attention_fn": attention_fn}
    linen = nn.MultiHeadDotProductAttention(num_heads=2, **options)
    params = linen.init(jax.random.key(0), x, deterministic=True)
    drop = lambda key: linen.apply(params, x, deterministic=False, rngs={"dropout": key})
    plain = linen.apply(params, x, deterministic=True)
    outs = jax.vmap(drop)(jax.random.split(jax.random.key(1), 2000))
    error = jnp.std(outs, 0) / np.sqrt(2000)
    assert (jnp.abs(outs.mean(0) - plain) < 5 * error + 1e-6).all()
    assert (error > 0).any()
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), **options)
    first, second = layer(x, deterministic=False), layer(x, deterministic=False)
    assert float(jnp.abs(first - second).max()) > 1e-3
    np.testing.assert_array_equal(layer(x, deterministic=True), layer(x, deterministic=True))


@pytest.mark.filterwarnings("ignore")
def test_flax_with_masks_and_options_of_softjax(as_users_run):
    """A mask object is the array that it stands for; `partial` binds options."""
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    x, lengths = tokens(), jnp.array([7, 4, 5])
    mask = masks.Causal() & masks.Lengths(key_lengths=lengths)
    dense = mask.array(x.shape[1], batch=x.shape[:1])
    capped = functools.partial(flax_recipe(), soft_cap=0.1)
    linen = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=flax_recipe())
    params = linen.init(jax.random.key(0), x)
    check_alike(linen.apply(params, x, mask=mask), linen.apply(params, x, mask=dense))
    layers = [
        nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=fn)
        for fn in (flax_recipe(), capped)
    ]
    plain, bounded = (layer(x, mask=mask) for layer in layers)
    check_alike(plain, layers[0](x, mask=dense))
    assert float(jnp.abs(plain - bounded).max()) > 1e-3
    q, k, v = (tokens(seed, (2, 7, 4, 8)) for seed in range(3))
    check_alike(capped(q, k, v), sj.attention(q, k, v, soft_cap=0.1))


@pytest.mark.filterwarnings("ignore")
def test_flax_options_that_are_not_offered(as_users_run):
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    attention_fn, x = flax_recipe(), tokens()
    linen = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2)
    nnx_ = functools.partial(nnx.MultiHeadAttention, 2, 8, decode=False, rngs=nnx.Rngs(0))
    einsum = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum}
    einsum["attn_weights_value_einsum_cls"] = einsum["qk_attn_weights_einsum_cls"]
    for made, called, name in (
        ({"precision": "highest"}, {}, "precision"),
        ({}, {"sow_weights": True}, "sow_weights"),
        ({"dropout_rate": 0.5}, {"deterministic": False}, "broadcast_dropout"),
        (einsum, {}, "qk_attn_weights_einsum"),
    ):
        layer = linen(attention_fn=attention_fn, **made)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        with pytest.raises(ValueError, match=name):
            layer.init(keys, x, **called)
        if "einsum" not in name:
            layer = nnx_(attention_fn=attention_fn, **made)
            with pytest.raises(ValueError, match=name):
                layer(x, **called)
    with pytest.raises(TypeError, match="window"):
        attention_fn(x[..., None, :], x[..., None, :], x[..., None, :], window=3)
    # All that flax's own functions take is named in the signature.
    ours = set(inspect.signature(attention_fn).parameters)
    for own in (nn.dot_product_attention, nnx.dot_product_attention):
        assert set(inspect.signature(own).parameters) <= ours


# equinox: a module as a score function, with its gradient.


@pytest.mark.filterwarnings("ignore")
def test_equinox(as_users_run):
    """A module that is a score function, and has its gradient."""
    eqx = pytest.importorskip("equinox")

    class Alibi(eqx.Module):
        slopes: jax.Array

        def __call__(self, scores, at):
            return scores - self.slopes[None, :, None, None] * jnp.abs(at.query - at.key)

    class Layer(eqx.Module):
        project: eqx.nn.Linear
        alibi: Alibi

        def __call__(self, x):
            tokens = jax.vmap(self.project)(x).reshape(-1, 2, 4)
            out = sj.attention(tokens, tokens, tokens, mask=masks.Causal(), score=self.alibi)
            return out.reshape(x.shape)

    layer = Layer(eqx.nn.Linear(8, 8, key=jax.random.key(0)), Alibi(jnp.array([0.5, 0.25])))
    x = jax.random.normal(jax.random.key(1), (5, 8))
    grads = eqx.filter_jit(eqx.filter_grad(lambda layer: jnp.sum(jnp.sin(layer(x)))))(layer)
    assert all(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))
    step = 1e-2 * jnp.array([1.0, 0.0])
    moved = [
        eqx.tree_at(lambda m: m.alibi.slopes, layer, layer.alibi.slopes + sign * step)
        for sign in (1, -1)
    ]
    ahead, behind = (jnp.sum(jnp.sin(m(x))) for m in moved)
    assert_close(grads.alibi.slopes[0], (ahead - behind) / 2e-2, rtol=1e-2, atol=1e-3)
