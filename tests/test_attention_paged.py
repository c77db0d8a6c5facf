"""Attention in parts: caches, splits that merge, and pages."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from tests import oracles
from tests.helpers import INF, NAN, assert_close, assert_same, eps

B, N, K, H, W = 2, 4, 2, 5, 3
PAGE, NUM_PAGES, MOST = 3, 11, 5
LENGTHS = np.array([13, 4])


def draw(seed, *shapes, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype))) for shape in shapes
    ]


def pages(seed=0, num_queries=2):
    queries, keys, values = draw(
        seed, (B, num_queries, N, H), (NUM_PAGES, PAGE, K, H), (NUM_PAGES, PAGE, K, W)
    )
    table = np.random.default_rng(seed).permutation(NUM_PAGES)[: B * MOST].reshape(B, MOST)
    return queries, keys, values, table


def test_a_cache_with_lengths():
    """One query a sequence against a cache that is not full, whatever stands behind."""
    queries, keys, values = draw(0, (B, 1, N, H), (B, 16, K, H), (B, 16, K, W))
    mask = masks.Causal(LENGTHS - 1) & masks.Lengths(key_lengths=LENGTHS)
    for way in ({}, {"block_size": (1, 5)}):
        behind = np.arange(16)[None, :, None, None] >= LENGTHS.reshape(-1, 1, 1, 1)
        spoilt = [jnp.where(behind, NAN, x) for x in (keys, values)]
        out = sj.attention(queries, *spoilt, mask=mask, **way)
        for b, n in enumerate(LENGTHS):
            expected, _ = oracles.attention(queries[b], keys[b, :n], values[b, :n])
            assert_close(out[b], expected, rtol=0, atol=32 * eps("float64"))


@pytest.mark.slow
def test_parts_of_the_keys_merge_into_all():
    queries, keys, values = draw(1, (B, 3, N, H), (B, 12, K, H), (B, 12, K, W))
    mask, ends = masks.Causal(4), (0, 2, 7, 12)  # The last part is unseen by the first query.
    ids = [np.arange(a, b) for a, b in itertools.pairwise(ends)]

    attend = functools.partial(sj.attention, mask=mask, return_lse=True)

    def merged(queries, keys, values):
        parts = [
            sj.attention(
                queries,
                keys[:, i],
                values[:, i],
                mask=mask,
                positions=(None, i),
                return_lse=True,
            )
            for i in ids
        ]
        widest = zip(*parts, strict=True)
        return sj.merge_attention(*(jnp.stack(x) for x in widest))

    args = queries, keys, values
    for one, other in zip(jax.jit(merged)(*args), attend(*args), strict=True):
        assert_close(one, other, rtol=0, atol=32 * eps("float64"))
    loss = lambda f: lambda *a: sum(jnp.sum(jnp.sin(x)) for x in f(*a))
    grad = lambda f: jax.jit(jax.grad(loss(f), argnums=(0, 1, 2)))(*args)
    grads = map(grad, (merged, attend))
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=0, atol=64 * eps("float64"))


def test_merging_nothing():
    out, lse = sj.merge_attention(jnp.zeros((2, 3, W)), jnp.full((2, 3), -INF))
    assert (out == 0).all()
    assert (lse == -INF).all()
    with pytest.raises(ValueError, match="`outs` must be"):
        sj.merge_attention(jnp.zeros((2, 3, W)), jnp.zeros((2, 4)))


@pytest.mark.parametrize("num_splits", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_pages(num_splits, monkeypatch):
    """Two pages at a time; with a sink and a soft cap; whatever stands in other pages."""
    monkeypatch.setattr("softjax.attentions.paged.AT_ONCE", 2 * PAGE)
    jax.clear_caches()  # Programs of before have the number built in.
    queries, keys, values, table = pages()
    options = {"sink": jnp.arange(N) / 4, "soft_cap": 2.0}
    call = lambda *a: sj.paged_attention(*a, table, LENGTHS, num_splits=num_splits, **options)
    expected = oracles.paged_attention(queries, keys, values, table, LENGTHS, **options)
    assert_close(call(queries, keys, values), expected, rtol=0, atol=32 * eps("float64"))
    used = np.zeros((NUM_PAGES, PAGE), bool)
    for row, n in zip(table, LENGTHS, strict=True):
        used[row[np.arange(n) // PAGE], np.arange(n) % PAGE] = True
    spoilt = [jnp.where(used[..., None, None], x, NAN) for x in (keys, values)]
    assert_same(call(queries, *spoilt), call(queries, keys, values))
    bars = jax.grad(lambda *a: jnp.sum(call(*a)), argnums=(0, 1, 2))(queries, *spoilt)
    assert all(jnp.isfinite(bar).all() for bar in bars)
    assert (np.asarray(bars[1] != 0).any((2, 3)) == used).all()


@pytest.mark.slow
def test_pages_with_a_window_and_a_score():
    queries, keys, values, table = pages(1)
    got = sj.paged_attention(
        queries,
        keys,
        values,
        table,
        LENGTHS,
        mask=masks.Window(3),
        score=lambda scores, at: scores - 0.25 * (at.query - at.key).astype(scores.dtype),
    )
    for b, n in enumerate(LENGTHS):
        k, v = (x[table[b]].reshape(-1, *x.shape[2:])[:n] for x in (keys, values))
        gap = np.subtract.outer(np.arange(n - 2, n), np.arange(n))
        expected, _ = oracles.attention(
            queries[b],
            k,
            v,
            keep=(gap >= 0) & (gap <= 3),
            score=lambda s, _, g=gap: s - 0.25 * g,
        )
        assert_close(got[b], expected, rtol=0, atol=32 * eps("float64"))


def test_a_page_that_is_not_there_gives_nan():
    queries, keys, values, table = pages(2)
    for number in (NUM_PAGES, -NUM_PAGES - 1):
        wrong = table.copy()
        wrong[1, 0], wrong[0, 4] = number, number
        wrong[1, 4] = number  # Behind the length.
        out = sj.paged_attention(queries, keys, values, wrong, LENGTHS)
        assert jnp.isnan(out[1]).all()
        assert jnp.isnan(out[0, 1]).all()  # Its last token is the first of the last page;
        assert jnp.isfinite(out[0, 0]).all()  # the one before it does not see that.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_pages": jnp.ones((2, 3, 4))}, ValueError, "`key_pages` must be"),
        ({"page_table": np.ones((B, MOST))}, TypeError, "`page_table` must be integers"),
        ({"page_table": np.ones((3, MOST), int)}, ValueError, "`page_table` must be"),
        ({"lengths": np.ones((B, 1), int)}, ValueError, "`lengths`"),
        ({"num_splits": 0}, ValueError, "`num_splits` must be at least 1"),
    ],
)
def test_errors(change, error, message):
    names = ("queries", "key_pages", "value_pages", "page_table")
    given = dict(zip(names, pages(), strict=True)) | {"lengths": LENGTHS} | change
    with pytest.raises(error, match=message):
        sj.paged_attention(**given)


@pytest.mark.parametrize("first", [-INF, 0.0, INF])
def test_infinite_parts(first):
    """Those of +inf share the average, those of -inf count for nothing; no NaN is made."""
    (outs,) = draw(5, (3, 2, W))
    lses = jnp.asarray([[first, first], [INF, -INF], [-INF, -INF]])
    with jax.debug_nans(True):
        out, lse = sj.merge_attention(outs, lses)
        bars = jax.grad(lambda *a: jnp.sum(sj.merge_attention(*a)[0]), argnums=(0, 1))(
            outs, lses
        )
    both = (outs[0, 0] + outs[1, 0]) / 2
    assert_close(out[0], both if first == INF else outs[1, 0], rtol=4 * eps("float64"))
    assert_same(out[1], jnp.zeros(W) if first == -INF else outs[0, 1])
    assert_same(lse, jnp.asarray([INF, first]))
    assert all(jnp.isfinite(bar).all() for bar in bars)
