"""Decoding: penalties for what has been written, and the step that the README shows."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, draw, eps, g_test

README = pathlib.Path(__file__).parents[1] / "README.md"
OFF = {"penalty": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical": 1.0}


def decode_step():
    """The function of the README."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    (block,) = [block for block in blocks if "def decode_step" in block]
    scope = {"jax": jax, "jnp": jnp, "sj": sj}
    exec(block, scope)
    return scope["decode_step"]


def options(rows, **columns):
    """One value a row for each option, those that are not given being off."""
    values = {**OFF, "temperature": 1.0, **columns}
    return {k: jnp.asarray(np.broadcast_to(v, rows)[:, None]) for k, v in values.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties(dtype):
    logits = jnp.asarray(draw(0, (3, 7), scale=3.0, dtype=dtype)[0]).at[0, 2].set(-INF)
    tokens = jnp.array([[2, 2, 5, -1], [6, 0, 0, 0], [-1, 7, 100, -100]])
    for given in (
        {"penalty": 1.5},
        {"penalty": np.array([[1.0], [2.0], [3.0]]), "presence": 0.25},
        {"presence": np.array([[0.5], [0.0], [1.0]]), "frequency": 0.125},
    ):
        out = sj.repetition_penalty(logits, tokens, **given)
        assert out.dtype == logits.dtype
        expected = oracles.repetition_penalty(logits, tokens, **given)
        assert_close(out, expected, rtol=4 * eps(dtype), atol=4 * eps(dtype))
        assert (out[2] == logits[2]).all()  # Nothing was written there.
    narrow = sj.repetition_penalty(logits, tokens.at[2].set(-1).astype("int8"), 1.5)
    assert_close(narrow, sj.repetition_penalty(logits, tokens, 1.5), rtol=0)
    shared = sj.repetition_penalty(logits, tokens[1], 1.5)
    assert_close(shared[1], narrow[1], rtol=0)
    assert_close(sj.repetition_penalty(logits, tokens[:, :0], 1.5), logits, rtol=0)


def test_penalties_at_the_edges():
    logits = jnp.array([-INF, INF, NAN, 0.0])
    with jax.debug_nans(True):
        grad = jax.grad(
            lambda z, p: jnp.sum(sj.softmax(sj.repetition_penalty(z, jnp.array([0, 1]), p))[1]),
            argnums=(0, 1),
        )(jnp.array([-INF, 1.0, 2.0]), 1.5)
        assert all(jnp.isfinite(g).all() for g in grad)
        assert grad[0][0] == 0
    out = sj.repetition_penalty(logits, jnp.arange(4), 2.0, presence=1.0)
    assert_close(out, [-INF, INF, NAN, -1.0], rtol=0)


def test_wrong_arguments():
    z = jnp.zeros((2, 3))
    for error, match, call in [
        (TypeError, "`tokens` must be int", lambda: sj.repetition_penalty(z, z)),
        (ValueError, "`tokens` of shape", lambda: sj.repetition_penalty(z, jnp.array(1))),
        (ValueError, "`tokens` of", lambda: sj.repetition_penalty(z, jnp.zeros((3, 1), int))),
        (ValueError, "`penalty` of", lambda: sj.repetition_penalty(z, jnp.zeros(1, int), z)),
    ]:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.slow
def test_decode_step():
    step, size = decode_step(), 50
    row = draw(1, (size,), scale=2.0, dtype="float32")[0]
    order = np.argsort(-row)
    tokens = np.full((6, 3), -1)
    tokens[5] = order[0]
    choices = options(
        6,
        temperature=[0.0, 1.0, 1.0, 0.7, 1.0, 0.0],
        top_k=[50, 1, 50, 5, 50, 50],
        top_p=[1.0, 1.0, 1e-6, 1.0, 0.8, 1.0],
        penalty=[1.0, 1.0, 1.0, 1.0, 1.0, 1e3],
    )
    logits = jnp.broadcast_to(jnp.asarray(row), (6, size))
    batch = jax.vmap(lambda key: step(key, logits, jnp.asarray(tokens), **choices))
    drawn, log_probs = batch(jax.random.split(jax.random.key(0), 4096))
    drawn, log_probs = np.asarray(drawn), np.asarray(log_probs)
    for greedy in (0, 1, 2):
        assert set(drawn[:, greedy]) == {order[0]}
        assert (log_probs[:, greedy] == 0).all()
    assert set(drawn[:, 5]) == {order[1]}  # The best one was written already.
    kept = [oracles.top_k_filter(row, 5) / 0.7, oracles.top_p_filter(row, 0.8)]
    for i, scores in zip((3, 4), kept, strict=True):
        probs = np.asarray(oracles.fast_softmax(scores)).astype(float)
        assert g_test(np.bincount(drawn[:, i], minlength=size), probs) > 1e-4
        assert_close(log_probs[:, i], np.log(probs[drawn[:, i]]), rtol=1e-5, atol=1e-6)


def test_decode_step_is_compiled_once():
    step = decode_step()
    logits, tokens = jnp.zeros((2, 50)), jnp.full((2, 3), -1)
    other = options(2, top_k=3, top_p=0.5, penalty=1.3, temperature=[0.0, 2.0])
    for given in (options(2), other):
        step(jax.random.key(0), logits, tokens, **given)
    assert step._cache_size() == 1
