"""What users' functions have captured: it is asked for anew in every call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks

SLOPE = 1.0


def apart(at):
    return jnp.abs(at.query - at.key).astype(float)


def lean(scores, at):
    return scores - SLOPE * apart(at)


def steeper(scores, at):
    return 2 * lean(scores, at)


def tokens():
    return jnp.asarray(np.random.default_rng(0).standard_normal((6, 2, 4)))


def attend(score=None, mask=None):
    x = tokens()
    return sj.attention(x, x, x, score=score, mask=mask)


class Slope:
    def __init__(self, value):
        self.value = value

    def score(self, scores, at):
        return scores - self.value * apart(at)

    __call__ = score


def with_global(change, monkeypatch):
    if change:
        monkeypatch.setitem(globals(), "SLOPE", 3.0)
    return lean


def with_global_of_a_function_beside(change, monkeypatch):
    if change:
        monkeypatch.setitem(globals(), "SLOPE", 3.0)
    return steeper


def keeper(value):
    def score(scores, at):
        return scores - value * apart(at)

    def put(new):
        nonlocal value
        value = new

    return score, put


CELL, PUT = keeper(1.0)
ARRAYS, PUT_ARRAY = keeper(jnp.array(1.0))
HELD = {"slope": 1.0}
OBJECT = Slope(1.0)
LENGTH = [4]
OF_AN_OBJECT = lambda scores, at: scores - OBJECT.value * apart(at)
IN_A_LAMBDA = lambda scores, at: (lambda: scores - HELD["slope"] * apart(at))()


def with_cell(change, monkeypatch):
    PUT(3.0 if change else 1.0)
    return CELL


def with_array(change, monkeypatch):
    PUT_ARRAY(jnp.array(3.0) if change else jnp.array(1.0))
    return ARRAYS


def with_dictionary(change, monkeypatch):
    HELD["slope"] = 3.0 if change else 1.0
    return IN_A_LAMBDA


def with_method(change, monkeypatch):
    OBJECT.value = 3.0 if change else 1.0
    return OBJECT.score


def with_object(change, monkeypatch):
    OBJECT.value = 3.0 if change else 1.0
    return OBJECT


def with_a_captured_object(change, monkeypatch):
    OBJECT.value = 3.0 if change else 1.0
    return OF_AN_OBJECT


@pytest.mark.parametrize(
    "make",
    [
        with_global,
        with_global_of_a_function_beside,
        with_cell,
        with_array,
        with_dictionary,
        with_method,
        with_object,
        with_a_captured_object,
    ],
    ids=lambda make: make.__name__,
)
def test_a_function_that_holds_something_new(make, monkeypatch):
    """Called outside of `jit`, it is asked again: no result of before is given."""
    before = attend(make(False, monkeypatch))
    after = attend(make(True, monkeypatch))
    assert float(jnp.abs(after - before).max()) > 1e-3
    monkeypatch.undo()
    np.testing.assert_array_equal(attend(make(False, monkeypatch)), before)


def test_a_mask_whose_function_holds_something_new():
    mask = masks.Causal() & ~masks.Function(lambda at: at.key >= LENGTH[0])
    before = attend(mask=mask)
    LENGTH[0] = 1
    after = attend(mask=mask)
    LENGTH[0] = 4
    np.testing.assert_allclose(after, jnp.broadcast_to(tokens()[:1], after.shape))
    np.testing.assert_array_equal(attend(mask=mask), before)


WAYS = {
    "dense": lambda x, score, mask: sj.attention(x, x, x, score=score, mask=mask),
    "streamed": lambda x, score, mask: sj.attention(
        x, x, x, score=score, mask=mask, block_size=4
    ),
    "entmax15": lambda x, score, mask: sj.attention(
        x, x, x, score=score, mask=mask, normalizer="entmax15"
    ),
    "paged": lambda x, score, mask: sj.paged_attention(
        x[None], x[None], x[None], np.zeros((1, 1), int), np.array([6]), score=score, mask=mask
    ),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_new_program_asks_again(way, jitted):
    """Under a new `jit` of the caller's too, where `jit` of the library would remember."""
    slope, length = Slope(1.0), Slope(6)
    score = lambda scores, at: scores - slope.value * apart(at)
    mask = masks.Causal() & masks.Function(lambda at: at.key < length.value)

    def run():
        call = functools.partial(WAYS[way], score=score, mask=mask)
        return (jax.jit(lambda x: call(x)) if jitted else call)(tokens())

    first = run()
    slope.value = 3.0
    second = run()
    length.value = 2
    third = run()
    assert float(jnp.abs(second - first).max()) > 1e-3
    assert float(jnp.abs(third - second).max()) > 1e-3
    slope.value, length.value = 1.0, 6
    np.testing.assert_array_equal(run(), first)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_normalizer_is_asked_again(jitted):
    power = Slope(1.0)
    weigh = lambda x: jnp.maximum(x, 0) ** power.value

    def run():
        call = lambda x: sj.attention(x, x, x, normalizer=(weigh, 1.0))
        return (jax.jit(lambda x: call(x)) if jitted else call)(tokens())

    first = run()
    power.value = 2.0
    assert float(jnp.abs(run() - first).max()) > 1e-3


def test_arrays_that_a_partial_holds_have_derivatives():
    score = lambda slope, scores, at: scores - slope * apart(at)
    loss = lambda slope: jnp.sum(jnp.sin(attend(jax.tree_util.Partial(score, slope))))
    step = 1e-5
    expected = (loss(1.0 + step) - loss(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(1.0), expected, rtol=1e-7)
