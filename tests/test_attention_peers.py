"""Attention in the hands of others: tokamax's own test suite, flax and equinox."""

import contextlib
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


# flax and equinox: the recipes of the README.


def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    **_,
):
    """For the multi-head attention of flax."""
    mask = None if mask is None else mask.astype(bool)
    drop = {"dropout_rate": dropout_rate, "dropout_key": dropout_rng}
    drop = {} if deterministic or not dropout_rate else drop
    return sj.attention(query, key, value, bias=bias, mask=mask, **drop)


@pytest.mark.filterwarnings("ignore")
def test_flax(as_users_run):
    """Multi-head attention with this attention, beside flax's own; and its dropout."""
    nn = pytest.importorskip("flax.linen")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8)), jnp.float32)
    causal = nn.make_causal_mask(x[..., 0])
    options = {"num_heads": 2, "dropout_rate": 0.5}
    theirs = nn.MultiHeadDotProductAttention(**options)
    ours = nn.MultiHeadDotProductAttention(**options, attention_fn=attention_fn)
    params = theirs.init(jax.random.key(0), x, deterministic=True)

    def run(module, **rest):
        apply = lambda p: module.apply(p, x, mask=causal, **rest)
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(apply(p))))(params)

    found, expected = (run(module, deterministic=True) for module in (ours, theirs))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)
    dropped = run(ours, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert abs(dropped[0] - found[0]) > 1e-3


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
