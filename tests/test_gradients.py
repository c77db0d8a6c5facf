"""Gradients of one's own: values stay as they are, and derivatives are those promised."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps

LOGITS = jnp.array([0.5, -1.0, 2.0])
PROBS = np.asarray(jax.nn.softmax(LOGITS))
VALUES = jnp.array([3.0, -1.0, 7.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_pass_unchanged(dtype):
    x = jnp.asarray(draw(0, (3, 4), scale=1e3, dtype=dtype)[0])
    hard = jnp.round(x)
    for out, expected in [
        (sj.straight_through(x, hard), hard),
        (sj.reverse_gradient(x, 0.5), x),
        (sj.clip_gradient(x, 0.5), x),
    ]:
        assert_same(out, expected)
    wide = "float64" if dtype == "float64" else "float32"
    assert sj.score_function(x, x).dtype == jnp.dtype(wide)


def test_straight_through():
    soft, hard = jnp.array([0.2, 0.8]), jnp.array([0.0, 1.0])
    fn = lambda s, h: jnp.sum(jnp.array([2.0, 5.0]) * sj.straight_through(s, h) ** 2)
    for mode in (jax.grad, jax.jacfwd):
        by_soft, by_hard = mode(fn, argnums=(0, 1))(soft, hard)
        assert by_soft.tolist() == [0, 10]
        assert by_hard.tolist() == [0, 0]
    with jax.debug_nans(True):
        assert sj.straight_through(jnp.array([INF, 1.0]), hard).tolist() == [0, 1]
    assert sj.straight_through(jnp.arange(2), jnp.arange(2)).dtype == jnp.float64


def gradient_of(draws, baseline=None, order=1):
    """Of the surrogate, its value, gradient, or Hessian, for classes `[K]`."""

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits)[draws]
        return sj.score_function(VALUES[draws], log_probs, baseline)

    return (loss, jax.grad(loss), jax.hessian(loss))[order](LOGITS)


def mean_over_draws(num, order, baseline=None):
    """The exact mean over all draws of `num` independent classes."""
    draws = np.array(list(itertools.product(range(3), repeat=num)))
    weights = np.prod(PROBS[draws], -1)
    found = jax.vmap(lambda d: gradient_of(d, baseline, order))(jnp.asarray(draws))
    return np.tensordot(weights, np.asarray(found), 1)


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 2])
def test_score_function_has_no_bias(order):
    """By enumeration, and not for the gradient alone."""
    exact = lambda z: jnp.sum(jax.nn.softmax(z) * VALUES)
    expected = (exact, jax.grad(exact), jax.hessian(exact))[order](LOGITS)
    for num, baseline in [(2, None), (3, None), (1, 0.0), (2, 2.5)]:
        got = mean_over_draws(num, order, baseline)
        assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_leaving_one_out_takes_the_mean_away():
    """A constant added to the values changes no gradient; without a baseline it does."""
    draws, shift = jnp.array([0, 2, 2, 1]), 1e3

    def grad(constant, baseline):
        loss = lambda z: sj.score_function(
            VALUES[draws] + constant, jax.nn.log_softmax(z)[draws], baseline
        )
        return np.asarray(jax.grad(loss)(LOGITS))

    assert_close(grad(shift, None), grad(0.0, None), rtol=0, atol=1e-11)
    assert np.abs(grad(shift, 0.0) - grad(0.0, 0.0)).max() > 10
    keys = jax.random.split(jax.random.key(0), 2000)

    def spread(baseline):
        def of_key(key):
            draws = sj.sample(key, LOGITS, shape=(4,))
            log_probs = lambda z: jax.nn.log_softmax(z)[draws]
            loss = lambda z: sj.score_function(VALUES[draws] + 10, log_probs(z), baseline)
            return jax.grad(loss)(LOGITS)

        return np.asarray(jax.jit(jax.vmap(of_key))(keys)).std(axis=0).max()

    assert spread(None) < 0.5 * spread(0.0)


@pytest.mark.slow
def test_score_function_of_values_that_move():
    """The path through the values counts too; axes, modes and shapes."""
    draws, scale = jnp.array([[0, 2], [1, 2], [2, 0]]), 1.5

    def loss(logits, scale):
        log_probs = jax.nn.log_softmax(logits)[draws]
        return jnp.sum(sj.score_function(scale * VALUES[draws] ** 2, log_probs, axis=0))

    expected = jnp.sum(jnp.mean(VALUES[draws] ** 2, 0))
    assert_close(jax.grad(loss, argnums=1)(LOGITS, scale), expected, rtol=1e-12)
    assert_close(loss(LOGITS, scale), scale * expected, rtol=1e-12)
    forward, reverse = jax.jacfwd(loss)(LOGITS, scale), jax.jacrev(loss)(LOGITS, scale)
    assert_close(forward, reverse, rtol=1e-12)
    values = jnp.asarray(draw(1, (2, 3, 4))[0])
    assert sj.score_function(values, values, axis=-1).shape == (2, 3)
    assert sj.score_function(values, values, values, axis=1).shape == (2, 4)


def test_an_impossible_sample_counts_as_any_other():
    values = jnp.array([2.0, 1.0], jnp.float32)
    log_probs = jnp.array([-INF, -0.3], jnp.float32)
    with jax.debug_nans(True):
        value, grad = jax.value_and_grad(lambda p: sj.score_function(values, p))(log_probs)
        assert_close(value, 1.5, rtol=0)
        assert_close(grad, [0.5, -0.5], rtol=0)
        second = jax.hessian(lambda p: sj.score_function(values, p))(log_probs)
    assert_close(second, np.diag([0.5, -0.5]), rtol=0)
    assert jnp.isnan(sj.score_function(values, jnp.array([NAN, 0.0], jnp.float32)))


def test_values_at_the_ends_of_the_range_have_their_mean():
    log_probs = jnp.array([-1.0, -2.0, -3.0], jnp.float32)

    def both(*values, baseline=None):
        values = jnp.array(values, jnp.float32)
        fn = lambda p: sj.score_function(values, p, baseline)
        return jax.value_and_grad(fn)(log_probs[: len(values)])

    value, grad = both(3e38, 3e38)
    assert_close(value, 3e38, rtol=1e-7)
    assert_close(grad, [0, 0], rtol=0)
    value, grad = both(3e38, 3e38, baseline=jnp.array([3e38, 0.0], jnp.float32))
    assert_close(value, 3e38, rtol=1e-7)
    assert_close(grad, [0, 1.5e38], rtol=1e-6)
    assert_close(both(2e-38, 2e-38)[0], 2e-38, rtol=1e-6)
    # What the others hold is not lost beside one's own value.
    assert_close(both(1e30, 4.0, 2.0)[0], 1e30 / 3, rtol=1e-6)
    value, grad = both(INF, 1.0, 2.0)
    assert value == INF
    assert grad.tolist() == [INF, -INF, -INF]
    assert both(2.0, 1.0, baseline=jnp.array([INF, 0.0]))[0] == 1.5


def test_reverse_gradient():
    fn = lambda x: jnp.sum(jnp.sin(x))
    reversed_fn = lambda x: fn(sj.reverse_gradient(x, 0.25))
    x = jnp.array([0.3, -2.0])
    for mode in (jax.grad, jax.jacfwd):
        assert_close(mode(reversed_fn)(x), -0.25 * jnp.cos(x), rtol=1e-15)
    loss = lambda z: sj.softmax(sj.reverse_gradient(z))[0]
    plain = lambda z: sj.softmax(z)[0]
    assert_close(jax.grad(loss)(LOGITS), -jax.grad(plain)(LOGITS), rtol=1e-15)
    zero = jax.grad(lambda c: sj.reverse_gradient(2.0, c))(0.5)
    assert zero == 0
    assert jax.grad(reversed_fn)(x.astype("bfloat16")).dtype == jnp.bfloat16


def test_clip_gradient():
    bars = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3e200, 4e200]])
    fn = lambda x, c, axis=-1: jnp.sum(bars * sj.clip_gradient(x, c, axis=axis))
    x = jnp.zeros((4, 2))
    with jax.debug_nans(True):
        got = jax.grad(fn)(x, 1.0)
        assert_close(got, [[0.6, 0.8], [0.3, 0.4], [0, 0], [0.6, 0.8]], rtol=1e-14)
        assert_same(jax.grad(fn)(x, INF), bars)
        assert not jax.grad(fn)(x, 0.0).any()
        rows = jax.grad(fn)(x, jnp.array([[1.0], [0.1], [1.0], [5.0]]))
        assert_close(jnp.linalg.norm(rows, axis=-1), [1.0, 0.1, 0, 5.0], rtol=1e-14)
        whole = jax.grad(lambda x: jnp.sum(bars[:2] * sj.clip_gradient(x, 1.0, axis=None)))
        assert_close(jnp.linalg.norm(whole(x[:2])), 1.0, rtol=1e-14)
    again = lambda x: jnp.sum(
        jax.grad(lambda x: jnp.sum(sj.clip_gradient(x, 1.0) ** 3))(x) ** 2
    )
    check_grads(again, (jnp.array([0.7, 0.9]),), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
    batch = jax.vmap(lambda b: jax.grad(lambda x: b @ sj.clip_gradient(x, 1.0))(x[0]))(bars)
    assert_close(batch, got, rtol=1e-14)


def test_wrong_arguments():
    x, y = jnp.zeros(3), jnp.zeros((2, 3))
    for error, match, call in [
        (ValueError, "`hard` of shape", lambda: sj.straight_through(x, y)),
        (ValueError, "`log_probs` of shape", lambda: sj.score_function(x, y)),
        (ValueError, "To leave one sample out", lambda: sj.score_function(x[:1], x[:1])),
        (ValueError, "`baseline` of shape", lambda: sj.score_function(x, x, y)),
        (TypeError, "`axis` must be one int", lambda: sj.score_function(x, x, axis=None)),
        (ValueError, "`scale` of shape", lambda: sj.reverse_gradient(x, x)),
        (ValueError, "`max_norm` must be in", lambda: sj.clip_gradient(x, -1.0)),
        (ValueError, "`max_norm` of shape", lambda: sj.clip_gradient(x, x)),
    ]:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("size", [1e-30, 1.0, 9e37, 3e38])
def test_gradients_of_any_size_are_clipped(size):
    bar = jnp.array([size, -size], "float32")
    (clipped,) = jax.vjp(lambda x: sj.clip_gradient(x, 1.0), jnp.zeros(2, "float32"))[1](bar)
    expected = bar if size < 1e-20 else np.array([1, -1]) * np.sqrt(0.5)
    assert_close(clipped, expected, rtol=4 * eps("float32"))
