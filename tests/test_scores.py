"""Score transforms: caps and re-weightings, logits in and logits out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps


def test_soft_cap():
    for dtype in DTYPES:
        logits = jnp.asarray(draw(0, (3, 5), scale=20.0, dtype=dtype)[0])
        for cap in (0.5, 30.0, 1000.0):
            actual = sj.soft_cap(logits, cap)
            assert actual.dtype == logits.dtype
            assert_close(actual, oracles.soft_cap(logits, cap), rtol=4 * eps(dtype))
            assert (jnp.abs(actual) <= cap).all()
    edges = jnp.array([-INF, INF, NAN, 0.0, 1e308, -1e308])
    assert_close(sj.soft_cap(edges, 30.0), [-INF, 30.0, NAN, 0.0, 30.0, -30.0], rtol=0)


def test_soft_cap_derivatives():
    fn = lambda z, cap: sj.soft_cap(z, cap)
    for z in (-3.0, 0.1, 2.0):
        t = np.tanh(z / 1.5)
        slopes = 1 - t**2, t - z / 1.5 * (1 - t**2)
        for got, expected in zip(jax.grad(fn, argnums=(0, 1))(z, 1.5), slopes, strict=True):
            assert_close(got, expected, rtol=1e-14)
    with jax.debug_nans(True):
        for z in (-INF, INF, 1e308):
            for grad in jax.grad(fn, argnums=(0, 1))(z, 30.0):
                assert jnp.isfinite(grad)
            assert jax.grad(fn)(z, 30.0) == 0
            assert jax.jacfwd(jax.grad(fn))(z, 30.0) == 0


def test_scalable_scores():
    logits, keep = draw(9, (3, 6))
    for scale in (0.5, 1.0, np.array([[0.5], [1.0], [2.0]])):
        actual = sj.scalable_scores(jnp.asarray(logits), scale, where=keep)
        expected = oracles.scalable_scores(logits, scale, where=keep)
        assert_close(np.asarray(actual)[keep], expected[keep], rtol=4 * eps("float64"))
    logits = jnp.array([[1.0, 2.0, -INF], [1.0, -INF, -INF], [-INF] * 3])
    with jax.debug_nans(True):
        out = sj.scalable_scores(logits)
        log2 = np.log(2)
        expected = [[log2, 2 * log2, -INF], [0.0, -INF, -INF], [-INF] * 3]
        assert_close(out, expected, rtol=1e-15)
        first = lambda z, s: jnp.sum(sj.softmax(sj.scalable_scores(z, s))[:, 0])
        for derivative in jax.grad(first, argnums=(0, 1))(logits, 1.0):
            assert jnp.isfinite(derivative).all()


def test_scalable_scores_of_infinite_logits():
    value, slope = jax.jvp(
        lambda s: sj.scalable_scores(jnp.array([[INF, -INF], [INF, 1.0]]), s),
        (jnp.array(2.0),),
        (jnp.array(1.0),),
    )
    assert_same(value, jnp.array([[0.0, -INF], [INF, 2 * jnp.log(2.0)]]))
    assert_same(slope, jnp.array([[0.0, 0.0], [0.0, jnp.log(2.0)]]))
    flipped = sj.scalable_scores(jnp.array([INF, 1.0]), -1.0)
    assert_same(flipped, jnp.array([-INF, -jnp.log(2.0)]))


def test_sigsoftmax_and_taylor_scores():
    for dtype in DTYPES:
        logits = jnp.asarray(draw(10, (40,), scale=8.0, dtype=dtype)[0])
        for name in ("sigsoftmax_scores", "taylor_scores"):
            actual = getattr(sj, name)(logits)
            assert actual.dtype == logits.dtype
            expected = getattr(oracles, name)(np.asarray(logits).astype(float))
            # Near zeros of the scores the terms cancel.
            assert_close(actual, expected, rtol=4 * eps(dtype), atol=4 * eps(dtype))
    x = jnp.array([0.3, -1.2, 2.0])
    weights = jnp.exp(x) * jax.nn.sigmoid(x)
    probs = sj.softmax(sj.sigsoftmax_scores(x))
    assert_close(probs, weights / weights.sum(), rtol=1e-14)
    weights = 1 + x + x**2 / 2
    assert_close(sj.softmax(sj.taylor_scores(x)), weights / weights.sum(), rtol=1e-14)


@pytest.mark.parametrize("name", ["sigsoftmax_scores", "taylor_scores"])
def test_unary_scores_at_the_edges(name):
    fn = getattr(sj, name)
    with jax.debug_nans(True):
        out = fn(jnp.array([-INF, INF, 1e3, -1e3]))
        assert_close(out[:2], [-INF, INF], rtol=0)
        assert jnp.isfinite(out[2:]).all()
        probs = lambda z: sj.softmax(fn(z))
        jacobian = jax.jacrev(probs)(jnp.array([-INF, 0.5, 0.25]))
        assert jnp.isfinite(jacobian).all()
        assert (jacobian[0] == 0).all()
        assert (jacobian[:, 0] == 0).all()
        for z in (-700.0, -1.0, 0.0, 30.0, 700.0, 1e200):
            for derivative in (jax.grad(fn)(z), jax.grad(jax.grad(fn))(z)):
                assert jnp.isfinite(derivative)
    assert jnp.isnan(fn(jnp.asarray(NAN)))
