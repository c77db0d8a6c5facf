"""The online softmax state: parts merged in any way are the whole."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softjax import _online
from tests import oracles
from tests.helpers import INF, NAN, assert_close, assert_same, draw, eps, nan_makers

SHAPE, WIDTH = (2, 3), 4


def whole(scores, values):
    """Average and log-sum-exp from the definitions."""
    probs = oracles.softmax(scores)
    average = np.einsum("...n,...nw->...w", probs, np.where(np.isfinite(values), values, 0))
    return average, oracles.logsumexp(scores, axis=-1)


def example(seed, n, *, scale=3.0, dropped=0.3):
    scores, keep = draw(seed, (*SHAPE, n), scale=scale, dropped=dropped)
    values, _ = draw(seed + 100, (*SHAPE, n, WIDTH))
    return np.where(keep, scores, -INF), values


def pieces(scores, values, cuts):
    """States of the parts between the cuts."""
    ends = [0, *cuts, scores.shape[-1]]
    return [
        _online.observe(jnp.asarray(scores[..., a:b]), jnp.asarray(values[..., a:b, :]))
        for a, b in itertools.pairwise(ends)
    ]


def check(state, scores, values):
    average, total = _online.finish(state)
    expected_average, expected_total = whole(scores, values)
    assert_close(total, expected_total, rtol=16 * eps("float64"), atol=16 * eps("float64"))
    assert_close(average, expected_average, rtol=0, atol=32 * eps("float64"))


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_one_part_is_the_definition(n):
    scores, values = example(0, n)
    check(_online.observe(jnp.asarray(scores), jnp.asarray(values)), scores, values)


def test_parts_merge_into_the_whole_in_any_order():
    scores, values = example(1, 12)
    scores[..., :3] = -INF  # A part that has seen nothing.
    parts = pieces(scores, values, (3, 4, 9))
    for order in itertools.permutations(parts):
        check(functools.reduce(_online.merge, order), scores, values)
    left, right = _online.merge(*parts[:2]), _online.merge(*parts[2:])
    check(_online.merge(left, right), scores, values)


def test_merge_is_commutative_and_associative():
    scores, values = example(2, 9)
    a, b, c = pieces(scores, values, (3, 6))
    close = functools.partial(assert_close, rtol=8 * eps("float64"), atol=8 * eps("float64"))
    for one, two in (
        (_online.merge(a, b), _online.merge(b, a)),
        (_online.merge(_online.merge(a, b), c), _online.merge(a, _online.merge(b, c))),
    ):
        jax.tree.map(close, one, two)


def test_init_is_the_neutral_element():
    scores, values = example(3, 5)
    state = _online.observe(jnp.asarray(scores), jnp.asarray(values))
    empty = _online.init(SHAPE, WIDTH, "float64")
    assert_same(_online.merge(empty, state), state)
    assert_same(_online.merge(state, empty), state)
    assert_same(_online.merge(empty, empty), empty)
    assert_same(_online.update(empty, jnp.asarray(scores), jnp.asarray(values)), state)
    average, total = _online.finish(empty)
    assert (average == 0).all()
    assert (total == -INF).all()


def test_updates_in_a_scan():
    scores, values = example(4, 24)
    blocks = (
        jnp.moveaxis(jnp.asarray(scores).reshape(*SHAPE, 6, 4), -2, 0),
        jnp.moveaxis(jnp.asarray(values).reshape(*SHAPE, 6, 4, WIDTH), -3, 0),
    )
    step = lambda state, block: (_online.update(state, *block), None)
    state, _ = jax.lax.scan(step, _online.init(SHAPE, WIDTH, "float64"), blocks)
    check(state, scores, values)


@pytest.mark.slow
def test_an_associative_scan_gives_every_prefix():
    scores, values = example(5, 6)
    parts = pieces(scores, values, range(1, 6))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    prefixes = jax.lax.associative_scan(_online.merge, stacked)
    for i in range(6):
        state = jax.tree.map(lambda a, i=i: a[i], prefixes)
        check(state, scores[..., : i + 1], values[..., : i + 1, :])


def test_far_peaks_neither_overflow_nor_vanish():
    for low, high in ((-1e4, 1e4), (-1e300, 1e300), (0.0, 800.0), (1e4, 1e4 + 1)):
        scores = np.array([low, high, low])
        values = np.array([[1.0], [2.0], [3.0]])
        for cuts in ((), (1,), (2,), (1, 2)):
            state = functools.reduce(_online.merge, pieces(scores, values, cuts))
            average, total = _online.finish(state)
            expected = whole(scores, values)
            assert_close(average, expected[0], rtol=8 * eps("float64"))
            assert_close(total, expected[1], rtol=8 * eps("float64"))


@pytest.mark.slow
def test_nothing_makes_a_nan():
    """Of -inf, in values and derivatives, and whatever values the dropped entries have."""
    scores = np.array([[-INF, -INF, 0.5, 1.5], [-INF] * 4])
    values = np.array([[NAN, INF, 1.0, 2.0], [NAN, 1.0, INF, -INF]])[..., None]

    @jax.jit
    def run(scores, values):
        parts = pieces(scores, values, (2,))
        return _online.finish(functools.reduce(_online.merge, parts))

    arrays = jnp.asarray(scores), jnp.asarray(values)
    with jax.debug_nans(True):
        average, total = run(*arrays)
    expected = np.exp([0.5, 1.5]) / np.exp([0.5, 1.5]).sum() @ [1.0, 2.0]
    assert_close(average, [[expected], [0.0]], rtol=1e-15)
    assert_close(total, [np.logaddexp(0.5, 1.5), -INF], rtol=1e-15)
    sums = lambda s, v: sum(jnp.sum(jnp.where(jnp.isfinite(o), o, 0)) for o in run(s, v))
    grads = jax.grad(sums, argnums=(0, 1))
    for grad in grads(*arrays):
        assert jnp.isfinite(grad).all()
        assert (grad[1] == 0).all()
        assert (grad[0, :2] == 0).all()
    assert nan_makers(grads, arrays[0], jnp.ones((2, 4, 1))) == []


@pytest.mark.slow
def test_derivatives_of_merged_parts_are_those_of_the_whole():
    scores, values = example(6, 8, dropped=0.0)
    weights = jnp.cos(jnp.arange(float(WIDTH)))

    def loss(cuts, scores, values):
        state = functools.reduce(_online.merge, pieces(scores, values, cuts))
        average, total = _online.finish(state)
        return jnp.sum(average @ weights) + jnp.sum(jnp.sin(total))

    args = jnp.asarray(scores), jnp.asarray(values)
    one = jax.grad(functools.partial(loss, ()), argnums=(0, 1))(*args)
    many = jax.grad(functools.partial(loss, (1, 5)), argnums=(0, 1))(*args)
    for a, b in zip(one, many, strict=True):
        assert_close(a, b, rtol=0, atol=64 * eps("float64"))
    plain = lambda s, v: (
        jnp.sum(jnp.einsum("...n,...nw->...w", jax.nn.softmax(s), v) @ weights)
        + jnp.sum(jnp.sin(jax.nn.logsumexp(s, -1)))
    )
    for a, b in zip(many, jax.grad(plain, argnums=(0, 1))(*args), strict=True):
        assert_close(a, b, rtol=0, atol=64 * eps("float64"))
