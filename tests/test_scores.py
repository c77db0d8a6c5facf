"""Score transforms: caps, filters and re-weightings, logits in and logits out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps

FILTERS = {
    "top_k_filter": (1, 2, 3, 5, 7),
    "top_p_filter": (1e-6, 0.3, 0.5, 0.9, 0.999, 1.0),
    "min_p_filter": (1e-6, 0.05, 0.3, 0.9, 1.0),
    "typical_filter": (1e-6, 0.3, 0.5, 0.9, 0.999, 1.0),
}
every_filter = pytest.mark.parametrize("name", FILTERS)


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


@every_filter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_filters_against_brute_force(name, dtype):
    fn, oracle = getattr(sj, name), getattr(oracles, name)
    for seed, scale in enumerate((0.5, 2.0, 8.0)):
        logits, keep = draw(seed, (3, 7), scale=scale, dtype=dtype)
        logits = np.where(keep, logits, np.array(-INF, logits.dtype))
        for option in FILTERS[name]:
            for axis in (0, -1, None):
                actual = fn(jnp.asarray(logits), option, axis=axis)
                expected = oracle(logits, option, axis=axis).astype(logits.dtype)
                assert_same(actual, jnp.asarray(expected))


@every_filter
def test_filters_take_an_option_per_slice(name):
    logits, _ = draw(3, (4, 7), scale=2.0)
    options = np.array(FILTERS[name][:4])[:, None]
    actual = getattr(sj, name)(jnp.asarray(logits), jnp.asarray(options))
    pairs = zip(logits, options, strict=True)
    alone = [getattr(sj, name)(jnp.asarray(z), o[0]) for z, o in pairs]
    assert_same(actual, jnp.stack(alone))
    traced = jax.jit(getattr(sj, name))(jnp.asarray(logits), jnp.asarray(options))
    assert_same(traced, actual)
    columns = getattr(sj, name)(jnp.asarray(logits.T), jnp.asarray(options.T), axis=0)
    assert_same(columns, actual.T)


@every_filter
def test_filters_keep_ties(name):
    """Entries that are equal are kept or dropped together."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        logits = rng.integers(-3, 3, 9).astype(float)
        for option in FILTERS[name][:-1]:
            if name == "top_k_filter" or option not in (0.3, 0.5, 0.9):
                out = np.asarray(getattr(sj, name)(jnp.asarray(logits), option))
                for level in np.unique(logits):
                    assert len(np.unique(out[logits == level])) == 1
                assert out.max() > -INF
                expected = getattr(oracles, name)(logits, option)
                np.testing.assert_array_equal(out, expected)


@every_filter
def test_filters_at_the_edges(name):
    fn, few, everything = getattr(sj, name), FILTERS[name][0], FILTERS[name][-1]
    with jax.debug_nans(True):
        assert_close(fn(jnp.array([-INF, -INF]), few), [-INF, -INF], rtol=0)
        assert_close(fn(jnp.array([2.0]), few), [2.0], rtol=0)
        assert_close(fn(jnp.array([0.0, -INF, 0.0]), few), [0.0, -INF, 0.0], rtol=0)
        assert fn(jnp.zeros((0, 3)), few).shape == (0, 3)
        assert fn(jnp.zeros((2, 0)), few).shape == (2, 0)
        if name != "min_p_filter":
            logits = jnp.asarray(draw(5, (7,), scale=30.0)[0])
            assert_same(fn(logits, everything), logits)
        assert fn(jnp.array([INF, 0.0]), few)[0] == INF
    assert jnp.isnan(fn(jnp.array([NAN, 0.0, 1.0]), everything)).any()


@pytest.mark.slow
@every_filter
def test_filters_pass_the_derivative_of_what_they_keep(name):
    logits = jnp.asarray(draw(6, (7,), scale=2.0)[0])
    option = FILTERS[name][1]
    kept = getattr(sj, name)(logits, option) > -INF
    assert 0 < kept.sum() < 7
    loss = lambda z: jnp.sum(sj.softmax(getattr(sj, name)(z, option)) * jnp.arange(7.0))
    masked = lambda z: jnp.sum(sj.softmax(z, where=kept) * jnp.arange(7.0))
    with jax.debug_nans(True):
        for mode in (jax.grad, jax.hessian):
            assert_close(mode(loss)(logits), mode(masked)(logits), rtol=1e-12, atol=1e-15)


def test_top_k_of_special_numbers():
    """Bit patterns are ordered like the numbers, whatever their sign; -0 equals 0."""
    logits = jnp.array([-1.0, -0.0, 0.0, 3e-308, -1e300, 1e300, -2.0])
    for k in range(1, 8):
        edge = np.sort(np.asarray(logits))[::-1][k - 1]
        expected = np.where(np.asarray(logits) >= edge, logits, -INF)
        np.testing.assert_array_equal(sj.top_k_filter(logits, k), expected)
        np.testing.assert_array_equal(sj.top_k_filter(logits, k - 0.5), expected)
    for dtype in DTYPES:
        values = jnp.asarray(draw(7, (4, 100), scale=5.0, dtype=dtype)[0])
        out = sj.top_k_filter(values, 10)
        expected = oracles.top_k_filter(values, 10)
        np.testing.assert_array_equal(np.asarray(out).astype(float), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_filters_of_long_slices(dtype):
    """Against a full sort in float64, with options that no rounding can blur."""
    logits, _ = draw(8, (2, 50_000), scale=3.0, dtype=dtype)
    exact = logits.astype(np.float64)
    ordered = np.sort(exact, -1)[:, ::-1]
    out = np.asarray(sj.top_k_filter(jnp.asarray(logits), 500))
    np.testing.assert_array_equal(out > -INF, exact >= ordered[:, 499:500])
    probs = np.asarray(oracles.fast_softmax(ordered))
    total = np.cumsum(probs, -1)
    for p in (0.1, 0.5, 0.95):
        count = np.sum(total < p, -1) + 1
        # How near the mass comes to p, against the rounding of a sum of probabilities.
        near = [total[i, c - 1 + s] - p for i, c in enumerate(count) for s in (-1, 0)]
        margin = np.abs(near).min()
        out = np.asarray(sj.top_p_filter(jnp.asarray(logits), p)) > -INF
        edge = np.take_along_axis(ordered, count[:, None] - 1, -1)
        if margin > 8 * eps(dtype):
            np.testing.assert_array_equal(out, exact >= edge)
        assert (np.abs(out.sum(-1) - count) <= 1).all()


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


def test_a_filter_remembers_its_result_alone():
    filters = (
        lambda z: sj.top_k_filter(z, 2),
        lambda z: sj.top_p_filter(z, 0.9),
        lambda z: sj.min_p_filter(z, 0.1),
    )
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)), "float32")
    for fn in filters:
        filtered, pullback = jax.vjp(fn, logits)
        (kept,) = jax.tree.leaves(pullback)
        assert_same(kept, filtered)
