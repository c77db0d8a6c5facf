"""sparsemax, entmax and soft_top_k: special cases, derivatives in alpha and in k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps

KINDS = ("capped", "sigmoid", "laplace")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, -1, (0, 2), None])
def test_against_the_definitions(axis, dtype):
    logits, keep = draw(0, (2, 3, 4), scale=1.5, dtype=dtype)
    for temperature in (0.25, 1.0, 8.0):
        options = {"axis": axis, "where": keep, "temperature": temperature}
        for name in ("sparsemax", "entmax15"):
            actual = getattr(sj, name)(jnp.asarray(logits), **options)
            expected = getattr(oracles, name)(logits, **options)
            assert_close(actual, expected, rtol=0, atol=8 * eps(dtype))
            np.testing.assert_array_equal(actual > 0, expected > 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "num_peaks", "margin"),
    [
        ("entmax15", 25, 8.0),
        ("entmax15", 100, 4.0),
        ("sparsemax", 5, 4.0),
        ("sparsemax", 10, 2.0),
    ],
)
def test_ties_exactly_at_a_threshold_that_rounds(name, num_peaks, margin, dtype):
    """At T = 20 the threshold is -0.1, say, which no number is, and so are the ties."""
    for num_ties in (1, 7, 106):
        logits = np.repeat([8, 8 - margin, -8], [num_peaks, num_ties, 60]).astype(dtype)
        probs = getattr(sj, name)(jnp.asarray(logits), temperature=20.0)
        assert_close(probs[:num_peaks], [1 / num_peaks] * num_peaks, rtol=2 * eps(dtype))
        assert np.all(probs[num_peaks:] == 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [1e-6, 1e-3, 0.1])
def test_a_crowd_at_the_edge_of_the_support_of_entmax15(width, dtype):
    """There the sum bends most, and Newton's method is slowest."""
    crowd = draw(1, (3, 999), dropped=0.0)[0]
    edges = np.array([[-2.0], [-1.99], [-1.5]])
    logits = np.minimum(np.pad(edges + width * crowd, [(0, 0), (1, 0)]), 0).astype(dtype)
    expected = oracles.fast_entmax(logits, 1.5)
    actual = np.asarray(sj.entmax15(jnp.asarray(logits)))
    assert_close(actual, expected, rtol=0, atol=4 * eps(dtype))
    np.testing.assert_array_equal(actual > 0, expected > 0)


def sensitivity(probs, alpha):
    """1 + the largest change of a weight for a change of the scores by one part of them.

    dp/ds = w (1 - q) grows without bound near the edge of the support when alpha > 2.
    """
    probs = probs.astype(float)
    w = np.where(probs > 0, np.where(probs > 0, probs, 1) ** (2 - alpha), 0)
    steepest = np.max(w * (1 - w / w.sum(-1, keepdims=True)))
    return 1 + steepest / max(alpha - 1, 1)


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-9, 1.001, 1.1, 1.5, 1.75, 2.0, 2.5, 4.0])
def test_entmax(alpha):
    logits, keep = draw(1, (3, 6), scale=2.0)
    for temperature in (0.25, 1.0, 8.0):
        options = {"where": keep, "temperature": temperature}
        actual = sj.entmax(jnp.asarray(logits), alpha, **options)
        expected = oracles.entmax(logits, alpha, **options)
        atol = 16 * eps("float64") * sensitivity(expected, alpha)
        assert_close(actual, expected, rtol=0, atol=atol)
        np.testing.assert_array_equal(actual > 0, expected > 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_entmax_in_other_dtypes(dtype):
    logits, keep = draw(2, (3, 6), scale=2.0, dtype=dtype)
    for alpha in (1.0, 1.0 + 2**-7, 1.25, 1.5, 2.0, 3.0):
        actual = sj.entmax(jnp.asarray(logits), alpha, where=keep)
        expected = oracles.entmax(logits, alpha, where=keep)
        atol = 16 * eps(dtype) * sensitivity(expected, alpha)
        assert_close(actual, expected, rtol=0, atol=atol)


def test_entmax_has_its_special_cases():
    logits, keep = draw(3, (3, 6), scale=2.0)
    call = lambda alpha: sj.entmax(jnp.asarray(logits), alpha, where=keep, temperature=0.5)
    rest = {"where": keep, "temperature": 0.5}
    close = {"rtol": 0, "atol": 8 * eps("float64")}
    assert_close(call(1.0), sj.softmax(logits, **rest), **close)
    assert_close(call(1.5), sj.entmax15(logits, **rest), **close)
    assert_close(call(2.0), sj.sparsemax(logits, **rest), **close)
    assert_same(sj.entmax(jnp.asarray(logits)), sj.entmax(jnp.asarray(logits), 1.5))


def test_alpha_per_slice():
    logits, keep = draw(4, (4, 6), scale=2.0)
    alpha = np.array([[1.0], [1.3], [1.5], [2.0]])
    expected = oracles.entmax(logits, alpha, where=keep)
    actual = sj.entmax(jnp.asarray(logits), alpha, where=keep)
    assert_close(actual, expected, rtol=0, atol=8 * eps("float64"))


def test_known_values():
    assert_close(sj.sparsemax(jnp.array([1.0, 0.0])), [1.0, 0.0], rtol=0)
    assert_close(sj.sparsemax(jnp.array([0.5, 0.0])), [0.75, 0.25], rtol=1e-15)
    assert_close(sj.sparsemax(jnp.array([0.1, 1.1, 0.2, 0.3])), [0, 0.9, 0, 0.1], rtol=1e-14)
    assert_close(sj.entmax15(jnp.array([2.0, 0.0])), [1.0, 0.0], rtol=0)
    # (1 + d/2) in quadrature: p = ((sqrt(2 - x^2) +- x) / 2)^2 at x = half the difference.
    x = 0.6 / 2
    pair = [((np.sqrt(2 - x**2) + s * x) / 2) ** 2 for s in (1, -1)]
    assert_close(sj.entmax15(jnp.array([0.6, 0.0])), pair, rtol=1e-14)


def test_two_classes_of_sparsemax_are_a_clipped_line():
    for x in np.linspace(-2, 2, 33):
        p = np.clip((x + 1) / 2, 0, 1)
        assert_close(sj.sparsemax(jnp.array([x, 0.0])), [p, 1 - p], rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-12, 1.0 + 1e-6, 1.01, 1.2, 1.5, 1.9, 2.0, 3.0])
def test_the_derivative_in_alpha(alpha):
    """(p - q)/(a-1)^2 - (S - q sum S)/(a-1), of which 1/(a-1)^2 must not eat the digits."""
    logits, _ = draw(5, (6,), scale=1.0)
    step = 2.0**-12
    if alpha < 1 + step:  # One-sided at the end, with the error of second order.
        value = lambda s: oracles.entmax(logits, alpha + s * step)
        expected = (-3 * value(0) + 4 * value(1) - value(2)) / (2 * step)
        accuracy = 1e-5
    else:
        value = lambda s: oracles.entmax(logits, alpha + s * step)
        expected = (value(1) - value(-1)) / (2 * step)
        accuracy = 1e-5
    fn = lambda a: sj.entmax(jnp.asarray(logits), a)
    for mode in (jax.jacfwd, jax.jacrev):
        assert_close(mode(fn)(alpha), expected, rtol=0, atol=accuracy)


def test_the_derivative_in_alpha_at_one_is_the_limit():
    logits = jnp.asarray(draw(6, (6,), scale=1.5)[0])
    p = sj.softmax(logits)
    expected = (-p * jnp.log(p) ** 2 + p * jnp.sum(p * jnp.log(p) ** 2)) / 2
    derivative = jax.jacfwd(lambda a: sj.entmax(logits, a))
    assert_close(derivative(1.0), expected, rtol=0, atol=1e-14)
    for step in (1e-4, 1e-7, 1e-10, 1e-13):
        assert_close(derivative(1.0 + step), expected, rtol=0, atol=step + 1e-9)


@pytest.mark.slow
def test_second_derivatives_in_alpha():
    logits = jnp.asarray(draw(7, (5,), scale=1.0)[0])
    fn = lambda a: sj.entmax(logits, a) @ jnp.arange(5.0)
    step = 2.0**-14
    for alpha in (1.0 + 2**-10, 1.25, 1.6):
        first = [jax.grad(fn)(alpha + s * step) for s in (1, -1)]
        expected = (first[0] - first[1]) / (2 * step)
        for second in (jax.jacfwd(jax.jacrev(fn)), jax.jacrev(jax.jacrev(fn))):
            assert_close(second(alpha), expected, rtol=1e-4, atol=1e-4)


def test_alpha_below_one_is_not_answered():
    logits = jnp.array([0.0, 1.0])
    assert jnp.isnan(jax.jit(sj.entmax)(logits, jnp.asarray(0.5))).all()
    assert jnp.isnan(sj.entmax(logits, jnp.asarray(NAN))).all()


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_top_k(kind, dtype):
    logits, keep = draw(8, (3, 8), scale=2.0, dtype=dtype)
    for k, temperature in [(1, 1.0), (2.5, 0.25), (0.125, 1.0), (3, 8.0), (2, 0.0625)]:
        options = {"kind": kind, "where": keep, "temperature": temperature}
        actual = sj.soft_top_k(jnp.asarray(logits), k, **options)
        expected = oracles.soft_top_k(logits, k, **options)
        assert_close(actual, expected, rtol=0, atol=8 * eps(dtype))


@pytest.mark.slow
@every_kind
def test_soft_top_k_has_axes_and_a_k_per_slice(kind):
    logits, keep = draw(9, (2, 3, 4))
    keep[:, :2] = True
    for axis, shape in [(0, (1, 3, 4)), (1, (2, 1, 4)), ((0, 2), (1, 3, 1)), (None, ())]:
        k = np.random.default_rng(10).uniform(0.2, 0.9, shape)
        actual = sj.soft_top_k(jnp.asarray(logits), k, kind=kind, axis=axis, where=keep)
        expected = oracles.soft_top_k(logits, k, kind=kind, axis=axis, where=keep)
        assert_close(actual, expected, rtol=0, atol=8 * eps("float64"))


@every_kind
def test_the_ends_of_k(kind):
    logits = jnp.array([[0.3, -1.0, 2.0], [5.0, -INF, -5.0]])
    with jax.debug_nans(True):
        assert_close(sj.soft_top_k(logits, 0, kind=kind), np.zeros((2, 3)), rtol=0)
        k = jnp.array([[3.0], [2.0]])
        expected = [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
        assert_close(sj.soft_top_k(logits, k, kind=kind), expected, rtol=0)
        for ends in (jnp.zeros((2, 1)), k):
            for argument in (0, 1):
                fn = lambda z, k: sj.soft_top_k(z, k, kind=kind)
                for mode in (jax.jacfwd, jax.jacrev):
                    assert jnp.isfinite(mode(fn, argnums=argument)(logits, ends)).all()


@every_kind
def test_a_k_that_cannot_be_is_nan_or_an_error(kind):
    logits = jnp.array([[0.3, -1.0, 2.0], [5.0, -INF, -5.0]])
    out = sj.soft_top_k(logits, jnp.asarray(2.5), kind=kind)
    assert_close(out.sum(-1), [2.5, NAN], rtol=1e-15)
    for k in (-0.5, 3.5, NAN):
        assert jnp.isnan(sj.soft_top_k(logits, jnp.asarray(k), kind=kind))[0].all()
    for k in (-1, 4, -0.5, 3.5):
        with pytest.raises(ValueError, match="`k`"):
            sj.soft_top_k(logits, k, kind=kind)


@pytest.mark.slow
@every_kind
def test_the_derivative_in_k(kind):
    """dp/dk = q = w / W, which sums to one."""
    logits = jnp.asarray(draw(11, (7,), scale=0.5)[0])
    fn = lambda k: sj.soft_top_k(logits, k, kind=kind)
    for k in (1.3, 3.7, 5.9):
        p = fn(k)
        w = {
            "capped": ((p > 0) & (p < 1)).astype(float),
            "sigmoid": p * (1 - p),
            "laplace": jnp.minimum(p, 1 - p),
        }[kind]
        for mode in (jax.jacfwd, jax.jacrev):
            assert_close(mode(fn)(k), w / w.sum(), rtol=1e-13, atol=1e-15)


@pytest.mark.slow
def test_integer_k_has_the_same_value():
    logits = jnp.asarray(draw(12, (4, 6))[0])
    for kind in KINDS:
        assert_same(sj.soft_top_k(logits, 2, kind=kind), sj.soft_top_k(logits, 2.0, kind=kind))
        counts = jnp.array([[1], [2], [3], [4]])
        whole = sj.soft_top_k(logits, counts, kind=kind)
        assert_same(whole, sj.soft_top_k(logits, counts.astype(float), kind=kind))


def test_capped_with_separated_logits_is_the_hard_choice():
    logits = jnp.array([5.0, -3.0, 2.0, 8.0])
    assert_close(sj.soft_top_k(logits, 2), [1.0, 0.0, 0.0, 1.0], rtol=0)
    grad = jax.grad(lambda z: sj.soft_top_k(z, 2) @ jnp.arange(4.0))(logits)
    assert_close(grad, np.zeros(4), rtol=0)


@pytest.mark.optimized
def test_the_memory_of_a_gradient_is_that_of_the_value():
    """The iterations that find the threshold leave nothing behind."""
    logits = jnp.asarray(draw(13, (64, 512), dtype="float32")[0])
    for fn in (sj.sparsemax, sj.entmax15, sj.entmax, lambda z: sj.soft_top_k(z, 8.0)):
        pullback = jax.vjp(fn, logits)[1]
        kept = sum(a.nbytes for a in jax.tree.leaves(pullback) if a is not logits)
        assert kept <= 1.1 * logits.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_more_entries_than_float32_counts(name):
    """Above 2^24 equal entries n - 1 rounds to n."""
    size = 2**24 + 2**15
    probs = getattr(sj, name)(jnp.zeros(size, jnp.float32))
    assert_close(np.asarray(probs[:: 2**20]), np.full(17, 1 / size), rtol=1e-5)
