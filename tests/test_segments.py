"""Ragged groups, each with a softmax and a logsumexp of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, draw, eps

IDS = np.array([2, 0, 0, 2, 5, 2, 0, 4, -1, 9])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_group_is_a_softmax(dtype):
    for seed, (scale, offset) in enumerate([(1.0, 0.0), (20.0, 100.0), (1.0, -1e3)]):
        logits, keep = draw(seed, (10,), scale=scale, offset=offset, dtype=dtype)
        for temperature in (0.25, 1.0, 16.0):
            options = {"num_segments": 6, "where": keep, "temperature": temperature}
            actual = sj.segment_softmax(jnp.asarray(logits), IDS, **options)
            expected = oracles.segment_softmax(logits, IDS, **options)
            assert actual.dtype == jnp.dtype(dtype)
            tiny = float(jnp.finfo(dtype).tiny)
            assert_close(actual, expected, rtol=4 * eps(dtype), atol=tiny)


def test_ids_out_of_range_are_dropped():
    probs = sj.segment_softmax(jnp.zeros(4), jnp.array([0, 0, -1, 2]), num_segments=2)
    assert_close(probs, [0.5, 0.5, 0.0, 0.0], rtol=0)
    grad = jax.jacrev(
        lambda z: sj.segment_softmax(z, jnp.array([0, 0, -1, 2]), num_segments=2)
    )(jnp.array([0.0, 0.0, NAN, INF]))
    assert_close(grad[:2, :2], [[0.25, -0.25], [-0.25, 0.25]], rtol=1e-15)
    assert (grad[2:] == 0).all()
    assert (grad[:, 2:] == 0).all()


def test_trailing_axes():
    """Graph attention: one softmax per head over the edges that enter a node."""
    logits, keep = draw(3, (10, 2, 3), scale=2.0)
    temperature = np.random.default_rng(4).uniform(0.5, 2.0, (1, 2, 3))
    for t in (0.7, temperature):
        options = {"num_segments": 6, "where": keep, "temperature": t}
        actual = sj.segment_softmax(jnp.asarray(logits), jnp.asarray(IDS), **options)
        flat = zip(
            logits.reshape(10, 6).T,
            keep.reshape(10, 6).T,
            np.broadcast_to(t, (1, 2, 3)).reshape(-1),
            strict=True,
        )
        expected = [
            oracles.segment_softmax(z, IDS, num_segments=6, where=w, temperature=s)
            for z, w, s in flat
        ]
        expected = np.stack(expected, -1).reshape(10, 2, 3)
        assert_close(actual, expected, rtol=8 * eps("float64"))


def test_jacobian_has_one_block_per_group():
    logits = jnp.asarray(draw(5, (10,))[0])
    fn = lambda z: sj.segment_softmax(z, IDS, num_segments=6)
    p = np.asarray(fn(logits))
    valid = (IDS >= 0) & (IDS < 6)
    same = (IDS[:, None] == IDS) & valid[:, None]
    expected = np.diag(p) - np.outer(p, p) * same
    for mode in (jax.jacfwd, jax.jacrev):
        assert_close(mode(fn)(logits), expected, rtol=0, atol=4 * eps("float64"))


def test_edges():
    ids = jnp.array([0, 0, 1, 1, 2, 2, 3])
    logits = jnp.array([-INF, -INF, INF, 0.0, NAN, 0.0, 5.0])
    fn = lambda z, w=True: sj.segment_softmax(z, ids, num_segments=5, where=w)
    probs = fn(logits)
    assert_close(probs, [0.0, 0.0, 1.0, 0.0, NAN, NAN, 1.0], rtol=0)
    keep = ids != 2
    with jax.debug_nans(True):
        assert_close(fn(logits, keep), [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], rtol=0)
        for mode in (jax.jacfwd, jax.jacrev):
            assert (mode(fn)(logits, keep) == 0).all()
        assert (jax.hessian(lambda z: jnp.sum(jnp.sin(fn(z, keep))))(logits) == 0).all()


def test_ends_of_the_temperature():
    ids = jnp.array([0, 0, 0, 1, 1])
    logits = jnp.array([1.0, 3.0, 3.0, -2.0, -7.0])
    fn = lambda t: sj.segment_softmax(logits, ids, num_segments=2, temperature=t)
    with jax.debug_nans(True):
        assert_close(fn(0.0), [0.0, 0.5, 0.5, 1.0, 0.0], rtol=1e-15)
        assert_close(fn(INF), [1 / 3] * 3 + [0.5] * 2, rtol=1e-15)
        for end in (0.0, INF):
            assert (jax.jacfwd(fn)(end) == 0).all()
            assert (jax.jacrev(fn)(end) == 0).all()


def test_sizes():
    assert sj.segment_softmax(jnp.zeros(0), jnp.zeros(0, int), num_segments=3).shape == (0,)
    alone = sj.segment_softmax(jnp.ones(1), jnp.zeros(1, int), num_segments=1)
    assert_close(alone, [1.0], rtol=0)
    # One group of many, in the dtype where a plain sum of ones stops at 2048.
    ids = jnp.zeros(5000, int)
    probs = sj.segment_softmax(jnp.zeros(5000, "float16"), ids, num_segments=1)
    assert_close(probs, np.full(5000, np.float16(1 / 5000)), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_groups_stay_exact(dtype):
    ids = np.random.default_rng(6).integers(0, 3, 30_000)
    logits, _ = draw(7, (30_000,), scale=3.0, dtype=dtype)
    actual = np.asarray(sj.segment_softmax(jnp.asarray(logits), ids, num_segments=3))
    for segment in range(3):
        expected = oracles.fast_softmax(logits[ids == segment])
        assert_close(actual[ids == segment], expected, rtol=4 * eps(dtype))


def test_packed_documents_equal_separate_ones():
    lengths = [3, 1, 4]
    logits = jnp.asarray(draw(8, (8,))[0])
    ids = jnp.repeat(jnp.arange(3), np.array(lengths), total_repeat_length=8)
    packed = sj.segment_softmax(logits, ids, num_segments=3)
    parts = jnp.split(logits, np.cumsum(lengths)[:-1])
    separate = np.concatenate([sj.softmax(part) for part in parts])
    assert_close(packed, separate, rtol=4 * eps("float64"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_group_has_its_logsumexp(dtype):
    for seed, (scale, offset) in enumerate([(1.0, 0.0), (20.0, 100.0), (1.0, -1e3)]):
        logits, keep = draw(seed, (10, 2), scale=scale, offset=offset, dtype=dtype)
        options = {"num_segments": 6, "where": keep}
        actual = sj.segment_logsumexp(jnp.asarray(logits), IDS, **options)
        expected = oracles.segment_logsumexp(logits, IDS, **options)
        assert actual.dtype == jnp.dtype(dtype)
        assert_close(actual, expected, rtol=2 * eps(dtype), atol=2 * eps(dtype))


def test_logsumexp_of_groups_at_the_edges():
    ids = jnp.array([0, 0, 1, 1, 2, 2, 3, 9, -1])
    logits = jnp.array([-INF, -INF, INF, 0.0, NAN, 0.0, 5.0, NAN, INF])
    fn = lambda z, w=True: sj.segment_logsumexp(z, ids, num_segments=5, where=w)
    assert_close(fn(logits), [-INF, INF, NAN, 5.0, -INF], rtol=0)
    keep = ids != 2
    with jax.debug_nans(True):
        assert_close(fn(logits, keep), [-INF, INF, -INF, 5.0, -INF], rtol=0)
        for mode in (jax.jacfwd, jax.jacrev):
            jacobian = mode(fn)(logits, keep)
            expected = np.zeros((5, 9))
            expected[1, 2] = expected[3, 6] = 1
            assert_close(jacobian, expected, rtol=0)
    assert (
        sj.segment_logsumexp(jnp.zeros(0), jnp.zeros(0, int), num_segments=3).tolist()
        == [-INF] * 3
    )
    assert sj.segment_logsumexp(jnp.zeros((2, 3)), jnp.array([0, 1]), num_segments=0).shape == (
        0,
        3,
    )
    with pytest.raises(ValueError, match="`num_segments` must be"):
        sj.segment_logsumexp(jnp.zeros(2), jnp.array([0, 1]), num_segments=-1)


def test_the_derivative_of_a_groups_logsumexp_is_its_softmax():
    logits = jnp.asarray(draw(9, (10,), scale=2.0)[0])
    fn = lambda z: sj.segment_logsumexp(z, IDS, num_segments=6)
    probs = sj.segment_softmax(logits, IDS, num_segments=6)
    for mode in (jax.jacfwd, jax.jacrev):
        jacobian = mode(fn)(logits)
        assert_close(jnp.sum(jacobian, 0), probs, rtol=16 * eps("float64"))
        assert ((np.asarray(jacobian) != 0) == (np.arange(6)[:, None] == IDS)).all()
