"""Searches for a threshold, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softjax import _rootfinding
from softjax._slices import AlongAxes
from tests.helpers import INF, NAN, assert_close, assert_same, draw, eps

LAST = AlongAxes((1,))


def threshold(keys, weights, amount):
    keys = jnp.asarray(keys)
    weights = None if weights is None else jnp.asarray(weights)
    amount = jnp.broadcast_to(jnp.asarray(amount, keys.dtype), (len(keys), 1))
    found = _rootfinding.largest_threshold(LAST, _rootfinding.ordered(keys), weights, amount)
    return np.asarray(_rootfinding.from_ordered(found, keys.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ordered_integers_have_the_order_of_the_numbers(dtype):
    info = np.finfo(dtype)
    numbers = [-INF, info.min, -1.0, -info.tiny, 0.0, info.tiny, 1.0, 1.5, info.max, INF, NAN]
    integers = _rootfinding.ordered(jnp.asarray(numbers, dtype))
    assert (jnp.diff(integers) > 0).all()
    assert_same(
        _rootfinding.from_ordered(integers[:-1], dtype), jnp.asarray(numbers[:-1], dtype)
    )
    zeros = _rootfinding.ordered(jnp.asarray([0.0, -0.0], dtype))
    assert zeros[0] == zeros[1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_largest_threshold_by_count_is_the_kth_largest(dtype):
    logits, _ = draw(0, (5, 40), scale=100.0, dtype=dtype)
    logits[1, :10] = -INF
    logits[2] = np.round(logits[2] / 50)  # ties, and zeros of both signs
    logits[3, :5] = [INF, 0.0, -0.0, np.finfo(dtype).tiny, -np.finfo(dtype).tiny]
    ranked = np.sort(logits, -1)[:, ::-1]
    for k in (1, 2, 7, 29, 40):
        np.testing.assert_array_equal(threshold(logits, None, k), ranked[:, k - 1 : k])
    each = threshold(logits, None, [[1], [2], [3], [4], [5]])
    np.testing.assert_array_equal(each[:, 0], ranked[np.arange(5), np.arange(5)])


def test_largest_threshold_by_weight():
    """The largest v such that the entries at or above it weigh enough."""
    rng = np.random.default_rng(1)
    keys = rng.integers(-5, 6, (20, 9)).astype(float)
    weights = rng.integers(0, 8, (20, 9)) / 8  # exact sums
    for amount in (0.125, 1.0, 2.5):
        found = threshold(keys, weights, amount)[:, 0]
        for row, w, v in zip(keys, weights, found, strict=True):
            enough = [u for u in row if w[row >= u].sum() >= amount]
            assert v == max(enough, default=-INF)


def test_newton_finds_roots_of_convex_functions():
    """Each slice its own, and each as if alone: neighbours do not disturb it."""
    target = jnp.array([[0.5], [3.0], [40.0]])
    step = lambda tau: (jnp.exp(-tau) - target, jnp.exp(-tau))
    start = jnp.full((3, 1), -10.0)
    tau = _rootfinding.newton_from_left(step, start)
    assert_close(tau, -jnp.log(target), rtol=8 * eps("float64"))
    for i in range(3):
        alone = lambda t, i=i: (jnp.exp(-t) - target[i : i + 1], jnp.exp(-t))
        assert_same(_rootfinding.newton_from_left(alone, start[i : i + 1]), tau[i : i + 1])


def test_newton_gives_up_on_nan_in_its_own_slice_only():
    step = lambda tau: (jnp.exp(-tau) - 1, jnp.exp(-tau))
    tau = _rootfinding.newton_from_left(step, jnp.array([[NAN], [-3.0]]))
    assert_close(tau[1:], [[0.0]], rtol=0, atol=1e-15)


def test_bracketed_newton_where_newton_alone_diverges():
    """atan has steps that leave every bracket, and the slope may vanish."""
    shift = jnp.array([[-7.0], [0.25], [9.0]])
    step = lambda tau: (-jnp.arctan(20 * (tau - shift)), 20 / (1 + 400 * (tau - shift) ** 2))
    low, high = jnp.full((3, 1), -10.0), jnp.full((3, 1), 10.0)
    tau = _rootfinding.bracketed_newton(step, low, high, low)
    assert_close(tau, shift, rtol=4 * eps("float64"))
    flat = lambda tau: (jnp.where(tau < 1, 1.0, jnp.where(tau > 2, -1.0, 0.0)), 0 * tau)
    tau = _rootfinding.bracketed_newton(flat, low, high, low)
    assert ((tau >= 1) & (tau <= 2)).all()


def test_newton_ends_at_the_root_or_after_a_short_step():
    """x^2 = 2 from the left of its larger root, which Newton's steps approach like 1, 2, 4."""
    seen = []

    def step(tau):
        jax.debug.callback(seen.append, tau, ordered=True)
        return tau * tau - 2, -2 * tau

    start = jnp.full((1,), -4.0)
    root = _rootfinding.newton_from_left(step, start)
    assert_close(root, [-np.sqrt(2)], rtol=2 * eps("float64"))
    jax.effects_barrier()
    patient = len(seen)
    near = _rootfinding.newton_from_left(step, start, 1e-4)
    jax.effects_barrier()
    assert len(seen) - patient < patient
    assert_close(near, [-np.sqrt(2)], rtol=1e-8)
