"""Samples without replacement, against the enumeration of all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import INF, NAN, assert_close, draw, eps, g_test

LOGITS = np.array([0.5, -1.0, 2.0, 0.3, 1.2])
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum()
NUM = 2**17
ROWS = jnp.broadcast_to(jnp.asarray(LOGITS), (NUM, 5))
VALUES = np.array([3.0, -1.0, 0.5, 2.0, 7.0])


def sequence_prob(sequence):
    prob, left = 1.0, 1.0
    for i in sequence:
        prob, left = prob * PROBS[i] / left, left - PROBS[i]
    return prob


def z_score(samples, expected):
    samples = np.asarray(samples, float)
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    return np.abs(samples.mean(axis=0) - expected).max() / error.max()


@pytest.mark.parametrize("k", [2, 4])
def test_sequences_have_their_probability(k):
    indices, log_probs = sj.sample_without_replacement(jax.random.key(k), ROWS, k)
    codes = np.asarray(indices) @ 5 ** np.arange(k)
    sequences = list(itertools.permutations(range(5), k))
    exact = {np.dot(s, 5 ** np.arange(k)): sequence_prob(s) for s in sequences}
    assert set(codes) <= set(exact)
    counts = [np.sum(codes == code) for code in exact]
    assert g_test(counts, list(exact.values())) > 1e-4
    expected = np.log([exact[code] for code in codes])
    assert_close(jnp.sum(log_probs, -1), expected, rtol=1e-12)
    inclusion = [np.mean(np.any(np.asarray(indices) == i, -1)) for i in range(5)]
    wanted = np.array([sum(sequence_prob(s) for s in sequences if i in s) for i in range(5)])
    error = np.sqrt(wanted * (1 - wanted) / NUM)
    assert (np.abs(inclusion - wanted) < 5 * error).all()


@pytest.mark.slow
def test_sums_are_unbiased():
    """The sum over a weighted subset, its gradient and its Hessian, in the mean."""
    direction = jnp.asarray(np.linspace(-1, 1, 5))

    def estimate(key, k, logits):
        indices, weights = sj.weighted_subset(key, logits, k)
        return jnp.sum(weights * jnp.asarray(VALUES)[indices])

    def exact(logits):
        return jnp.sum(jax.nn.softmax(logits) * jnp.asarray(VALUES))

    def orders(fn):
        slope = lambda z: jax.jvp(fn, (z,), (direction,))[1]
        return lambda z: (fn(z), jax.grad(fn)(z), jax.grad(slope)(z))

    keys = jax.random.split(jax.random.key(5), 2**15)
    logits = jnp.asarray(LOGITS)
    expected = orders(exact)(logits)
    spreads = []
    for k in (1, 3):
        of_key = lambda key, k=k: orders(lambda z: estimate(key, k, z))(logits)
        found = jax.jit(jax.vmap(of_key))(keys)
        for samples, wanted in zip(found, expected, strict=True):
            assert z_score(samples, np.asarray(wanted)) < 5
        spreads.append(float(jnp.std(found[0])))
    assert spreads[1] < spreads[0]
    certain = orders(lambda z: estimate(keys[0], 5, z))(logits)
    for got, wanted in zip(certain, expected, strict=True):
        assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_ranking_keeps_its_digits():
    """After a first draw of all but 1e-22 of the mass, the next is as exact as any other."""
    logits = np.array([50.0, 0.0, 3.0, -40.0])
    order = np.array([0, 2, 1, 3])
    for dtype in ("float32", "float64"):
        actual = sj.ranking_log_prob(jnp.asarray(logits, dtype), jnp.asarray(order))
        expected = oracles.ranking_log_prob(logits, order)
        assert actual.dtype == jnp.dtype(dtype)
        assert_close(actual, expected, rtol=16 * eps(dtype))
    shifted = sj.ranking_log_prob(jnp.asarray(logits + 1e6, "float32"), jnp.asarray(order))
    assert_close(shifted, expected, rtol=16 * eps("float32"))


@pytest.mark.slow
def test_ranking_of_special_indices():
    logits = jnp.array([1.0, 0.0, -INF, 3.0])
    indices = jnp.array([0, -1, 2, 0, 7, 3, 1])
    with jax.debug_nans(False):
        got = sj.ranking_log_prob(logits, indices)
    first = 1 - np.log(np.exp([1.0, 0.0, 3.0]).sum())
    later = 3 - np.log(np.exp([0.0, 3.0]).sum())
    assert_close(got, [first, 0, -INF, -INF, NAN, later, 0], rtol=1e-14)
    with jax.debug_nans(True):
        fn = lambda z: sj.ranking_log_prob(z, jnp.array([0, 2, 2, 3]))
        for jacobian in (jax.jacfwd(fn)(logits), jax.jacrev(fn)(logits)):
            assert jnp.isfinite(jacobian).all()
            assert (jacobian[1:3] == 0).all()
            assert (jacobian[:, 2] == 0).all()
    assert sj.ranking_log_prob(logits, jnp.zeros(0, int)).shape == (0,)
    assert jnp.isnan(sj.ranking_log_prob(jnp.array([NAN, 0.0]), jnp.array([1]))).all()


@pytest.mark.slow
def test_subsets_at_the_edges():
    logits = jnp.array([[INF, 0.0, -INF, INF], [NAN, 0, 0, 0], [-INF] * 4, [0, -INF, -INF, 1]])
    with jax.debug_nans(False):
        indices, log_probs = sj.sample_without_replacement(jax.random.key(0), logits, 3)
        _, weights = sj.weighted_subset(jax.random.key(0), logits, 3)
    assert set(indices[0, :2].tolist()) == {0, 3}
    assert indices[0, 2] == 1
    assert_close(log_probs[0], np.log([0.5, 1, 1]), rtol=1e-12, atol=1e-80)
    assert_close(weights[0], [0.5, 0.5, 0], rtol=1e-12, atol=1e-80)
    assert indices[1:3].tolist() == [[-1] * 3] * 2
    assert jnp.isnan(log_probs[1]).all()
    assert jnp.isnan(weights[1]).all()
    assert (log_probs[2] == 0).all()
    assert (weights[2] == 0).all()
    assert set(indices[3].tolist()) == {0, 3, -1}
    assert_close(jnp.sum(weights[3]), 1.0, rtol=1e-14)
    with jax.debug_nans(True):
        clean = logits[jnp.array([0, 2, 3])]
        for fn in (sj.sample_without_replacement, sj.weighted_subset):
            grad = jax.grad(lambda z, fn=fn: jnp.sum(fn(jax.random.key(0), z, 3)[1]))(clean)
            assert jnp.isfinite(grad).all()
    first = jnp.zeros((4, 2), "bfloat16")
    indices, log_probs = sj.sample_without_replacement(jax.random.key(1), first, 2, axis=0)
    assert indices.shape == log_probs.shape == (2, 2)
    assert log_probs.dtype == jnp.float32
    assert sj.weighted_subset(jax.random.key(1), first, 0)[0].shape == (4, 0)
    assert sj.weighted_subset(jax.random.key(1), jnp.zeros((2, 0)), 0)[1].shape == (2, 0)


def test_large_offsets_do_not_drown_the_noise():
    """Noise is added after the peak is subtracted."""
    logits = jnp.asarray(np.full((2**14, 4), 3e7), jnp.float32)
    indices, _ = sj.sample_without_replacement(jax.random.key(3), logits, 1)
    assert g_test(np.bincount(np.asarray(indices)[:, 0]), np.full(4, 0.25)) > 1e-4


def test_half_precision_logits_take_wide_noise():
    logits = jnp.zeros((2**14, 100), "bfloat16")
    indices, _ = sj.sample_without_replacement(jax.random.key(4), logits, 2)
    for draws in np.asarray(indices).T:
        assert g_test(np.bincount(draws, minlength=100), np.full(100, 0.01)) > 1e-4


def test_wrong_arguments():
    key, z = jax.random.key(0), jnp.asarray(draw(0, (2, 3))[0])
    for error, match, call in [
        (ValueError, "`k` must be a whole", lambda: sj.sample_without_replacement(key, z, -1)),
        (ValueError, "`k` must be a whole", lambda: sj.weighted_subset(key, z, 1.5)),
        (ValueError, "`k` must be at most", lambda: sj.sample_without_replacement(key, z, 4)),
        (TypeError, "`key` must be a key", lambda: sj.weighted_subset(z, z, 2)),
        (TypeError, "`indices` must be int", lambda: sj.ranking_log_prob(z, z)),
        (ValueError, "`indices` of shape", lambda: sj.ranking_log_prob(z, jnp.zeros(2, int))),
        (
            ValueError,
            "`indices` of shape",
            lambda: sj.ranking_log_prob(z, jnp.zeros((3, 2), int)),
        ),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_no_unsigned_index_stands_for_nothing():
    indices = jnp.array([2**32 - 1, 0], "uint32")
    assert jnp.isnan(sj.ranking_log_prob(jnp.zeros(3), indices)[0])
