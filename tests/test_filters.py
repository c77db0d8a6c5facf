"""Filters: what is kept, against brute force; ties, counts and edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import _rootfinding
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps

FILTERS = {
    "top_k_filter": (1, 2, 3, 5, 7),
    "top_p_filter": (1e-6, 0.3, 0.5, 0.9, 0.999, 1.0),
    "min_p_filter": (1e-6, 0.05, 0.3, 0.9, 1.0),
    "typical_filter": (1e-6, 0.3, 0.5, 0.9, 0.999, 1.0),
    "epsilon_filter": (0.3, 0.1, 1e-2, 1e-4, 0.0),
    "eta_filter": (0.9, 0.3, 0.03, 1e-4, 0.0),
    "top_n_sigma_filter": (1e-3, 0.5, 1.0, 2.0, INF),
}
every_filter = pytest.mark.parametrize("name", FILTERS)


@every_filter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_filters_against_brute_force(name, dtype):
    fn, oracle = getattr(sj, name), getattr(oracles, name)
    for seed, scale in enumerate((0.5, 2.0, 8.0)):
        logits, keep = draw(seed, (3, 7), scale=scale, dtype=dtype)
        logits = np.where(keep, logits, np.array(-INF, logits.dtype))
        for option in FILTERS[name]:
            for axis in (0, -1, None):
                actual = fn(jnp.asarray(logits), option, axis=axis)
                expected = oracle(logits, option, axis=axis).astype(logits.dtype)
                assert_same(actual, jnp.asarray(expected))


@every_filter
def test_filters_take_an_option_per_slice(name):
    logits, _ = draw(3, (4, 7), scale=2.0)
    options = np.array(FILTERS[name][:4])[:, None]
    actual = getattr(sj, name)(jnp.asarray(logits), jnp.asarray(options))
    pairs = zip(logits, options, strict=True)
    alone = [getattr(sj, name)(jnp.asarray(z), o[0]) for z, o in pairs]
    assert_same(actual, jnp.stack(alone))
    traced = jax.jit(getattr(sj, name))(jnp.asarray(logits), jnp.asarray(options))
    assert_same(traced, actual)
    columns = getattr(sj, name)(jnp.asarray(logits.T), jnp.asarray(options.T), axis=0)
    assert_same(columns, actual.T)


@every_filter
def test_filters_keep_ties(name):
    """Entries that are equal are kept or dropped together."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        logits = rng.integers(-3, 3, 9).astype(float)
        for option in FILTERS[name][:-1]:
            if name == "top_k_filter" or option not in (0.3, 0.5, 0.9):
                out = np.asarray(getattr(sj, name)(jnp.asarray(logits), option))
                for level in np.unique(logits):
                    assert len(np.unique(out[logits == level])) == 1
                assert out.max() > -INF
                expected = getattr(oracles, name)(logits, option)
                np.testing.assert_array_equal(out, expected)


@every_filter
def test_filters_at_the_edges(name):
    fn, few, everything = getattr(sj, name), FILTERS[name][0], FILTERS[name][-1]
    with jax.debug_nans(True):
        assert_close(fn(jnp.array([-INF, -INF]), few), [-INF, -INF], rtol=0)
        assert_close(fn(jnp.array([2.0]), few), [2.0], rtol=0)
        assert_close(fn(jnp.array([0.0, -INF, 0.0]), few), [0.0, -INF, 0.0], rtol=0)
        assert fn(jnp.zeros((0, 3)), few).shape == (0, 3)
        assert fn(jnp.zeros((2, 0)), few).shape == (2, 0)
        if name != "min_p_filter":
            logits = jnp.asarray(draw(5, (7,), scale=30.0)[0])
            assert_same(fn(logits, everything), logits)
        assert fn(jnp.array([INF, 0.0]), few)[0] == INF
    assert jnp.isnan(fn(jnp.array([NAN, 0.0, 1.0]), everything)).any()


@pytest.mark.slow
@every_filter
def test_filters_pass_the_derivative_of_what_they_keep(name):
    logits = jnp.asarray(draw(6, (7,), scale=2.0)[0])
    option = FILTERS[name][1]
    kept = getattr(sj, name)(logits, option) > -INF
    assert 0 < kept.sum() < 7
    loss = lambda z: jnp.sum(sj.softmax(getattr(sj, name)(z, option)) * jnp.arange(7.0))
    masked = lambda z: jnp.sum(sj.softmax(z, where=kept) * jnp.arange(7.0))
    with jax.debug_nans(True):
        for mode in (jax.grad, jax.hessian):
            assert_close(mode(loss)(logits), mode(masked)(logits), rtol=1e-12, atol=1e-15)


def test_top_k_of_special_numbers():
    """Bit patterns are ordered like the numbers, whatever their sign; -0 equals 0."""
    logits = jnp.array([-1.0, -0.0, 0.0, 3e-308, -1e300, 1e300, -2.0])
    for k in range(1, 8):
        edge = np.sort(np.asarray(logits))[::-1][k - 1]
        expected = np.where(np.asarray(logits) >= edge, logits, -INF)
        np.testing.assert_array_equal(sj.top_k_filter(logits, k), expected)
        np.testing.assert_array_equal(sj.top_k_filter(logits, k - 0.5), expected)
    for dtype in DTYPES:
        values = jnp.asarray(draw(7, (4, 100), scale=5.0, dtype=dtype)[0])
        out = sj.top_k_filter(values, 10)
        expected = oracles.top_k_filter(values, 10)
        np.testing.assert_array_equal(np.asarray(out).astype(float), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_filters_of_long_slices(dtype):
    """Against a full sort in float64, with options that no rounding can blur."""
    logits, _ = draw(8, (2, 50_000), scale=3.0, dtype=dtype)
    exact = logits.astype(np.float64)
    ordered = np.sort(exact, -1)[:, ::-1]
    out = np.asarray(sj.top_k_filter(jnp.asarray(logits), 500))
    np.testing.assert_array_equal(out > -INF, exact >= ordered[:, 499:500])
    probs = np.asarray(oracles.fast_softmax(ordered))
    total = np.cumsum(probs, -1)
    for p in (0.1, 0.5, 0.95):
        count = np.sum(total < p, -1) + 1
        # How near the mass comes to p, against the rounding of a sum of probabilities.
        near = [total[i, c - 1 + s] - p for i, c in enumerate(count) for s in (-1, 0)]
        margin = np.abs(near).min()
        out = np.asarray(sj.top_p_filter(jnp.asarray(logits), p)) > -INF
        edge = np.take_along_axis(ordered, count[:, None] - 1, -1)
        if margin > 8 * eps(dtype):
            np.testing.assert_array_equal(out, exact >= edge)
        assert (np.abs(out.sum(-1) - count) <= 1).all()


def test_a_filter_remembers_its_result_alone():
    filters = (
        lambda z: sj.top_k_filter(z, 2),
        lambda z: sj.top_p_filter(z, 0.9),
        lambda z: sj.min_p_filter(z, 0.1),
    )
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)), "float32")
    for fn in filters:
        filtered, pullback = jax.vjp(fn, logits)
        (kept,) = jax.tree.leaves(pullback)
        assert_same(kept, filtered)


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "top_k_filter"])
def test_filters_keep_a_least_number(name):
    """The largest entries, or the most typical ones, are kept in any case, with their ties."""
    fn, oracle = getattr(sj, name), getattr(oracles, name)
    strict = FILTERS[name][0]
    for seed, dtype in enumerate(("float32", "float64")):
        logits, keep = draw(seed, (3, 9), scale=4.0, dtype=dtype)
        logits = np.where(keep, logits, np.array(-INF, dtype))
        logits[1] = np.round(logits[1])
        for least in (1, 2, 5, 9, 12):
            actual = fn(jnp.asarray(logits), strict, min_tokens_to_keep=least)
            expected = oracle(logits, strict, min_tokens_to_keep=least).astype(dtype)
            assert_same(actual, jnp.asarray(expected))
    with pytest.raises(ValueError, match="`min_tokens_to_keep` must be at least 1"):
        fn(jnp.zeros(3), strict, min_tokens_to_keep=0)
    with pytest.raises(TypeError, match="`min_tokens_to_keep` must be an int"):
        fn(jnp.zeros(3), strict, min_tokens_to_keep=1.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_first_of_ties_make_exactly_k(dtype):
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (40, 2, 6)).astype(float)
    logits[0] = [[INF, -INF, -0.0, 0.0, INF, 0.0], [0.0] * 6]
    logits[1] = -INF
    for axes in ((2,), (1, 2), (0, 2)):
        order = tuple(i for i in range(3) if i not in axes)
        flat = logits.transpose(*order, *axes).reshape(*(logits.shape[i] for i in order), -1)
        first = np.argsort(-flat, -1, kind="stable")
        for k in (0, 1, 2, 5, 6, 100):
            wanted = np.full(flat.shape, -INF)
            place = first[..., :k]
            np.put_along_axis(wanted, place, np.take_along_axis(flat, place, -1), -1)
            out = sj.top_k_filter(jnp.asarray(logits, dtype), k, axis=axes, ties="first")
            out = np.asarray(out).astype(float).transpose(*order, *axes).reshape(flat.shape)
            np.testing.assert_array_equal(out, wanted)
    each = jnp.arange(7)[:, None]
    out = sj.top_k_filter(jnp.zeros((7, 6), dtype), each, ties="first")
    np.testing.assert_array_equal(jnp.isfinite(out), np.arange(6) < np.arange(7)[:, None])
    with pytest.raises(ValueError, match="`ties` must be one of"):
        sj.top_k_filter(jnp.zeros(3), 2, ties="last")


def test_the_first_of_ties_in_blocks():
    """As many slices as are searched a few at a time."""
    logits = np.round(draw(1, (600, 512), dtype="float32")[0])
    first = np.argsort(-logits, -1, kind="stable")[:, :7]
    out = np.asarray(sj.top_k_filter(jnp.asarray(logits), 7, ties="first"))
    assert (np.sort(np.nonzero(out > -INF)[1].reshape(600, 7), -1) == np.sort(first, -1)).all()
    columns = sj.top_k_filter(jnp.asarray(logits.T), 7, axis=0, ties="first")
    assert_same(columns.T, jnp.asarray(out))


def test_counts_are_not_floats():
    """Counts that float32 cannot hold, as the search takes and makes them."""
    for dtype in ("int32", "uint32", "int64", "float64"):
        count = _rootfinding.to_count(jnp.array([2**24 + 1, 2**25 + 3], dtype), 2**25 + 1)
        assert count.tolist() == [2**24 + 1, 2**25 + 1]
    odd = _rootfinding.to_count(jnp.array([-3.0, 0.5, NAN, INF, 1e30], "float32"), 2**24 + 1)
    assert odd.tolist() == [0, 1, 2**24 + 1, 2**24 + 1, 2**24 + 1]
    narrow = _rootfinding.to_count(jnp.array([127, -1], "int8").astype("int32"), 1000)
    assert narrow.tolist() == [127, 0]
    with jax.enable_x64(False):
        filtered = lambda z: sj.top_k_filter(z, 1)
        jax.eval_shape(filtered, jax.ShapeDtypeStruct((2**31 - 2,), "float32"))
        with pytest.raises(ValueError, match="a slice of 2147483647 entries is longer"):
            jax.eval_shape(filtered, jax.ShapeDtypeStruct((2**31 - 1,), "float32"))


@pytest.mark.slow
@pytest.mark.optimized
def test_a_slice_of_more_than_float32_counts():
    size = 513 * 32768  # 2^24 + 2^15
    with jax.enable_x64(False):
        zeros = jnp.zeros((513, 32768)).at[0, 0].set(2.0).at[0, 1].set(1.0)
        kept = lambda k, **ties: int(
            jnp.sum(jnp.isfinite(sj.top_k_filter(zeros, k, axis=None, **ties)))
        )
        assert (kept(1), kept(2), kept(3)) == (1, 2, size)
        for k in (1, 5, 2**24 + 1, size - 1, size):
            assert kept(k, ties="first") == k
            assert kept(jnp.array(k), ties="first") == k
        row = jax.lax.iota("int32", size).astype("float32") % 4096
        least = jnp.sum(row >= 1).item()
        out = sj.top_k_filter(row, least)
        assert jnp.sum(jnp.isfinite(out)).item() == least
        counted = sj.scalable_scores(jnp.ones(size))[0]
        assert_close(counted, np.float32(np.log(size)), rtol=2 * eps("float32"))


def test_deviations_of_huge_and_equal_logits():
    """Neither a difference nor a square overflows; equal entries lie within no distance."""
    for dtype in ("float32", "float64"):
        top = float(jnp.finfo(dtype).max)
        for scale in (top, float(jnp.finfo(dtype).tiny) * 2**12):
            logits = jnp.asarray(np.array([1.0, 0.9, -1.0, -1.0, -0.95]) * scale, dtype)
            for n, kept in ((0.0, 1), (0.2, 2), (2.08, 3), (2.2, 5), (INF, 5)):
                out = sj.top_n_sigma_filter(logits, n)
                expected = oracles.top_n_sigma_filter(np.asarray(logits), n)
                assert_same(out, jnp.asarray(expected.astype(dtype)))
                assert jnp.isfinite(out).sum() == kept
        assert jnp.isfinite(sj.top_n_sigma_filter(jnp.full(5, 3.0, dtype), 0.0)).all()


@pytest.mark.parametrize("name", ["epsilon_filter", "eta_filter", "top_n_sigma_filter"])
def test_infinite_logits_leave_nothing_else(name):
    strict, loose = FILTERS[name][0], FILTERS[name][-2]
    logits = jnp.array([[INF, 1.0, INF, -INF], [-INF, 1.0, -INF, -INF]])
    for option in (strict, loose):
        with jax.debug_nans(True):
            out = getattr(sj, name)(logits, option)
        assert_close(out, [[INF, -INF, INF, -INF], [-INF, 1.0, -INF, -INF]], rtol=0)
    assert jnp.isnan(getattr(sj, name)(jnp.array([0.0, NAN, 1.0]), strict)[1])
