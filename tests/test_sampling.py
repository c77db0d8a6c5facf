"""Samples: every class at its own rate, whatever the dtype, the mask or the temperature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import softjax as sj
from softjax import _inverse_cdf, _random, _uint64
from softjax._uint64 import Wide
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_same, draw, eps, g_test

KEY = jax.random.key(0)
MANY = 2**20


def counts_of(classes, size):
    """How often each class was drawn; none may be -1."""
    return np.bincount(np.asarray(classes).reshape(-1), minlength=size)


def definition(logits, where=None, temperature=1.0):
    """Exact probabilities of the last axis."""
    logits = np.asarray(logits).astype(float)
    if where is not None:
        logits = np.where(where, logits, -INF)
    return np.asarray(oracles.fast_softmax(logits / temperature)).astype(float)


# Integers of 64 bits.


def wide(numbers):
    numbers = [int(n) % 2**64 for n in numbers]
    words = [[n >> 32 for n in numbers], [n & 0xFFFFFFFF for n in numbers]]
    return Wide(*(jnp.asarray(np.array(w, np.uint32)) for w in words))


def number(pair):
    return [(int(h) << 32) | int(m) for h, m in zip(*map(np.asarray, pair), strict=True)]


def test_wide_integers():
    edges = [0, 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    rng = np.random.default_rng(0)
    others = [int(n) for n in rng.integers(0, 2**64, 40, np.uint64)]
    pairs = list(itertools.product(edges, edges)) + list(itertools.pairwise(others))
    first, second = zip(*pairs, strict=True)
    a, b = wide(first), wide(second)
    assert number(_uint64.add(a, b)) == [(x + y) % 2**64 for x, y in pairs]
    assert number(_uint64.subtract(a, b)) == [(x - y) % 2**64 for x, y in pairs]
    assert number(_uint64.multiply_high(a, b)) == [x * y >> 64 for x, y in pairs]
    assert number(_uint64.smaller(a, b)) == [min(pair) for pair in pairs]
    assert _uint64.at_most(a, b).tolist() == [x <= y for x, y in pairs]
    assert _uint64.is_zero(a).tolist() == [x == 0 for x in first]
    high, low = np.array([0, 1, 2**24, 5]), np.array([7, -1, 2**31 - 1, -(2**20)])
    for shift in (20, 27, 31):
        parts = (jnp.asarray(part, jnp.int32) for part in (high, low))
        expected = [(int(h) << shift) + int(m) for h, m in zip(high, low, strict=True)]
        assert number(_uint64.from_parts(*parts, shift)) == expected


@pytest.mark.parametrize("size", [1, 300, 2**16 + 5])
def test_running_sums_do_not_round(size):
    terms = np.random.default_rng(1).integers(0, 2**46, size, np.uint64)
    sums = _uint64.running_sums(wide(terms))
    assert number(sums) == [int(n) for n in np.cumsum(terms)]


# Inverse CDF.


def intervals(x, temperature=None, *, many=False):
    """The exact probability that each class is drawn: bits are searched for its interval."""
    size = x.shape[-1]
    ask = jax.jit(lambda bits: _inverse_cdf.draw(x[None], temperature, bits)[0])
    # Enough draws at once, or few of them, to take one way or the other.
    width = size - 1 if many or size <= 64 else 1
    starts = []
    for first in range(1, size, width):
        wanted = np.arange(first, min(size, first + width))
        low, high = [-1] * len(wanted), [2**64] * len(wanted)  # The answer is in (low, high].
        for _ in range(65):
            middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
            clipped = [min(max(m, 0), 2**64 - 1) for m in middle]
            passed = np.asarray(ask(Wide(*(w[None] for w in wide(clipped))))) >= wanted
            high = [m if ok else b for m, b, ok in zip(middle, high, passed, strict=True)]
            low = [a if ok else m for a, m, ok in zip(low, middle, passed, strict=True)]
            low = [min(a, b - 1) for a, b in zip(low, high, strict=True)]
        starts += high
    edges = [0, *starts, 2**64]
    return np.array([(b - a) / 2**64 for a, b in itertools.pairwise(edges)])


@pytest.mark.parametrize(("size", "many"), [(5, False), (40, False), (40, True), (300, True)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probabilities_are_exact(size, many, dtype):
    """Found by bisection of the 64 bits, for classes from 1 down to 1e-9."""
    rng = np.random.default_rng(size)
    logits = rng.permuted(np.linspace(-20, 0, size)).astype(dtype)
    logits[rng.integers(size)] = -INF
    expected = definition(logits)
    got = intervals(jnp.asarray(logits), many=many)
    assert not got[expected == 0].any()
    # A score of -20 is rounded to eps, so is its exponential; integers add 2^-41 of the peak.
    tolerance = 8 * eps("float32") * expected + 2.0**-40 * expected.max()
    assert (np.abs(got - expected) <= tolerance).all()
    assert (np.abs(got / np.where(expected > 0, expected, 1) - (expected > 0)) < 1e-3).all()


def test_rare_classes_after_a_common_one():
    """Sums that are rounded lose what comes after a class of nearly all of the mass."""
    logits = np.full(300, -22.0, np.float32)
    logits[0] = 0
    got = intervals(jnp.asarray(logits), many=True)
    assert (np.abs(got[1:] / np.exp(-22.0) - 1) < 1e-2).all()  # 2.8e-10 each.
    assert abs(got[1:].sum() / (299 * np.exp(-22.0)) - 1) < 1e-2


@pytest.mark.parametrize("size", [3, 37])
def test_both_ways_draw_the_same(size):
    """Whether a block is weighed anew or all weights are summed up in advance."""
    logits = jnp.asarray(draw(2, (2, size), scale=3.0, dtype="float32")[0])
    logits = logits.at[:, 1].set(-INF)
    ask = jax.jit(lambda bits: _inverse_cdf.draw(logits, None, bits))
    bits = _random.bits(KEY, (2, 4 * size))
    together = ask(bits)
    alone = [ask(Wide(*(w[:, i : i + 1] for w in bits))) for i in range(0, 4 * size, 7)]
    assert_same(together[:, ::7], jnp.concatenate(alone, 1))


def test_extreme_bits_draw_a_kept_class():
    draw_all = jax.jit(_inverse_cdf.draw)
    for size in (4, 50):
        logits = jnp.zeros((1, size)).at[:, jnp.array([0, -1])].set(-INF)
        for copies in (1, 2 * size):
            bits = wide([0, 2**64 - 1] * copies)
            got = draw_all(logits, None, Wide(*(w[None] for w in bits)))
            assert got[0, :2].tolist() == [1, size - 2]


CASES = [
    *((n, dtype, False, 1.0) for n in (2, 5, 1000) for dtype in ("bfloat16", "float32")),
    (1000, "float16", True, 0.5),
    (5, "float16", True, 3.0),
    (5, "float64", True, 0.7),
]
SLOW_CASES = [
    *((n, dtype, False, 1.0) for n in (2, 5, 1000, 131072) for dtype in DTYPES),
    *((n, "bfloat16", True, t) for n in (2, 5, 1000, 131072) for t in (0.5, 3.0)),
]


def check_rates(size, dtype, masked, temperature, **options):
    logits, keep = draw(size, (size,), scale=1.5, dtype=dtype)
    options |= {"where": jnp.asarray(keep)} if masked else {}
    classes = sj.sample(KEY, jnp.asarray(logits), temperature=temperature, **options)
    assert classes.dtype == jnp.int32
    expected = definition(logits, keep if masked else None, temperature)
    assert g_test(counts_of(classes, size), expected) > 1e-4


@pytest.mark.parametrize(("size", "dtype", "masked", "temperature"), CASES)
def test_rates(size, dtype, masked, temperature):
    check_rates(size, dtype, masked, temperature, shape=(MANY,))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype", "masked", "temperature"), SLOW_CASES)
def test_rates_of_all_sizes(size, dtype, masked, temperature):
    check_rates(size, dtype, masked, temperature, shape=(4, MANY // 4))


@pytest.mark.parametrize("size", [4, 1000])
def test_rates_over_rows(size):
    """One draw a row, where each row has a rotation of the same logits."""
    logits = draw(3, (size,), scale=1.5, dtype="float32")[0]
    rows = MANY // 64 // size
    shifts = np.arange(rows)
    grid = jnp.asarray(np.stack([np.roll(logits, s) for s in shifts]))
    classes = np.asarray(sj.sample(KEY, grid, shape=(64,)))
    assert classes.shape == (64, rows)
    assert g_test(counts_of((classes - shifts) % size, size), definition(logits)) > 1e-4


@pytest.mark.slow
def test_the_g_test_sees_a_bias():
    """Noise in the dtype of the logits, as in `jax.random.categorical`, is too coarse."""
    logits = jnp.zeros(1000, "bfloat16")
    biased = jax.random.categorical(KEY, logits, shape=(2**14,))
    uniform = np.full(1000, 1e-3)
    assert g_test(counts_of(biased, 1000), uniform) < 1e-100
    ours = sj.sample(KEY, logits, shape=(2**14,))
    assert g_test(counts_of(ours, 1000), uniform) > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rates_with_gumbel_noise(dtype):
    logits, keep = draw(4, (6,), scale=1.5, dtype=dtype)
    options = {"where": jnp.asarray(keep), "temperature": 0.8, "method": "gumbel"}
    classes = sj.sample(KEY, jnp.asarray(logits), shape=(2**18,), **options)
    assert g_test(counts_of(classes, 6), definition(logits, keep, 0.8)) > 1e-4


def test_gumbel_noise_couples():
    """With one key, two close distributions differ at few draws: 2 d / (1 + d) at most."""
    logits = draw(5, (50,), dtype="float32")[0]
    close = logits + np.random.default_rng(6).standard_normal(50).astype("float32") / 50
    pair = [
        np.asarray(sj.sample(KEY, jnp.asarray(z), shape=(2**14,), method="gumbel"))
        for z in (logits, close)
    ]
    distance = np.abs(definition(logits) - definition(close)).sum() / 2
    rate = 2 * distance / (1 + distance)
    assert np.mean(pair[0] != pair[1]) < rate + 5 * (rate / 2**14) ** 0.5


# Edges.

METHODS = ("inverse", "gumbel")
WAYS = [("gumbel", 4), ("inverse", 4), ("inverse", 40)]
EDGES = [
    ([-INF, -INF, -INF], {-1}),
    ([NAN, 0.0, 1.0], {-1}),
    ([INF, 0.0, INF], {0, 2}),
    ([-INF, 3.0, -INF], {1}),
    ([1e30, -1e30, 1e30], {0, 2}),
    ([3e38, -3e38, -INF], {0}),
    ([-3e38, -3e38, -INF], {0, 1}),
]


@pytest.mark.parametrize(("method", "size"), WAYS)
def test_edges(method, size):
    logits = np.full((len(EDGES), size), -INF, np.float32)
    logits[:, :3] = [row for row, _ in EDGES]
    with jax.debug_nans(False):
        out = np.asarray(sj.sample(KEY, jnp.asarray(logits), shape=(200,), method=method))
    for i, (_, expected) in enumerate(EDGES):
        assert set(out[:, i]) == expected, EDGES[i]
    clean = jnp.asarray(np.delete(logits, 1, 0))
    with jax.debug_nans(True):
        sj.sample(KEY, clean, shape=(2,), method=method)


@pytest.mark.parametrize(("method", "size"), WAYS)
def test_limits_of_the_temperature(method, size):
    logits = np.full((2, size), -INF, np.float32)
    logits[:, :4] = [[1.0, 3.0, 3.0, 2.0], [5.0, 1.0, -2.0, 0.0]]
    where = np.ones((2, size), bool)
    where[1, 0] = False
    call = jax.jit(
        lambda t: sj.sample(
            KEY, jnp.asarray(logits), shape=(4096,), where=where, temperature=t, method=method
        )
    )
    cold, hot = np.asarray(call(jnp.zeros((2, 1)))), np.asarray(call(jnp.full((2, 1), INF)))
    assert g_test(counts_of(cold[:, 0], size)[:4], [0, 0.5, 0.5, 0]) > 1e-4
    assert set(cold[:, 1]) == {1}
    assert g_test(counts_of(hot[:, 0], size)[:4], np.full(4, 0.25)) > 1e-4
    assert g_test(counts_of(hot[:, 1], size)[:4], np.array([0, 1, 1, 1]) / 3) > 1e-4
    mixed = np.asarray(call(jnp.array([[-1.0], [1e-30]])))
    assert set(mixed[:, 0]) == {-1}  # A negative temperature in an array.
    assert set(mixed[:, 1]) == {1}


@pytest.mark.parametrize(("method", "size"), WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_greedy_draws_are_the_first_of_ties(method, size, dtype):
    """With any key; beside rows that are drawn at random, and where nothing is kept."""
    rows = [[0, 3, 3, 1], [INF, 0, INF, 0], [2, -1, 2, 2], [0, 0, 0, 0], [NAN, 1, 1, 0]]
    logits = np.full((6, size), -INF, np.float32)
    logits[:5, :4] = rows
    where = np.ones((6, size), bool)
    where[2, 0] = False
    heat = jnp.array([[0.0], [1e-39], [0.0], [1.0], [0.0], [0.0]], "float32")
    call = jax.jit(
        lambda key: sj.sample(
            key,
            jnp.asarray(logits, dtype),
            where=where,
            temperature=heat,
            method=method,
            ties="first",
        )
    )
    with jax.debug_nans(False):
        out = np.stack([call(jax.random.key(i)) for i in range(40)])
    assert (out[:, [0, 1, 2, 4, 5]] == [1, 0, 2, -1, -1]).all()
    assert set(out[:, 3]) == {0, 1, 2, 3}
    plain = sj.sample(KEY, jnp.zeros(size), temperature=0.0, method=method, ties="first")
    assert plain == 0
    shared = sj.sample(KEY, jnp.zeros(4), shape=(100,), temperature=0.0, method=method)
    assert set(shared.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("method", METHODS)
def test_shapes(method):
    logits = jnp.asarray(draw(7, (2, 3, 4), dtype="float32")[0])
    for axis, shape, expected in ((0, (), (3, 4)), (1, (2, 1), (2, 1, 2, 4))):
        out = sj.sample(KEY, logits, shape=shape, axis=axis, method=method)
        assert out.shape == expected
        assert (out >= 0).all()
        assert (out < logits.shape[axis]).all()
    assert sj.sample(KEY, logits, shape=(0,), method=method).shape == (0, 2, 3)
    assert sj.sample(KEY, jnp.zeros((0, 3)), method=method).shape == (0,)
    assert sj.sample(KEY, jnp.zeros((2, 0)), method=method).tolist() == [-1, -1]
    assert sj.sample(KEY, jnp.zeros(1), method=method) == 0
    assert sj.sample(KEY, jnp.arange(3) * 100, method=method) == 2


@pytest.mark.parametrize(("method", "size"), WAYS[::2])
def test_transformations(method, size):
    logits = jnp.asarray(draw(8, (3, 2, size), dtype="float32")[0])
    keys = jax.random.split(KEY, 3)
    call = lambda key, z, t: sj.sample(key, z, temperature=t, method=method)
    temperatures = jnp.array([0.5, 1.0, 2.0], jnp.float32)
    expected = jnp.stack(list(map(call, keys, logits, temperatures)))
    assert_same(jax.vmap(call)(keys, logits, temperatures), expected)
    _, scanned = jax.lax.scan(lambda _, args: (0, call(*args)), 0, (keys, logits, temperatures))
    assert_same(scanned, expected)
    raw = jax.random.key_data(keys[0])
    assert_same(call(raw, logits[0], temperatures[0]), expected[0])


@pytest.mark.slow
def test_classes_beyond_the_integers_of_float32():
    """Even classes above 2^24 alone, in both ways, and none of their shares is lost."""
    size, first = 2**24 + 2**15, 2**24 + 2
    classes = np.arange(size)
    kept = (classes >= first) & (classes % 2 == 0)
    logits = jnp.asarray(np.where(kept, 0.0, -INF)[None], jnp.float32)
    draws = [sj.sample(KEY, logits, shape=(n,)) for n in (2**12, 2**18)]
    draws = np.concatenate([np.asarray(d)[:, 0] for d in draws])
    assert kept[draws].all()
    counts = np.bincount((draws - first) // 2 % 64, minlength=64)
    shares = np.bincount((classes[kept] - first) // 2 % 64, minlength=64)
    assert g_test(counts, shares / shares.sum()) > 1e-4
    logits = logits.at[0, -1].set(1.0)
    greedy = sj.sample(KEY, logits, temperature=0.0, ties="first")
    assert greedy.tolist() == [size - 1]


@pytest.mark.slow
def test_without_jit():
    logits = jnp.asarray(draw(8, (2, 4), dtype="float32")[0])
    with jax.disable_jit():
        plain = sj.sample(KEY, logits, temperature=0.7)
    assert_same(plain, sj.sample(KEY, logits, temperature=0.7))


def test_wrong_arguments():
    z = jnp.zeros((2, 3))
    many_classes = lambda n: jax.eval_shape(
        lambda z: sj.sample(KEY, z), jax.ShapeDtypeStruct((n,), jnp.float32)
    )
    for error, match, call in [
        (TypeError, "`key` must be a key", lambda: sj.sample(0, z)),
        (TypeError, "`key` must be a key", lambda: sj.sample(jnp.zeros(2), z)),
        (ValueError, "`key` must be one key", lambda: sj.sample(jax.random.split(KEY), z)),
        (TypeError, "`shape` must be an int or a tuple", lambda: sj.sample(KEY, z, shape=3.0)),
        (TypeError, "`shape` must be an int", lambda: sj.sample(KEY, z, shape=(3.0,))),
        (ValueError, "`shape` must be at least 0", lambda: sj.sample(KEY, z, shape=(-1,))),
        (ValueError, "`method` must be one of", lambda: sj.sample(KEY, z, method="best")),
        (ValueError, "`ties` must be one of", lambda: sj.sample(KEY, z, ties="last")),
        (ValueError, "`temperature` must be in", lambda: sj.sample(KEY, z, temperature=-1.0)),
        (ValueError, "classes, more than an int32", lambda: many_classes(2**31)),
        (TypeError, "`axis` must be one int", lambda: sj.sample(KEY, z, axis=None)),
        (ValueError, "`axis` 2 is out of range", lambda: sj.sample(KEY, z, axis=2)),
        (ValueError, "`where` of shape", lambda: sj.sample(KEY, z, where=jnp.ones(2, bool))),
        (TypeError, "`dtype` must be float32", lambda: sj.gumbel(KEY, dtype=jnp.bfloat16)),
        (TypeError, "`labels` must be int", lambda: sj.gumbel_given_argmax(KEY, z, z[:, 0])),
    ]:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.optimized
def test_memory_of_many_draws():
    """1000 x 8 draws from 50257 classes: a few numbers a class, and a few a draw."""
    logits = jnp.zeros((8, 50257), jnp.float32)
    fn = jax.jit(lambda key, z: sj.sample(key, z, shape=(1000,)))
    memory = fn.lower(KEY, logits).compile().memory_analysis()
    if memory is None:
        pytest.skip("the platform does not tell")
    assert memory.temp_size_in_bytes <= 8 * logits.nbytes + 100 * 8000


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.optimized
def test_a_draw_is_computed_once_for_all_that_read_it():
    """Integers are multiplied in the draw alone."""
    logits = jnp.zeros((64, 6), jnp.float32)

    def drawn_and_read(key, logits):
        actions = sj.sample(key, logits)
        return actions, sj.log_prob(logits, actions)

    def num_products(call):
        lines = jax.jit(call).lower(KEY, logits).compile().as_text().splitlines()
        return sum("= u32[64" in line and " multiply(" in line for line in lines)

    assert num_products(sj.sample) > 0
    for call in (sj.select_action, drawn_and_read):
        assert num_products(call) == num_products(sj.sample)


# Noise.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gumbel_noise(dtype):
    noise = np.asarray(sj.gumbel(KEY, (1000, 1000), dtype=dtype))
    assert noise.dtype == dtype
    assert stats.kstest(noise.reshape(-1), "gumbel_r").pvalue > 1e-3
    # Both tails, each a thousandth, are as fine as the middle.
    rate = np.exp(-noise.astype(float).reshape(-1))
    upper = rate[rate < 1e-3] / 1e-3
    assert stats.kstest(np.expm1(-upper * 1e-3) / np.expm1(-1e-3), "uniform").pvalue > 1e-3
    assert len(np.unique(upper)) > 0.99 * len(upper)
    limit = -np.log(1e-3)
    lower = rate[rate > limit] - limit
    assert stats.kstest(lower, "expon").pvalue > 1e-3


def test_noise_reaches_far_into_both_tails(monkeypatch):
    """By bits: the smallest, those next to the middle, and the largest."""
    words = jnp.array([[0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], [0, 0, 2**32 - 1, 0, 0]])
    fixed = lambda key, shape: Wide(*words.astype(jnp.uint32))
    monkeypatch.setattr(_random, "bits", fixed)
    for dtype in ("float32", "float64"):
        got = np.asarray(_random.exponential(None, (5,), dtype)).astype(float)
        expected = [65 * np.log(2), 32 * np.log(2), np.log(2), 2.0**-65, 0.6931471803]
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_gumbel_given_argmax():
    """Over classes drawn with their probabilities it is logits with independent noise."""
    logits = jnp.array([0.5, -1.0, 2.0, -INF, 1e-3])
    rows = jnp.broadcast_to(logits, (2**16, 5))
    labels = sj.sample(KEY, rows)
    noisy = sj.gumbel_given_argmax(jax.random.key(1), rows, labels)
    assert_same(jnp.argmax(noisy, -1).astype(jnp.int32), labels)
    noisy = np.asarray(noisy)
    assert (noisy[:, 3] == -INF).all()
    noise = np.delete(noisy, 3, 1) - np.delete(np.asarray(rows), 3, 1)
    for column in noise.T:
        assert stats.kstest(column, "gumbel_r").pvalue > 1e-3
    uniform = np.exp(-np.exp(-noise))
    correlation = np.corrcoef(uniform.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / 2**8


def test_gumbel_given_argmax_at_the_edges():
    logits = jnp.array([[0.0, 100.0], [0.0, -INF], [0.0, 1.0], [-INF, -INF], [1e30, -1e30]])
    noisy = sj.gumbel_given_argmax(KEY, logits, jnp.array([0, 1, 2, 0, 1]))
    assert noisy[0, 0] > noisy[0, 1]  # Although it hardly ever is.
    assert jnp.isnan(noisy[1, 0])
    assert noisy[1, 1] == -INF
    assert jnp.isnan(noisy[2]).all()
    assert (noisy[3] == -INF).all()
    assert noisy[4, 1] > noisy[4, 0]
    half = sj.gumbel_given_argmax(KEY, logits[:1].astype("bfloat16"), jnp.array([1]))
    assert half.dtype == jnp.float32
    columns = sj.gumbel_given_argmax(KEY, logits[:1].T, jnp.array([1]), axis=0)
    assert columns.shape == (2, 1)
    assert columns[1, 0] > columns[0, 0]


def test_gumbels_of_infinite_and_unknown_logits():
    key = jax.random.key(0)
    given = lambda logits, label: sj.gumbel_given_argmax(
        key, jnp.array(logits), jnp.array(label)
    )
    noisy = given([0.0, INF, 1.0, -INF], 1)
    assert noisy[1] == INF
    assert jnp.isfinite(noisy[jnp.array([0, 2])]).all()
    assert noisy[3] == -INF
    assert jnp.isnan(given([INF, 0.0, 1.0], 1)[1:]).all()
    assert jnp.isnan(given([NAN, 0.0, 1.0], 1)).all()
    assert jnp.isfinite(given([2.0, 0.0, 1.0], 1)).all()
