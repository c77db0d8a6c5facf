"""What shapes the logits of attention before they are formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from tests import oracles
from tests.helpers import INF, NAN, assert_close, assert_same, eps


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def test_slopes():
    for num_heads in (1, 2, 3, 6, 8, 12, 20):
        slopes = sj.alibi_slopes(num_heads)
        assert_close(slopes, oracles.alibi_slopes(num_heads), rtol=2 * eps("float64"))
        assert slopes.shape == (num_heads,)
    for wrong in (0, -4, 2.0):
        with pytest.raises((TypeError, ValueError), match="`num_heads` must be"):
            sj.alibi_slopes(wrong)


def test_slopes_as_a_score():
    queries, keys, values = draw((9, 6, 4), (11, 2, 4), (11, 2, 3))
    slopes = sj.alibi_slopes(6)
    gap = lambda at: jnp.abs(at.query - at.key).astype("float64")
    score = lambda z, at: z - slopes[None, :, None, None] * gap(at)
    out = sj.attention(
        queries, keys, values, score=score, mask=masks.Causal(2), block_size=(4, 3)
    )
    distance = np.abs(np.subtract.outer(range(9), range(11)))
    expected, _ = oracles.attention(
        queries,
        keys,
        values,
        keep=np.tri(9, 11, 2, dtype=bool),
        score=lambda z, n: z - oracles.alibi_slopes(6)[n] * distance,
    )
    assert_close(out, expected, rtol=0, atol=32 * eps("float64"))


def test_normalised_vectors_of_every_size():
    """Squares neither overflow nor vanish; zeros stay; half precision is rounded once."""
    queries, keys = draw((5, 2, 8), (7, 2, 8))
    plain = sj.qk_norm(queries, keys, epsilon=0.0)
    for size in (2.0**500, 2.0**-500):
        for one, other in zip(
            sj.qk_norm(size * queries, size * keys, epsilon=0.0), plain, strict=True
        ):
            assert_same(one, other)
    tiny = 1e-9 * queries  # Below epsilon, which then rules.
    assert_close(
        sj.qk_norm(tiny, keys)[0], oracles.qk_norm(tiny, keys)[0], rtol=16 * eps("float64")
    )
    for epsilon in (0.0, 1e-6):
        zeros, grad = jax.value_and_grad(
            lambda q, epsilon=epsilon: jnp.sum(sj.qk_norm(q, keys, epsilon=epsilon)[0])
        )(jnp.zeros((1, 8)))
        assert zeros == 0
        assert jnp.isfinite(grad).all()
    narrow = [x.astype("bfloat16") for x in (queries, keys)]
    for one, x in zip(sj.qk_norm(*narrow), oracles.qk_norm(*narrow), strict=True):
        assert_same(one, jnp.asarray(x.astype(np.float32)).astype("bfloat16"))


def test_a_bad_vector_stays_where_it_is():
    """No gradient of another, nor of a scale, sees it, unless what comes of it is used."""
    queries, keys, values, scale = draw((6, 2, 4), (6, 2, 4), (6, 2, 4), (2, 4))

    def loss(queries, keys, scale):
        normal = sj.qk_norm(queries, keys, query_scale=scale, key_scale=scale)
        return jnp.sum(jnp.sin(sj.attention(*normal, values, mask=masks.Causal(-2))))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    expected = run(queries, keys, scale)
    for number in (NAN, INF):  # The first two queries see nothing, nobody sees the last keys.
        found = run(queries.at[1].set(number), keys.at[4:, :, 1].set(number), scale)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_same(one, other)


def test_normalised_attention_has_the_temperature_of_unit_vectors():
    """As Henry et al. define it: g times the cosine."""
    queries, keys, values = draw((9, 2, 4), (9, 2, 4), (9, 2, 3), seed=1)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    expected, _ = oracles.attention(unit(queries), unit(keys), values, scale=5.0)
    out = sj.attention(*sj.qk_norm(queries, keys, epsilon=0.0), values, scale=5.0 / 4)
    assert_close(out, expected, rtol=0, atol=32 * eps("float64"))


def test_scalable_attention():
    """Its logits are those of `scalable_scores` over the keys that are seen."""
    queries, keys = draw((7, 2, 4), (7, 2, 4), seed=2)
    values = jnp.broadcast_to(jnp.eye(7)[:, None], (7, 2, 7))
    scale = jnp.asarray([0.5, 2.0])
    scaled = sj.scalable_queries(queries, jnp.arange(1, 8), scale)
    weights = sj.attention(scaled, keys, values, mask=masks.Causal())
    logits = jnp.einsum("tnh,snh->tns", queries, keys) / 2
    logits = jnp.where(np.tri(7, dtype=bool)[:, None], logits, -INF)
    expected = sj.softmax(sj.scalable_scores(logits, scale[None, :, None]))
    assert_close(weights, expected, rtol=0, atol=32 * eps("float64"))
    none = sj.scalable_queries(queries, 0)
    assert (none == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: sj.qk_norm(q, q, query_scale=jnp.ones(3)), ValueError, "`query_scale`"),
        (lambda q: sj.qk_norm(q, q, epsilon=-1.0), ValueError, "`epsilon` must be"),
        (lambda q: sj.qk_norm(q, q.astype(complex)), TypeError, "`keys` must be real"),
        (lambda q: sj.scalable_queries(q[0], 1), ValueError, "`queries` must be"),
        (lambda q: sj.scalable_queries(q, jnp.ones(3)), ValueError, "`counts` of shape"),
        (lambda q: sj.scalable_queries(q, 3, jnp.ones(3)), ValueError, "`scale` of shape"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((5, 2, 4)))
