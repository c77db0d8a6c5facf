"""softmax and log_softmax: the numbers of the articles, identities, shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps, spread


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([2.33, -1.46, 0.56], [0.83827314, 0.01894129, 0.14278557]),
        ([13.0, 31.0, 5.0], [1.52299795e-08, 9.99999985e-01, 5.10908895e-12]),
        ([0.7, 1.5, 4.8], [0.01573172, 0.03501159, 0.94925668]),
    ],
)
def test_the_numbers_of_the_articles(logits, expected):
    """They print eight decimals, or nine significant digits."""
    probs = sj.softmax(jnp.array(logits))
    digits = 5e-9 if min(expected) > 1e-4 else 0.0
    assert_close(probs, expected, rtol=0 if digits else 5e-9, atol=digits)
    assert_close(jnp.exp(sj.log_softmax(jnp.array(logits))), probs, rtol=1e-14)


def test_a_tiny_probability_of_the_articles():
    """exp(-100) is a normal number in float64, so nothing excuses a zero."""
    probs = sj.softmax(jnp.array([0.0, 100.0, 0.0]))
    assert_close(probs, [3.72007598e-44, 1.0, 3.72007598e-44], rtol=5e-9)
    logs = sj.log_softmax(jnp.array([0.0, 100.0, 0.0]))
    assert_close(logs, [-100.0, -2 * 3.720075976020836e-44, -100.0], rtol=1e-15)


def test_two_classes_are_the_sigmoid():
    for x in np.linspace(-30, 30, 25):
        probs = sj.softmax(jnp.array([x, 0.0]))
        assert_close(probs, jax.nn.sigmoid(jnp.array([x, -x])), rtol=8 * eps("float64"))
        logs = sj.log_softmax(jnp.array([x, 0.0]))
        assert_close(logs, jax.nn.log_sigmoid(jnp.array([x, -x])), rtol=8 * eps("float64"))


def test_shift_invariant_and_argmax_preserving():
    logits = np.round(draw(0, (5, 6), scale=4.0)[0] * 1024) / 1024
    for name in ("softmax", "log_softmax"):
        fn = getattr(sj, name)
        out = fn(jnp.asarray(logits))
        np.testing.assert_array_equal(jnp.argmax(out, -1), np.argmax(logits, -1))
        for shift in (1.0, -1e3, 2.0**30):  # The shifted logits are exact.
            assert_same(fn(jnp.asarray(logits + shift)), out)


def test_jacobian():
    logits = jnp.asarray(draw(1, (6,), scale=2.0)[0])
    p = sj.softmax(logits)
    expected = jnp.diag(p) - jnp.outer(p, p)
    for mode in (jax.jacfwd, jax.jacrev):
        assert_close(mode(sj.softmax)(logits), expected, rtol=0, atol=4 * eps("float64"))
        expected_log = jnp.eye(6) - jnp.tile(p, (6, 1))
        assert_close(
            mode(sj.log_softmax)(logits), expected_log, rtol=0, atol=4 * eps("float64")
        )


@pytest.mark.parametrize("axis", [0, 1, -1, -2, 2, (0, 1), (0, 2), (-1, 0, 1), None])
def test_axes(axis):
    logits, keep = draw(2, (2, 3, 4), scale=3.0)
    for name in ("softmax", "log_softmax"):
        actual = getattr(sj, name)(jnp.asarray(logits), axis=axis, where=keep)
        expected = getattr(oracles, name)(logits, axis=axis, where=keep)
        assert_close(actual, expected, rtol=8 * eps("float64"))


@pytest.mark.slow
def test_options_broadcast():
    logits, _ = draw(3, (2, 3, 4))
    masks = [np.array(m) for m in (True, [True, False, True, True])]
    masks += [np.array([[True], [False], [True]]), draw(4, (2, 1, 4))[1]]
    shapes = [(), (1,), (3, 1), (2, 1, 1), (2, 3, 1)]
    for mask, shape in itertools.product(masks, shapes):
        option = np.random.default_rng(5).uniform(0.5, 2.0, shape)
        options = {"where": mask, "temperature": option, "sink": option - 1}
        for name in ("softmax", "log_softmax"):
            actual = getattr(sj, name)(jnp.asarray(logits), **options)
            expected = getattr(oracles, name)(logits, **options)
            assert_close(actual, expected, rtol=8 * eps("float64"), atol=8 * eps("float64"))


def test_options_broadcast_over_several_axes():
    logits, keep = draw(6, (2, 3, 4))
    option = np.array([[[0.5], [1.0], [2.0]]])
    options = {"axis": (0, 2), "where": keep, "temperature": option, "sink": option}
    actual = sj.softmax(jnp.asarray(logits), **options)
    assert_close(actual, oracles.softmax(logits, **options), rtol=8 * eps("float64"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sink_is_an_extra_logit(dtype):
    logits, keep = draw(7, (3, 5), scale=4.0, dtype=dtype)
    for sink in (-INF, -3.0, 0.0, 40.0):
        options = {"where": keep, "temperature": 0.5, "sink": sink}
        for name in ("softmax", "log_softmax"):
            actual = getattr(sj, name)(jnp.asarray(logits), **options)
            expected = getattr(oracles, name)(logits, **options)
            tiny = float(jnp.finfo(dtype).tiny)
            assert_close(actual, expected, rtol=4 * eps(dtype), atol=tiny)


def test_a_sink_alone_takes_everything():
    logits = jnp.array([[-INF, -INF], [0.0, -INF]])
    probs = sj.softmax(logits, sink=0.0)
    assert_close(probs, [[0.0, 0.0], [0.5, 0.0]], rtol=0)
    assert_close(sj.softmax(jnp.zeros(2), sink=INF), [0.0, 0.0], rtol=0)
    assert_close(sj.softmax(jnp.array([1.0, 3.0]), sink=3.0, temperature=0.0), [0, 0.5], rtol=0)
    assert_close(sj.softmax(jnp.array([1.0, 3.0]), sink=4.0, temperature=0.0), [0, 0], rtol=0)
    assert_close(
        sj.softmax(jnp.array([1.0, 3.0]), sink=4.0, temperature=INF), [1 / 3] * 2, rtol=1e-15
    )


def test_temperature_divides_before_anything_overflows():
    """|z / T| above 2^31, where a fused multiply-add makes jitted softmax(z / T) NaN."""
    logits = jnp.asarray(np.array([1e9, 1e9 + 64.0, -1e9], "float32"))
    for temperature in (1e-3, 1.0, 64.0, 1e30):
        expected = oracles.softmax(np.asarray(logits), temperature=np.float32(temperature))
        actual = jax.jit(sj.softmax)(logits, temperature=np.float32(temperature))
        assert_close(actual, expected, rtol=4 * eps("float32"), atol=1e-37)


def test_sums_do_not_overflow():
    for dtype in DTYPES:
        probs = sj.softmax(jnp.zeros(70000, dtype))
        assert_close(
            probs,
            np.full(70000, 1 / 70000),
            rtol={"bfloat16": 0.52 * eps(dtype), "float16": 0.01}.get(dtype, 2 * eps(dtype)),
        )


def test_log_softmax_of_a_confident_entry_keeps_its_digits():
    for margin in (20.0, 40.0, 80.0):
        logits = jnp.array([margin, 0.0], "float32")
        actual = sj.log_softmax(logits)
        assert_close(actual, oracles.log_softmax(logits), rtol=2 * eps("float32"))
        grad = jax.jacrev(sj.log_softmax)(logits)
        small = float(np.exp(-margin) / (1 + np.exp(-margin)))
        # 1 - p is the sum of the other probabilities, never a difference.
        assert_close(grad[0], [small, -small], rtol=16 * eps("float32"))


@pytest.mark.optimized
def test_small_residuals():
    """What the forward pass leaves for the backward pass: no more than the output."""
    logits = jnp.asarray(draw(8, (64, 128), dtype="float32")[0])
    for fn in (sj.softmax, sj.log_softmax, sj.sparsemax, sj.entmax15):
        out, pullback = jax.vjp(fn, logits)
        leaves = [a for a in jax.tree.leaves(pullback) if a is not logits]
        assert sum(a.nbytes for a in leaves) <= 1.02 * out.nbytes, fn
    probs = sj.softmax(logits)
    assert spread(probs) > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neighbours_of_the_peak_are_no_peaks(dtype):
    """A weight that is one rounding below 1 counts as itself in the sum."""
    gaps = jnp.asarray([0.25, 0.5, 1.0, 2.0, 4.0, 64.0]) * float(eps(dtype))
    logits = jnp.stack([gaps, jnp.zeros_like(gaps)], -1).astype(dtype)
    assert_close(sj.softmax(logits), np.full((6, 2), 0.5), rtol=64 * eps(dtype))
    assert_close(sj.log_softmax(logits), np.full((6, 2), -np.log(2)), rtol=64 * eps(dtype))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "cross_entropy"])
def test_the_reverse_of_a_scan_can_be_reversed(name):
    """JAX before 0.12 drops custom rules there: the value must differentiate rightly itself."""
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)))
    rows = rows.at[1, 2].set(rows[1, 4])  # A tie, not for the peak.
    rows = rows.at[2].set(0.0)  # A tie for the peak.
    map_ = {
        "softmax": lambda z: sj.softmax(z, temperature=0.7, sink=0.3),
        "log_softmax": sj.log_softmax,
        "logsumexp": sj.logsumexp,
        "cross_entropy": lambda z: sj.cross_entropy(z, jnp.array(1)),
    }[name]
    dots = jnp.cos(jnp.arange(15.0)).reshape(3, 5)
    losses = (
        lambda z: jnp.sum(jnp.sin(jax.lax.map(map_, z))),
        lambda z: sum(jnp.sum(jnp.sin(map_(row))) for row in z),
    )
    for second in (
        lambda f: jax.grad(lambda z: jnp.vdot(jax.grad(f)(z), dots))(rows),
        lambda f: jax.jvp(jax.grad(f), (rows,), (dots,))[1],
    ):
        scanned, plain = map(second, losses)
        np.testing.assert_allclose(scanned, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sparsemax", "entmax15"])
def test_a_nan_outlasts_an_infinite_temperature(name):
    logits = jnp.array([[0.0, NAN, 1.0], [0.0, 2.0, -INF]])
    fn = functools.partial(getattr(sj, name), temperature=jnp.inf)
    keep = jnp.array([True, False, True])
    assert jnp.isnan(fn(logits)[0]).all()
    assert jnp.isfinite(fn(logits, where=keep)[0, ::2]).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sparsemax", "logsumexp"])
def test_exports_for_any_number_of_slices(name):
    fn = jax.jit(functools.partial(getattr(sj, name), axis=-1))
    shape = jax.export.symbolic_shape("slices, 20")
    exported = jax.export.export(fn)(jax.ShapeDtypeStruct(shape, jnp.float64))
    logits = jnp.asarray(draw(0, (3, 20))[0])
    assert_close(exported.call(logits), fn(logits), rtol=1e-14)
