"""What functions have captured: arguments of a program, and a key to it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from softjax._closures import Captured

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


def test_what_is_the_same_is_not_compiled_again():
    asked = types.SimpleNamespace(times=0)

    def score(scale, scores, at):
        asked.times += 1
        return scale * scores

    for i in range(3):
        attend(jax.tree_util.Partial(score, jnp.array(float(i))))
    assert asked.times == 1
    assert Captured(lean) == Captured(lean)
    assert hash(Captured(lean)) == hash(Captured(lean))
    assert Captured(keeper(1.0)[0]) == Captured(keeper(1.0)[0])
    assert Captured(keeper(1.0)[0]) != Captured(keeper(2.0)[0])
    assert Captured(keeper(1.0)[0]) != Captured(keeper(1)[0])
    assert Captured(None) == Captured()
    partial = functools.partial(lambda a, x, at: x, 1.0)
    assert Captured(partial) == Captured(partial)
    assert Captured(partial) != Captured(functools.partial(partial.func, 2.0))


def test_cells_that_are_not_bound_yet():
    def outer():
        score = lambda scores, at: later(scores)
        found = Captured(score)
        later = lambda scores: scores
        return found, Captured(score)

    before, after = outer()
    assert before != after
