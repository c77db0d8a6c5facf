"""The recipes in the docstring of `attentions`, beside their definitions in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests.helpers import assert_close

BATCH, LENGTH, HEADS, WIDTH = 2, 6, 3, 4


@pytest.fixture(scope="module")
def recipes():
    """The functions of the docstring by name."""
    blocks = re.findall(r"```python\n(.*?)```", sj.attentions.__doc__, re.S)
    (code,) = [block for block in blocks if "def forgetting_attention" in block]
    scope = {}
    exec(code, scope)
    return scope


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(BATCH, LENGTH, HEADS, WIDTH)) for _ in range(5)]


def scores_of(q, k):
    """Scaled products `[batch, heads, query, key]`."""
    return np.einsum("btnh,bsnh->bnts", q, k) / WIDTH**0.5


def average(weights, v):
    return np.einsum("bnts,bsnh->btnh", weights, v)


def softmax(scores, extra=0.0):
    """Exponentials over their sum and a further number."""
    weights = np.exp(scores)
    return weights / (extra + weights.sum(axis=-1, keepdims=True))


def check(fn, args, expected):
    """The value, and a gradient in every argument that is finite and not 0."""
    args = [jnp.asarray(x) for x in args]
    assert_close(jax.jit(fn)(*args), expected, rtol=1e-12, atol=1e-12)
    loss = lambda *args: jnp.sum(jnp.sin(fn(*args)))
    for gradient in jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))(*args):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 1e-3


def test_forgetting_attention(recipes, arrays):
    """Lin et al. (2025): a score loses the log forget gates of the tokens after its key."""
    q, k, v, *_ = arrays
    log_forget = -np.random.default_rng(1).exponential(size=(BATCH, LENGTH, HEADS))
    scores = scores_of(q, k)
    for query in range(LENGTH):
        for key in range(LENGTH):
            forgotten = log_forget[:, key + 1 : query + 1].sum(axis=1)
            scores[:, :, query, key] += forgotten if key <= query else -np.inf
    check(recipes["forgetting_attention"], (q, k, v, log_forget), average(softmax(scores), v))


def test_threshold_attention(recipes, arrays):
    q, k, v, *_ = arrays
    scores = scores_of(q, k)
    threshold = np.median(scores)
    kept = np.where(scores < threshold, -np.inf, scores)
    assert not np.isneginf(kept).all(axis=-1).any()
    fn = lambda q, k, v: recipes["threshold_attention"](q, k, v, threshold)
    check(fn, (q, k, v), average(softmax(kept), v))
    fn = lambda q, k, v: recipes["threshold_attention"](q, k, v, 1e9)
    np.testing.assert_array_equal(fn(*map(jnp.asarray, (q, k, v))), np.zeros_like(v))


def test_softmax1_attention(recipes, arrays):
    """Miller (2023), Attention is off by one."""
    q, k, v, *_ = arrays
    expected = average(softmax(scores_of(q, k), extra=1.0), v)
    check(recipes["softmax1_attention"], (q, k, v), expected)
    far = jnp.asarray(-1e3 * np.ones_like(q)), jnp.asarray(np.ones_like(k)), jnp.asarray(v)
    np.testing.assert_array_equal(recipes["softmax1_attention"](*far), np.zeros_like(v))


def test_differential_attention(recipes, arrays):
    """Ye et al. (2025), Differential transformer."""
    q, k, q2, k2, v = arrays
    weight = 0.8
    weights = softmax(scores_of(q, k)) - weight * softmax(scores_of(q2, k2))
    args = q, k, q2, k2, v, np.float64(weight)
    check(recipes["differential_attention"], args, average(weights, v))
